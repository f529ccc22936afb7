"""Scoring: metric caches and trajectories in, sub-scores and scores out.

One batched program over scenes × proposals × time, float64, on CPU or GPU. Rows never influence each other except where
the metric says so (progress is measured against the reference plan).

    caches, trajectories ─► interpolate ─► simulate ─► footprints ─► areas, contacts ─► sub-scores ─► score

`score` judges planners' trajectories; `compare_states` judges simulated states of a scene against each other (the
reference planner picks among its proposals with it).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from navsim_eval.errors import UserError
from navsim_eval.metrics.aggregate import (
    COLUMNS,
    METRICS,
    base_metric,
    final_score,
    forgive_human_faults,
    multiplier,
    table_columns,
    weighted_score,
    with_progress,
)
from navsim_eval.metrics.areas import area_flags, locate
from navsim_eval.metrics.collision import no_at_fault_collisions
from navsim_eval.metrics.comfort import comfort_checks_v1
from navsim_eval.metrics.direction import driving_direction_compliance
from navsim_eval.metrics.drivable_area import drivable_area_compliance
from navsim_eval.metrics.extended_comfort import extended_comfort, motion, preceding_scenes
from navsim_eval.metrics.footprint import Footprints, find_contacts
from navsim_eval.metrics.history_comfort import history_comfort
from navsim_eval.metrics.lane_keeping import lane_keeping
from navsim_eval.metrics.progress import raw_progress
from navsim_eval.metrics.scene_batch import PreparedScene, SceneBatch, prepare
from navsim_eval.metrics.time_to_collision import LEADS, time_to_collision_within_bound
from navsim_eval.metrics.traffic_light import traffic_light_compliance
from navsim_eval.pdm.dynamics import simulate
from navsim_eval.pdm.types import SIMULATION_DT, MetricCache
from navsim_eval.score_table import ScoreTable
from navsim_eval.traffic import NON_REACTIVE, REACTIVE, check_traffic
from navsim_eval.traffic.worlds import judge_in_own_worlds

LAST_TTC_INDEX = {"pdms_v1": 40, "epdms_v2": 31}
_ROWS_AT_ONCE = 1024  # on a CPU: more would not fit its caches
_BYTES_PER_ROW = 64_000  # of GPU memory, roughly and on the safe side; half of the memory may be filled


_Scored = tuple[dict[str, Tensor], dict[str, Tensor]]  # columns (S, N) and details (S, N, ...) on their device


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
        """Raw progress [m] times the multiplicative sub-scores: what the best of a comparison is taken from."""
        return self.details["raw_progress"] * multiplier(self.columns, self.metric)

    def scored(self, best: Tensor) -> SubScores:
        """With `ego_progress` and `score`, progress compared with `best` [m]."""
        columns = with_progress(self.columns, self.details["raw_progress"], best, self.metric)
        return SubScores(self.metric, {**columns, "score": weighted_score(columns, self.metric)}, self.details)

    def updated(self, values: dict[str, Tensor]) -> SubScores:
        """With other values for some columns and details."""
        columns, details = (
            {name: values.get(name, old) for name, old in part.items()} for part in (self.columns, self.details)
        )
        return SubScores(self.metric, columns, details)

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
    located = locate(ego, scenes.areas.polygons)
    flags = area_flags(located, scenes.areas)
    contacts = find_contacts(ego, scenes.boxes, LEADS, SIMULATION_DT)
    collisions, first_collision = no_at_fault_collisions(contacts, ego, scenes.boxes, flags, scenes.areas)
    time_to_collision, first_violation = time_to_collision_within_bound(
        contacts, ego, scenes.boxes, flags, scenes.areas, LAST_TTC_INDEX[scenes.metric]
    )
    is_v2 = scenes.metric == "epdms_v2"
    columns = {
        "no_at_fault_collisions": collisions,
        "drivable_area_compliance": drivable_area_compliance(flags),
        "driving_direction_compliance": driving_direction_compliance(ego, flags, spare_intersections=is_v2),
        "time_to_collision_within_bound": time_to_collision,
    }
    details = {
        "raw_progress": raw_progress(ego, scenes.centerline),
        "first_collision_index": first_collision,
        "first_ttc_index": first_violation,
    }
    if is_v2:
        columns["traffic_light_compliance"] = traffic_light_compliance(ego, located, scenes.red_lights)
        columns["lane_keeping"] = lane_keeping(ego, flags, scenes.centerline)
        columns["history_comfort"] = history_comfort(states, scenes.histories)
    else:
        details["comfort_checks"] = comfort_checks_v1(states)
        columns["comfort"] = details["comfort_checks"].all(dim=-1).to(torch.float64)
    return SubScores(scenes.metric, columns, details)


def score(
    metric_caches: Sequence[MetricCache | PreparedScene] | SceneBatch,
    trajectories: np.ndarray | Tensor,
    metric: str = "pdms_v1",
    device: str = "cpu",
    traffic: str = NON_REACTIVE,
    pair_scenes: bool = True,
) -> ScoreTable:
    """Score N trajectories in each of S scenes.

    metric_caches: S caches built for `metric`, or prepared scenes, or a batch of them that is on its device already
    metric:        "pdms_v1", "epdms_v2", or a revision (see `metrics.aggregate.base_metric`)
    trajectories:  (S, N, T, 3) x [m], y [m], heading [rad] in the ego frame, 0.5 s apart, the first one at 0.5 s;
                   NAVSIM's are T = 8 poses long, a shorter one stays at its last pose
    device:        "cpu" or "cuda"; a batch is scored where it lies
    traffic:       "non_reactive" (replayed) or, under `epdms_v2`, "reactive": vehicles that follow each other and the
                   ego by an IDM, so that every trajectory is judged in a world of its own
    pair_scenes:   False leaves extended comfort to the caller (two stages); the details then hold what that takes:
                   `motion` (R, 2, 41), `start_pose` (R, 3) global rear axle now, `start_time` (R,) s
    Each trajectory is compared with the scene's reference plan only. Under `epdms_v2`, trajectory k of all scenes is
    one planner: extended comfort pairs it with itself in the preceding scene of its log, where that is among the S.
    Synthetic scenes are not paired, and no human was there whose faults could be forgiven.
    A trajectory with NaN or infinite numbers is marked invalid. Raises UserError for wrong shapes or caches.

    As a reward, prepare every scene once and keep it; N samples of each of S scenes then get the rewards (S, N)
        score(prepared, samples, metric).columns["score"].reshape(S, N)
    On a GPU, keep the batch of them as well (1.2 MB a scene): putting it there takes longer than scoring.
        batch = SceneBatch.of(prepared, "cuda")
    """
    trajectories = _checked_trajectories(metric_caches, trajectories, metric)
    check_traffic(traffic, base_metric(metric))
    with _one_thread():
        if isinstance(metric_caches, SceneBatch):
            scenes = metric_caches.scenes
            columns, details = _score_batch(metric_caches, trajectories, traffic)
        else:
            scenes = [cache if isinstance(cache, PreparedScene) else prepare(cache) for cache in metric_caches]
            columns, details = _score_scenes(scenes, trajectories, device, traffic)
        caches, count = [scene.cache for scene in scenes], trajectories.shape[1]
        if base_metric(metric) == "epdms_v2":
            pairs = _pairs(caches) if pair_scenes else []
            columns = _with_extended_comfort(columns, details["motion"], pairs, metric)
            if pair_scenes:
                del details["motion"]
            else:
                details |= _starts(caches, count)
    columns, details = ({name: values.cpu() for name, values in part.items()} for part in (columns, details))
    return ScoreTable(
        metric=metric,
        tokens=np.repeat(np.array([cache.token for cache in caches], str), count),
        log_names=np.repeat(np.array([cache.log_name for cache in caches], str), count),
        proposals=np.tile(np.arange(count), len(caches)),
        valid=torch.isfinite(columns["score"]).flatten().numpy(),
        columns={name: columns[name].flatten().numpy() for name in table_columns(metric)},
        details={name: values.flatten(0, 1).numpy() for name, values in details.items()},
    )


def _checked_trajectories(caches: Sequence | SceneBatch, trajectories: np.ndarray | Tensor, metric: str) -> Tensor:
    if metric not in METRICS:
        raise UserError(f"metric '{metric}' is unknown; choose one of {', '.join(METRICS)}")
    if isinstance(caches, SceneBatch):
        caches = caches.scenes
        if len({scene.cache.synthetic for scene in caches}) > 1:
            raise UserError("scenes: recorded and synthetic ones need a batch each")
    trajectories = torch.as_tensor(trajectories)
    shape = tuple(trajectories.shape)
    if len(shape) != 4 or shape[3] != 3 or shape[0] != len(caches) or 0 in shape:
        raise UserError(f"trajectories: shape {shape}, expected ({len(caches)} scenes, proposals ≥ 1, poses ≥ 1, 3)")
    base = base_metric(metric)
    for item in caches:
        cache = item.cache if isinstance(item, PreparedScene) else item
        if cache.metric != base:
            raise UserError(f"scene {cache.token}: its metric cache was built for {cache.metric}, not for {metric}")
        if base == "epdms_v2" and (cache.history_states is None or (cache.human_poses is None) != cache.synthetic):
            raise UserError(f"scene {cache.token}: {metric} needs the human's future poses and past states")
    return trajectories.to(torch.float64)


def _score_scenes(scenes: Sequence[PreparedScene], trajectories: Tensor, device: str, traffic: str) -> _Scored:
    """As `_score_plans`, batch by batch: recorded scenes (which need the human) apart from synthetic ones."""
    at_once = max(1, _rows_at_once(torch.device(device), traffic) // (trajectories.shape[1] + 2))
    synthetic = np.array([scene.cache.synthetic for scene in scenes])
    kinds = [rows for rows in (np.flatnonzero(~synthetic), np.flatnonzero(synthetic)) if len(rows)]
    chunks = [chunk for rows in kinds for chunk in np.array_split(rows, -(-len(rows) // at_once))]
    batches = (SceneBatch.of([scenes[row] for row in chunk], device) for chunk in chunks)
    parts = [
        _score_batch(batch, trajectories[chunk], traffic) for batch, chunk in zip(batches, chunks, strict=True)
    ]
    return _joined(parts, dim=0, order=np.argsort(np.concatenate(chunks)))


def _score_batch(batch: SceneBatch, trajectories: Tensor, traffic: str) -> _Scored:
    """As `_score_plans`, for any number of trajectories."""
    at_once = max(1, _rows_at_once(batch.origin.device, traffic) // len(batch.scenes) - 2)
    parts = trajectories.tensor_split(-(-trajectories.shape[1] // at_once), dim=1)
    return _joined([_score_plans(batch, part, traffic) for part in parts], dim=1)


def _rows_at_once(device: torch.device, traffic: str) -> int:
    """How many simulated rows go through the program together; worlds of reactive traffic are made on the CPU."""
    if device.type == "cpu" or traffic == REACTIVE:
        return _ROWS_AT_ONCE
    return torch.cuda.get_device_properties(device).total_memory // (2 * _BYTES_PER_ROW)


def _score_plans(batch: SceneBatch, trajectories: Tensor, traffic: str) -> _Scored:
    """Columns (S, N) and details (S, N, ...) of trajectories (S, N, T, 3), without extended comfort."""
    count = trajectories.shape[1]
    trajectories = trajectories.to(batch.origin.device)
    finite = torch.isfinite(trajectories).flatten(2).all(dim=-1)
    trajectories = torch.where(finite[..., None, None], trajectories, 0.0)

    # Rows of a scene: the reference plan, the trajectories, and for EPDMS the human.
    poses = [batch.reference_poses[:, None], batch.sample(trajectories)]
    if batch.human_poses is not None:
        poses.append(batch.sample(batch.human_poses[:, None]))
    states = simulate(batch.initial_state[:, None], torch.cat(poses, dim=1))
    sane = torch.isfinite(states.sum(dim=(2, 3)))
    if not bool(sane.all()):
        states = torch.where(sane[..., None, None], states, 0.0)
    measured = measure(batch, states)

    rows = slice(1, 1 + count)
    reference, plans = measured.select((slice(None), slice(0, 1))), measured.select((slice(None), slice(1, None)))
    if traffic == REACTIVE:
        own, reference_there = judge_in_own_worlds(batch.scenes, batch, states, LAST_TTC_INDEX[batch.metric])
        reference, plans = reference.updated(reference_there), plans.updated(own)
        reference = reference.select((slice(None), slice(0, count)))
    human, plans = plans.select((slice(None), slice(count, None))), plans.select((slice(None), slice(0, count)))
    scored = plans.scored(torch.maximum(reference.masked_progress, plans.masked_progress))
    columns = {name: scored.columns[name] for name in (*COLUMNS[batch.metric], "score")}
    if batch.metric == "epdms_v2":
        columns = _filtered(columns, human if batch.human_poses is not None else None, batch.metric)
    valid = finite & sane[:, rows]
    columns = {name: torch.where(valid, values, torch.nan) for name, values in columns.items()}

    plan_states = states[:, rows]
    final_state = plan_states[:, :, -1].clone()
    final_state[..., :2] += batch.origin[:, None]
    details = {
        **scored.details,
        "raw_progress_reference": reference.details["raw_progress"].expand(-1, count),
        "final_state": final_state,
    }
    if batch.metric == "epdms_v2":
        details["motion"] = motion(plan_states)
    return columns, details


def _joined(parts: Sequence[_Scored], dim: int, order: np.ndarray | None = None) -> _Scored:
    """Parts behind one another along a dimension, then in another order where that differs."""

    def join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        joined = {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]} if parts[1:] else parts[0]
        as_it_is = order is None or (np.diff(order) == 1).all()
        return joined if as_it_is else {name: values[order] for name, values in joined.items()}

    return join([columns for columns, _ in parts]), join([details for _, details in parts])


def _filtered(columns: dict[str, Tensor], human: SubScores | None, metric: str) -> dict[str, Tensor]:
    """Sub-scores after the human filter, before it as `unfiltered_…`, and `pdm_score`, which never is filtered.

    human: None in a synthetic scene, which nobody drove: nothing is forgiven there
    """
    unfiltered = {f"unfiltered_{name}": columns[name] for name in COLUMNS[metric]}
    filtered = columns if human is None else forgive_human_faults(columns, human.columns)
    return {**filtered, **unfiltered, "pdm_score": columns["score"]}


def _starts(caches: Sequence[MetricCache], count: int) -> dict[str, Tensor]:
    """Where and when scenes start, once for each of their trajectories."""
    poses = torch.from_numpy(np.stack([cache.initial_state[:3] for cache in caches]))
    times = torch.tensor([cache.start_time_us * 1e-6 for cache in caches], dtype=torch.float64)
    return {
        "start_pose": poses[:, None].expand(-1, count, -1),
        "start_time": times[:, None].expand(-1, count),
    }


def _pairs(caches: Sequence[MetricCache]) -> list[tuple[int, int, float]]:
    recorded = [row for row, cache in enumerate(caches) if not cache.synthetic]
    names, times = [caches[row].log_name for row in recorded], [caches[row].start_time_us for row in recorded]
    return [(recorded[later], recorded[earlier], gap) for later, earlier, gap in preceding_scenes(names, times)]


def _with_extended_comfort(
    columns: dict[str, Tensor], motions: Tensor, pairs: Sequence[tuple[int, int, float]], metric: str
) -> dict[str, Tensor]:
    """Columns of EPDMS with extended comfort (NaN without a preceding scene) and the final score.

    pairs: (scene, preceding scene, gap in s)
    """
    comfort = torch.full_like(columns["pdm_score"], torch.nan)
    by_steps: dict[int, list[tuple[int, int]]] = {}
    for scene, earlier, gap in pairs:
        by_steps.setdefault(round(gap / SIMULATION_DT), []).append((scene, earlier))
    for steps, neighbours in by_steps.items():
        scene, earlier = torch.tensor(neighbours, device=comfort.device).T
        known = torch.isfinite(columns["pdm_score"][scene] + columns["pdm_score"][earlier])
        scores = extended_comfort(motions[scene], motions[earlier], steps * SIMULATION_DT)
        comfort[scene] = torch.where(known, scores, torch.nan)
    columns = {**columns, "two_frame_extended_comfort": comfort}
    return {**columns, "score": final_score(columns, metric)}


def compare_states(
    prepared: Sequence[PreparedScene],
    states: Tensor | np.ndarray,
    ignored_tokens: Sequence[Collection[str]] | None = None,
) -> SubScores:
    """Judge simulated states (S, P, 41, 11) in S scenes, in global coordinates, those of a scene against each other.

    Progress is normalised over the P rows of a scene jointly, as the reference planner does when it chooses among its
    proposals. Objects with a token in a scene's `ignored_tokens` are never collided with. Returns tensors (S, P).
    """
    scenes = SceneBatch.of(prepared, ignored_tokens=ignored_tokens)
    local = torch.as_tensor(states).to(torch.float64).clone()
    local[..., :2] -= scenes.origin[:, None, None]
    with _one_thread():
        measured = measure(scenes, local)
    return measured.scored(measured.masked_progress.amax(dim=1, keepdim=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The arrays of a chunk fit the caches of one core; threads would mostly wait for each other (use processes)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
