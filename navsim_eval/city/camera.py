"""Where each pixel of a calibrated camera looks, and where a point in the world appears.

Pinhole with the five OpenCV distortion coefficients, as the logs store them. Frame: ego rear axle, x forward, y left,
z up [m]; image: u right, v down [px], pixel centres at integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navsim_eval.scene import Camera

_UNDISTORT_ITERATIONS = 40
_UNDISTORT_TOLERANCE = 1e-6
_BAND_ROWS = 64  # rows worked on at a time, to bound the memory


@dataclass(frozen=True)
class View:
    """The rays of one camera at one image size.

    size:       height, width [px]
    origin:     (3,) float32 camera position, ego frame [m]
    directions: (H, W, 3) float32 unit vectors, ego frame
    rotation:   (3, 3) float64 camera → ego
    intrinsics: (3, 3) float64, scaled to `size`
    distortion: (5,) float64
    limits:     (2, 2) float64 smallest and largest normalised image coordinates (x, y) that a pixel looks along
    """

    size: tuple[int, int]
    origin: np.ndarray
    directions: np.ndarray
    rotation: np.ndarray
    intrinsics: np.ndarray
    distortion: np.ndarray
    limits: np.ndarray

    @property
    def pixel_angle(self) -> float:
        """Angle between neighbouring pixels at the image centre [rad]."""
        return 1.0 / float(self.intrinsics[0, 0])

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels (N, 2) u, v and depths (N,) [m] of ego-frame points (N, 3); meaningless where depth ≤ 0."""
        local = (np.asarray(points, np.float64) - self.origin) @ self.rotation
        depth = local[:, 2]
        safe = np.where(np.abs(depth) < 1e-9, 1e-9, depth)
        return self.pixels(local[:, :2] / safe[:, None]), depth

    def pixels(self, normalised: np.ndarray) -> np.ndarray:
        """Pixels (..., 2) of normalised (undistorted) image coordinates (..., 2)."""
        return distort(normalised, self.distortion) @ self.intrinsics[:2, :2].T + self.intrinsics[:2, 2]


def make_view(camera: Camera, size: tuple[int, int]) -> View:
    """Rays of `camera` for an image of `size` (height, width).

    Calibrations refer to an image about twice as wide as the principal point's abscissa; for other sizes the
    intrinsics are scaled by the power of two that comes nearest (1920 → 960 px: one half).
    """
    height, width = size
    intrinsics = np.asarray(camera.intrinsics, np.float64).copy()
    scale = 2.0 ** np.round(np.log2(width / (2.0 * intrinsics[0, 2])))
    intrinsics[:2] *= scale
    rotation = np.asarray(camera.rotation, np.float64)
    distortion = np.asarray(camera.distortion, np.float64)
    inverse = np.linalg.inv(intrinsics[:2, :2]).T
    directions = np.empty((height, width, 3), np.float32)
    limits = np.array([[np.inf, np.inf], [-np.inf, -np.inf]])
    for top in range(0, height, _BAND_ROWS):
        u, v = np.meshgrid(np.arange(width), np.arange(top, min(top + _BAND_ROWS, height)))
        normalised = undistort((np.stack([u, v], axis=-1) - intrinsics[:2, 2]) @ inverse, distortion)
        rays = np.concatenate([normalised, np.ones((*u.shape, 1))], axis=-1) @ rotation.T
        directions[top : top + len(u)] = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
        limits[0] = np.minimum(limits[0], normalised.min((0, 1)))
        limits[1] = np.maximum(limits[1], normalised.max((0, 1)))
    origin = np.asarray(camera.translation, np.float32)
    return View(size, origin, directions, rotation, intrinsics, distortion, limits)


def distort(normalised: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Lens distortion of normalised image coordinates (..., 2); coefficients k1, k2, p1, p2, k3 (OpenCV order)."""
    k1, k2, p1, p2, k3 = coefficients
    x, y = normalised[..., 0], normalised[..., 1]
    r2 = x * x + y * y
    radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return np.stack(
        [
            x * radial + 2.0 * p1 * x * y + p2 * (r2 + 2.0 * x * x),
            y * radial + p1 * (r2 + 2.0 * y * y) + 2.0 * p2 * x * y,
        ],
        axis=-1,
    )


def undistort(distorted: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Inverse of `distort` by fixed-point iteration (converges for the fields of view of driving cameras)."""
    if not np.any(coefficients):
        return distorted
    k1, k2, p1, p2, k3 = coefficients
    x, y = distorted[..., 0].copy(), distorted[..., 1].copy()
    for _ in range(_UNDISTORT_ITERATIONS):
        r2 = x * x + y * y
        radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3))
        dx = 2.0 * p1 * x * y + p2 * (r2 + 2.0 * x * x)
        dy = p1 * (r2 + 2.0 * y * y) + 2.0 * p2 * x * y
        last = x
        x, y = (distorted[..., 0] - dx) / radial, (distorted[..., 1] - dy) / radial
        if np.abs(x - last).max() < _UNDISTORT_TOLERANCE:
            break
    return np.stack([x, y], axis=-1)
