"""What the world looks like around one planning decision: the types every other room consumes.

Readers (`navsim_eval.formats`) make these from disk, the city writes files from which readers make them, features,
targets and the metric cache read them. Nothing here touches a file. Sensor files are referred to by path and opened
only when somebody asks (`navsim_eval.formats.sensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from navsim_eval.geometry import to_local

FRAME_INTERVAL_S = 0.5
COMMANDS = ("left", "straight", "right", "unknown")
CAMERAS = ("CAM_F0", "CAM_L0", "CAM_L1", "CAM_L2", "CAM_R0", "CAM_R1", "CAM_R2", "CAM_B0")
AGENT_CLASSES = ("vehicle", "pedestrian", "bicycle")
STATIC_CLASSES = ("traffic_cone", "barrier", "czone_sign", "generic_object")


class BoxIndex:
    """Columns of `Annotations.boxes`."""

    X, Y, Z, LENGTH, WIDTH, HEIGHT, HEADING = range(7)


@dataclass(frozen=True)
class Annotations:
    """Objects of one frame. Frame of reference: ego rear axle of that same frame.

    boxes:        (N, 7) float64  centre x, y, z [m], length, width, height [m], heading [rad] (not wrapped)
    names:        (N,) str        one of AGENT_CLASSES + STATIC_CLASSES
    velocity:     (N, 2) float64  over ground, expressed in the ego frame [m/s]
    track_tokens: (N,) str        stable over the log
    """

    boxes: np.ndarray
    names: np.ndarray
    velocity: np.ndarray
    track_tokens: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.boxes)
        lengths = {"names": len(self.names), "velocity": len(self.velocity), "track_tokens": len(self.track_tokens)}
        for name, length in lengths.items():
            if length != n:
                raise ValueError(f"annotations: {n} boxes but {length} {name}")

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Camera:
    """One calibrated camera image of a frame.

    path:        relative to the sensor root of the split
    rotation:    (3, 3) camera → ego; translation: (3,) camera position in the ego frame [m]
    intrinsics:  (3, 3) pinhole matrix [px]; distortion: (5,) k1, k2, p1, p2, k3
    Optical convention: x right, y down, z forward.
    """

    path: Path
    rotation: np.ndarray
    translation: np.ndarray
    intrinsics: np.ndarray
    distortion: np.ndarray


@dataclass(frozen=True)
class Frame:
    """One key frame (2 Hz) of a driving log.

    ego_pose:         (3,) float64 global x, y, heading of the rear axle
    ego_velocity:     (2,) float64 vx, vy in the ego frame [m/s];  ego_acceleration: (2,) likewise [m/s²]
    driving_command:  (4,) int one-hot: left, straight, right, unknown
    roadblock_ids:    route as map ids (lane groups and lane group connectors), in driving order
    traffic_lights:   ((lane connector id, is_red), …)
    annotations:      None where the data set withholds labels (private test)
    """

    token: str
    log_name: str
    scene_token: str
    map_name: str
    timestamp_us: int
    ego_pose: np.ndarray
    ego_velocity: np.ndarray
    ego_acceleration: np.ndarray
    driving_command: np.ndarray
    roadblock_ids: tuple[str, ...] = ()
    traffic_lights: tuple[tuple[str, bool], ...] = ()
    annotations: Annotations | None = None
    cameras: Mapping[str, Camera] = field(default_factory=dict)
    lidar_path: Path | None = None


@dataclass(frozen=True)
class Scene:
    """A window of consecutive frames around the current one; the unit that is planned in and scored.

    frames:      history (the last of them is *now*), then future, 0.5 s apart
    num_history: number of history frames, the current one included
    sensor_root: folder that camera and LiDAR paths are relative to, or None
    """

    frames: tuple[Frame, ...]
    num_history: int = 4
    sensor_root: Path | None = None

    @property
    def current(self) -> Frame:
        return self.frames[self.num_history - 1]

    @property
    def token(self) -> str:
        return self.current.token

    @property
    def log_name(self) -> str:
        return self.current.log_name

    @property
    def map_name(self) -> str:
        return self.current.map_name

    @property
    def history(self) -> tuple[Frame, ...]:
        return self.frames[: self.num_history]

    @property
    def future(self) -> tuple[Frame, ...]:
        return self.frames[self.num_history :]

    def human_trajectory(self, num_poses: int = 8) -> np.ndarray:
        """(num_poses, 3) float64 future ego poses at 0.5 s steps, relative to the current pose.

        Raises ValueError where the window holds fewer future frames.
        """
        if len(self.future) < num_poses:
            raise ValueError(f"scene {self.token}: {len(self.future)} future frames, {num_poses} asked for")
        poses = np.stack([frame.ego_pose for frame in self.future[:num_poses]])
        return to_local(self.current.ego_pose, poses)

    def history_trajectory(self) -> np.ndarray:
        """(num_history, 3) float64 past ego poses relative to the current pose; the last row is zero."""
        return to_local(self.current.ego_pose, np.stack([frame.ego_pose for frame in self.history]))
