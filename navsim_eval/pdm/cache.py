"""The metric cache: everything about a scene that scoring needs, computed once, whatever proposals come.

`build_metric_cache` goes scene → route → drivable map → centreline → observation → reference plan. `to_arrays` and
`from_arrays` turn the result into plain named arrays and back, bit for bit, for any store of arrays. The arrays can be
read without this package: numbers, fixed-width text, and polygons as well-known binary (one `uint8` array for all of
them, cut by `offsets`) in which every coordinate is zero, with the coordinates beside it, where they compress best:
`shapely.set_coordinates(shapely.from_wkb(blobs), xy)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import shapely

from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.pdm.drivable import build_drivable_map
from navsim_eval.pdm.lane_graph import lane_graph
from navsim_eval.pdm.observation import FRAME_STEPS, forecast, recorded_observation, resample, without_tracks_at
from navsim_eval.pdm.reference import ReferencePlan, plan_reference
from navsim_eval.pdm.route import Route, correct_route, route_centerline, starting_lane
from navsim_eval.pdm.types import DrivableMap, MetricCache, Observation, StateIndex
from navsim_eval.scene import Frame, Scene

FORMAT_VERSION = 2
FUTURE_FRAMES = {"pdms_v1": 10, "epdms_v2": 8}  # observed by each metric version
HUMAN_POSES = 8
HISTORY_STEP_US = 100_000
_OPTIONAL = ("human_poses", "history_states")


def build_metric_cache(scene: Scene, road_map: RoadMap, metric: str = "pdms_v1") -> MetricCache:
    """Prepare a scene for scoring under "pdms_v1" (NAVSIM v1.1) or "epdms_v2" (NAVSIM v2.2, log replay).

    Raises DataError where the scene cannot be scored (no route in this map, too few or unlabelled future frames) and
    UserError for an unknown metric.
    """
    return build_with_plan(scene, road_map, metric)[0]


def build_with_plan(scene: Scene, road_map: RoadMap, metric: str) -> tuple[MetricCache, ReferencePlan]:
    """As `build_metric_cache`, together with the reference planner's proposals and their scores."""
    if metric not in FUTURE_FRAMES:
        raise UserError(f"metric '{metric}' is unknown; choose one of {', '.join(FUTURE_FRAMES)}")
    frame, graph = scene.current, lane_graph(road_map)
    frames = _observed_frames(scene, metric)
    route = correct_route(frame.roadblock_ids, frame.ego_pose, graph, token=scene.token)
    drivable_map = build_drivable_map(road_map, frame.ego_pose, route.lanes)
    start = starting_lane(route, drivable_map, frame.ego_pose, graph)
    cache = MetricCache(
        metric=metric,
        token=scene.token,
        log_name=scene.log_name,
        map_name=scene.map_name,
        start_time_us=frame.timestamp_us,
        initial_state=initial_state(frame),
        centerline=route_centerline(route, start, graph),
        drivable_map=drivable_map,
        observation=_scoring_observation(frames, road_map, route, metric),
        reference_poses=np.empty((0, 3)),
        human_poses=scene.human_trajectory(HUMAN_POSES) if len(scene.future) >= HUMAN_POSES else None,
        history_states=history_states(scene) if metric == "epdms_v2" else None,
        unknown_route_ids=np.array(route.unknown, dtype=np.str_),
    )
    plan = plan_reference(cache, road_map.speed_limit(start), forecast(frame, road_map, route.lanes))
    return replace(cache, reference_poses=plan.poses), plan


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
    """
    times = np.array([frame.timestamp_us for frame in scene.history], dtype=np.int64)
    states = np.stack([initial_state(frame) for frame in scene.history])
    states[:, StateIndex.HEADING] = np.unwrap(states[:, StateIndex.HEADING])
    samples = np.arange(times[0], times[-1], HISTORY_STEP_US)[:-1]
    return np.column_stack([np.interp(samples, times, column) for column in states.T])


def _observed_frames(scene: Scene, metric: str) -> tuple[Frame, ...]:
    wanted = FUTURE_FRAMES[metric]
    if len(scene.future) < wanted:
        raise DataError(
            scene.token,
            f"{len(scene.future)} future frames, {metric} observes {wanted}",
            remedy=f"cut windows with {wanted} future frames",
        )
    return (scene.current, *scene.future[:wanted])


def _scoring_observation(frames: tuple[Frame, ...], road_map: RoadMap, route: Route, metric: str) -> Observation:
    if metric == "pdms_v1":
        return recorded_observation(frames)
    edges = [edge for block in route.logged for edge in road_map.interior_edges(block)]
    return without_tracks_at(recorded_observation(frames, edges, road_map), frames[0].ego_pose)


# --- arrays ----------------------------------------------------------------------------------------------------------


def to_arrays(cache: MetricCache) -> dict[str, np.ndarray]:
    """A metric cache as plain arrays, keyed `field` or `part.field`; absent optional fields have no key.

    Where 10 Hz object poses follow from every fifth of them, only those are kept (`observation.stride` 5).
    """
    arrays: dict[str, np.ndarray] = {"format_version": np.array(FORMAT_VERSION)}
    for field in fields(MetricCache):
        value = getattr(cache, field.name)
        if isinstance(value, DrivableMap | Observation):
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
            name: _scalar(arrays[name])
            for name in (field.name for field in fields(MetricCache))
            if name not in ("drivable_map", "observation") and not (name in _OPTIONAL and name not in arrays)
        }
        drivable_map = DrivableMap(**{f.name: _get(arrays, f"drivable_map.{f.name}") for f in fields(DrivableMap)})
        parts = {f.name: _get(arrays, f"observation.{f.name}") for f in fields(Observation)}
        if int(arrays["observation.stride"]) != 1:
            parts["poses"] = resample(parts["poses"])
    except KeyError as error:
        remedy = "build it again with tools/cache.py"
        raise DataError("metric cache", "array is missing", field=str(error.args[0]), remedy=remedy) from error
    return MetricCache(drivable_map=drivable_map, observation=Observation(**parts), **values)


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
