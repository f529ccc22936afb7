"""Lanes as lines that vehicles drive along: poses, what lies ahead, and the ground that a stretch covers.

Everything is vectorised over queries, each of which names a line and an arc length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.geometry import wrap_angle

_QUARTER_SEGMENTS = 16  # of a round join, as the published evaluator buffers


@dataclass(frozen=True)
class Lines:
    """L lines, padded to V vertices.

    x, y, heading: (L, V), headings unwrapped;  arc_length: (L, V), inf in the padding;  count: (L,) vertices
    """

    x: np.ndarray
    y: np.ndarray
    heading: np.ndarray
    arc_length: np.ndarray
    count: np.ndarray

    @staticmethod
    def of(lines: list[np.ndarray]) -> Lines:
        """Pack lines, each (V_l, 3) x, y, heading with at least two vertices."""
        count = np.array([len(line) for line in lines], int)
        columns = np.full((4, len(lines), max(count, default=2)), np.inf)
        for row, line in enumerate(lines):
            steps = np.hypot(*np.diff(line[:, :2], axis=0).T)
            arc_length = np.concatenate([[0.0], np.cumsum(steps)])
            columns[:, row, : len(line)] = line[:, 0], line[:, 1], np.unwrap(line[:, 2]), arc_length
        return Lines(*columns, count)

    def end(self, line: np.ndarray) -> np.ndarray:
        """Arc length (Q,) of the last vertex."""
        return self.arc_length[line, self.count[line] - 1]

    def poses(self, line: np.ndarray, progress: np.ndarray) -> np.ndarray:
        """(Q, 3) poses at arc lengths (Q,), which are clipped to the line; heading in [-pi, pi]."""
        progress = np.clip(progress, 0.0, self.end(line))
        after = np.clip((self.arc_length[line] < progress[:, None]).sum(axis=1), 1, self.count[line] - 1)
        before = after - 1
        start = self.arc_length[line, before]
        stretch = self.arc_length[line, after] - start
        columns = []
        for values in (self.x, self.y, self.heading):
            low = values[line, before]
            columns.append((values[line, after] - low) / stretch * (progress - start) + low)
        columns[2] = wrap_angle(columns[2])
        return np.stack(columns, axis=-1)

    def ahead(self, line: np.ndarray, progress: np.ndarray, half_width: np.ndarray) -> np.ndarray:
        """(Q,) polygons: the ground from arc lengths (Q,) to the end of the line, `half_width` (Q,) to both sides."""
        progress = np.clip(progress, 0.0, self.end(line))
        first = (self.arc_length[line] <= progress[:, None]).sum(axis=1)
        return self._ribbons(line, progress, self.end(line), first, self.count[line], half_width, has_end=False)

    def section(self, line: np.ndarray, start: np.ndarray, end: np.ndarray, half_width: np.ndarray) -> np.ndarray:
        """(Q,) polygons: the ground between two arc lengths (Q,), each clipped to the line."""
        start, end = (np.clip(value, 0.0, self.end(line)) for value in (start, end))
        first = (self.arc_length[line] <= start[:, None]).sum(axis=1)
        last = (self.arc_length[line] < end[:, None]).sum(axis=1)
        return self._ribbons(line, start, end, first, last, half_width, has_end=True)

    def _ribbons(self, line, start, end, first, last, half_width, has_end: bool) -> np.ndarray:
        """Start point, vertices [first, last), and the end point if `has_end`, as lines of a width with flat ends.

        Where no vertex lies behind the start, the line's last two vertices; where none lies before the end, its first
        two.
        """
        at_end = first >= self.count[line]
        at_start = ~at_end & (last == 0) & has_end
        whole = at_end | at_start
        first = np.where(at_end, self.count[line] - 2, np.where(at_start, 0, first))
        last = np.where(at_end, self.count[line], np.where(at_start, 2, last))
        vertices = np.maximum(last - first, 0)
        with_start, with_end = ~whole, ~whole & has_end
        total = vertices + with_start + with_end
        row = np.repeat(np.arange(len(line)), total)
        place = np.arange(len(row)) - np.repeat(np.cumsum(total) - total, total) - with_start[row]
        vertex = np.clip(first[row] + place, 0, self.x.shape[1] - 1)
        points = np.column_stack([self.x[line[row], vertex], self.y[line[row], vertex]])
        is_start = place < 0
        points[is_start] = self.poses(line[with_start], start[with_start])[:, :2]
        if has_end:
            is_end = (place >= vertices[row]) & with_end[row]
            points[is_end] = self.poses(line[with_end], end[with_end])[:, :2]
        strings = shapely.linestrings(points, indices=row)
        return shapely.buffer(strings, half_width, quad_segs=_QUARTER_SEGMENTS, cap_style="flat")
