"""Scenes packed for the metrics: polygons in a grid, boxes over time, centreline, red lights, as tensors.

`prepare` packs one metric cache (numpy, can be sent to another process), `SceneBatch.of` puts prepared scenes behind
one another on a device. Coordinates are relative to the ego position now of each scene, so that float64 keeps its
precision.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_eval.metrics.areas import DrivableAreas, area_lookups
from navsim_eval.metrics.collision import STOPPED_SPEED
from navsim_eval.metrics.footprint import Boxes
from navsim_eval.metrics.polygons import PolygonBatch, PolygonGrid, build_grid
from navsim_eval.metrics.polyline import Polylines
from navsim_eval.metrics.traffic_light import RedLights
from navsim_eval.pdm.dynamics import interpolate_poses, interpolate_trajectory, sample_times_us
from navsim_eval.pdm.types import AreaKind, MetricCache, StateIndex

REFERENCE_STEP_US = 100_000
_DRIVABLE = (AreaKind.ROADBLOCK, AreaKind.INTERSECTION, AreaKind.CARPARK)
# The polygon grid covers where the ego can normally get to; further away scoring is as exact, but slower.
_MIN_REACH, _MAX_REACH, _REACH_TIME, _REACH_MARGIN = 48.0, 112.0, 4.5, 32.0


@dataclass(frozen=True)
class PreparedScene:
    """A metric cache packed for scoring (numpy). Coordinates are relative to `origin`, the ego position now.

    centerline: (M, 2);  object_poses: (T, N, 3), NaN where absent;  half_sizes: (N, 2) half length and width
    areas:      words (W,) of the grid's polygons by role (see `DrivableAreas`)
    red_lights: (R,) index of each red light's connector in the grid (v2; v1 looks at no red light)
    """

    cache: MetricCache
    origin: np.ndarray
    grid: PolygonGrid
    areas: dict[str, np.ndarray]
    red_lights: np.ndarray
    centerline: np.ndarray
    object_poses: np.ndarray
    half_sizes: np.ndarray
    is_agent: np.ndarray
    is_stopped: np.ndarray


def prepare(cache: MetricCache, extent: float = np.inf) -> PreparedScene:
    """Pack a metric cache for scoring; worth keeping when a scene is scored more than once.

    extent: how far from its position now the ego gets at most [m], where that is known; a smaller grid is ready sooner
    """
    state, drivable, seen = cache.initial_state, cache.drivable_map, cache.observation
    origin = np.array(state[:2], np.float64)
    speed = float(np.hypot(state[StateIndex.VX], state[StateIndex.VY]))
    reach = min(extent, float(np.clip(_REACH_TIME * speed + _REACH_MARGIN, _MIN_REACH, _MAX_REACH)))
    red_polygons = seen.red_light_polygons if cache.metric == "epdms_v2" else seen.red_light_polygons[:0]
    kinds = np.asarray(drivable.kinds)
    is_lane = np.isin(kinds, (AreaKind.LANE, AreaKind.LANE_CONNECTOR))
    roles = {
        "lanes": np.flatnonzero(is_lane),
        "route_lanes": np.flatnonzero(is_lane & drivable.on_route),
        "drivable": np.flatnonzero(np.isin(kinds, _DRIVABLE)),
        "intersections": np.flatnonzero(kinds == AreaKind.INTERSECTION),
    }
    red_lights = len(kinds) + np.arange(len(red_polygons))
    polygons = np.concatenate([drivable.polygons, red_polygons])
    grid = build_grid(polygons, origin, reach, area_lookups(roles, red_lights))
    return PreparedScene(
        cache=cache,
        origin=origin,
        grid=grid,
        areas={role: grid.words(members) for role, members in roles.items()},
        red_lights=red_lights,
        centerline=np.asarray(cache.centerline, np.float64)[:, :2] - origin,
        object_poses=np.asarray(seen.poses, np.float64) - np.append(origin, 0.0),
        half_sizes=np.asarray(seen.sizes, np.float64) / 2.0,
        is_agent=np.asarray(seen.is_agent, bool),
        is_stopped=~np.asarray(seen.is_agent, bool) | (np.asarray(seen.speed) <= STOPPED_SPEED),
    )


@dataclass(frozen=True)
class SceneBatch:
    """S prepared scenes as tensors on one device: about 1.2 MB a scene, and worth keeping like the scenes."""

    scenes: tuple[PreparedScene, ...]
    origin: Tensor  # (S, 2)
    initial_state: Tensor  # (S, 11), relative to the origin
    start_time_us: Tensor  # (S,)
    reference_poses: Tensor  # (S, 41, 3) of the reference plan at the sample times, relative to the origin
    areas: DrivableAreas
    centerline: Polylines
    boxes: Boxes
    red_lights: RedLights
    histories: list[tuple[Tensor, Tensor]]  # see `history_comfort`; none under pdms_v1
    human_poses: Tensor | None  # (S, 8, 3) relative to the ego now; None under pdms_v1

    @staticmethod
    def of(
        scenes: Sequence[PreparedScene],
        device: str = "cpu",
        ignored_tokens: Sequence[Collection[str]] | None = None,
    ) -> SceneBatch:
        """Put scenes behind one another.

        ignored_tokens: for each scene the track tokens of objects that can never be hit; none by default
        """
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
            scenes=tuple(scenes),
            origin=origin,
            initial_state=torch.from_numpy(initial).to(device),
            start_time_us=start,
            reference_poses=_sampled_reference(scenes, start),
            areas=DrivableAreas(polygons, **roles),
            centerline=Polylines.of([scene.centerline for scene in scenes], device),
            boxes=_pack_boxes(scenes, device, ignored_tokens or [()] * len(scenes)),
            red_lights=_pack_red_lights(scenes, width, device),
            histories=_histories(scenes, device),
            human_poses=_human_poses(scenes, device),
        )

    @property
    def metric(self) -> str:
        """The metric that the caches were built for."""
        return self.scenes[0].cache.metric

    def sample(self, trajectories: Tensor) -> Tensor:
        """Trajectories (S, N, T, 3) in the ego frame as poses (S, N, 41, 3) at 10 Hz, relative to the origins."""
        return interpolate_trajectory(self.initial_state[:, None, :3], self.start_time_us[:, None], trajectories)


def _sampled_reference(scenes: Sequence[PreparedScene], start_time_us: Tensor) -> Tensor:
    """Reference plans at the sample times of trajectories (which may lie 1 us before the plans' own)."""
    poses = np.stack([scene.cache.reference_poses - np.append(scene.origin, 0.0) for scene in scenes])
    times = start_time_us[:, None] + REFERENCE_STEP_US * torch.arange(poses.shape[1], device=start_time_us.device)
    return interpolate_poses(torch.from_numpy(poses).to(times.device), times, sample_times_us(start_time_us))


def _pack_boxes(scenes: Sequence[PreparedScene], device: str, ignored_tokens: Sequence[Collection[str]]) -> Boxes:
    steps = min(len(scene.object_poses) for scene in scenes)
    count = max(1, *(len(scene.is_agent) for scene in scenes))
    poses = np.full((len(scenes), steps, count, 3), np.nan)
    sizes = np.zeros((len(scenes), count, 2))
    flags = np.zeros((3, len(scenes), count), bool)
    for i, (scene, ignored) in enumerate(zip(scenes, ignored_tokens, strict=True)):
        n = len(scene.is_agent)
        poses[i, :, :n] = scene.object_poses[:steps]
        sizes[i, :n] = scene.half_sizes
        flags[0, i, :n], flags[1, i, :n] = scene.is_agent, scene.is_stopped
        if ignored:
            flags[2, i, :n] = [token in ignored for token in scene.cache.observation.tokens]
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


def _pack_red_lights(scenes: Sequence[PreparedScene], width: int, device: str) -> RedLights:
    steps = min(len(scene.cache.observation.red_light_active) for scene in scenes)
    count = max(len(scene.red_lights) for scene in scenes)
    active = np.zeros((len(scenes), steps, count), bool)
    words = np.zeros((width, len(scenes), steps), np.int64)
    bounds = np.zeros((len(scenes), count, 4))
    runs = np.zeros((2, len(scenes), count), np.int64)  # first edge and number of edges
    edges, edge_count = [np.zeros((0, 4))], 0
    for i, scene in enumerate(scenes):
        n, grid = len(scene.red_lights), scene.grid
        active[i, :, :n] = scene.cache.observation.red_light_active[:steps, :n]
        for time in range(steps if n else 0):
            words[: len(grid.base), i, time] = grid.words(scene.red_lights[active[i, time, :n]])
        for light, polygon in enumerate(scene.red_lights):
            own = grid.edges[grid.edge_polygon == polygon]
            xs, ys = own[:, [0, 2]], own[:, [1, 3]]
            bounds[i, light] = xs.min(), ys.min(), xs.max(), ys.max()
            runs[:, i, light] = edge_count, len(own)
            edges.append(own)
            edge_count += len(own)
    ax, ay, bx, by = np.concatenate(edges).T
    length, direction = np.hypot(bx - ax, by - ay), np.arctan2(by - ay, bx - ax)
    packed = np.stack([(ax + bx) / 2, (ay + by) / 2, np.cos(direction), np.sin(direction), length / 2])
    tensors = (torch.from_numpy(array).to(device) for array in (active, words, bounds, *runs, packed))
    return RedLights(*tensors)


def _human_poses(scenes: Sequence[PreparedScene], device: str) -> Tensor | None:
    poses = [scene.cache.human_poses for scene in scenes]
    if scenes[0].cache.metric == "pdms_v1" or any(item is None for item in poses):
        return None
    return torch.from_numpy(np.stack(poses).astype(np.float64)).to(device)


def _histories(scenes: Sequence[PreparedScene], device: str) -> list[tuple[Tensor, Tensor]]:
    """Scenes and their past states, those of one length together."""
    by_length: dict[int, list[int]] = {}
    for row, scene in enumerate(scenes):
        if scene.cache.history_states is not None:
            by_length.setdefault(len(scene.cache.history_states), []).append(row)
    stacks = ((rows, np.stack([scenes[row].cache.history_states for row in rows])) for rows in by_length.values())
    return [
        (torch.tensor(rows, device=device), torch.from_numpy(states.astype(np.float64)).to(device))
        for rows, states in stacks
    ]
