"""Synthetic scenes of NAVSIM v2: the second stage of two-stage evaluation, one pickle a scene.

A scene holds four frames (the current one last) and, as nuPlan objects in global coordinates, the boxes and traffic
lights of the following steps. The nuPlan classes are replaced by empty stand-ins that only take the stored attributes,
so neither nuPlan nor any code in the file is needed or run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.formats.fields import FieldReader, parse_timestamp, single_precision, text
from navsim_eval.formats.logs import parse_route, parse_traffic_lights, read_annotations, read_cameras
from navsim_eval.formats.map_store import canonical_map_name
from navsim_eval.formats.splits import SceneFilter
from navsim_eval.formats.unpickle import load_pickle
from navsim_eval.scene import AGENT_CLASSES, COMMANDS, STATIC_CLASSES, Frame, Scene

_TRACKED_TYPES = (*AGENT_CLASSES, *STATIC_CLASSES, "ego")  # in the order of nuPlan's enumeration
_RED = 2


@dataclass(frozen=True)
class FutureStep:
    """What is around at one step after the current frame. Global frame.

    poses:        (N, 3) box centre x, y [m], heading [rad];  sizes: (N, 3) length, width, height [m]
    velocity:     (N, 2) [m/s], zero for static classes
    names, track_tokens: (N,) str
    traffic_lights: ((lane connector id, is_red), …)
    """

    poses: np.ndarray
    sizes: np.ndarray
    velocity: np.ndarray
    names: np.ndarray
    track_tokens: np.ndarray
    traffic_lights: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class SyntheticScene:
    """A second-stage scene.

    scene:          history frames, the current one last; no future frames. `scene.token` is the initial token, the
                    key under which splits and submissions list the scene
    scene_token:    the file's stem
    original_token: original frame of the same time: the last frame of a first-stage window
    original_initial_token: current frame of that window
    future:         steps 0.5 s apart, the first 0.5 s after the current frame
    """

    scene: Scene
    scene_token: str
    original_token: str
    original_initial_token: str
    future: tuple[FutureStep, ...]


def read_synthetic_scene(path: Path | str, sensor_root: Path | str | None = None) -> SyntheticScene:
    """One synthetic scene. Raises DataError that names the file, the frame or step, and the field."""
    content = FieldReader(load_pickle(path, _stand_ins()), path, "scene")
    meta = content.inner("scene_metadata")
    frames = tuple(
        _frame(FieldReader(frame, path, f"frame {index}"), meta)
        for index, frame in enumerate(content.parse("frames", list))
    )
    if not frames:
        raise content.error("frames", "empty")
    frames = (*frames[:-1], replace(frames[-1], token=meta.parse("initial_token", text)))
    return SyntheticScene(
        scene=Scene(frames, len(frames), None if sensor_root is None else Path(sensor_root)),
        scene_token=meta.parse("scene_token", text),
        original_token=meta.parse("corresponding_original_scene", text),
        original_initial_token=meta.parse("corresponding_original_initial_token", text),
        future=_future(content),
    )


def select_synthetic_scenes(
    folder: Path | str, scene_filter: SceneFilter, last_tokens: Collection[str]
) -> dict[str, Path]:
    """Second-stage scenes of a filter: initial token → file, by file name.

    last_tokens: tokens of the last frames of the first-stage windows. Logs are those of the filter; then either its
    `synthetic_scene_tokens` decide, or a scene belongs to the window whose last frame it starts from.
    Raises DataError for a folder without scenes.
    """
    logs = None if scene_filter.log_names is None else set(scene_filter.log_names)
    listed = None if scene_filter.synthetic_scene_tokens is None else set(scene_filter.synthetic_scene_tokens)
    last, chosen = set(last_tokens), {}
    for path in _scene_files(folder):
        meta = _metadata(path)
        token, original = (meta.parse(key, text) for key in ("initial_token", "corresponding_original_scene"))
        if logs is not None and meta.parse("log_name", text) not in logs:
            continue
        if token in listed if listed is not None else original in last:
            chosen[token] = path
    return chosen


def list_synthetic_scenes(
    folder: Path | str, tokens: Collection[str]
) -> tuple[dict[str, tuple[Path, str]], dict[str, str]]:
    """Second-stage scenes by initial token → file and log name, those of `tokens` that the folder holds.

    Also returns the files that cannot be read, by name, with the reason. Raises DataError for a folder without scenes.
    """
    wanted, found, broken = set(tokens), {}, {}
    for path in _scene_files(folder):
        try:
            meta = _metadata(path)
            token, log = meta.parse("initial_token", text), meta.parse("log_name", text)
        except DataError as error:
            broken[path.name] = str(error)
            continue
        if token in wanted:
            found[token] = path, log
    return found, broken


def _scene_files(folder: Path | str) -> list[Path]:
    paths = sorted(Path(folder).glob("*.pkl"))
    if not paths:
        raise DataError(folder, "no synthetic scenes (*.pkl)", remedy="download the two-stage split")
    return paths


def _metadata(path: Path) -> FieldReader:
    return FieldReader(load_pickle(path, _stand_ins()), path, "scene").inner("scene_metadata")


def _frame(field: FieldReader, meta: FieldReader) -> Frame:
    status = field.inner("ego_status")
    if status.values.get("in_global_frame") is False:
        raise status.error("in_global_frame", "False: the pose is not global")
    has_labels = field.values.get("annotations") is not None
    return Frame(
        token=field.parse("token", text),
        log_name=meta.parse("log_name", text),
        scene_token=meta.parse("scene_token", text),
        map_name=canonical_map_name(meta.parse("map_name", text)),
        timestamp_us=field.parse("timestamp", parse_timestamp),
        ego_pose=status.numbers("ego_pose", (3,)),
        ego_velocity=single_precision(status, "ego_velocity", (2,)),
        ego_acceleration=single_precision(status, "ego_acceleration", (2,)),
        driving_command=status.numbers("driving_command", (len(COMMANDS),)).astype(np.int64),
        roadblock_ids=field.parse("roadblock_ids", parse_route, default=()),
        traffic_lights=field.parse("traffic_lights", parse_traffic_lights, default=()),
        annotations=read_annotations(field.inner("annotations"), prefix="") if has_labels else None,
        cameras=read_cameras(field, "camera_dict"),
        lidar_path=field.parse("lidar_path", Path, default=None),
    )


def _future(content: FieldReader) -> tuple[FutureStep, ...]:
    tracks = content.parse("extended_detections_tracks", list, default=[])
    lights = content.parse("extended_traffic_light_data", list, default=[])
    steps = []
    for index, step in enumerate(tracks):
        try:
            steps.append(_step(step.tracked_objects.tracked_objects))
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            place = f"extended_detections_tracks.{index}"
            raise content.error(place, f"cannot be read ({error})") from error
    for index, light in enumerate(lights[: len(steps)]):
        try:
            states = tuple((str(int(s.lane_connector_id)), s.status == _RED) for s in light.traffic_lights)
        except (AttributeError, TypeError, ValueError) as error:
            place = f"extended_traffic_light_data.{index}"
            raise content.error(place, f"cannot be read ({error})") from error
        steps[index] = replace(steps[index], traffic_lights=states)
    return tuple(steps)


def _step(objects: Sequence[Any]) -> FutureStep:
    names = [_TRACKED_TYPES[int(o._tracked_object_type)] for o in objects]
    centres = [o._box._center for o in objects]
    velocity = [
        (o._velocity._x, o._velocity._y) if name in AGENT_CLASSES else (0.0, 0.0)
        for o, name in zip(objects, names, strict=True)
    ]
    return FutureStep(
        poses=np.array([(c.x, c.y, c.heading) for c in centres], np.float64).reshape(-1, 3),
        sizes=np.array([(o._box._length, o._box._width, o._box._height) for o in objects], np.float64).reshape(-1, 3),
        velocity=np.array(velocity, np.float64).reshape(-1, 2),
        names=np.array(names, np.str_),
        track_tokens=np.array([o._metadata.track_token for o in objects], np.str_),
    )


# --- stand-ins for the classes that the pickles name -----------------------------------------------------------------

_ACTORS = "nuplan.common.actor_state"
_STATE_CLASSES: dict[str, tuple[str, ...]] = {
    f"{_ACTORS}.agent": ("Agent",),
    f"{_ACTORS}.static_object": ("StaticObject",),
    f"{_ACTORS}.oriented_box": ("OrientedBox", "Dimension"),
    f"{_ACTORS}.scene_object": ("SceneObject", "SceneObjectMetadata"),
    f"{_ACTORS}.state_representation": ("StateSE2", "StateVector2D", "TimePoint", "Point2D", "TimeDuration"),
    f"{_ACTORS}.tracked_objects": ("TrackedObjects",),
    f"{_ACTORS}.vehicle_parameters": ("VehicleParameters",),
    f"{_ACTORS}.agent_temporal_state": ("AgentTemporalState",),
    f"{_ACTORS}.waypoint": ("Waypoint",),
    "nuplan.planning.simulation.observation.observation_type": ("DetectionsTracks",),
    "nuplan.common.maps.maps_datatypes": ("TrafficLightStatuses", "TrafficLightStatusData"),
    "shapely.geometry.polygon": ("Polygon",),
}
_ENUMS = {
    f"{_ACTORS}.tracked_objects_types": "TrackedObjectType",
    "nuplan.common.maps.maps_datatypes": "TrafficLightStatusType",
}


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """Names that synthetic scenes ask for beyond those of logs. Made afresh for each file: a file may alter them."""
    names = {(module, name): _state_class(name) for module, listed in _STATE_CLASSES.items() for name in listed}
    names |= {(module, name): lambda value: int(value) for module, name in _ENUMS.items()}
    names["shapely.io", "from_wkb"] = lambda *_: None  # cached outlines are not needed
    names["pathlib", "PosixPath"] = names["pathlib", "PurePosixPath"] = lambda *parts: PurePosixPath(*parts)
    return names


def _state_class(name: str) -> type:
    """A class that accepts any arguments and takes its attributes from the pickled state, a dict or (dict, slots)."""

    def ignore(self: Any, *_: Any, **__: Any) -> None: ...

    def set_state(self: Any, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    return type(name, (), {"__init__": ignore, "__setstate__": set_state})
