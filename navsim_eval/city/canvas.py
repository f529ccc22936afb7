"""Drawing global geometry into pictures of the ground, with smooth edges."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import shapely

_SHIFT = 4  # fractional bits of OpenCV's vertices
_LIMIT = 200_000  # texels; farther vertices are cut off, within OpenCV's range

Rings = tuple[np.ndarray, ...]  # a polygon: its outline (K, 2) and its holes, global metres


class Canvas:
    """Masks of `size` × `size` texels over the square whose lower corner is (x0, y0) [m, global].

    Texel (row, column) covers [x0 + column · texel, + texel] × [y0 + row · texel, + texel].
    """

    def __init__(self, x0: float, y0: float, side: float, size: int):
        self.x0, self.y0, self.size = x0, y0, size
        self.texel = side / size
        self.bounds = (x0, y0, x0 + side, y0 + side)

    def blank(self) -> np.ndarray:
        """(size, size) uint8 zeros."""
        return np.zeros((self.size, self.size), np.uint8)

    def fill(self, mask: np.ndarray, polygons: Sequence[Rings], value: int = 255) -> None:
        """Fill polygons one after the other, their holes left open."""
        outlines = iter(self._outlines([ring for rings in polygons for ring in rings]))
        for rings in polygons:
            cv2.fillPoly(mask, [next(outlines) for _ in rings], value, cv2.LINE_AA, _SHIFT)

    def fill_rings(self, mask: np.ndarray, rings: Sequence[np.ndarray], value: int = 255) -> None:
        """Fill simple rings (K, 2) one after the other."""
        self.fill(mask, [(ring,) for ring in rings], value)

    def stroke(self, mask: np.ndarray, lines: Sequence[np.ndarray], width: float, value: int = 255) -> None:
        """Draw polylines (K, 2) `width` metres wide; thinner than a texel they get fainter instead."""
        if not lines:
            return
        texels = width / self.texel
        strength = round(value * min(1.0, texels))
        cv2.polylines(mask, self._outlines(lines), False, strength, max(1, round(texels)), cv2.LINE_AA, _SHIFT)

    def _outlines(self, lines: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Vertices (K, 2) of each line as fixed-point texel coordinates."""
        if not lines:
            return []
        scaled = (np.concatenate(lines)[:, :2] - [self.x0, self.y0]) / self.texel - 0.5
        fixed = np.round(np.clip(scaled, -_LIMIT, _LIMIT) * (1 << _SHIFT)).astype(np.int32)
        stops = np.cumsum([len(points) for points in lines]).tolist()
        return [fixed[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def polygon_rings(polygon: shapely.Geometry) -> list[Rings]:
    """The rings of each part of a polygon or multipolygon."""
    parts = [shapely.get_rings(part) for part in shapely.get_parts(polygon)]
    return [tuple(shapely.get_coordinates(ring) for ring in rings) for rings in parts if len(rings)]
