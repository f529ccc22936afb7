"""PDM-Closed's fifteen proposals: three parallel paths times five target speeds, driven by an IDM.

Open loop: a proposal moves along its path exactly, keeping its distance to what the forecast puts in the way.
Proposal index = path · 5 + speed. The step rules, oddities included, are those of the published evaluators, whose
reference plan would otherwise differ: leads are looked up every second step only, the first look-up comes at step 2,
and what one target speed learnt about the lead carries over to the next ones (see `_LeadSearch.at`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.geometry import Vehicle, box_corners, ego_corners
from navsim_eval.pdm.observation import SNAPSHOT_STEPS, Forecast
from navsim_eval.pdm.path import Path
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


class Lead:
    """Columns of a lead vector: its arc length on the path [m], speed along the path [m/s], length behind that [m]."""

    PROGRESS, SPEED, REAR = range(3)


@dataclass(frozen=True)
class Proposals:
    """Open-loop rollouts from *now* at 10 Hz, index 0 is now; P = 15 proposals, T = 41 states.

    poses: (P, T, 3) on the path;  progress: (P, T) arc length;  speed: (P, T);  lead: (P, T, 3), columns of `Lead`
    """

    poses: np.ndarray
    progress: np.ndarray
    speed: np.ndarray
    lead: np.ndarray


class ProposalDriver:
    """Rolls the proposals out. `drive()` gives all of them over 4 s, `extend(...)` one of them over 5 s.

    centerline:  (M, 3);  ego_pose: (3,) rear axle;  ego_speed: vx [m/s]
    speed_limit: of the starting lane [m/s], None where the map has none
    """

    def __init__(
        self,
        centerline: np.ndarray,
        ego_pose: np.ndarray,
        ego_speed: float,
        speed_limit: float | None,
        forecast: Forecast,
    ):
        center = Path(centerline)
        self.paths = [center if offset == 0.0 else center.shifted(offset) for offset in LATERAL_OFFSETS]
        limit = DEFAULT_SPEED_LIMIT if speed_limit is None else speed_limit
        self.target_speed = np.tile(limit * np.array(SPEED_FRACTIONS), (len(self.paths), 1))
        self.start = np.array([path.project(ego_pose[:2]) for path in self.paths])
        self.ego_speed = float(ego_speed)
        reach = abs(limit) * PLAN_STEPS * SIMULATION_DT
        self._leads = _LeadSearch(self.paths, self.start, reach, forecast)

    def drive(self) -> Proposals:
        """All proposals over 4 s."""
        shape = (*self.target_speed.shape, SIMULATION_STEPS + 1)  # (paths, speeds, T)
        progress, speed, lead = np.zeros(shape), np.zeros(shape), np.zeros((*shape, 3))
        progress[..., 0] = self.start[:, None]
        speed[..., 0] = self.ego_speed
        self._roll(progress, speed, lead, range(1, SIMULATION_STEPS + 1), slice(None), slice(None))
        poses = np.stack([path.interpolate(p) for path, p in zip(self.paths, progress, strict=True)])
        return Proposals(*(array.reshape(-1, *array.shape[2:]) for array in (poses, progress, speed, lead)))

    def extend(self, proposals: Proposals, index: int) -> np.ndarray:
        """(51, 3) poses of one proposal, driven on to 5 s."""
        path, policy = divmod(index, len(SPEED_FRACTIONS))
        arrays = []
        for array in (proposals.progress, proposals.speed, proposals.lead):
            extended = np.zeros((1, 1, PLAN_STEPS + 1, *array.shape[2:]))
            extended[0, 0, : SIMULATION_STEPS + 1] = array[index]
            arrays.append(extended)
        steps = range(SIMULATION_STEPS + 1, PLAN_STEPS + 1)
        self._roll(*arrays, steps, slice(path, path + 1), slice(policy, policy + 1))
        return self.paths[path].interpolate(arrays[0][0, 0])

    def _roll(
        self, progress: np.ndarray, speed: np.ndarray, lead: np.ndarray, steps: range, paths: slice, policies: slice
    ) -> None:
        """Fill (paths, speeds, T[, 3]) arrays in place for the given steps, each from the one before."""
        target = self.target_speed[paths, policies]
        for t in steps:
            before = progress[..., t - 1]
            lead[..., t, :] = lead[..., t - 1, :] if t % SNAPSHOT_STEPS else self._leads.at(t, before, paths)
            progress[..., t] = before + SIMULATION_DT * speed[..., t - 1]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # speed limits of (nearly) zero
                acceleration = idm_acceleration(before, speed[..., t - 1], lead[..., t, :], target)
            speed[..., t] = speed[..., t - 1] + SIMULATION_DT * acceleration


def idm_acceleration(progress: np.ndarray, speed: np.ndarray, lead: np.ndarray, target_speed: np.ndarray) -> np.ndarray:
    """Acceleration (...) [m/s²] of the Intelligent Driver Model (Treiber et al. 2000), limited to comfort bounds.

    progress, speed, target_speed: (...);  lead: (..., 3). Braking is limited too, so a late obstacle can be hit.
    """
    gap = np.maximum(lead[..., Lead.PROGRESS] - progress - lead[..., Lead.REAR], MIN_GAP)
    approach = speed * (speed - lead[..., Lead.SPEED]) / (2.0 * np.sqrt(MAX_ACCELERATION * MAX_DECELERATION))
    wanted_gap = MIN_GAP + speed * HEADWAY + approach
    acceleration = MAX_ACCELERATION * (1.0 - (speed / target_speed) ** EXPONENT - (wanted_gap / gap) ** 2)
    return np.clip(acceleration, -MAX_DECELERATION, MAX_ACCELERATION)


class _LeadSearch:
    """Which forecast object each proposal follows.

    Candidates of a path are the objects (boxes, then red lights) that meet its corridor: the stretch within reach,
    widened by half the ego's width. They are found once, for all snapshots together.
    """

    def __init__(self, paths: list[Path], start: np.ndarray, reach: float, forecast: Forecast):
        world = forecast.observation
        poses = world.poses[::SNAPSHOT_STEPS]  # (S, N, 3)
        boxes = shapely.polygons(box_corners(poses, world.sizes[:, 0], world.sizes[:, 1]))
        red_lights = np.broadcast_to(world.red_light_polygons, (len(boxes), len(world.red_light_ids)))
        heading, speed = poses[0, :, 2], world.speed
        ignored = np.concatenate([forecast.ignored, forecast.ignored_red_lights])
        self._paths = paths
        self._shapes = np.concatenate([boxes, red_lights], axis=1)  # (S, O)
        self._heading = np.concatenate([heading, np.zeros(len(world.red_light_ids))])
        self._speed = np.concatenate([speed, np.full(len(world.red_light_ids), np.nan)])  # NaN: has no speed
        self._progress = np.full((len(paths), *self._shapes.shape), -np.inf)  # of candidates, else -inf
        for k, path in enumerate(paths):
            corridor = shapely.buffer(
                path.section(start[k], start[k] + reach), Vehicle.HALF_WIDTH, quad_segs=16, cap_style="square"
            )
            shapely.prepare(corridor)
            met = shapely.intersects(corridor, self._shapes) & ~ignored
            centroids = shapely.get_coordinates(shapely.centroid(self._shapes[met]))
            self._progress[k, met] = path.project(centroids)

    def at(self, step: int, progress: np.ndarray, paths: slice) -> np.ndarray:
        """Lead vectors (paths, speeds, 3) at a step for proposals that have come as far as `progress` (paths, speeds).

        The reference keeps one vector per path and lets the five target speeds write into it one after the other, so
        an entry that a proposal does not write is the last one written before it: the lead's speed where there is no
        lead or a red light, the rear length where there is a lead.
        """
        selected = self._paths[paths]
        snapshot = self._shapes[step // SNAPSHOT_STEPS]
        ahead = self._progress[paths, None, step // SNAPSHOT_STEPS] > progress[..., None]  # (paths, speeds, O)
        if not ahead.any():
            lead = np.zeros((*progress.shape, 3))
            lead[..., Lead.PROGRESS] = np.array([path.length for path in selected])[:, None]
            lead[..., Lead.REAR] = Vehicle.HALF_LENGTH
            return lead
        poses = np.stack([path.interpolate(p) for path, p in zip(selected, progress, strict=True)])
        distance = np.full((*ahead.shape[:2], ahead.shape[2] + 1), np.inf)  # a last column keeps argmin defined
        path, policy, candidate = np.nonzero(ahead)
        egos = shapely.polygons(ego_corners(poses))
        distance[path, policy, candidate] = shapely.distance(egos[path, policy], snapshot[candidate])
        nearest = distance.argmin(axis=-1)
        has_lead = ahead.any(axis=-1)
        path_length = np.array([path.length for path in selected])[:, None]

        lead = np.empty((*progress.shape, 3))
        lead[..., Lead.PROGRESS] = np.where(has_lead, progress + distance.min(axis=-1), path_length)
        along = self._speed[nearest] * np.cos(self._heading[nearest] - poses[..., 2])
        known = has_lead & ~np.isnan(self._speed[nearest])
        lead[..., Lead.SPEED] = _last_written(along, known)
        lead[..., Lead.REAR] = np.where(np.logical_or.accumulate(~has_lead, axis=1), Vehicle.HALF_LENGTH, 0.0)
        return lead


def _last_written(values: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Values (R, C) where `written`, elsewhere the last written one to the left, 0 where there is none."""
    source = np.maximum.accumulate(np.where(written, np.arange(values.shape[1]), -1), axis=1)
    return np.where(source >= 0, np.take_along_axis(values, np.maximum(source, 0), axis=1), 0.0)
