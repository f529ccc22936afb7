"""PDM-Closed's fifteen proposals: three parallel paths times five target speeds, driven by an IDM.

Open loop: a proposal moves along its path exactly, keeping its distance to what the forecast puts in the way.
Proposal index = path · 5 + speed. The step rules, oddities included, are those of the published evaluators, whose
reference plan would otherwise differ: leads are looked up every second step only, the first look-up comes at step 2,
and what one target speed learnt about the lead carries over to the next ones (see `_LeadSearch.at`).

Any number of scenes are driven side by side, because a step costs far more in calls than in arithmetic. Arrays named
"rows" have one row per path, the three paths of the first scene first; C = 5 target speeds a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.geometry import Vehicle, box_corners, ego_corners
from navsim_eval.pdm.observation import SNAPSHOT_STEPS, Forecast
from navsim_eval.pdm.path import Path, Paths
from navsim_eval.pdm.types import SIMULATION_DT, SIMULATION_STEPS

LATERAL_OFFSETS = (0.0, -1.0, 1.0)  # m, to the left
SPEED_FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the speed limit
DEFAULT_SPEED_LIMIT = 15.0  # m/s
PLAN_STEPS = 50  # the chosen proposal is driven to 5 s

# Intelligent Driver Model
MIN_GAP = 1.0  # m
HEADWAY = 1.5  # s
MAX_ACCELERATION = 1.5  # m/s²
MAX_DECELERATION = 3.0  # m/s²
EXPONENT = 10

_ROUNDING = 1e-3  # m, far above that of UTM coordinates


class Lead:
    """Columns of a lead vector: its arc length on the path [m], speed along the path [m/s], length behind that [m]."""

    PROGRESS, SPEED, REAR = range(3)


@dataclass(frozen=True)
class Start:
    """What the proposals of one scene start from.

    centerline:  (M, 3);  ego_pose: (3,) rear axle;  ego_speed: vx [m/s]
    speed_limit: of the starting lane [m/s], None where the map has none
    """

    centerline: np.ndarray
    ego_pose: np.ndarray
    ego_speed: float
    speed_limit: float | None
    forecast: Forecast

    @property
    def limit(self) -> float:
        """Speed [m/s] that the fastest proposal aims at."""
        return DEFAULT_SPEED_LIMIT if self.speed_limit is None else self.speed_limit


@dataclass(frozen=True)
class Proposals:
    """Open-loop rollouts from *now* at 10 Hz, index 0 is now; P = 15 proposals, T = 41 states, of S scenes or of one.

    poses: (S, P, T, 3) on the path;  progress: (S, P, T) arc length;  speed: (S, P, T)
    lead:  (S, P, T, 3), columns of `Lead`
    """

    poses: np.ndarray
    progress: np.ndarray
    speed: np.ndarray
    lead: np.ndarray

    def of_scene(self, scene: int) -> Proposals:
        """Those of one scene, without the axis S."""
        return Proposals(self.poses[scene], self.progress[scene], self.speed[scene], self.lead[scene])


class ProposalDriver:
    """Rolls the proposals of S scenes out. `drive()` gives all over 4 s, `extend(...)` one of each scene over 5 s."""

    def __init__(self, starts: Sequence[Start]):
        per_scene = len(LATERAL_OFFSETS)
        centers = [Path(start.centerline) for start in starts]
        paths = [path if offset == 0.0 else path.shifted(offset) for path in centers for offset in LATERAL_OFFSETS]
        positions = np.repeat(np.stack([start.ego_pose[:2] for start in starts]), per_scene, axis=0)
        limits = np.repeat([start.limit for start in starts], per_scene)
        self.paths = Paths(paths)
        self.target_speed = limits[:, None] * np.array(SPEED_FRACTIONS)  # (rows, C)
        self.start = np.array([path.project(point) for path, point in zip(paths, positions, strict=True)])
        self.ego_speed = np.repeat([float(start.ego_speed) for start in starts], per_scene)
        reach = np.abs(limits) * PLAN_STEPS * SIMULATION_DT
        self._leads = _LeadSearch(paths, self.paths, self.start, reach, [start.forecast for start in starts])

    def drive(self) -> Proposals:
        """All proposals over 4 s."""
        shape = self.target_speed.shape
        progress, speed = (np.broadcast_to(value[:, None], shape) for value in (self.start, self.ego_speed))
        steps = range(1, SIMULATION_STEPS + 1)
        rows = np.arange(len(self.start))
        progress, speed, lead = self._roll(progress, speed, np.zeros((*shape, 3)), steps, rows, self.target_speed)
        poses = self.paths.interpolate(progress.reshape(len(rows), -1))
        proposals = len(LATERAL_OFFSETS) * len(SPEED_FRACTIONS), len(steps) + 1
        return Proposals(
            poses.reshape(-1, *proposals, 3),
            progress.reshape(-1, *proposals),
            speed.reshape(-1, *proposals),
            lead.reshape(-1, *proposals, 3),
        )

    def extend(self, proposals: Proposals, index: np.ndarray) -> np.ndarray:
        """(S, 51, 3) poses of one proposal of each scene, `index` (S,), driven on to 5 s."""
        scene = np.arange(len(index))
        path, policy = np.divmod(index, len(SPEED_FRACTIONS))
        rows = scene * len(LATERAL_OFFSETS) + path
        last = (array[scene, index, -1][:, None] for array in (proposals.progress, proposals.speed, proposals.lead))
        steps = range(SIMULATION_STEPS + 1, PLAN_STEPS + 1)
        progress, _, _ = self._roll(*last, steps, rows, self.target_speed[rows, policy][:, None])
        whole = np.concatenate([proposals.progress[scene, index], progress[:, 0, 1:]], axis=1)
        return self.paths.interpolate(whole, rows)

    def _roll(
        self,
        progress: np.ndarray,
        speed: np.ndarray,
        lead: np.ndarray,
        steps: range,
        rows: np.ndarray,
        target: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Progress, speed (rows, C) and lead (rows, C, 3), driven through `steps`; time becomes the axis behind C."""
        history = [(progress, speed, lead)]
        for step in steps:
            before = progress
            lead = lead if step % SNAPSHOT_STEPS else self._leads.at(step, before, rows)
            progress = before + SIMULATION_DT * speed
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # speed limits of (nearly) zero
                acceleration = idm_acceleration(before, speed, lead, target)
            speed = speed + SIMULATION_DT * acceleration
            history.append((progress, speed, lead))
        return tuple(np.stack(values, axis=2) for values in zip(*history, strict=True))


def idm_acceleration(progress: np.ndarray, speed: np.ndarray, lead: np.ndarray, target_speed: np.ndarray) -> np.ndarray:
    """Acceleration (...) [m/s²] of the Intelligent Driver Model (Treiber et al. 2000), limited to comfort bounds.

    progress, speed, target_speed: (...);  lead: (..., 3). Braking is limited too, so a late obstacle can be hit.
    """
    gap = np.maximum(lead[..., Lead.PROGRESS] - progress - lead[..., Lead.REAR], MIN_GAP)
    approach = speed * (speed - lead[..., Lead.SPEED]) / (2.0 * np.sqrt(MAX_ACCELERATION * MAX_DECELERATION))
    wanted_gap = MIN_GAP + speed * HEADWAY + approach
    acceleration = MAX_ACCELERATION * (1.0 - (speed / target_speed) ** EXPONENT - (wanted_gap / gap) ** 2)
    return np.clip(acceleration, -MAX_DECELERATION, MAX_ACCELERATION)


@dataclass(frozen=True)
class _Obstacles:
    """What could lead on the paths of one scene: O objects (boxes, then red lights) in K snapshots of the forecast.

    shapes:   (K, O) polygons, None where no path needs them
    progress: (paths, K, O) arc length of an object that meets the path's corridor, elsewhere -inf
    heading:  (O,);  speed: (O,), NaN for red lights, which have none
    """

    shapes: np.ndarray
    progress: np.ndarray
    heading: np.ndarray
    speed: np.ndarray

    @staticmethod
    def on(paths: Sequence[Path], start: np.ndarray, reach: np.ndarray, forecast: Forecast) -> _Obstacles:
        """Objects in the corridors: the stretch within reach, widened by half the ego's width.

        An object that stands has one shape and one place in all snapshots.
        """
        world = forecast.observation
        poses = world.poses[::SNAPSHOT_STEPS]  # (K, N, 3)
        snapshots, boxes, red_lights = *poses.shape[:2], len(world.red_light_ids)
        corridors = [
            shapely.buffer(path.section(a, a + r), Vehicle.HALF_WIDTH, quad_segs=16, cap_style="square")
            for path, a, r in zip(paths, start, reach, strict=True)
        ]
        first = np.arange(snapshots)[:, None] == 0
        still = np.concatenate([(poses == poses[:1]).all(axis=(0, 2)), np.ones(red_lights, bool)])
        near = np.concatenate([_near(poses, world.sizes, corridors), np.ones((snapshots, red_lights), bool)], axis=1)
        ignored = np.concatenate([forecast.ignored, forecast.ignored_red_lights])
        wanted = near & ~ignored & (first | ~still)

        shapes = np.full(wanted.shape, None, object)
        shapes[:, boxes:] = world.red_light_polygons
        snapshot, item = np.nonzero(wanted[:, :boxes])
        shapes[snapshot, item] = shapely.polygons(box_corners(poses[snapshot, item], *world.sizes[item].T))
        progress = np.full((len(paths), *wanted.shape), -np.inf)
        for k, (path, corridor) in enumerate(zip(paths, corridors, strict=True)):
            shapely.prepare(corridor)
            met = wanted.copy()
            met[wanted] = shapely.intersects(corridor, shapes[wanted])
            progress[k, met] = path.project(shapely.get_coordinates(shapely.centroid(shapes[met])))
        shapes[:, still], progress[:, :, still] = shapes[:1, still], progress[:, :1, still]
        heading = np.concatenate([poses[0, :, 2], np.zeros(red_lights)])
        return _Obstacles(shapes, progress, heading, np.concatenate([world.speed, np.full(red_lights, np.nan)]))


def _near(poses: np.ndarray, sizes: np.ndarray, corridors: Sequence[shapely.Geometry]) -> np.ndarray:
    """(K, N) bool: boxes (K, N, 3), (N, 2) whose circle meets the rectangle around the corridors; errs towards True."""
    low_x, low_y, high_x, high_y = shapely.total_bounds(np.array(corridors, object))
    x, y = poses[..., 0], poses[..., 1]
    radius = np.hypot(sizes[:, 0], sizes[:, 1]) / 2.0 + _ROUNDING
    return (x + radius >= low_x) & (x - radius <= high_x) & (y + radius >= low_y) & (y - radius <= high_y)


class _LeadSearch:
    """Which forecast object each proposal follows: candidates of a path are found once, for all snapshots together."""

    def __init__(
        self,
        paths: Sequence[Path],
        together: Paths,
        start: np.ndarray,
        reach: np.ndarray,
        forecasts: Sequence[Forecast],
    ):
        self._paths, per_scene = together, len(LATERAL_OFFSETS)
        found = []
        for first, forecast in zip(range(0, len(paths), per_scene), forecasts, strict=True):
            rows = slice(first, first + per_scene)
            found.append(_Obstacles.on(paths[rows], start[rows], reach[rows], forecast))
        most = max(1, *(len(obstacles.speed) for obstacles in found))
        scenes, snapshots = len(found), len(found[0].shapes)
        self._shapes = np.full((scenes, snapshots, most), None, object)
        self._progress = np.full((scenes, per_scene, snapshots, most), -np.inf)
        self._heading, self._speed = np.zeros((2, scenes, most))
        for scene, obstacles in enumerate(found):
            mine = scene, ..., slice(len(obstacles.speed))
            self._shapes[mine], self._progress[mine] = obstacles.shapes, obstacles.progress
            self._heading[mine], self._speed[mine] = obstacles.heading, obstacles.speed
        self._progress = self._progress.reshape(-1, snapshots, most)

    def at(self, step: int, progress: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Lead vectors (Q, C, 3) at a step for proposals that have come as far as `progress` (Q, C) on paths `rows`.

        The reference keeps one vector per path and lets the target speeds write into it one after the other, so an
        entry that a proposal does not write is the last one written before it: the lead's speed where there is no lead
        or a red light, the rear length where there is a lead.
        """
        snapshot, scene = step // SNAPSHOT_STEPS, rows // len(LATERAL_OFFSETS)
        ahead = self._progress[rows, snapshot][:, None] > progress[..., None]  # (Q, C, O)
        has_lead = ahead.any(axis=-1)
        poses = self._paths.interpolate(progress, rows)
        egos = np.full(has_lead.shape, None, object)
        egos[has_lead] = shapely.polygons(ego_corners(poses[has_lead]))
        row, policy, item = np.nonzero(ahead)
        distance = np.full(ahead.shape, np.inf)
        distance[ahead] = shapely.distance(egos[row, policy], self._shapes[scene[row], snapshot, item])
        nearest = distance.argmin(axis=-1)
        speed, heading = self._speed[scene[:, None], nearest], self._heading[scene[:, None], nearest]

        lead = np.empty((*progress.shape, 3))
        lead[..., Lead.PROGRESS] = np.where(has_lead, progress + distance.min(axis=-1), self._paths.length[rows, None])
        along = speed * np.cos(heading - poses[..., 2])
        lead[..., Lead.SPEED] = _last_written(along, has_lead & ~np.isnan(speed))
        lead[..., Lead.REAR] = np.where(np.logical_or.accumulate(~has_lead, axis=1), Vehicle.HALF_LENGTH, 0.0)
        return lead


def _last_written(values: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Values (R, C) where `written`, elsewhere the last written one to the left, 0 where there is none."""
    source = np.maximum.accumulate(np.where(written, np.arange(values.shape[1]), -1), axis=1)
    return np.where(source >= 0, np.take_along_axis(values, np.maximum(source, 0), axis=1), 0.0)
