"""Which moments of the simulated drives become scenes: those that tell planners apart.

As NAVSIM's filter does, moments that a constant-velocity plan solves are dropped, and those in which the recorded
driver fails. Both are judged by the evaluator itself (PDMS v1). A log on disk must hold nothing but such moments,
because readers cut every window of every log; so runs of consecutive kept moments become one short log each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import shapely

from navsim_eval.city.ego import EgoMotion, ego_motion
from navsim_eval.city.recorder import FRAME_STEPS, FUTURE_FRAMES, HISTORY_FRAMES, Recorder, driving_command
from navsim_eval.city.traffic import EGO_KIND, STEP_S, Track
from navsim_eval.errors import DataError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import Vehicle, box_corners, to_global, to_local
from navsim_eval.pdm.cache import build_metric_caches
from navsim_eval.planners import constant_velocity, human
from navsim_eval.scene import FRAME_INTERVAL_S, Frame, Scene
from navsim_eval.scoring import score

HORIZON_STEPS = 40  # 4 s
MIN_HUMAN_SCORE, MAX_CONSTANT_VELOCITY_SCORE = 0.8, 0.8
MIN_DEVIATION_M = 2.0  # of the drive from constant velocity after 4 s; below, constant velocity all but solves it
MIN_GAIN = 1.7  # of an accelerating drive's way against constant velocity's; below, its progress is good enough
MIN_START_M = 6.0  # up to 5 m PDMS counts any progress as full
TURN_RAD = np.radians(25.0)
MIN_ROUTE_LEFT_M = 110.0
MAX_RUN = 6  # consecutive scenes a log
GAP_FRAMES = 4  # between two logs of one vehicle
RUNS_TOGETHER = 6  # proposals judged at a time: a good dozen of scenes, see `build_metric_caches`

# What the driver does over the next 4 s, and how often we look for it.
CATEGORY_WEIGHTS = {
    **{"left": 0.19, "right": 0.22, "wide turn": 0.2, "start": 0.11, "brake": 0.1, "accelerate": 0.09, "bend": 0.09}
}


@dataclass(frozen=True)
class Drive:
    """A vehicle that may be the ego, and its motion."""

    track: Track
    motion: EgoMotion


@dataclass(frozen=True)
class Run:
    """Consecutive scenes of one drive: current frames at `first`, `first` + 0.5 s, … (count of them)."""

    drive: Drive
    first: int
    count: int


def select_runs(recorder: Recorder, road_map: RoadMap, quota: int, rng: np.random.Generator) -> list[Run]:
    """Runs that hold `quota` scenes altogether, or fewer where the district has no more to offer."""
    proposals = _Moments(recorder, road_map).proposals(rng)
    runs: list[Run] = []
    missing = quota
    while missing > 0 and (group := list(islice(proposals, RUNS_TOGETHER))):
        for kept in _kept(recorder, road_map, group):
            length = min(kept.count, missing)
            if length > 0:
                runs.append(replace(kept, count=length))
                missing -= length
    return runs


def run_frames(recorder: Recorder, road_map: RoadMap, run: Run, log_name: str) -> list[Frame]:
    """All frames of a run's log, history and future included, with driving commands."""
    count = HISTORY_FRAMES + run.count + FUTURE_FRAMES
    first = run.first - HISTORY_FRAMES * FRAME_STEPS
    frames = recorder.frames(run.drive.track, run.drive.motion, first, count, log_name)
    return [replace(frame, driving_command=driving_command(frame, road_map)) for frame in frames]


class _Moments:
    """Moments of all drives of a district by category, and which of them have been used."""

    def __init__(self, recorder: Recorder, road_map: RoadMap):
        self.recorder = recorder
        self.drives = [
            Drive(track, motion)
            for track in recorder.traffic.tracks
            if track.kind.name == EGO_KIND and (motion := ego_motion(track)) is not None
        ]
        roads = _drivable_union(road_map, recorder.district.offset)
        self.categories: dict[tuple[int, int], str] = {}
        for number, drive in enumerate(self.drives):
            steps = self._plausible(drive)
            for step, category in zip(steps.tolist(), _categories(drive.motion, steps, roads), strict=True):
                if category is not None:
                    self.categories[number, step] = category
        self.used: set[tuple[int, int]] = set()

    def _plausible(self, drive: Drive) -> np.ndarray:
        """Steps at which a full window of comfortable driving on a known route can be cut."""
        motion, before, after = drive.motion, HISTORY_FRAMES * FRAME_STEPS, FUTURE_FRAMES * FRAME_STEPS
        first = max(-(-(motion.first + before) // FRAME_STEPS) * FRAME_STEPS, before)
        steps = np.arange(first, motion.last - after, FRAME_STEPS)
        rows = steps - motion.first
        rough = np.concatenate([[0], np.cumsum(~motion.comfortable)])
        comfortable = rough[rows + after + 1] == rough[rows - before]
        start, end = self.recorder.known_route(drive.track, motion)
        on_route = (motion.progress[rows - before] >= start) & (end - motion.progress[rows] > MIN_ROUTE_LEFT_M)
        return steps[comfortable & on_route]

    def proposals(self, rng: np.random.Generator) -> Iterator[Run]:
        """Short runs of unused moments, categories in random turn, each moment once."""
        waiting = defaultdict(list)
        for key in sorted(self.categories):
            waiting[self.categories[key]].append(key)
        for keys in waiting.values():
            rng.shuffle(keys)
        while waiting:
            names = [name for name in CATEGORY_WEIGHTS if name in waiting]
            weights = np.array([CATEGORY_WEIGHTS[name] for name in names])
            name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
            number, step = map(int, waiting[name].pop())
            if not waiting[name]:
                del waiting[name]
            count = self._unused(number, step, int(rng.integers(2, MAX_RUN + 1)))
            if count:
                margin = range(-GAP_FRAMES, count + GAP_FRAMES)
                self.used.update((number, step + k * FRAME_STEPS) for k in margin)
                yield Run(self.drives[number], step, count)

    def _unused(self, number: int, step: int, wanted: int) -> int:
        """Length of the run of unused moments from a step on, at most `wanted`."""
        for k in range(wanted):
            key = (number, step + k * FRAME_STEPS)
            if key not in self.categories or key in self.used:
                return k
        return wanted


def _categories(motion: EgoMotion, steps: np.ndarray, roads: shapely.Geometry) -> list[str | None]:
    """What the drive does within 4 s of each step; None where constant velocity (nearly) solves that too.

    Speeding up a little leaves constant velocity a good score, and so does a bend within which it stays on the road.
    A turn is wide where constant velocity stays on the junction. roads: drivable surface, prepared, local frame.
    """
    rows = steps - motion.first
    here, later = motion.poses[rows], motion.poses[rows + HORIZON_STEPS]
    speed, turned = motion.velocity[rows], later[:, 2] - here[:, 2]
    ahead, aside = to_local(here, later)[:, :2].T
    straight_on = speed * HORIZON_STEPS * STEP_S
    gained = ahead - straight_on
    leaves_road = _leaves_road(here, speed, roads)
    categories: list[str | None] = []
    for k in range(len(steps)):
        if np.hypot(gained[k], aside[k]) < MIN_DEVIATION_M:
            categories.append(None)
        elif abs(turned[k]) > TURN_RAD:
            categories.append(("left" if turned[k] > 0 else "right") if leaves_road[k] else "wide turn")
        elif abs(aside[k]) > abs(gained[k]):
            categories.append("bend" if leaves_road[k] else None)
        elif gained[k] < 0:
            categories.append("brake")
        elif ahead[k] < MIN_GAIN * straight_on[k] or ahead[k] < MIN_START_M:
            categories.append(None)
        else:
            categories.append("start" if speed[k] < 1.0 else "accelerate")
    return categories


def _leaves_road(poses: np.ndarray, speed: np.ndarray, roads: shapely.Geometry) -> np.ndarray:
    """(K,) bool: within 4 s, constant velocity takes a corner of the ego off the drivable surface."""
    times = np.arange(1, 9) * FRAME_INTERVAL_S
    centre = np.zeros((len(poses), len(times), 3))
    centre[..., 0] = speed[:, None] * times + Vehicle.REAR_AXLE_TO_CENTER
    corners = box_corners(to_global(poses[:, None], centre), Vehicle.LENGTH, Vehicle.WIDTH)
    return ~shapely.contains_xy(roads, corners[..., 0], corners[..., 1]).all(axis=(1, 2))


def _drivable_union(road_map: RoadMap, offset: np.ndarray) -> shapely.Geometry:
    """All drivable surface of a district in its local frame, prepared for queries."""
    layers = ("lane_groups_polygons", "intersections", "carpark_areas")
    union = shapely.union_all(np.concatenate([road_map.layer(name).geometries for name in layers]))
    union = shapely.transform(union, lambda xy: xy - offset)
    shapely.prepare(union)
    return union


def _kept(recorder: Recorder, road_map: RoadMap, proposals: Sequence[Run]) -> list[Run]:
    """The parts of the proposed runs in which every scene passes the filter, in order."""
    scenes = [list(_scenes(recorder, run)) for run in proposals]
    flags = iter(passes([scene for run in scenes for scene in run], road_map))
    kept = []
    for run in proposals:
        for start, length in stretches([next(flags) for _ in range(run.count)]):
            kept.append(Run(run.drive, run.first + start * FRAME_STEPS, length))
    return kept


def _scenes(recorder: Recorder, run: Run) -> Iterator[Scene]:
    """The run's scenes, without driving commands."""
    count, first = HISTORY_FRAMES + run.count + FUTURE_FRAMES, run.first - HISTORY_FRAMES * FRAME_STEPS
    frames = recorder.frames(run.drive.track, run.drive.motion, first, count, "candidate")
    for k in range(run.count):
        yield Scene(tuple(frames[k : k + HISTORY_FRAMES + 1 + FUTURE_FRAMES]))


def passes(scenes: Sequence[Scene], road_map: RoadMap) -> list[bool]:
    """For each scene: the human solves it and constant velocity does not (PDMS v1 of NAVSIM, see pdm.cache).

    A scene that the evaluator refuses does not pass.
    """
    try:
        caches = build_metric_caches(scenes, [road_map] * len(scenes))
    except DataError:
        return [False] if len(scenes) == 1 else [passes([scene], road_map)[0] for scene in scenes]
    plans = np.stack([np.stack([human(scene), constant_velocity(scene)]) for scene in scenes])
    scores = score(caches, plans).columns["score"].reshape(len(scenes), 2)
    good = (scores[:, 0] >= MIN_HUMAN_SCORE) & (scores[:, 1] < MAX_CONSTANT_VELOCITY_SCORE)
    return good.tolist()


def stretches(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, length) of every maximal stretch of true flags."""
    edges = np.flatnonzero(np.diff([False, *flags, False]))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
