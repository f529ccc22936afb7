"""Scoring: metric caches and trajectories in, sub-scores and scores out.

One batched program over scenes × proposals × time, float64, on CPU or GPU. Rows never influence each other except where
the metric says so (progress is measured against the reference plan).

    caches, trajectories ─► interpolate ─► simulate ─► footprints ─► areas, contacts ─► sub-scores ─► score

`score` judges planners' trajectories; `score_batch` judges simulated states of one scene against each other (the
reference planner picks among its proposals with it).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.metrics.aggregate import METRICS, multiplier, weighted_score, with_progress
from navsim_eval.metrics.areas import DrivableAreas, area_flags
from navsim_eval.metrics.collision import STOPPED_SPEED, no_at_fault_collisions
from navsim_eval.metrics.comfort import comfort_checks_v1
from navsim_eval.metrics.direction import driving_direction_compliance
from navsim_eval.metrics.drivable_area import drivable_area_compliance
from navsim_eval.metrics.footprint import Boxes, Footprints, find_contacts
from navsim_eval.metrics.polygons import PolygonBatch, PolygonGrid, build_grid
from navsim_eval.metrics.polyline import Polylines
from navsim_eval.metrics.progress import raw_progress
from navsim_eval.metrics.time_to_collision import LEADS, time_to_collision_within_bound
from navsim_eval.pdm.dynamics import interpolate_poses, interpolate_trajectory, sample_times_us, simulate
from navsim_eval.pdm.types import SIMULATION_DT, AreaKind, MetricCache, StateIndex

LAST_TTC_INDEX = {"pdms_v1": 40, "epdms_v2": 31}
REFERENCE_STEP_US = 100_000
_ROWS_AT_ONCE = {"cpu": 1024, "cuda": 262_144}
# The polygon grid covers where the ego can normally get to; further away scoring is as exact, but slower.
_MIN_REACH, _MAX_REACH, _REACH_TIME, _REACH_MARGIN = 48.0, 112.0, 4.5, 32.0


@dataclass(frozen=True)
class PreparedScene:
    """A metric cache packed for scoring (numpy). Coordinates are relative to `origin`, the ego position now.

    centerline: (M, 2);  object_poses: (T, N, 3), NaN where absent;  half_sizes: (N, 2) half length and width
    areas:      words (W,) of the grid's polygons by role (see `DrivableAreas`)
    """

    cache: MetricCache
    origin: np.ndarray
    grid: PolygonGrid
    areas: dict[str, np.ndarray]
    centerline: np.ndarray
    object_poses: np.ndarray
    half_sizes: np.ndarray
    is_agent: np.ndarray
    is_stopped: np.ndarray


def prepare(cache: MetricCache) -> PreparedScene:
    """Pack a metric cache for scoring; worth keeping when a scene is scored more than once."""
    state, drivable, seen = cache.initial_state, cache.drivable_map, cache.observation
    origin = np.array(state[:2], np.float64)
    speed = float(np.hypot(state[StateIndex.VX], state[StateIndex.VY]))
    reach = float(np.clip(_REACH_TIME * speed + _REACH_MARGIN, _MIN_REACH, _MAX_REACH))
    grid = build_grid(drivable.polygons, origin, reach)
    kinds = np.asarray(drivable.kinds)
    is_lane = np.isin(kinds, (AreaKind.LANE, AreaKind.LANE_CONNECTOR))
    areas = {
        "lanes": grid.masks(is_lane),
        "route_lanes": grid.masks(is_lane & drivable.on_route),
        "drivable": grid.masks(np.isin(kinds, (AreaKind.ROADBLOCK, AreaKind.INTERSECTION, AreaKind.CARPARK))),
        "intersections": grid.masks(kinds == AreaKind.INTERSECTION),
    }
    return PreparedScene(
        cache=cache,
        origin=origin,
        grid=grid,
        areas=areas,
        centerline=np.asarray(cache.centerline, np.float64)[:, :2] - origin,
        object_poses=np.asarray(seen.poses, np.float64) - np.append(origin, 0.0),
        half_sizes=np.asarray(seen.sizes, np.float64) / 2.0,
        is_agent=np.asarray(seen.is_agent, bool),
        is_stopped=~np.asarray(seen.is_agent, bool) | (np.asarray(seen.speed) <= STOPPED_SPEED),
    )


@dataclass(frozen=True)
class SceneBatch:
    """S prepared scenes as tensors on one device."""

    metric: str
    origin: Tensor  # (S, 2)
    initial_state: Tensor  # (S, 11), relative to the origin
    start_time_us: Tensor  # (S,)
    reference_poses: Tensor  # (S, 41, 3) of the reference plan at the sample times, relative to the origin
    areas: DrivableAreas
    centerline: Polylines
    boxes: Boxes

    @staticmethod
    def of(scenes: Sequence[PreparedScene], device: str = "cpu", ignored_tokens: Sequence[str] = ()) -> SceneBatch:
        """Put scenes behind one another; objects whose track token is ignored can never be hit."""
        origin = torch.from_numpy(np.stack([scene.origin for scene in scenes])).to(device)
        initial = np.stack([scene.cache.initial_state for scene in scenes]).astype(np.float64)
        initial[:, :2] -= np.stack([scene.origin for scene in scenes])
        start = torch.tensor([scene.cache.start_time_us for scene in scenes], device=device)
        polygons = PolygonBatch.of([scene.grid for scene in scenes], device)
        width = len(polygons.base)
        roles = {
            role: torch.from_numpy(
                np.stack([np.pad(scene.areas[role], (0, width - len(scene.areas[role]))) for scene in scenes], axis=1)
            ).to(device)
            for role in ("lanes", "route_lanes", "drivable", "intersections")
        }
        return SceneBatch(
            metric=scenes[0].cache.metric,
            origin=origin,
            initial_state=torch.from_numpy(initial).to(device),
            start_time_us=start,
            reference_poses=_sampled_reference(scenes, start),
            areas=DrivableAreas(polygons, **roles),
            centerline=Polylines.of([scene.centerline for scene in scenes], device),
            boxes=_pack_boxes(scenes, device, set(ignored_tokens)),
        )

    def sample(self, trajectories: Tensor) -> Tensor:
        """Trajectories (S, N, T, 3) in the ego frame as poses (S, N, 41, 3) at 10 Hz, relative to the origins."""
        return interpolate_trajectory(self.initial_state[:, None, :3], self.start_time_us[:, None], trajectories)


def _sampled_reference(scenes: Sequence[PreparedScene], start_time_us: Tensor) -> Tensor:
    """Reference plans at the sample times of trajectories (which may lie 1 us before the plans' own)."""
    poses = np.stack([scene.cache.reference_poses - np.append(scene.origin, 0.0) for scene in scenes])
    times = start_time_us[:, None] + REFERENCE_STEP_US * torch.arange(poses.shape[1], device=start_time_us.device)
    return interpolate_poses(torch.from_numpy(poses).to(times.device), times, sample_times_us(start_time_us))


def _pack_boxes(scenes: Sequence[PreparedScene], device: str, ignored_tokens: set[str]) -> Boxes:
    steps = min(len(scene.object_poses) for scene in scenes)
    count = max(1, *(len(scene.is_agent) for scene in scenes))
    poses = np.full((len(scenes), steps, count, 3), np.nan)
    sizes = np.zeros((len(scenes), count, 2))
    flags = np.zeros((3, len(scenes), count), bool)
    for i, scene in enumerate(scenes):
        n = len(scene.is_agent)
        poses[i, :, :n] = scene.object_poses[:steps]
        sizes[i, :n] = scene.half_sizes
        flags[0, i, :n], flags[1, i, :n] = scene.is_agent, scene.is_stopped
        if ignored_tokens:
            flags[2, i, :n] = [token in ignored_tokens for token in scene.cache.observation.tokens]
    x, y, heading = torch.from_numpy(poses).to(device).unbind(-1)
    half_length, half_width = torch.from_numpy(sizes).to(device).unbind(-1)
    return Boxes(
        x.contiguous(),
        y.contiguous(),
        torch.cos(heading),
        torch.sin(heading),
        half_length.contiguous(),
        half_width.contiguous(),
        *torch.from_numpy(flags).to(device),
    )


@dataclass(frozen=True)
class SubScores:
    """What the metric says about simulated states; every tensor has the shape of the batch, (S, P) or (P,).

    columns: sub-scores by NAVSIM's names, `score` among them once progress has been normalised
    details: `raw_progress` [m], `first_collision_index` and `first_ttc_index` (0.1 s steps, inf: none), comfort checks
    """

    metric: str
    columns: dict[str, Tensor]
    details: dict[str, Tensor] = field(default_factory=dict)

    @property
    def masked_progress(self) -> Tensor:
        """Raw progress [m], 0 where a multiplicative sub-score is 0: what progress is compared by."""
        return self.details["raw_progress"] * multiplier(self.columns, self.metric)

    def scored(self, best: Tensor) -> SubScores:
        """With `ego_progress` and `score`, progress compared with `best` [m]."""
        columns = with_progress(self.columns, self.details["raw_progress"], best, self.metric)
        return SubScores(self.metric, {**columns, "score": weighted_score(columns, self.metric)}, self.details)

    def select(self, index: tuple | int | slice) -> SubScores:
        """The same for a part of the batch."""
        return SubScores(
            self.metric,
            {name: column[index] for name, column in self.columns.items()},
            {name: value[index] for name, value in self.details.items()},
        )


def measure(scenes: SceneBatch, states: Tensor) -> SubScores:
    """Sub-scores of simulated states (S, P, 41, 11), given relative to the origins of the scenes.

    Progress stays in metres: how to compare it is the caller's question (see `SubScores.scored`).
    """
    ego = Footprints.of(states)
    areas = area_flags(ego, scenes.areas)
    contacts = find_contacts(ego, scenes.boxes, LEADS, SIMULATION_DT)
    collisions, first_collision = no_at_fault_collisions(contacts, ego, scenes.boxes, areas)
    time_to_collision, first_violation = time_to_collision_within_bound(
        contacts, ego, scenes.boxes, areas, scenes.areas, LAST_TTC_INDEX[scenes.metric]
    )
    checks = comfort_checks_v1(states)
    columns = {
        "no_at_fault_collisions": collisions,
        "drivable_area_compliance": drivable_area_compliance(areas),
        "driving_direction_compliance": driving_direction_compliance(ego, areas, scenes.metric == "epdms_v2"),
        "time_to_collision_within_bound": time_to_collision,
        "comfort": checks.all(dim=-1).to(torch.float64),
    }
    details = {
        "raw_progress": raw_progress(ego, scenes.centerline),
        "first_collision_index": first_collision,
        "first_ttc_index": first_violation,
        "comfort_checks": checks,
    }
    return SubScores(scenes.metric, columns, details)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of R = S × N trajectories, scene after scene.

    tokens, log_names: (R,) str;  proposals: (R,) int index within the scene
    valid:   (R,) bool, False where the trajectory was not finite: its scores are NaN
    columns: sub-scores by NAVSIM's names, `score` last, (R,) float64
    details: what they come from, not written to CSV: `raw_progress`, `raw_progress_reference` [m],
             `first_collision_index`, `first_ttc_index` (0.1 s steps, inf: none), `comfort_checks` (R, 6),
             `final_state` (R, 11) simulated state after 4 s, global
    """

    metric: str
    tokens: np.ndarray
    log_names: np.ndarray
    proposals: np.ndarray
    valid: np.ndarray
    columns: dict[str, np.ndarray]
    details: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def mean(self) -> dict[str, float]:
        """Mean of every column over the rows where it is defined; NaN where it is nowhere."""
        return {
            name: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
            for name, values in self.columns.items()
        }

    def to_csv(self, path: Path | str) -> Path:
        """One row a trajectory: token, log_name, proposal, valid, sub-scores, score (fractions). Undefined: empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["token", "log_name", "proposal", "valid", *self.columns])
        numbers = np.column_stack(list(self.columns.values()))
        for row in range(len(self)):
            cells = ("" if np.isnan(value) else repr(float(value)) for value in numbers[row])
            head = self.tokens[row], self.log_names[row], int(self.proposals[row]), bool(self.valid[row])
            writer.writerow([*head, *cells])
        return atomic_write(path, text.getvalue())


def score(
    metric_caches: Sequence[MetricCache | PreparedScene],
    trajectories: np.ndarray | Tensor,
    metric: str = "pdms_v1",
    device: str = "cpu",
) -> ScoreTable:
    """Score N trajectories in each of S scenes.

    metric_caches: S caches built for `metric` (or prepared scenes)
    trajectories:  (S, N, T, 3) x [m], y [m], heading [rad] in the ego frame, 0.5 s apart, the first one at 0.5 s;
                   NAVSIM's are T = 8 poses long, a shorter one stays at its last pose
    A trajectory with NaN or infinite numbers is marked invalid. Raises UserError for wrong shapes or caches.
    """
    trajectories = _checked_trajectories(metric_caches, trajectories, metric)
    scenes = [cache if isinstance(cache, PreparedScene) else prepare(cache) for cache in metric_caches]
    at_once = max(1, _ROWS_AT_ONCE[torch.device(device).type] // (trajectories.shape[1] + 1))
    parts = [
        _score_scenes(scenes[first : first + at_once], trajectories[first : first + at_once], device)
        for first in range(0, len(scenes), at_once)
    ]
    count = trajectories.shape[1]
    caches = [scene.cache for scene in scenes]
    joined = [
        {name: torch.cat([part[kind][name] for part in parts]).flatten(0, 1).numpy() for name in parts[0][kind]}
        for kind in (0, 1)
    ]
    return ScoreTable(
        metric=metric,
        tokens=np.repeat(np.array([cache.token for cache in caches], str), count),
        log_names=np.repeat(np.array([cache.log_name for cache in caches], str), count),
        proposals=np.tile(np.arange(count), len(caches)),
        valid=~np.isnan(joined[0]["score"]),
        columns=joined[0],
        details=joined[1],
    )


def _checked_trajectories(caches: Sequence, trajectories: np.ndarray | Tensor, metric: str) -> Tensor:
    if metric not in METRICS:
        raise UserError(f"metric '{metric}' is unknown; choose one of {', '.join(METRICS)}")
    trajectories = torch.as_tensor(trajectories)
    shape = tuple(trajectories.shape)
    if len(shape) != 4 or shape[3] != 3 or shape[0] != len(caches) or 0 in shape:
        raise UserError(f"trajectories: shape {shape}, expected ({len(caches)} scenes, proposals ≥ 1, poses ≥ 1, 3)")
    for cache in caches:
        built_for = cache.cache.metric if isinstance(cache, PreparedScene) else cache.metric
        if built_for != metric:
            raise UserError(f"scene {cache.token}: its metric cache was built for {built_for}, not for {metric}")
    return trajectories.to(torch.float64)


def _score_scenes(
    scenes: Sequence[PreparedScene], trajectories: Tensor, device: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Columns and details (S, N, ...) of trajectories (S, N, T, 3), on the CPU."""
    batch = SceneBatch.of(scenes, device)
    trajectories = trajectories.to(device)
    finite = torch.isfinite(trajectories).flatten(2).all(dim=-1)
    trajectories = torch.where(finite[..., None, None], trajectories, 0.0)

    poses = torch.cat([batch.reference_poses[:, None], batch.sample(trajectories)], dim=1)
    states = simulate(batch.initial_state[:, None], poses)
    sane = torch.isfinite(states).flatten(2).all(dim=-1)
    states = torch.where(sane[..., None, None], states, 0.0)

    measured = measure(batch, states)
    progress = measured.masked_progress
    plans = measured.select((slice(None), slice(1, None)))
    scored = plans.scored(torch.maximum(progress[:, :1], progress[:, 1:]))
    valid = finite & sane[:, 1:]
    columns = {name: torch.where(valid, values, torch.nan).cpu() for name, values in scored.columns.items()}

    final_state = states[:, 1:, -1].clone()
    final_state[..., :2] += batch.origin[:, None]
    reference_progress = measured.details["raw_progress"][:, :1].expand(-1, trajectories.shape[1])
    details = {**scored.details, "raw_progress_reference": reference_progress, "final_state": final_state}
    return columns, {name: values.cpu() for name, values in details.items()}


def score_batch(prepared: PreparedScene, states: Tensor | np.ndarray, ignored_tokens: Sequence[str] = ()) -> SubScores:
    """Judge simulated states (P, 41, 11) of one scene, in global coordinates, against each other.

    Progress is normalised over all P rows jointly, as the reference planner does when it chooses among its proposals.
    Objects with a token in `ignored_tokens` are never collided with. Returns tensors of shape (P,).
    """
    scenes = SceneBatch.of([prepared], ignored_tokens=ignored_tokens)
    local = torch.as_tensor(states).to(torch.float64)[None].clone()
    local[..., :2] -= scenes.origin[:, None, None]
    measured = measure(scenes, local)
    return measured.scored(measured.masked_progress.amax(dim=1, keepdim=True)).select(0)
