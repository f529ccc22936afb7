"""The ground as a picture: asphalt, lane markings, crosswalks, stop lines, sidewalks and grass, painted from the map.

The plane is cut into square tiles at five resolutions, each painted when first needed and kept for a while. A tile
follows from the map and the seed alone, so the order in which tiles are asked for cannot change a pixel.

Coordinates: global (UTM) metres. Texel (row, column) of a tile covers [x0 + column·r, +r] × [y0 + row·r, +r].
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely

from navsim_eval.city.approaches import ROAD_LAYERS, Approaches
from navsim_eval.city.textures import noise
from navsim_eval.formats.maps import RoadMap

TILE = 384  # texels per side of a tile
WINDOW = 768  # texels per side of a window
TEXEL_M = 0.04  # of level 0; each level doubles it
LEVELS = 4
CURB_HEIGHT_M = 0.13
CURB_COLOR = np.array([158, 156, 150], np.uint8)

GRASS, WALKWAY, CURB, ASPHALT, CARPARK = range(5)
_PALETTE = np.array(
    [[96, 113, 64], [166, 162, 154], [184, 181, 173], [86, 87, 90], [98, 98, 98]], np.uint8
)
_LOOK_UP = np.zeros((1, 256, 3), np.uint8)
_LOOK_UP[0, : len(_PALETTE)] = _PALETTE
_WHITE = np.array([226, 226, 220], np.float32)
_YELLOW = np.array([222, 178, 52], np.float32)
_DASHED, _SOLID = 0, 2
_DASH_M, _GAP_M = 3.0, 4.5
_LINE_M, _CENTER_LINE_M, _STOP_LINE_M = 0.15, 0.40, 0.40
_SHIFT = 4  # fractional bits of OpenCV's vertices
_MAX_TILES = 120
_FIRST_SUPERSAMPLED = 2  # coarser levels are painted at twice their resolution

ShadowSource = Callable[[float, float, float, float], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Window:
    """A square piece of ground.

    pixels: (WINDOW, WINDOW, 4) uint8 R, G, B and 255 where the ground is a raised sidewalk
    origin: (2,) float64 global position of the corner of texel (0, 0);  texel: side of a texel [m]
    """

    pixels: np.ndarray
    origin: np.ndarray
    texel: float


class GroundPainter:
    """Paints and keeps ground tiles of one map.

    approaches: lane ends, where stop lines are
    shadows: called with a square (x0, y0, x1, y1), gives polygons (K, 2) of static shadows that may fall into it
    """

    def __init__(
        self, road_map: RoadMap, approaches: Approaches, seed: int = 0, shadows: ShadowSource | None = None
    ):
        self._map = road_map
        self._approaches = approaches
        self._seed = seed
        self._shadows = shadows
        self._tiles: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._lines: dict[int, list[np.ndarray]] = {}

    def window(self, level: int, x: float, y: float) -> Window:
        """A fresh copy of the ground around (x, y), which is at most half a texel from the window's centre."""
        texel = TEXEL_M * 2**level
        column, row = round(x / texel) - WINDOW // 2, round(y / texel) - WINDOW // 2
        pixels = np.empty((WINDOW, WINDOW, 4), np.uint8)
        for iy, rows_out, rows_in in _pieces(row):
            for ix, columns_out, columns_in in _pieces(column):
                pixels[rows_out, columns_out] = self._tile(level, ix, iy)[rows_in, columns_in]
        return Window(pixels, np.array([column * texel, row * texel]), texel)

    def _tile(self, level: int, ix: int, iy: int) -> np.ndarray:
        key = (level, ix, iy)
        if key in self._tiles:
            self._tiles.move_to_end(key)
            return self._tiles[key]
        tile = self._paint(level, ix, iy)
        self._tiles[key] = tile
        if len(self._tiles) > _MAX_TILES:
            self._tiles.popitem(last=False)
        return tile

    def _paint(self, level: int, ix: int, iy: int) -> np.ndarray:
        """(TILE, TILE, 4) uint8 picture of one tile; fine lines of coarse tiles are thinned by coverage."""
        texel = TEXEL_M * 2**level
        side = TILE * texel
        canvas = _Canvas(ix * side, iy * side, side, TILE if level < _FIRST_SUPERSAMPLED else 2 * TILE)
        surface = self._surface(canvas)
        colors = _shade(surface, ix, iy, level, self._seed)
        white, yellow = self._markings(canvas)
        _blend(colors, white, _WHITE)
        _blend(colors, yellow, _YELLOW)
        image = cv2.merge([*cv2.split(colors), cv2.inRange(surface, WALKWAY, CURB)])
        if canvas.size != TILE:
            image = cv2.resize(image, (TILE, TILE), interpolation=cv2.INTER_AREA)
        if self._shadows is not None:
            self._cast_shadows(image, canvas)
        return image

    def _surface(self, canvas: _Canvas) -> np.ndarray:
        surface = np.full((canvas.size, canvas.size), GRASS, np.uint8)
        walkways = list(self._polygons("walkways", canvas))
        for polygon in walkways:
            canvas.fill(surface, polygon, WALKWAY)
        for polygon in walkways:
            canvas.outline(surface, polygon, CURB, 0.18)
        for polygon in self._polygons("carpark_areas", canvas):
            canvas.fill(surface, polygon, CARPARK)
        for layer in ROAD_LAYERS:
            for polygon in self._polygons(layer, canvas):
                canvas.fill(surface, polygon, ASPHALT)
        return surface

    def _markings(self, canvas: _Canvas) -> tuple[np.ndarray, np.ndarray]:
        """Coverage (size, size) uint8 of white and of yellow paint."""
        white = np.zeros((canvas.size, canvas.size), np.uint8)
        yellow = np.zeros_like(white)
        strokes: list[np.ndarray] = []
        centers: list[np.ndarray] = []
        boundaries = self._map.layer("boundaries")
        if len(boundaries):
            kinds = boundaries.columns["boundary_type_fid"]
            for row in canvas.rows(boundaries):
                if kinds[row] not in (_DASHED, _SOLID):
                    continue
                if row in self._centers:
                    centers.append(shapely.get_coordinates(boundaries.geometries[row]))
                else:
                    strokes += self._strokes(row, int(kinds[row]))
        canvas.lines(white, strokes, _LINE_M)
        canvas.lines(yellow, centers, _CENTER_LINE_M)
        canvas.gaps(yellow, centers, 0.14)
        for polygon in self._polygons("crosswalks", canvas):
            self._zebra(white, canvas, polygon)
        canvas.lines(white, [line for line in self._stop_lines if canvas.near(line)], _STOP_LINE_M)
        return white, yellow

    def _strokes(self, row: int, kind: int) -> list[np.ndarray]:
        """The painted pieces (K, 2) of a boundary."""
        if row not in self._lines:
            points = shapely.get_coordinates(self._map.layer("boundaries").geometries[row])
            self._lines[row] = [points] if kind == _SOLID else _dashes(points)
        return self._lines[row]

    def _zebra(self, white: np.ndarray, canvas: _Canvas, polygon: shapely.Geometry) -> None:
        """Bars along the direction of traffic, half a metre wide, one a metre."""
        heading = self._traffic_heading(polygon.centroid)
        rectangle = shapely.get_coordinates(shapely.oriented_envelope(polygon))[:4]
        edges = [rectangle[1] - rectangle[0], rectangle[3] - rectangle[0]]
        lengths = [float(np.linalg.norm(edge)) for edge in edges]
        if min(lengths) < 0.2:
            return
        direction = np.array([np.cos(heading), np.sin(heading)])
        bar = int(abs(edges[1] @ direction) / lengths[1] > abs(edges[0] @ direction) / lengths[0])
        across = edges[1 - bar] / lengths[1 - bar]
        starts = np.arange(0.3, lengths[1 - bar] - 0.3, 1.0)
        mask = np.zeros_like(white)
        for start in starts:
            stop = min(start + 0.5, lengths[1 - bar] - 0.1)
            low, high = rectangle[0] + across * start, rectangle[0] + across * stop
            canvas.fill_ring(mask, np.stack([low, high, high + edges[bar], low + edges[bar]]), 255)
        inside = np.zeros_like(white)
        canvas.fill(inside, polygon, 255)
        np.maximum(white, mask & inside, out=white)

    def _traffic_heading(self, point: shapely.Point) -> float:
        baselines = self._map.layer("baseline_paths")
        if not len(baselines):
            return 0.0
        points = shapely.get_coordinates(baselines.geometries[baselines.tree.nearest(point)])
        nearest = int(np.argmin(np.hypot(*(points[:-1] - [point.x, point.y]).T)))
        return float(np.arctan2(*(points[nearest + 1] - points[nearest])[::-1]))

    def _cast_shadows(self, image: np.ndarray, canvas: _Canvas) -> None:
        mask = np.zeros((TILE, TILE), np.uint8)
        small = _Canvas(canvas.x0, canvas.y0, canvas.side, TILE)
        for ring in self._shadows(*canvas.bounds):
            small.fill_ring(mask, ring, 255)
        if mask.any():
            dark = cv2.multiply(mask, np.full_like(mask, 255), scale=0.38 / 255.0)
            lit = cv2.merge([*([255 - dark] * 3), np.full_like(mask, 255)])
            cv2.multiply(image, lit, dst=image, scale=1.0 / 255.0)

    def _polygons(self, layer_name: str, canvas: _Canvas) -> Iterable[shapely.Geometry]:
        layer = self._map.layer(layer_name)
        if len(layer):
            yield from layer.geometries[canvas.rows(layer)]

    @functools.cached_property
    def _centers(self) -> frozenset[int]:
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

    @functools.cached_property
    def _stop_lines(self) -> list[np.ndarray]:
        """(2, 2) end points of the line across each lane where traffic has to stop."""
        lanes = self._map.layer("lanes_polygons")
        lines = []
        for row in np.flatnonzero(self._approaches.stop_line):
            direction = self._approaches.directions[row]
            foot = self._approaches.ends[row] - 0.35 * direction
            aside = 4.0 * np.array([-direction[1], direction[0]])
            cut = shapely.intersection(shapely.LineString([foot + aside, foot - aside]), lanes.geometries[row])
            points = shapely.get_coordinates(cut)
            if len(points) >= 2:
                lines.append(points[[0, -1]])
        return lines


class _Canvas:
    """Draws global geometry into arrays of `size` × `size` texels that cover a square."""

    def __init__(self, x0: float, y0: float, side: float, size: int):
        self.x0, self.y0, self.side, self.size = x0, y0, side, size
        self.texel = side / size
        self.bounds = (x0, y0, x0 + side, y0 + side)

    def rows(self, layer) -> list[int]:
        """Rows of a layer that may touch the square, ascending."""
        margin = 1.0
        square = shapely.box(self.x0 - margin, self.y0 - margin, self.bounds[2] + margin, self.bounds[3] + margin)
        return sorted(layer.tree.query(square).tolist())

    def vertices(self, points: np.ndarray) -> np.ndarray:
        """(K, 2) fixed-point texel coordinates."""
        scaled = (np.asarray(points)[:, :2] - [self.x0, self.y0]) / self.texel - 0.5
        return np.round(np.clip(scaled, -200000, 200000) * (1 << _SHIFT)).astype(np.int32)

    def fill(self, target: np.ndarray, polygon: shapely.Geometry, value: int) -> None:
        """Fill polygons, their holes left open."""
        for part in shapely.get_parts(polygon):
            rings = [self.vertices(shapely.get_coordinates(ring)) for ring in shapely.get_rings(part)]
            if rings:
                cv2.fillPoly(target, rings, value, cv2.LINE_8, _SHIFT)

    def fill_ring(self, target: np.ndarray, ring: np.ndarray, value: int) -> None:
        cv2.fillPoly(target, [self.vertices(ring)], value, cv2.LINE_8, _SHIFT)

    def outline(self, target: np.ndarray, polygon: shapely.Geometry, value: int, width: float) -> None:
        """Stroke the rings of polygons where a texel is not much coarser than the stroke."""
        if width < 0.5 * self.texel:
            return
        for part in shapely.get_parts(polygon):
            for ring in shapely.get_rings(part):
                points = self.vertices(shapely.get_coordinates(ring))
                cv2.polylines(target, [points], True, value, max(1, round(width / self.texel)), cv2.LINE_8, _SHIFT)

    def near(self, points: np.ndarray) -> bool:
        """Whether the bounding box of points (K, 2) comes within a metre of the square."""
        low, high = points.min(0), points.max(0)
        return bool(
            low[0] < self.bounds[2] + 1 and low[1] < self.bounds[3] + 1
            and high[0] > self.x0 - 1 and high[1] > self.y0 - 1
        )  # fmt: skip

    def lines(self, target: np.ndarray, lines: Sequence[np.ndarray], width: float) -> None:
        """Painted lines; thinner than a texel they get fainter instead."""
        texels = width / self.texel
        self._strokes(target, lines, max(1, round(texels)), round(255 * min(1.0, texels)))

    def gaps(self, target: np.ndarray, lines: Sequence[np.ndarray], width: float) -> None:
        """Leave the middle of lines free, making them double lines."""
        texels = width / self.texel
        if texels >= 1.0:
            self._strokes(target, lines, round(texels), 0)

    def _strokes(self, target: np.ndarray, lines: Sequence[np.ndarray], thickness: int, value: int) -> None:
        if lines:
            split = np.cumsum([len(points) for points in lines])[:-1]
            pieces = np.split(self.vertices(np.concatenate(lines)), split)
            cv2.polylines(target, pieces, False, value, thickness, cv2.LINE_AA, _SHIFT)


def _pieces(start: int) -> list[tuple[int, slice, slice]]:
    """How WINDOW texels from `start` on are put together of tiles: (tile, slice of the window, slice of the tile)."""
    pieces = []
    for tile in range(start // TILE, (start + WINDOW - 1) // TILE + 1):
        low, high = max(start, tile * TILE), min(start + WINDOW, (tile + 1) * TILE)
        pieces.append((tile, slice(low - start, high - start), slice(low - tile * TILE, high - tile * TILE)))
    return pieces


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


_GRAIN = 1024  # texels per side of the noise that roughens the ground, at the resolution of level 0


@functools.lru_cache(maxsize=2)
def _grain_fields(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Brightness factors (_GRAIN, _GRAIN) float32 of hard ground and of grass, tileable."""
    hard = 1.0 + 0.035 * noise(_GRAIN, 0.15, seed + 1) + 0.035 * noise(_GRAIN, 2.2, seed + 2)
    grass = 1.0 + 0.10 * noise(_GRAIN, 0.8, seed + 3) + 0.07 * noise(_GRAIN, 2.2, seed + 4)
    return hard, grass


@functools.lru_cache(maxsize=2 * LEVELS)
def _grain(level: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Brightness factors · 128 uint8 of hard ground and of grass, tileable, in the texels of a level's canvas."""
    size = _GRAIN >> (level if level < _FIRST_SUPERSAMPLED else level - 1)
    fields = [cv2.resize(field, (size, size), interpolation=cv2.INTER_AREA) for field in _grain_fields(seed)]
    hard, grass = (np.clip(np.round(field * 128), 0, 255).astype(np.uint8) for field in fields)
    return hard, grass


def _shade(surface: np.ndarray, ix: int, iy: int, level: int, seed: int) -> np.ndarray:
    """(n, n, 3) uint8 colours of the surface classes of tile (ix, iy) with their grain."""
    size = len(surface)
    factors = []
    for field in _grain(level, seed):
        rows = np.arange(iy * size, (iy + 1) * size) % len(field)
        columns = np.arange(ix * size, (ix + 1) * size) % len(field)
        factors.append(np.take(np.take(field, rows, axis=0), columns, axis=1))
    hard, grass = factors
    factor = cv2.copyTo(grass, cv2.inRange(surface, GRASS, GRASS), hard)
    colors = cv2.LUT(cv2.cvtColor(surface, cv2.COLOR_GRAY2RGB), _LOOK_UP)
    return cv2.multiply(colors, cv2.cvtColor(factor, cv2.COLOR_GRAY2RGB), scale=1.0 / 128.0)


def _blend(colors: np.ndarray, coverage: np.ndarray, paint: np.ndarray) -> None:
    """Paint over `colors` in place where coverage (0 to 255) is not zero; worn by the grain that is there."""
    if not cv2.countNonZero(coverage):
        return
    where = np.flatnonzero(coverage)
    flat = colors.reshape(-1, 3)
    weight = coverage.reshape(-1)[where].astype(np.float32)[:, None] * np.float32(0.92 / 255.0)
    flat[where] = (flat[where] * (1.0 - weight) + paint * weight).astype(np.uint8)
