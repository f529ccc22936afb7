"""A centreline that can be projected on and walked along.

The reference planner drives along three of these a scene, those of many scenes side by side (`Paths`); metrics project
whole batches of scenes with `navsim_eval.metrics.polyline`. Coordinates are global metres in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import shapely
import torch

from navsim_eval.geometry import wrap_angle

MIN_ARC_LENGTH = 1e-5  # queries start here, so that a doubled first vertex never yields a zero-length segment


def with_headings(points: np.ndarray) -> np.ndarray:
    """(M, 3) poses of the vertices (M, 2) of a line: each looks at the next one, the last repeats its predecessor."""
    points = np.asarray(points, np.float64)
    steps = np.diff(points, axis=0)
    headings = np.arctan2(steps[:, 1], steps[:, 0])
    return np.column_stack([points, np.append(headings, headings[-1])])


class Path:
    """A polyline of poses parametrised by arc length.

    poses:      (M, 3) x, y, heading per vertex, M >= 2; neighbouring vertices may coincide
    arc_length: (M,) cumulative chord length [m]
    """

    def __init__(self, poses: np.ndarray):
        self.poses = np.asarray(poses, np.float64)
        if self.poses.ndim != 2 or self.poses.shape[1] != 3 or len(self.poses) < 2:
            raise ValueError(f"a path needs (M >= 2, 3) poses, got {self.poses.shape}")
        self.arc_length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(self.poses[:, :2], axis=0).T))])

    @property
    def length(self) -> float:
        return float(self.arc_length[-1])

    @cached_property
    def line(self) -> shapely.LineString:
        return shapely.linestrings(self.poses[:, :2])

    @cached_property
    def unwrapped(self) -> np.ndarray:
        """(M, 3) poses with headings that do not jump."""
        return np.column_stack([self.poses[:, :2], np.unwrap(self.poses[:, 2])])

    @cached_property
    def _alone(self) -> Paths:
        return Paths([self])

    def project(self, points: np.ndarray) -> np.ndarray:
        """Arc length (...) of the point of the path nearest to each of (..., 2) points; saturates at both ends."""
        return shapely.line_locate_point(self.line, shapely.points(points))

    def interpolate(self, arc_length: np.ndarray) -> np.ndarray:
        """Poses (..., 3) at arc lengths (...), clipped to the path; heading wrapped, NaN becomes 0."""
        arc_length = np.asarray(arc_length, np.float64)
        return self._alone.interpolate(arc_length.reshape(1, -1)).reshape(*arc_length.shape, 3)

    def shifted(self, offset: float) -> Path:
        """Parallel path `offset` metres to the left (negative: to the right); headings stay."""
        normal = self.poses[:, 2] + np.pi / 2
        poses = self.poses.copy()
        poses[:, 0] += offset * np.cos(normal)
        poses[:, 1] += offset * np.sin(normal)
        return Path(poses)

    def section(self, start: float, end: float) -> shapely.Geometry:
        """The vertices between two arc lengths as a line (ends are not interpolated).

        With fewer than two vertices between them: the exact stretch, which is a point where it has no length.
        """
        inside = (self.arc_length >= start) & (self.arc_length <= end)
        if np.count_nonzero(inside) >= 2:
            return shapely.linestrings(self.poses[inside, :2])
        ends = self._exact(np.clip([start, end], 0.0, self.length))
        points = np.concatenate([ends[:1], self.poses[inside, :2], ends[1:]])
        if np.ptp(points, axis=0).max() == 0.0:
            return shapely.points(points[0])
        return shapely.linestrings(points)

    def _exact(self, arc_length: np.ndarray) -> np.ndarray:
        return np.column_stack([np.interp(arc_length, self.arc_length, self.poses[:, k]) for k in (0, 1)])


class Paths:
    """R paths side by side, to be walked along at once.

    length: (R,) of each [m]
    """

    def __init__(self, paths: Sequence[Path]):
        shape = len(paths), max(len(path.poses) for path in paths)
        self.length = np.array([path.length for path in paths])
        self._last_segment = np.array([len(path.poses) - 2 for path in paths])
        self._arc_length = np.full(shape, np.inf)
        self._poses, self._slope = np.zeros((*shape, 3)), np.zeros((*shape, 3))
        for row, path in enumerate(paths):
            vertices = len(path.poses)
            self._arc_length[row, :vertices], self._poses[row, :vertices] = path.arc_length, path.unwrapped
            with np.errstate(divide="ignore", invalid="ignore"):  # doubled vertices; queries never fall between them
                steps = np.diff(path.unwrapped, axis=0) / np.diff(path.arc_length)[:, None]
            self._slope[row, : vertices - 1] = steps

    def interpolate(self, arc_length: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Poses (Q, C, 3) at arc lengths (Q, C) along the paths `rows` (Q,), by default all; see `Path.interpolate`."""
        rows = np.arange(len(self.length)) if rows is None else rows
        query = np.minimum(np.maximum(arc_length, MIN_ARC_LENGTH), self.length[rows, None])
        # before the first vertex: a path of no length; behind the last one: NaN
        above = torch.searchsorted(torch.from_numpy(self._arc_length[rows]), torch.from_numpy(query)).numpy()
        segment = np.clip(above - 1, 0, self._last_segment[rows, None])
        place = rows[:, None], segment
        poses = self._poses[place] + self._slope[place] * (query - self._arc_length[place])[..., None]
        poses[..., 2] = wrap_angle(poses[..., 2])
        poses[np.isnan(poses)] = 0.0
        return poses
