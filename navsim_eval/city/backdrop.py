"""Sky and ground as one camera sees them: everything behind and below the things that stand on the road.

The ground is the plane z = ground height, sidewalks a curb above it. Where a pixel meets it in the ego frame never
changes for a calibrated camera, so rays, resolutions and haze are worked out once (`Backdrop`) and a frame costs a few
image look-ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from navsim_eval.city.camera import View
from navsim_eval.city.ground import CURB_COLOR, CURB_HEIGHT_M, LEVELS, TEXEL_M, WINDOW, Window
from navsim_eval.city.textures import HORIZON, SKY_SHAPE

FOG_M = 260.0
_FAR_M = 900.0
_TALL_M = 18.0  # beyond this distance each pixel is sampled several times along the line of sight
_TALL_SAMPLES = 6
_HORIZON = (*(float(channel) for channel in HORIZON), 255.0)


def clearness(distance: np.ndarray) -> np.ndarray:
    """Share of an object's own colour that reaches the eye at `distance` [m]; the rest is horizon."""
    return np.exp(np.asarray(distance) * np.float32(-1.0 / FOG_M))


@dataclass(frozen=True)
class _Zone:
    """Rows of the image that look at the ground, sampled at one vertical rate.

    rows:    image rows; samples: rays per pixel, one above the other
    points:  (R · samples, W, 2) float32 where the rays meet the ground, ego frame [m]
    levels:  ((level, band of ray rows, mask (band, W) uint8), …) resolution to look the ground up in
    """

    rows: slice
    samples: int
    points: np.ndarray
    levels: tuple[tuple[int, slice, np.ndarray], ...]


@dataclass(frozen=True)
class Backdrop:
    """What is fixed about ground and sky for one view.

    zones:    far and near part of the ground
    clear:    (G, W) uint8 share of the ground's own colour that is seen, of the lowest G rows; 255 above the horizon
    azimuth, elevation: (S, W) float32 panorama coordinates of the upper S rows
    foot:     (2,) camera position, ego x and y [m]; height above the ground [m]
    """

    zones: tuple[_Zone, ...]
    clear: np.ndarray
    azimuth: np.ndarray
    elevation: np.ndarray
    foot: np.ndarray
    height: float

    def paint(self, image: np.ndarray, pose: np.ndarray, windows: Sequence[Window], panorama: np.ndarray) -> None:
        """Fill `image` (H, W, 4) uint8 with sky and ground as seen from the ego at `pose` (3,), global.

        windows: ground around the ego, one a level; panorama: sky, two turns wide
        """
        turn = SKY_SHAPE[1]
        shift = np.float32((pose[2] / (2.0 * np.pi) * turn) % turn + turn / 2)
        sky_rows = len(self.azimuth)
        if sky_rows:
            image[:sky_rows] = cv2.remap(panorama, self.azimuth + shift, self.elevation, cv2.INTER_LINEAR)
        for zone in self.zones:
            self._paint_zone(image, zone, pose, windows)
        if len(self.clear):
            below = image[-len(self.clear) :]
            clear = cv2.cvtColor(cv2.merge([self.clear] * 3), cv2.COLOR_RGB2RGBA)
            haze = cv2.multiply(cv2.bitwise_not(clear), _HORIZON, scale=1.0 / 255.0)
            cv2.add(cv2.multiply(below, clear, scale=1.0 / 255.0), haze, dst=below)

    def distance(self, directions: np.ndarray) -> np.ndarray:
        """(...,) float32 range to the road along unit vectors (..., 3), inf where they do not go down."""
        return _ground_distance(directions, self.height)

    def _paint_zone(self, image: np.ndarray, zone: _Zone, pose: np.ndarray, windows: Sequence[Window]) -> None:
        c, s = np.float32(np.cos(pose[2])), np.float32(np.sin(pose[2]))
        height, width = zone.points.shape[:2]
        target = image[zone.rows] if zone.samples == 1 else np.empty((height, width, 4), np.uint8)
        for level, band, mask in zone.levels:
            window = windows[level]
            shift = ((pose[:2] - window.origin) / window.texel - 0.5).astype(np.float32)
            scale = np.float32(1.0 / window.texel)
            x, y = zone.points[band, :, 0], zone.points[band, :, 1]
            u = (c * scale) * x - (s * scale) * y + shift[0]
            v = (s * scale) * x + (c * scale) * y + shift[1]
            texels = cv2.remap(window.pixels, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            if zone.samples == 1:
                foot = np.array([c * self.foot[0] - s * self.foot[1], s * self.foot[0] + c * self.foot[1]]) * scale
                self._raise_sidewalks(texels, window, u, v, foot.astype(np.float32) + shift)
            cv2.copyTo(texels, mask, target[band])
        if zone.samples > 1:
            rows = image[zone.rows]
            rows[:] = cv2.resize(target, (width, len(rows)), interpolation=cv2.INTER_AREA)

    def _raise_sidewalks(
        self, texels: np.ndarray, window: Window, u: np.ndarray, v: np.ndarray, foot: np.ndarray
    ) -> None:
        """Replace pixels that meet a sidewalk's surface or its curb before the plane of the road, in place."""
        if not texels[..., 3].any():
            return
        # At curb height a ray is this much of the way from the camera's foot to where it meets the road.
        share = np.float32(1.0 - CURB_HEIGHT_M / self.height)
        top = cv2.remap(
            window.pixels,
            foot[0] + (u - foot[0]) * share,
            foot[1] + (v - foot[1]) * share,
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        on_top = cv2.inRange(top[..., 3], 128, 255)
        below = cv2.inRange(texels[..., 3], 128, 255)
        texels[cv2.subtract(below, on_top) > 0, :3] = CURB_COLOR
        cv2.copyTo(top, on_top, texels)


def make_backdrop(view: View, ground_height: float) -> Backdrop:
    """Work out a view's ground and sky rays. ground_height: z of the road in the ego frame [m]."""
    height = float(view.origin[2]) - ground_height
    distance = _ground_distance(view.directions, height)
    on_ground = np.isfinite(distance)
    first = int(np.flatnonzero(on_ground.any(1))[0]) if on_ground.any() else view.size[0]
    last_sky = int(np.flatnonzero((~on_ground).any(1))[-1]) + 1 if not on_ground.all() else 0
    far = first
    if first < view.size[0]:
        beyond = (distance[first:] > _TALL_M).any(1)
        far = first + (int(np.flatnonzero(beyond)[-1]) + 1 if beyond.any() else 0)
    zones = []
    if far > first:
        zones.append(_zone(view, slice(first, far), _TALL_SAMPLES, height))
    if far < view.size[0]:
        zones.append(_zone(view, slice(far, view.size[0]), 1, height))
    limited = np.minimum(distance[first:], np.float32(_FAR_M))
    hazy = np.maximum(1.0 - clearness(limited), np.clip((limited - 250.0) / 300.0, 0.0, 1.0))
    hazy = np.where(on_ground[first:], hazy, 0.0)
    sky = view.directions[:last_sky]
    azimuth = np.arctan2(sky[..., 1], sky[..., 0]) / (2.0 * np.pi) * SKY_SHAPE[1]
    elevation = np.arcsin(np.clip(sky[..., 2], 0.0, 1.0)) / (np.pi / 2.0) * (SKY_SHAPE[0] - 1)
    return Backdrop(
        zones=tuple(zones),
        clear=np.round(255.0 * (1.0 - hazy)).astype(np.uint8),
        azimuth=azimuth.astype(np.float32),
        elevation=elevation.astype(np.float32),
        foot=view.origin[:2].astype(np.float64),
        height=height,
    )


def _ground_distance(directions: np.ndarray, height: float) -> np.ndarray:
    down = -directions[..., 2]
    return np.where(down > 1e-5, np.float32(height) / np.maximum(down, np.float32(1e-5)), np.float32(np.inf))


def _zone(view: View, rows: slice, samples: int, height: float) -> _Zone:
    directions = _finer_rows(view.directions, rows, samples)
    limited = np.minimum(_ground_distance(directions, height), np.float32(_FAR_M))
    points = (view.origin[:2] + directions[..., :2] * limited[..., None]).astype(np.float32)
    # A ray stands for distance · angle across, and along the ground for that over the grazing angle; the resolution
    # suits the geometric mean of the two. Blurring the choice hides where it changes.
    across = limited * view.pixel_angle
    exact = np.log2(np.maximum(across * np.sqrt(limited / height / samples), 1e-6) / (1.1 * TEXEL_M))
    blur = np.random.default_rng(7).random(exact.shape, dtype=np.float32) - 0.5
    levels = np.clip(np.round(exact + 0.7 * blur), 0, LEVELS - 1).astype(np.int64)
    reach = np.hypot(points[..., 0], points[..., 1])
    for level in range(LEVELS - 1):  # a finer window ends nearer; which way it is turned is not known here
        levels[(levels == level) & (reach > (WINDOW / 2 - 2) * TEXEL_M * 2**level)] = level + 1
    parts = []
    for level in range(LEVELS):
        used = np.flatnonzero((levels == level).any(1))
        if len(used):
            band = slice(int(used[0]), int(used[-1]) + 1)
            parts.append((level, band, np.where(levels[band] == level, np.uint8(255), np.uint8(0))))
    return _Zone(rows, samples, points, tuple(parts))


def _finer_rows(directions: np.ndarray, rows: slice, samples: int) -> np.ndarray:
    """Directions of `samples` evenly spaced rays within each pixel row, (rows · samples, W, 3)."""
    if samples == 1:
        return directions[rows]
    count = rows.stop - rows.start
    at = rows.start + (np.arange(count * samples) + 0.5) / samples - 0.5
    at = np.clip(at, 0, len(directions) - 1)
    low = np.minimum(at.astype(int), len(directions) - 2)
    share = (at - low).astype(np.float32)[:, None, None]
    return directions[low] * (1.0 - share) + directions[low + 1] * share
