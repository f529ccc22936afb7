"""Procedural pictures of the city: tileable noise, house fronts and the sky. Everything follows from a seed.

Colours are RGB, 0 to 255.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np

FACADE_SIZE_M = 12.8  # one picture shows four bays of 3.2 m; a ground floor and three upper floors of 3.2 m
FLOOR_M = 3.2
BAY_M = 3.2
HOUSE_STYLES = 12
FOLIAGE = HOUSE_STYLES  # the picture after the house fronts
_FACADE_PIXELS = 256
_FLOOR_PIXELS = 64
SKY_SHAPE = (256, 2048)  # elevation 0 to 90 degrees, azimuth full turn
HORIZON = np.array([201.0, 213.0, 222.0], np.float32)
ZENITH = np.array([88.0, 132.0, 196.0], np.float32)


def noise(size: int, exponent: float, seed: int) -> np.ndarray:
    """(size, size) float32 tileable noise of zero mean and unit deviation, power spectrum 1 / frequency^exponent."""
    white = np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32)
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(white) * frequency ** (-exponent / 2.0)
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(size, size))
    return (field / field.std()).astype(np.float32)


@dataclass(frozen=True)
class FacadeAtlas:
    """House fronts at decreasing resolution, packed for one gather per pixel.

    texels:  (n,) uint32, bytes R, G, B, A; A = 255 where the wall's own colour multiplies the texel, 0 for glass
    offsets: (levels,) int32 start of each level;  widths: (levels,) int32 texels per side
    Within a level: (style, row, column), row 0 at the foot of the ground floor.
    """

    texels: np.ndarray
    offsets: np.ndarray
    widths: np.ndarray

    def sample(self, style: np.ndarray, along: np.ndarray, height: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """RGBA (N, 4) uint8 at distance `along` the wall and `height` above its foot [m], all (N,) float32.

        footprint: size of a pixel on the wall [m]; picks the level whose texels are about as large.
        """
        side = np.float32(FACADE_SIZE_M)
        upper = np.float32(FACADE_SIZE_M - FLOOR_M)
        # The exponent bits of a float are the floor of its binary logarithm.
        level = (np.maximum(footprint * (_FACADE_PIXELS / side), np.float32(1.0)).view(np.int32) >> 23) - 127
        np.minimum(level, len(self.widths) - 1, out=level)
        width = np.take(self.widths, level)
        above = height - side
        v = np.where(above < 0.0, height, above - np.floor(above / upper) * upper + np.float32(FLOOR_M))
        u = along / side
        row = (v * (width * np.float32(1.0 / FACADE_SIZE_M))).astype(np.int32)
        column = ((u - np.floor(u)) * width).astype(np.int32)
        np.clip(row, 0, width - 1, out=row)
        np.minimum(column, width - 1, out=column)
        index = np.take(self.offsets, level) + (style * width + row) * width + column
        return np.take(self.texels, index).view(np.uint8).reshape(-1, 4)


@functools.lru_cache(maxsize=2)
def facade_atlas(seed: int = 0) -> FacadeAtlas:
    """House fronts of brick, plaster, concrete and glass with shops or doors below; and leaves (style FOLIAGE)."""
    rng = np.random.default_rng([seed, 11])
    pictures = np.stack([*(_facade(style, rng) for style in range(HOUSE_STYLES)), _foliage(seed)])
    levels, offsets, widths, start = [], [], [], 0
    width = _FACADE_PIXELS
    while width >= 4:
        level = np.stack([cv2.resize(p, (width, width), interpolation=cv2.INTER_AREA) for p in pictures])
        levels.append(np.ascontiguousarray(level).view(np.uint32).reshape(-1))
        offsets.append(start)
        widths.append(width)
        start += levels[-1].size
        width //= 2
    return FacadeAtlas(np.concatenate(levels), np.array(offsets, np.int32), np.array(widths, np.int32))


def _foliage(seed: int) -> np.ndarray:
    """(256, 256, 4) uint8 light and shade among leaves."""
    shade = 205 + 24 * noise(_FACADE_PIXELS, 1.0, seed + 201) + 16 * noise(_FACADE_PIXELS, 0.0, seed + 202)
    image = np.full((_FACADE_PIXELS, _FACADE_PIXELS, 4), 255, np.uint8)
    image[..., :3] = np.clip(shade, 70, 255)[..., None]
    return image


def _facade(style: int, rng: np.random.Generator) -> np.ndarray:
    """(256, 256, 4) uint8 picture of a house front, row 0 at its foot."""
    size, floor = _FACADE_PIXELS, _FLOOR_PIXELS
    image = np.full((size, size, 4), 255, np.uint8)
    grain = noise(size, 0.6, int(rng.integers(1 << 30)))
    image[..., :3] = np.clip(236 + 9 * grain, 0, 255)[..., None]
    kind = style % 4
    if kind == 0:  # brick courses
        image[::4, :, :3] = (image[::4, :, :3] * 0.86).astype(np.uint8)
    elif kind == 2:  # concrete joints
        image[::floor, :, :3] = 190
        image[:, :: 2 * floor, :3] = 200
    glass = np.array([[62, 78, 96], [50, 62, 74], [84, 104, 124], [44, 54, 66]][style % 4], np.float64)
    wide = kind == 3
    x0, x1 = (4, 60) if wide else ((14, 50) if style % 3 else (20, 44))
    y0, y1 = (10, 56) if wide else ((20, 54) if style % 3 else (16, 52))
    for row in range(1, 4):
        for bay in range(4):
            tone = glass * rng.uniform(0.75, 1.25)
            _pane(image, bay * floor + x0, row * floor + y0, bay * floor + x1, row * floor + y1, tone)
    _ground_floor(image, style, rng)
    return image


def _ground_floor(image: np.ndarray, style: int, rng: np.random.Generator) -> None:
    floor = _FLOOR_PIXELS
    if style in (1, 3, 5, 10):  # shop windows under a coloured fascia
        for bay in range(4):
            _pane(image, bay * floor + 4, 6, bay * floor + 60, 44, np.array([70.0, 82.0, 92.0]) * rng.uniform(0.8, 1.3))
            image[48:60, bay * floor + 2 : bay * floor + 62] = (*rng.integers(50, 215, 3), 0)
        return
    door = int(rng.integers(4))
    for bay in range(4):
        left = bay * floor
        if bay == door:
            image[0:42, left + 20 : left + 44] = (*rng.integers(50, 110, 3), 0)
            image[26:40, left + 26 : left + 38] = (120, 130, 138, 0)
        else:
            _pane(image, left + 16, 18, left + 48, 52, np.array([66.0, 78.0, 92.0]) * rng.uniform(0.75, 1.2))


def _pane(image: np.ndarray, x0: int, y0: int, x1: int, y1: int, tone: np.ndarray) -> None:
    """A window with frame and sill; the upper half reflects some sky."""
    image[y0 - 3 : y0, x0 - 3 : x1 + 3, :3] = 205
    image[y0:y1, x0:x1] = (225, 225, 222, 0)
    glass = np.empty((y1 - y0 - 4, x1 - x0 - 4, 4))
    shade = np.linspace(0.85, 1.35, glass.shape[0])[:, None]
    glass[..., :3] = np.minimum(shade[..., None] * tone, 235)
    glass[..., 3] = 0
    image[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = glass.astype(np.uint8)
    image[y0:y1, (x0 + x1) // 2 - 1 : (x0 + x1) // 2 + 1] = (215, 215, 212, 0)


@functools.lru_cache(maxsize=2)
def sky_panorama(seed: int = 0) -> np.ndarray:
    """(256, 2048, 3) uint8 sky by elevation (row 0 = horizon) and azimuth, without a seam."""
    rows, columns = SKY_SHAPE
    elevation = np.linspace(0.0, 1.0, rows, dtype=np.float32)[:, None, None]
    sky = HORIZON + (ZENITH - HORIZON) * (1.0 - (1.0 - elevation) ** 2.2)
    field = noise(columns, 3.0, seed + 101)[: 4 * rows : 4]
    cover = np.clip((field - 0.1) * 0.55, 0.0, 0.8)[..., None] * np.clip(elevation * 5.0, 0.0, 1.0)
    cloud = np.array([246.0, 247.0, 248.0], np.float32)
    return np.clip(sky * (1.0 - cover) + cloud * cover, 0, 255).astype(np.uint8)
