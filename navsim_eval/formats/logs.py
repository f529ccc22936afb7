"""NAVSIM log pickles (OpenScene v1.1 meta data): one file per drive, a list of frame dicts at 2 Hz.

Reading makes `Frame`s: planar poses, float64, everything in the frames of reference that `navsim_eval.scene` states.
Values are taken as stored: box headings are not wrapped, NaN boxes and velocities are kept, gaps in time are left as
they are. Writing produces the layout that the published logs have.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write
from navsim_eval.formats.fields import (
    MOST_ELEMENTS,
    REMEDY,
    FieldReader,
    parse_timestamp,
    single_precision,
    text,
    texts,
)
from navsim_eval.formats.map_store import canonical_map_name
from navsim_eval.formats.unpickle import load_pickle
from navsim_eval.geometry import quaternion_yaw, yaw_quaternion
from navsim_eval.scene import AGENT_CLASSES, CAMERAS, COMMANDS, STATIC_CLASSES, Annotations, Camera, Frame

BOX_CLASSES = frozenset((*AGENT_CLASSES, *STATIC_CLASSES, "ego"))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_log(path: Path | str) -> list[Frame]:
    """Frames of a log in file order.

    Frames without `anns` (private test sets) have `annotations=None`. Absent sensors, route, traffic lights and names
    are empty; an absent pose, time stamp, motion state or command is an error.

    Raises DataError that names the file, the frame's list index and the field.
    """
    frames = read_log_dicts(path)
    return [frame_from_dict(frame, path, index) for index, frame in enumerate(frames)]


def read_log_dicts(path: Path | str) -> list[dict[str, Any]]:
    """The raw frame dicts of a log, checked only for being a list of dicts with tokens. Raises DataError."""
    content = load_pickle(path)
    if not isinstance(content, list) or not all(isinstance(frame, dict) for frame in content):
        kind = f"a {type(content).__name__}" if not isinstance(content, list) else "a list of something else"
        raise DataError(path, f"not a log: a list of frame dicts is expected, this is {kind}", remedy=REMEDY)
    for index, frame in enumerate(content):
        FieldReader(frame, path, f"frame {index}").parse("token", text)
    return content


def frame_from_dict(frame: Mapping[str, Any], path: Path | str, index: int, sensors: bool = True) -> Frame:
    """One frame from the dict of a log. path and index are for error messages. Raises DataError.

    sensors: whether cameras and LiDAR are wanted; they take 40 % of the time, and scoring never looks at them
    """
    field = FieldReader(frame, path, f"frame {index}")
    motion = single_precision(field, "ego_dynamic_state", (4,))
    return Frame(
        token=field.parse("token", text),
        log_name=field.parse("log_name", text, default="") or Path(path).stem,
        scene_token=field.parse("scene_token", text, default=""),
        map_name=canonical_map_name(field.parse("map_location", text, default="")),
        timestamp_us=field.parse("timestamp", parse_timestamp),
        ego_pose=_ego_pose(field),
        ego_velocity=motion[:2],
        ego_acceleration=motion[2:],
        driving_command=field.numbers("driving_command", (len(COMMANDS),)).astype(np.int64),
        roadblock_ids=field.parse("roadblock_ids", parse_route, default=()),
        traffic_lights=field.parse("traffic_lights", parse_traffic_lights, default=()),
        annotations=read_annotations(field.inner("anns")) if frame.get("anns") is not None else None,
        cameras=read_cameras(field, "cams") if sensors else {},
        lidar_path=field.parse("lidar_path", Path, default=None) if sensors else None,
    )


def parse_route(route: Any) -> tuple[str, ...]:
    """Route ids in driving order from a list or a text, split on blanks and commas; repeats are kept."""
    parts = [route] if isinstance(route, str) else [part if isinstance(part, str) else str(int(part)) for part in route]
    if sum(map(len, parts)) > MOST_ELEMENTS:
        raise ValueError(f"more than {MOST_ELEMENTS} characters")
    return tuple(id_ for part in parts for id_ in re.split(r"[\s,]+", part) if id_)


def _ego_pose(field: FieldReader) -> np.ndarray:
    translation = field.numbers("ego2global_translation", (-1,))
    if len(translation) < 2:
        raise field.error("ego2global_translation", f"shape {translation.shape} where (3,) is expected")
    return np.array([translation[0], translation[1], quaternion_yaw(_quaternion(field, "ego2global_rotation"))])


def _quaternion(field: FieldReader, key: str) -> np.ndarray:
    quaternion = field.numbers(key, (4,))
    if not quaternion.any():
        raise field.error(key, "zero quaternion")
    return quaternion


def read_annotations(field: FieldReader, prefix: str = "gt_") -> Annotations:
    """Boxes of one frame. prefix: of the keys boxes, names and velocity_3d (logs say gt_, synthetic scenes nothing)."""
    boxes = field.numbers(f"{prefix}boxes", (-1, 7), finite=False)
    velocity = field.numbers(f"{prefix}velocity_3d", (-1, 3), finite=False)
    names = texts(field, f"{prefix}names")
    tracks = texts(field, "track_tokens")
    for key, values in ((f"{prefix}velocity_3d", velocity), (f"{prefix}names", names), ("track_tokens", tracks)):
        if len(values) != len(boxes):
            raise field.error(key, f"{len(values)} entries for {len(boxes)} boxes")
    unknown = sorted(set(names.tolist()) - BOX_CLASSES)
    if unknown:
        raise field.error(f"{prefix}names", f"unknown class '{unknown[0]}'; known: {', '.join(sorted(BOX_CLASSES))}")
    return Annotations(boxes=boxes, names=names, velocity=velocity[:, :2].copy(), track_tokens=tracks)


def parse_traffic_lights(lights: Any) -> tuple[tuple[str, bool], ...]:
    """((lane connector id, is_red), …) from pairs of any integer and truth-value types."""
    return tuple((str(int(connector)), bool(is_red)) for connector, is_red in lights)


def read_cameras(field: FieldReader, key: str) -> dict[str, Camera]:
    """Cameras by upper-case name, extrinsics composed to camera → ego. An empty dict stands for an unused camera."""
    cameras = field.values.get(key) or {}
    if not isinstance(cameras, Mapping):
        raise field.error(key, f"a dict is expected, this is a {type(cameras).__name__}")
    to_ego = _lidar_to_ego(field)
    place = f"{field.place}.{key}"
    return {
        name.upper(): _camera(FieldReader(values, field.path, f"{place}.{name}"), to_ego)
        for name, values in cameras.items()
        if values and isinstance(name, str)
    }


def _camera(field: FieldReader, lidar_to_ego: tuple[np.ndarray, np.ndarray] | None) -> Camera:
    rotation = field.numbers("sensor2lidar_rotation", (3, 3))
    translation = field.numbers("sensor2lidar_translation", (3,))
    if lidar_to_ego is not None:
        rotation, translation = lidar_to_ego[0] @ rotation, lidar_to_ego[0] @ translation + lidar_to_ego[1]
    return Camera(
        path=field.parse("data_path", Path),
        rotation=rotation,
        translation=translation,
        intrinsics=field.numbers("cam_intrinsic", (3, 3)),
        distortion=field.numbers("distortion", (5,)) if field.values.get("distortion") is not None else np.zeros(5),
    )


def _lidar_to_ego(field: FieldReader) -> tuple[np.ndarray, np.ndarray] | None:
    """Rotation and translation of the LiDAR in the ego frame; None for the identity, as in all published logs."""
    rotation, translation = np.eye(3), np.zeros(3)
    if field.values.get("lidar2ego_rotation") is not None:
        quaternion = _quaternion(field, "lidar2ego_rotation")
        rotation = rotation_matrix(quaternion) if quaternion[1:].any() else rotation
    if field.values.get("lidar2ego_translation") is not None:
        translation = field.numbers("lidar2ego_translation", (3,))
    identity = np.array_equal(rotation, np.eye(3)) and not translation.any()
    return None if identity else (rotation, translation)


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of a quaternion w, x, y, z (any length but zero)."""
    w, x, y, z = np.asarray(quaternion, np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_log(path: Path | str, frames: Sequence[Frame], vehicle_name: str = "synthetic") -> Path:
    """Write frames as a NAVSIM log pickle (all keys of the published layout), atomically. Returns the path.

    The ego stands upright at height 0 and the LiDAR frame is the ego frame. Tokens that a `Frame` does not carry (log,
    object instances) are derived from those it does, so equal frames give an equal file.
    """
    rates = _yaw_rates(frames)
    tokens = [None, *(frame.token for frame in frames), None]
    content = []
    for index, frame in enumerate(frames):
        entry = _frame_dict(frame, index, float(rates[index]), vehicle_name)
        entry["sample_prev"], entry["sample_next"] = tokens[index], tokens[index + 2]
        content.append(entry)
    return atomic_write(path, pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL))


def _frame_dict(frame: Frame, index: int, yaw_rate: float, vehicle_name: str) -> dict[str, Any]:
    translation = np.array([frame.ego_pose[0], frame.ego_pose[1], 0.0])
    rotation = yaw_quaternion(float(frame.ego_pose[2]))
    ego2global = np.eye(4)
    ego2global[:3, :3], ego2global[:3, 3] = rotation_matrix(rotation), translation
    (vx, vy), (ax, ay) = frame.ego_velocity.tolist(), frame.ego_acceleration.tolist()
    entry = {
        "token": frame.token,
        "frame_idx": index,
        "timestamp": int(frame.timestamp_us),
        "log_name": frame.log_name,
        "log_token": _derived_token("log", frame.log_name),
        "scene_name": f"log-0000-{frame.scene_token}",
        "scene_token": frame.scene_token,
        "map_location": frame.map_name,
        "roadblock_ids": list(frame.roadblock_ids),
        "vehicle_name": vehicle_name,
        "can_bus": np.array([*translation, *rotation, ax, ay, 0.0, vx, vy, 0.0, 0.0, 0.0, yaw_rate, 0.0, 0.0]),
        "lidar_path": None if frame.lidar_path is None else frame.lidar_path.as_posix(),
        "lidar2ego_translation": np.zeros(3),
        "lidar2ego_rotation": [1.0, 0.0, 0.0, 0.0],
        "ego2global_translation": translation,
        "ego2global_rotation": rotation,
        "ego_dynamic_state": [vx, vy, ax, ay],
        "traffic_lights": [(int(connector), bool(is_red)) for connector, is_red in frame.traffic_lights],
        "driving_command": np.asarray(frame.driving_command, dtype=np.int64),
        "cams": {name: _camera_dict(frame.cameras[name]) for name in CAMERAS if name in frame.cameras},
        "sample_prev": None,
        "sample_next": None,
        "ego2global": ego2global,
        "lidar2ego": np.eye(4),
        "lidar2global": ego2global.copy(),
    }
    if frame.annotations is not None:
        entry["anns"] = _annotations_dict(frame.annotations, frame.token)
    return entry


def _camera_dict(camera: Camera) -> dict[str, Any]:
    return {
        "data_path": camera.path.as_posix(),
        "sensor2lidar_rotation": np.asarray(camera.rotation, np.float64),
        "sensor2lidar_translation": np.asarray(camera.translation, np.float64),
        "cam_intrinsic": np.asarray(camera.intrinsics, np.float64),
        "distortion": np.asarray(camera.distortion, np.float64),
    }


def _annotations_dict(annotations: Annotations, frame_token: str) -> dict[str, Any]:
    tracks = annotations.track_tokens.tolist()
    return {
        "gt_boxes": np.asarray(annotations.boxes, np.float64).reshape(-1, 7),
        "gt_names": np.array(annotations.names.tolist()),
        "gt_velocity_3d": np.pad(np.asarray(annotations.velocity, np.float64).reshape(-1, 2), ((0, 0), (0, 1))),
        "instance_tokens": [_derived_token(frame_token, track) for track in tracks],
        "track_tokens": tracks,
    }


def _yaw_rates(frames: Sequence[Frame]) -> np.ndarray:
    """(n,) heading rate [rad/s] by differences of neighbouring frames; zero where time stands still."""
    if len(frames) < 2:
        return np.zeros(len(frames))
    headings = np.unwrap([frame.ego_pose[2] for frame in frames])
    seconds = np.array([frame.timestamp_us for frame in frames], np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = np.gradient(headings, (seconds - seconds[0]) * 1e-6)
    return np.where(np.isfinite(rates), rates, 0.0)


def _derived_token(*parts: str) -> str:
    """16 hex digits that depend on nothing but the parts."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]
