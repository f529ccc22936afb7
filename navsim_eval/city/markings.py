"""The paint on the road, as geometry: lane lines, centre lines, stop lines and zebra bars. Global (UTM) metres."""

from __future__ import annotations

import functools

import numpy as np
import shapely

from navsim_eval.city.approaches import Approaches
from navsim_eval.formats.map_layers import Layer
from navsim_eval.formats.maps import RoadMap

BAR_M = 0.5  # width of a zebra bar and of the gap beside it
_DASHED, _SOLID = 0, 2  # boundaries.boundary_type_fid
_DASH_M, _GAP_M = 3.0, 4.5
_STOP_LINE_SETBACK_M = 0.35

Rectangle = tuple[float, float, float, float]


class Markings:
    """What is painted on the roads of one map. Rectangles are x0, y0, x1, y1."""

    def __init__(self, road_map: RoadMap, approaches: Approaches):
        self._map = road_map
        self._approaches = approaches
        self._pieces: dict[int, list[np.ndarray]] = {}
        self._bars: dict[int, np.ndarray] = {}

    def lane_lines(self, area: Rectangle) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """White lines and yellow centre lines, polylines (K, 2), that may touch the area."""
        boundaries = self._map.layer("boundaries")
        white, yellow = [], []
        for row in rows_near(boundaries, area):
            kind = self._kinds[row]
            if row in self._opposing and kind in (_DASHED, _SOLID):
                yellow.append(shapely.get_coordinates(boundaries.geometries[row]))
            elif kind in (_DASHED, _SOLID):
                white += self._line_pieces(row, kind)
        return white, yellow

    def stop_lines(self, area: Rectangle) -> list[np.ndarray]:
        """(2, 2) end points of the lines across lanes where traffic has to stop."""
        x0, y0, x1, y1 = area
        lines = self._stop_lines
        near = ((lines.min(1) < [x1 + 1, y1 + 1]) & (lines.max(1) > [x0 - 1, y0 - 1])).all(1)
        return list(lines[near])

    def crosswalks(self, area: Rectangle) -> list[tuple[shapely.Geometry, np.ndarray]]:
        """Crosswalk polygons and the bars (B, 4, 2) painted on each, which may stick out of the polygon."""
        layer = self._map.layer("crosswalks")
        return [(layer.geometries[row], self._zebra_bars(row)) for row in rows_near(layer, area)]

    # --- lane lines ---

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        """(B,) type of each boundary, -1 for those that only bound lane connectors: junctions are not painted."""
        boundaries = self._map.layer("boundaries")
        kinds = np.asarray(boundaries.columns["boundary_type_fid"], np.float64)
        connectors, lanes = (
            _boundary_ids(self._map.layer(name))
            for name in ("gen_lane_connectors_scaled_width_polygons", "lanes_polygons")
        )
        return np.where(np.isin(boundaries.ids, list(connectors - lanes)), -1, kinds)

    def _line_pieces(self, row: int, kind: float) -> list[np.ndarray]:
        if row not in self._pieces:
            points = shapely.get_coordinates(self._map.layer("boundaries").geometries[row])
            self._pieces[row] = [points] if kind == _SOLID else _dashes(points)
        return self._pieces[row]

    @functools.cached_property
    def _opposing(self) -> frozenset[int]:
        """Rows of boundaries that have traffic in opposite directions on their two sides."""
        boundaries = self._map.layer("boundaries")
        lanes = self._map.layer("lanes_polygons")
        if not len(boundaries) or not len(lanes):
            return frozenset()
        lines = boundaries.geometries
        length = shapely.length(lines)
        middle = shapely.get_coordinates(shapely.line_interpolate_point(lines, length / 2.0))
        ahead = shapely.get_coordinates(shapely.line_interpolate_point(lines, length / 2.0 + 0.5))
        direction = ahead - middle
        direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-9)
        normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
        headings = []
        for side in (1.0, -1.0):
            probe = shapely.points(middle + side * 1.3 * normal)
            found = np.full(len(lines), -1)
            where, lane = lanes.tree.query(probe, predicate="intersects")
            found[where[::-1]] = lane[::-1]
            headings.append(self._lane_directions(found, middle))
        facing = np.einsum("ij,ij->i", *headings)
        return frozenset(np.flatnonzero((facing < -0.5) & (length > 0.5)).tolist())

    def _lane_directions(self, rows: np.ndarray, points: np.ndarray) -> np.ndarray:
        """(N, 2) driving direction of lane `rows` (N,) near `points` (N, 2); zero where row is -1."""
        lanes = self._map.layer("lanes_polygons")
        result = np.zeros((len(rows), 2))
        for i in np.flatnonzero(rows >= 0):
            path = self._map.baseline(str(lanes.ids[rows[i]]))
            nearest = int(np.argmin(np.hypot(*(path[:-1] - points[i]).T)))
            step = path[nearest + 1] - path[nearest]
            result[i] = step / max(float(np.linalg.norm(step)), 1e-9)
        return result

    # --- stop lines and crosswalks ---

    @functools.cached_property
    def _stop_lines(self) -> np.ndarray:
        """(L, 2, 2) across each lane where traffic has to stop."""
        lanes = self._map.layer("lanes_polygons")
        lines = []
        for row in np.flatnonzero(self._approaches.stop_line):
            direction = self._approaches.directions[row]
            foot = self._approaches.ends[row] - _STOP_LINE_SETBACK_M * direction
            aside = 4.0 * np.array([-direction[1], direction[0]])
            cut = shapely.intersection(shapely.LineString([foot + aside, foot - aside]), lanes.geometries[row])
            points = shapely.get_coordinates(cut)
            if len(points) >= 2:
                lines.append(points[[0, -1]])
        return np.array(lines).reshape(-1, 2, 2)

    def _zebra_bars(self, row: int) -> np.ndarray:
        """(B, 4, 2) bars along the direction of traffic, one a metre, within the polygon's enclosing rectangle."""
        if row not in self._bars:
            polygon = self._map.layer("crosswalks").geometries[row]
            self._bars[row] = _bars(polygon, self._traffic_heading(polygon.centroid))
        return self._bars[row]

    def _traffic_heading(self, point: shapely.Point) -> float:
        baselines = self._map.layer("baseline_paths")
        if not len(baselines):
            return 0.0
        points = shapely.get_coordinates(baselines.geometries[baselines.tree.nearest(point)])
        nearest = int(np.argmin(np.hypot(*(points[:-1] - [point.x, point.y]).T)))
        return float(np.arctan2(*(points[nearest + 1] - points[nearest])[::-1]))


def rows_near(layer: Layer, area: Rectangle) -> list[int]:
    """Rows of a layer, ascending, whose bounding box comes within a metre of the area."""
    if not len(layer):
        return []
    x0, y0, x1, y1 = area
    return sorted(layer.tree.query(shapely.box(x0 - 1.0, y0 - 1.0, x1 + 1.0, y1 + 1.0)).tolist())


def _boundary_ids(layer: Layer) -> set[str]:
    names = [name for name in ("left_boundary_fid", "right_boundary_fid") if name in layer.columns]
    return {id_ for name in names for id_ in layer.keys(name).tolist()}


def _bars(polygon: shapely.Geometry, heading: float) -> np.ndarray:
    rectangle = shapely.get_coordinates(shapely.oriented_envelope(polygon))[:4]
    if len(rectangle) < 4:
        return np.zeros((0, 4, 2))
    edges = [rectangle[1] - rectangle[0], rectangle[3] - rectangle[0]]
    lengths = [float(np.hypot(*edge)) for edge in edges]
    if min(lengths) < 0.2:
        return np.zeros((0, 4, 2))
    direction = np.array([np.cos(heading), np.sin(heading)])
    long = int(abs(edges[1] @ direction) / lengths[1] > abs(edges[0] @ direction) / lengths[0])
    across, width = edges[1 - long] / lengths[1 - long], lengths[1 - long]
    bars = []
    for start in np.arange(0.3, width - 0.3, 2.0 * BAR_M):
        low, high = rectangle[0] + across * start, rectangle[0] + across * min(start + BAR_M, width - 0.1)
        bars.append([low, high, high + edges[long], low + edges[long]])
    return np.array(bars).reshape(-1, 4, 2)


def _dashes(points: np.ndarray) -> list[np.ndarray]:
    """Pieces of _DASH_M metres with gaps of _GAP_M along a polyline (K, 2)."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    station = np.concatenate([[0.0], np.cumsum(steps)])
    pieces = []
    for start in np.arange(_GAP_M / 2.0, station[-1], _DASH_M + _GAP_M):
        stop = min(start + _DASH_M, station[-1])
        inner = station[(station > start) & (station < stop)]
        at = np.concatenate([[start], inner, [stop]])
        pieces.append(np.stack([np.interp(at, station, points[:, k]) for k in (0, 1)], axis=1))
    return pieces
