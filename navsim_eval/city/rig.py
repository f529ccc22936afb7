"""The sensor rig of the city's ego vehicle: eight pinhole cameras around it, placed as on a nuPlan vehicle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from navsim_eval.scene import CAMERAS, Camera, Frame

REFERENCE_WIDTH, REFERENCE_HEIGHT = 1920, 1080
FOCAL_LENGTH_PX, PRINCIPAL_POINT_PX = 1545.0, (960.0, 560.0)  # at the reference size

# camera → (position x, y, z in the ego frame [m], direction of view [deg], counter-clockwise from straight ahead)
_MOUNTS: Mapping[str, tuple[tuple[float, float, float], float]] = {
    "CAM_F0": ((1.66, -0.01, 1.51), 0.0),
    "CAM_L0": ((1.66, 0.17, 1.51), 55.0),
    "CAM_L1": ((1.29, 0.65, 1.40), 111.0),
    "CAM_L2": ((-0.49, 0.54, 1.38), 141.0),
    "CAM_R0": ((1.66, -0.17, 1.51), -55.0),
    "CAM_R1": ((1.29, -0.65, 1.40), -111.0),
    "CAM_R2": ((-0.49, -0.54, 1.38), -141.0),
    "CAM_B0": ((-0.53, 0.03, 1.47), 180.0),
}


def intrinsics(height: int, width: int) -> np.ndarray:
    """(3, 3) pinhole matrix [px] of an image of this size; the published one at 1920 × 1080."""
    focal = FOCAL_LENGTH_PX * width / REFERENCE_WIDTH
    cx, cy = PRINCIPAL_POINT_PX[0] * width / REFERENCE_WIDTH, PRINCIPAL_POINT_PX[1] * height / REFERENCE_HEIGHT
    return np.array([[focal, 0.0, cx], [0.0, focal, cy], [0.0, 0.0, 1.0]])


def viewing_rotation(yaw: float) -> np.ndarray:
    """(3, 3) camera → ego of a level camera that looks along `yaw` [rad] (camera x right, y down, z forward)."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[s, 0.0, c], [-c, 0.0, s], [0.0, -1.0, 0.0]])


def with_sensors(frame: Frame, height: int, width: int) -> Frame:
    """The frame with calibrations and with the paths at which its images and point cloud lie, if they are rendered.

    Images have no lens distortion. Paths are relative to the sensor folder of the split.
    """
    matrix = intrinsics(height, width)
    cameras = {
        name: Camera(
            path=Path(frame.log_name) / name / f"{frame.token}.jpg",
            rotation=viewing_rotation(np.radians(degrees)),
            translation=np.array(position),
            intrinsics=matrix,
            distortion=np.zeros(5),
        )
        for name, (position, degrees) in ((name, _MOUNTS[name]) for name in CAMERAS)
    }
    lidar = Path(frame.log_name) / "MergedPointCloud" / f"{frame.token}.pcd"
    return replace(frame, cameras=cameras, lidar_path=lidar)
