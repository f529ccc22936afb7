"""Drawing global geometry into pictures of the ground, with smooth edges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import shapely

_SHIFT = 4  # fractional bits of OpenCV's vertices
_LIMIT = 200_000  # texels; farther vertices are cut off, within OpenCV's range


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

    def fill(self, mask: np.ndarray, polygons: Iterable[shapely.Geometry], value: int = 255) -> None:
        """Fill polygons one after the other, their holes left open."""
        for polygon in polygons:
            for part in shapely.get_parts(polygon):
                rings = [self._vertices(shapely.get_coordinates(ring)) for ring in shapely.get_rings(part)]
                if rings:
                    cv2.fillPoly(mask, rings, value, cv2.LINE_AA, _SHIFT)

    def fill_rings(self, mask: np.ndarray, rings: Iterable[np.ndarray], value: int = 255) -> None:
        """Fill simple rings (K, 2) one after the other."""
        for ring in rings:
            cv2.fillPoly(mask, [self._vertices(ring)], value, cv2.LINE_AA, _SHIFT)

    def stroke(self, mask: np.ndarray, lines: Sequence[np.ndarray], width: float, value: int = 255) -> None:
        """Draw polylines (K, 2) `width` metres wide; thinner than a texel they get fainter instead."""
        if not lines:
            return
        texels = width / self.texel
        split = np.cumsum([len(points) for points in lines])[:-1]
        pieces = np.split(self._vertices(np.concatenate(lines)), split)
        strength = round(value * min(1.0, texels))
        cv2.polylines(mask, pieces, False, strength, max(1, round(texels)), cv2.LINE_AA, _SHIFT)

    def _vertices(self, points: np.ndarray) -> np.ndarray:
        """(K, 2) fixed-point texel coordinates."""
        scaled = (np.asarray(points)[:, :2] - [self.x0, self.y0]) / self.texel - 0.5
        return np.round(np.clip(scaled, -_LIMIT, _LIMIT) * (1 << _SHIFT)).astype(np.int32)
