"""Second-stage scenes as NAVSIM pickles them: instances of nuPlan's classes, written without nuPlan."""

from __future__ import annotations

import copyreg
import enum
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from navsim_eval.pdm.observation import global_objects
from navsim_eval.scene import AGENT_CLASSES, STATIC_CLASSES, Frame

ACTORS = "nuplan.common.actor_state"
MAPS = "nuplan.common.maps.maps_datatypes"


class Nuplan:
    """Classes that pickle as nuPlan's do, in stub modules; gone again when the pickles are written."""

    def __init__(self) -> None:
        self.agent = self._plain(f"{ACTORS}.agent", "Agent")
        self.static = self._plain(f"{ACTORS}.static_object", "StaticObject")
        self.box = self._plain(f"{ACTORS}.oriented_box", "OrientedBox")
        self.metadata = self._plain(f"{ACTORS}.scene_object", "SceneObjectMetadata")
        self.pose = self._plain(f"{ACTORS}.state_representation", "StateSE2", slots=True)
        self.vector = self._plain(f"{ACTORS}.state_representation", "StateVector2D", slots=True)
        self.tracks = self._plain(f"{ACTORS}.tracked_objects", "TrackedObjects")
        self.detections = self._plain("nuplan.planning.simulation.observation.observation_type", "DetectionsTracks")
        self.light = self._plain(MAPS, "TrafficLightStatusData")
        self.lights = self._plain(MAPS, "TrafficLightStatuses")
        self.kind = self._enum(f"{ACTORS}.tracked_objects_types", "TrackedObjectType", 8)
        self.status = self._enum(MAPS, "TrafficLightStatusType", 4)

    def _plain(self, module: str, name: str, slots: bool = False) -> Callable[..., Any]:
        """Constructor of a class whose state pickles as a dict, or as (dict, slots) the way slotted classes do."""

        def reduce(instance: Any, _: int) -> tuple:
            state = dict(instance.__dict__)
            return copyreg.__newobj__, (type(instance),), (None, state) if slots else state

        made = type(name, (), {"__module__": module, "__reduce_ex__": reduce})
        self._register(module, name, made)

        def build(**attributes: Any) -> Any:
            instance = made()
            instance.__dict__.update(attributes)
            return instance

        return build

    def _enum(self, module: str, name: str, count: int) -> Any:
        made = enum.IntEnum(name, {f"M{value}": value for value in range(count)}, module=module)
        made.__reduce_ex__ = lambda member, _: (type(member), (int(member),))
        self._register(module, name, made)
        return made

    def _register(self, module: str, name: str, made: Any) -> None:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            sys.modules.setdefault(path, types.ModuleType(path))
        setattr(sys.modules[module], name, made)


@contextmanager
def nuplan_classes() -> Iterator[Nuplan]:
    """nuPlan's classes while pickles are written; gone afterwards, so that reading cannot lean on them."""
    before = set(sys.modules)
    assert "nuplan" not in before
    try:
        yield Nuplan()
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "nuplan":
                del sys.modules[name]


def thing(
    n: Nuplan,
    kind: int,
    track: str,
    pose: tuple[float, float, float],
    size: tuple[float, float, float],
    velocity: tuple[float, float] | None,
) -> Any:
    """An object in global coordinates; velocity None: a static one."""
    x, y, heading = map(float, pose)
    box = n.box(
        _center=n.pose(x=x, y=y, heading=heading), _length=float(size[0]), _width=float(size[1]),
        _height=float(size[2]), _geometry=shapely.box(0, 0, 1, 1),
    )  # fmt: skip
    metadata = n.metadata(timestamp_us=1, token="t", track_id=None, track_token=track, category_name="c")
    attributes = {"_box": box, "_metadata": metadata, "_tracked_object_type": n.kind(kind)}
    if velocity is None:
        return n.static(**attributes)
    vx, vy = map(float, velocity)
    return n.agent(**attributes, _velocity=n.vector(_x=vx, _y=vy, _array=np.array([vx, vy])))


def write_second_stage(path: Path, frames: list[Frame], future: list[Frame], tokens: dict[str, str]) -> Path:
    """Write frames (the last is now) and what a recording saw after them as a second-stage scene.

    tokens: scene_token, initial_token, corresponding_original_scene, corresponding_original_initial_token
    """
    with nuplan_classes() as n:
        tracks = [n.detections(tracked_objects=n.tracks(tracked_objects=_things(n, frame))) for frame in future]
        lights = [
            n.lights(
                traffic_lights=[
                    n.light(status=n.status(2 if red else 0), lane_connector_id=int(edge), timestamp=1)
                    for edge, red in frame.traffic_lights
                ]
            )
            for frame in future
        ]
        meta = {
            "log_name": frames[-1].log_name,
            "map_name": frames[-1].map_name,
            "num_history_frames": len(frames),
            "num_future_frames": 0,
            **tokens,
        }
        content = {
            "scene_metadata": meta,
            "frames": [_frame_dict(frame) for frame in frames],
            "extended_detections_tracks": tracks,
            "extended_traffic_light_data": lights,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))
    return path


def _things(n: Nuplan, frame: Frame) -> list[Any]:
    classes, objects = (*AGENT_CLASSES, *STATIC_CLASSES), global_objects(frame)
    heights = frame.annotations.boxes[:, 5]
    return [
        thing(n, classes.index(name), token, pose, (*size, height), velocity if name in AGENT_CLASSES else None)
        for name, token, pose, size, height, velocity in zip(
            objects.names, objects.tokens.tolist(), objects.poses, objects.sizes, heights, objects.velocity, strict=True
        )
    ]


def _frame_dict(frame: Frame) -> dict[str, Any]:
    seen = frame.annotations
    return {
        "token": frame.token,
        "timestamp": frame.timestamp_us,
        "roadblock_ids": list(frame.roadblock_ids),
        "traffic_lights": [(int(edge), red) for edge, red in frame.traffic_lights],
        "annotations": {
            "boxes": seen.boxes,
            "names": seen.names.tolist(),
            "velocity_3d": np.column_stack([seen.velocity, np.zeros(len(seen))]),
            "instance_tokens": seen.track_tokens.tolist(),
            "track_tokens": seen.track_tokens.tolist(),
        },
        "ego_status": {
            "ego_pose": frame.ego_pose,
            "ego_velocity": frame.ego_velocity,
            "ego_acceleration": frame.ego_acceleration,
            "driving_command": frame.driving_command,
            "in_global_frame": True,
        },
        "lidar_path": None,
        "camera_dict": {},
    }
