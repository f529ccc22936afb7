"""Planar geometry shared by readers, city and evaluator (numpy, float64).

Poses are (..., 3) arrays x [m], y [m], heading [rad], heading counter-clockwise from the x axis. "Global" is the
UTM frame of the map (x east, y north); "ego" is the rear axle of the ego vehicle (x forward, y left).
"""

from __future__ import annotations

import numpy as np


class Vehicle:
    """The ego vehicle of nuPlan (Pacifica), metres. Distances along x are measured from the rear axle."""

    WIDTH = 2.297
    FRONT_LENGTH = 4.049
    REAR_LENGTH = 1.127
    LENGTH = FRONT_LENGTH + REAR_LENGTH
    HALF_LENGTH = LENGTH / 2.0
    HALF_WIDTH = WIDTH / 2.0
    WHEEL_BASE = 3.089
    HEIGHT = 1.777
    REAR_AXLE_TO_CENTER = 1.461


def wrap_angle(angle: np.ndarray | float) -> np.ndarray:
    """Angle(s) in (-pi, pi] through atan2, as the reference wraps."""
    return np.arctan2(np.sin(angle), np.cos(angle))


def quaternion_yaw(quaternion: np.ndarray) -> np.ndarray:
    """Heading of (..., 4) quaternions w, x, y, z in NAVSIM's convention (x-y-z intrinsic order).

    yaw = atan2(2(wz - xy), 1 - 2(y² + z²)); not the usual ZYX formula, from which it differs by a few 1e-4 rad
    on a tilted road.
    """
    q = np.asarray(quaternion, dtype=np.float64)
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    w, x, y, z = np.moveaxis(q, -1, 0)
    return np.arctan2(2.0 * (w * z - x * y), 1.0 - 2.0 * (y * y + z * z))


def yaw_quaternion(yaw: float) -> np.ndarray:
    """Quaternion w, x, y, z of a rotation by `yaw` about z."""
    return np.array([np.cos(yaw / 2.0), 0.0, 0.0, np.sin(yaw / 2.0)])


def to_global(origin: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Poses (..., 3) given relative to `origin` (3,), as poses in the frame that `origin` is given in."""
    origin, poses = np.asarray(origin, np.float64), np.asarray(poses, np.float64)
    c, s = np.cos(origin[..., 2]), np.sin(origin[..., 2])
    x = origin[..., 0] + c * poses[..., 0] - s * poses[..., 1]
    y = origin[..., 1] + s * poses[..., 0] + c * poses[..., 1]
    return np.stack([x, y, wrap_angle(poses[..., 2] + origin[..., 2])], axis=-1)


def to_local(origin: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Inverse of `to_global`: poses (..., 3) expressed relative to `origin` (3,)."""
    origin, poses = np.asarray(origin, np.float64), np.asarray(poses, np.float64)
    c, s = np.cos(origin[..., 2]), np.sin(origin[..., 2])
    dx, dy = poses[..., 0] - origin[..., 0], poses[..., 1] - origin[..., 1]
    return np.stack([c * dx + s * dy, -s * dx + c * dy, wrap_angle(poses[..., 2] - origin[..., 2])], axis=-1)


def box_corners(center: np.ndarray, length: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Corners (..., 4, 2) of boxes: front-left, rear-left, rear-right, front-right.

    center: (..., 3) x, y, heading of the box centre; length, width: broadcastable to (...).
    """
    center = np.asarray(center, np.float64)
    heading = center[..., 2]
    lon = np.stack([np.cos(heading), np.sin(heading)], -1)
    lat = np.stack([np.cos(heading + np.pi / 2), np.sin(heading + np.pi / 2)], -1)
    half_l, half_w = np.asarray(length)[..., None] / 2.0, np.asarray(width)[..., None] / 2.0
    xy = center[..., :2]
    return np.stack(
        [
            xy + half_l * lon + half_w * lat,
            xy - half_l * lon + half_w * lat,
            xy - half_l * lon - half_w * lat,
            xy + half_l * lon - half_w * lat,
        ],
        axis=-2,
    )


def ego_center(rear_axle: np.ndarray) -> np.ndarray:
    """Poses (..., 3) of the ego's box centre, from poses (..., >=3) of its rear axle."""
    rear_axle = np.asarray(rear_axle, np.float64)
    x, y, heading = rear_axle[..., 0], rear_axle[..., 1], rear_axle[..., 2]
    offset = Vehicle.REAR_AXLE_TO_CENTER
    return np.stack([x + offset * np.cos(heading), y + offset * np.sin(heading), heading], axis=-1)


def ego_corners(rear_axle: np.ndarray) -> np.ndarray:
    """Corners (..., 4, 2) of the ego's box, from poses (..., >=3) of its rear axle; order as `box_corners`."""
    return box_corners(ego_center(rear_axle), Vehicle.LENGTH, Vehicle.WIDTH)
