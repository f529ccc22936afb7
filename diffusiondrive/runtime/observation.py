"""What a car hands to the planner at one instant: sensors as they are encoded, status, clock and odometry."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from diffusiondrive.features import CAMERAS, status_feature
from navsim_eval.dataset import sensor_files
from navsim_eval.errors import DataError
from navsim_eval.scene import Scene


@dataclass(frozen=True)
class Observation:
    """One frame in host memory, nothing decoded yet.

    token:        name of the frame
    cameras:      encoded images (JPEG) in the order of `features.CAMERAS`: left, front, right; None where none came
    cloud:        bytes of a .pcd sweep, or (≥ 3, P) float32 points x, y, z [m] in the ego frame; None where none came
    status:       (8,) driving command (left, straight, right, unknown), velocity [m/s], acceleration [m/s²], ego frame
    ego_pose:     (3,) float64 x, y [m], heading [rad] of the rear axle, in any frame that stays put (odometry)
    time_s:       when all this was true, on the car's clock
    camera_times_s: when each image was taken; a camera that hangs shows here
    """

    token: str
    cameras: tuple[bytes | None, ...]
    cloud: bytes | np.ndarray | None
    status: np.ndarray
    ego_pose: np.ndarray = field(default_factory=lambda: np.zeros(3))
    time_s: float = 0.0
    camera_times_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.cameras) != len(CAMERAS):
            raise ValueError(f"observation {self.token}: {len(self.cameras)} images, expected {', '.join(CAMERAS)}")
        if not self.camera_times_s:
            object.__setattr__(self, "camera_times_s", (self.time_s,) * len(CAMERAS))

    @property
    def speed(self) -> float:
        """Along the ego's x axis [m/s], from the status."""
        return float(self.status[4])


def read_observation(scene: Scene) -> Observation:
    """The current frame of a scene: bytes of its sensor files, unopened. Raises DataError for an absent file."""
    frame = scene.current
    contents = []
    for path in sensor_files(scene, CAMERAS, lidar=True):
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise DataError(path, f"no such sensor file ({error.strerror})", remedy="check data.root") from error
    return Observation(
        token=frame.token,
        cameras=tuple(contents[:-1]),
        cloud=contents[-1],
        status=status_feature(frame),
        ego_pose=np.asarray(frame.ego_pose, np.float64),
        time_s=frame.timestamp_us * 1e-6,
    )
