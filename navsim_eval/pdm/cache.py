"""The metric cache: everything about a scene that scoring needs, computed once, whatever proposals come.

`build_metric_caches` goes scene → route → drivable map → centreline → observation for one scene after the other, and on
to the reference plans of all of them together, which takes a third of the time of planning one by one. `to_arrays` and
`from_arrays` turn the result into plain named arrays and back, bit for bit, for any store of arrays. The arrays can be
read without this package: numbers, fixed-width text, and polygons as well-known binary (one `uint8` array for all of
them, cut by `offsets`) in which every coordinate is zero, with the coordinates beside it, where they compress best:
`shapely.set_coordinates(shapely.from_wkb(blobs), xy)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import shapely

from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.formats.synthetic import FutureStep, SyntheticScene
from navsim_eval.garbage import no_garbage_collection
from navsim_eval.pdm.drivable import build_drivable_map
from navsim_eval.pdm.lane_graph import lane_graph
from navsim_eval.pdm.observation import (
    FRAME_STEPS,
    Objects,
    forecast,
    global_objects,
    recorded_observation,
    resample,
    split_at_ego,
)
from navsim_eval.pdm.reference import PlanningTask, ReferencePlan, plan_references
from navsim_eval.pdm.route import Route, correct_route, route_centerline, starting_lane
from navsim_eval.pdm.types import DrivableMap, MetricCache, Observation, StateIndex, TrafficStart
from navsim_eval.scene import Frame, Scene
from navsim_eval.traffic.rails import start_of_traffic

FORMAT_VERSION = 2
FUTURE_FRAMES = {"pdms_v1": 10, "epdms_v2": 8}  # observed by each metric version
HUMAN_POSES = 8
HISTORY_STEP_US = 100_000
LARGEST_COORDINATE = 1e8  # m; UTM stays below 1e7
LONGEST_HISTORY_US = 60_000_000  # far beyond the 1.5 s of a window, gaps included
_OPTIONAL = ("human_poses", "history_states", "traffic")
_PARTS = {"drivable_map": DrivableMap, "observation": Observation, "traffic": TrafficStart}


def build_metric_cache(scene: Scene | SyntheticScene, road_map: RoadMap, metric: str = "pdms_v1") -> MetricCache:
    """Prepare one scene for scoring, see `build_metric_caches`."""
    return build_metric_caches([scene], [road_map], metric)[0]


def build_metric_caches(
    scenes: Sequence[Scene | SyntheticScene], road_maps: Sequence[RoadMap], metric: str = "pdms_v1"
) -> list[MetricCache]:
    """Prepare scenes, each with its map, for scoring under "pdms_v1" (NAVSIM v1.1) or "epdms_v2" (NAVSIM v2.2).

    The caches do not depend on which scenes are prepared together; a good dozen at a time is fastest.
    A synthetic scene can be scored under "epdms_v2" only. Raises DataError where a scene cannot be scored (no route
    in its map, too few or unlabelled future frames) and UserError for a metric that is unknown, or not for a scene.
    """
    return [cache for cache, _ in build_with_plans(scenes, road_maps, metric)]


@no_garbage_collection()
def build_with_plans(
    scenes: Sequence[Scene | SyntheticScene], road_maps: Sequence[RoadMap], metric: str
) -> list[tuple[MetricCache, ReferencePlan]]:
    """As `build_metric_caches`, together with the reference planner's proposals and their scores."""
    if metric not in FUTURE_FRAMES:
        raise UserError(f"metric '{metric}' is unknown; choose one of {', '.join(FUTURE_FRAMES)}")
    tasks = [_planning_task(scene, road_map, metric) for scene, road_map in zip(scenes, road_maps, strict=True)]
    plans = plan_references(tasks)
    return [(replace(task.scene, reference_poses=plan.poses), plan) for task, plan in zip(tasks, plans, strict=True)]


def _planning_task(scene: Scene | SyntheticScene, road_map: RoadMap, metric: str) -> PlanningTask:
    """Everything about a scene but its reference plan."""
    synthetic = isinstance(scene, SyntheticScene)
    if synthetic and metric == "pdms_v1":
        raise UserError(f"scene {scene.scene.token}: pdms_v1 has no second stage; score synthetic scenes as epdms_v2")
    window = scene.scene if synthetic else scene
    frame, graph = window.current, lane_graph(road_map)
    if not (np.abs(frame.ego_pose[:2]) < LARGEST_COORDINATE).all():
        problem = f"the ego is at {frame.ego_pose[:2].tolist()}, beyond every map"
        raise DataError(window.token, problem, field="ego pose", remedy="unpack or download the log again")
    frames = (frame, *_observed_future(window.token, scene.future, metric))
    route = correct_route(frame.roadblock_ids, frame.ego_pose, graph, token=window.token)
    drivable_map = build_drivable_map(road_map, frame.ego_pose, route.lanes)
    start = starting_lane(route, drivable_map, frame.ego_pose, graph)
    objects = [global_objects(moment) for moment in frames]
    observation, traffic = _world(frames, objects, road_map, route, metric)
    cache = MetricCache(
        metric=metric,
        token=window.token,
        log_name=window.log_name,
        map_name=window.map_name,
        start_time_us=frame.timestamp_us,
        initial_state=initial_state(frame),
        centerline=route_centerline(route, start, graph),
        drivable_map=drivable_map,
        observation=observation,
        reference_poses=np.empty((0, 3)),
        human_poses=None if len(window.future) < HUMAN_POSES else window.human_trajectory(HUMAN_POSES),
        history_states=history_states(window) if metric == "epdms_v2" else None,
        unknown_route_ids=np.array(route.unknown, dtype=np.str_),
        synthetic=synthetic,
        traffic=traffic,
    )
    return PlanningTask(cache, road_map.speed_limit(start), forecast(frame, road_map, route.lanes, objects[0]))


def initial_state(frame: Frame) -> np.ndarray:
    """(11,) ego state of a frame: pose, logged velocity and acceleration (float32, as the reference keeps them)."""
    state = np.zeros(StateIndex.SIZE)
    state[StateIndex.POSE] = frame.ego_pose
    state[[StateIndex.VX, StateIndex.VY]] = np.asarray(frame.ego_velocity, np.float32)
    state[[StateIndex.AX, StateIndex.AY]] = np.asarray(frame.ego_acceleration, np.float32)
    return state


def history_states(scene: Scene) -> np.ndarray:
    """(H, 11) past ego states every 0.1 s from the first frame on, interpolated over the real time stamps.

    The reference drops the last sample before *now*; with exact 0.5 s frames H is 14 and a gap of 0.2 s remains.
    Raises DataError where the time stamps cannot be those of a history.
    """
    times = np.array([frame.timestamp_us for frame in scene.history], dtype=np.int64)
    span = int(times[-1]) - int(times[0])
    if not 0 <= span <= LONGEST_HISTORY_US or (np.diff(times) < 0).any():
        problem = f"the history goes from {times[0]} to {times[-1]} µs"
        raise DataError(scene.token, problem, field="timestamp", remedy="unpack or download the log again")
    states = np.stack([initial_state(frame) for frame in scene.history])
    states[:, StateIndex.HEADING] = np.unwrap(states[:, StateIndex.HEADING])
    samples = np.arange(times[0], times[-1], HISTORY_STEP_US)[:-1]
    return np.column_stack([np.interp(samples, times, column) for column in states.T])


def _observed_future(token: str, future: Sequence[Frame | FutureStep], metric: str) -> Sequence[Frame | FutureStep]:
    wanted = FUTURE_FRAMES[metric]
    if len(future) < wanted:
        raise DataError(
            token,
            f"{len(future)} future frames, {metric} observes {wanted}",
            remedy=f"cut windows with {wanted} future frames",
        )
    return future[:wanted]


def _world(
    frames: Sequence[Frame | FutureStep], objects: Sequence[Objects], road_map: RoadMap, route: Route, metric: str
) -> tuple[Observation, TrafficStart | None]:
    """The replayed world, and under `epdms_v2` what the world that reacts to the ego starts from."""
    if metric == "pdms_v1":
        return recorded_observation(frames, objects=objects), None
    ego_pose = frames[0].ego_pose
    edges = [edge for block in route.logged for edge in road_map.interior_edges(block)]
    kept, dropped = split_at_ego(recorded_observation(frames, edges, road_map, objects), ego_pose)
    return kept, start_of_traffic(objects, ego_pose, kept, dropped, road_map)


# --- arrays ----------------------------------------------------------------------------------------------------------


def to_arrays(cache: MetricCache) -> dict[str, np.ndarray]:
    """A metric cache as plain arrays, keyed `field` or `part.field`; absent optional fields have no key.

    Where 10 Hz object poses follow from every fifth of them, only those are kept (`observation.stride` 5).
    """
    arrays: dict[str, np.ndarray] = {"format_version": np.array(FORMAT_VERSION)}
    for field in fields(MetricCache):
        value = getattr(cache, field.name)
        if value is not None and field.name in _PARTS:
            for part in fields(value):
                _put(arrays, f"{field.name}.{part.name}", getattr(value, part.name))
        elif value is not None:
            _put(arrays, field.name, value)
    poses = cache.observation.poses
    keyframes = poses[::FRAME_STEPS]
    regular = (len(poses) - 1) % FRAME_STEPS == 0 and np.array_equal(resample(keyframes), poses, equal_nan=True)
    arrays["observation.stride"] = np.array(FRAME_STEPS if regular else 1)
    arrays["observation.poses"] = keyframes if regular else poses
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> MetricCache:
    """Inverse of `to_arrays`. Raises DataError for another format version or a missing array."""
    version = int(arrays["format_version"]) if "format_version" in arrays else None
    if version != FORMAT_VERSION:
        problem = f"metric cache has format version {version}, this code reads {FORMAT_VERSION}"
        raise DataError("metric cache", problem, remedy="build it again with tools/cache.py")
    try:
        values = {
            name: _part(arrays, name) if name in _PARTS else _scalar(arrays[name])
            for name in (field.name for field in fields(MetricCache))
            if not (name in _OPTIONAL and _absent(arrays, name))
        }
    except KeyError as error:
        remedy = "build it again with tools/cache.py"
        raise DataError("metric cache", "array is missing", field=str(error.args[0]), remedy=remedy) from error
    return MetricCache(**values)


def _absent(arrays: Mapping[str, np.ndarray], name: str) -> bool:
    return not any(key == name or key.startswith(f"{name}.") for key in arrays)


def _part(arrays: Mapping[str, np.ndarray], name: str) -> DrivableMap | Observation | TrafficStart:
    """One of the nested parts of a cache."""
    values = {field.name: _get(arrays, f"{name}.{field.name}") for field in fields(_PARTS[name])}
    if name == "observation" and int(arrays["observation.stride"]) != 1:
        values["poses"] = resample(values["poses"])
    return _PARTS[name](**values)


def _put(arrays: dict[str, np.ndarray], name: str, value: object) -> None:
    array = np.asarray(value)
    if array.dtype != object:
        arrays[name] = array
        return
    arrays[f"{name}.xy"] = shapely.get_coordinates(array)
    blobs = shapely.to_wkb(shapely.transform(array, np.zeros_like))
    arrays[f"{name}.wkb"] = np.frombuffer(b"".join(blobs), dtype=np.uint8)
    arrays[f"{name}.offsets"] = np.concatenate([[0], np.cumsum([len(blob) for blob in blobs])]).astype(np.int64)


def _get(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if f"{name}.wkb" not in arrays:
        return arrays[name]
    blob, offsets = arrays[f"{name}.wkb"].tobytes(), arrays[f"{name}.offsets"].tolist()
    polygons = np.empty(len(offsets) - 1, dtype=object)
    polygons[:] = shapely.from_wkb([blob[start:end] for start, end in pairwise(offsets)])
    return shapely.set_coordinates(polygons, arrays[f"{name}.xy"])


def _scalar(array: np.ndarray) -> object:
    return array.item() if array.ndim == 0 else array
