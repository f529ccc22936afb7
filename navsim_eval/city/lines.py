"""Planar polylines, (M, 2) arrays in metres: resampling, smoothing, offsetting, strips."""

from __future__ import annotations

import numpy as np
import shapely
from scipy.interpolate import CubicSpline


def arc_lengths(line: np.ndarray) -> np.ndarray:
    """(M,) distance of each vertex from the first one along the line."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])


def without_repeats(line: np.ndarray, tolerance: float = 1e-3) -> np.ndarray:
    """Drop vertices that repeat their predecessor; first and last point stay exactly."""
    keep = np.concatenate([[True], np.hypot(*np.diff(line, axis=0).T) > tolerance])
    kept = line[keep]
    kept[-1] = line[-1]
    return kept


def sample(line: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """(K, 2) points at the given distances along the line, clipped to its ends."""
    s = arc_lengths(line)
    return np.stack([np.interp(distances, s, line[:, 0]), np.interp(distances, s, line[:, 1])], axis=-1)


def resample(line: np.ndarray, count: int) -> np.ndarray:
    """(count, 2) evenly spaced points from the first to the last vertex."""
    line = without_repeats(line)
    return sample(line, np.linspace(0.0, arc_lengths(line)[-1], count))


def smooth(line: np.ndarray, count: int, knot_spacing: float = 6.0) -> np.ndarray:
    """(count, 2) points of a cubic spline through knots on the line; ends and end directions are kept."""
    line = without_repeats(line)
    length = arc_lengths(line)[-1]
    knots = sample(line, np.linspace(0.0, length, max(2, round(length / knot_spacing) + 1)))
    if len(knots) < 4:
        return resample(line, count)
    first, last = line[1] - line[0], line[-1] - line[-2]
    slopes = ((1, first / np.hypot(*first)), (1, last / np.hypot(*last)))
    spline = CubicSpline(arc_lengths(knots), knots, bc_type=slopes)
    return resample(spline(np.linspace(0.0, arc_lengths(knots)[-1], 4 * count)), count)


def directions(line: np.ndarray) -> np.ndarray:
    """(M, 2) unit tangents at the vertices (mean of the adjacent segments)."""
    segments = np.diff(line, axis=0)
    segments /= np.maximum(np.hypot(*segments.T), 1e-9)[:, None]
    tangents = np.concatenate([segments[:1], segments[:-1] + segments[1:], segments[-1:]])
    return tangents / np.maximum(np.hypot(*tangents.T), 1e-9)[:, None]


def headings(line: np.ndarray) -> np.ndarray:
    """(M,) heading [rad] of the line at its vertices."""
    tangents = directions(line)
    return np.arctan2(tangents[:, 1], tangents[:, 0])


def offset(line: np.ndarray, distance: float | np.ndarray) -> np.ndarray:
    """The line moved sideways vertex by vertex; positive is left. distance: scalar or (M,)."""
    tangents = directions(line)
    normals = np.stack([-tangents[:, 1], tangents[:, 0]], axis=-1)
    return line + np.asarray(distance, np.float64).reshape(-1, 1) * normals


def strip(left: np.ndarray, right: np.ndarray) -> shapely.Polygon:
    """Polygon between a left and a right border; repaired where a tight curve folds it."""
    polygon = shapely.Polygon(np.concatenate([left, right[::-1]]))
    return polygon if polygon.is_valid else largest_part(polygon.buffer(0))


def largest_part(geometry: shapely.Geometry) -> shapely.Polygon:
    """The largest polygon of a (multi-)polygon."""
    parts = [part for part in shapely.get_parts(geometry) if part.geom_type == "Polygon"]
    return max(parts, key=lambda part: part.area) if parts else shapely.Polygon()


def without_holes(polygon: shapely.Polygon) -> shapely.Polygon:
    return shapely.Polygon(polygon.exterior)
