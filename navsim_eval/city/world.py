"""What stands beside the roads of any map: buildings, trees, lamp posts and stop signs.

Scenery is made square by square from the map and a seed, so a place looks the same whenever it is visited. Nothing
stands on roads, sidewalks (but lamp posts), or car parks. Coordinates: global (UTM) metres; heights above ground.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.city import meshes
from navsim_eval.city.approaches import ROAD_LAYERS, Approaches, roadside
from navsim_eval.city.meshes import Mesh
from navsim_eval.city.props import LEAVES, TINTS, house, lamp_post, stop_sign, tree
from navsim_eval.city.textures import BAY_M, FLOOR_M, HOUSE_STYLES
from navsim_eval.formats.maps import RoadMap

SQUARE_M = 128.0
SUN = np.array([0.52, -0.42, 0.74]) / np.linalg.norm([0.52, -0.42, 0.74])
_MAX_SQUARES = 110
_MARGIN_M = 0.5  # between houses and the rim of their square
_STRIDE_M = 4.0  # by which a house that does not fit is moved on
@dataclass(frozen=True)
class Square:
    """The scenery of one square.

    near, far: the same things in more and in less detail, vertices relative to `origin`
    thin:    (T, 2, 3) float64 lower and upper corners, relative to `origin`, of things narrower than a few pixels
    shadows: polygons (K, 2) in global metres;  shadow_bounds: (S, 4) their lowest and highest x and y
    """

    origin: np.ndarray
    near: Mesh
    far: Mesh
    thin: np.ndarray
    shadows: tuple[np.ndarray, ...]
    shadow_bounds: np.ndarray


class Scenery:
    """Static surroundings of one map, made lazily."""

    def __init__(self, road_map: RoadMap, approaches: Approaches, seed: int = 0):
        self._map = road_map
        self._approaches = approaches
        self._seed = seed
        self._squares: OrderedDict[tuple[int, int], Square] = OrderedDict()

    def square(self, ix: int, iy: int) -> Square:
        """Scenery of [ix, ix + 1) × [iy, iy + 1) in units of SQUARE_M."""
        key = (ix, iy)
        if key in self._squares:
            self._squares.move_to_end(key)
            return self._squares[key]
        square = self._build(ix, iy)
        self._squares[key] = square
        if len(self._squares) > _MAX_SQUARES:
            self._squares.popitem(last=False)
        return square

    def shadows(self, x0: float, y0: float, x1: float, y1: float) -> list[np.ndarray]:
        """Shadow polygons (K, 2) that fall into the given rectangle, of everything up to 40 m around it."""
        low = np.floor(np.array([x0 - 40.0, y0 - 40.0]) / SQUARE_M).astype(int)
        high = np.floor(np.array([x1 + 40.0, y1 + 40.0]) / SQUARE_M).astype(int)
        result: list[np.ndarray] = []
        for ix in range(low[0], high[0] + 1):
            for iy in range(low[1], high[1] + 1):
                square = self.square(ix, iy)
                low_x, low_y, high_x, high_y = square.shadow_bounds.T
                meets = (low_x < x1) & (high_x > x0) & (low_y < y1) & (high_y > y0)
                result += [square.shadows[k] for k in np.flatnonzero(meets)]
        return result

    # --- one square ---

    def _build(self, ix: int, iy: int) -> Square:
        rng = np.random.default_rng([self._seed, ix & 0xFFFFFFFF, iy & 0xFFFFFFFF])
        origin = np.array([ix, iy], np.float64) * SQUARE_M
        builder = _SquareBuilder(origin, rng)
        roads = self._union((*ROAD_LAYERS, "carpark_areas"), builder.bounds)
        if not roads.is_empty:
            paved = shapely.union(roads, self._union(("walkways",), builder.bounds))
            builder.buildings(paved)
            builder.lamp_posts(roads)
            builder.stop_signs(self._stop_signs(origin))
            builder.trees(paved)
        return builder.finish()

    def _union(self, names: tuple[str, ...], bounds: shapely.Polygon, margin: float = 45.0) -> shapely.Geometry:
        """Union of the layers' polygons around a square, clipped to its surroundings."""
        around = bounds.buffer(margin, join_style="mitre")
        parts = []
        for name in names:
            layer = self._map.layer(name)
            if len(layer):
                parts.append(layer.geometries[np.sort(layer.tree.query(around))])
        if not parts:
            return shapely.Polygon()
        polygons = np.concatenate(parts)
        broken = ~shapely.is_valid(polygons)
        polygons[broken] = shapely.buffer(polygons[broken], 0.0)
        # Neighbours that touch but for a rounding error become one.
        return shapely.intersection(shapely.union_all(polygons), around).buffer(0.03, quad_segs=1)

    def _stop_signs(self, origin: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Foot (2,) and heading of the traffic addressed, of the signs whose lane ends in the square at `origin`."""
        ends = self._approaches.ends
        inside = ((ends >= origin) & (ends < origin + SQUARE_M)).all(1) & self._approaches.stop_sign
        signs: dict[str, tuple[np.ndarray, float]] = {}
        for row in np.flatnonzero(inside):
            ahead = self._approaches.directions[row]
            foot = roadside(self._map, ends[row] - ahead, np.array([ahead[1], -ahead[0]]))
            signs.setdefault(str(self._approaches.groups[row]), (foot, float(np.arctan2(ahead[1], ahead[0]))))
        return list(signs.values())


class _SquareBuilder:
    """Collects the scenery of a square; each step avoids what the earlier ones placed."""

    def __init__(self, origin: np.ndarray, rng: np.random.Generator):
        self.origin, self.rng = origin, rng
        self.low, self.high = origin + _MARGIN_M, origin + SQUARE_M - _MARGIN_M
        self.bounds = shapely.box(*origin, *(origin + SQUARE_M))
        self.meshes: list[Mesh] = []
        self.fine: list[Mesh] = []
        self.coarse: list[Mesh] = []
        self.thin: list[np.ndarray] = []
        self.shadows: list[np.ndarray] = []
        self.taken: list[shapely.Polygon] = []
        # The character of the quarter: from low houses to office blocks.
        self.density = float(rng.beta(1.2, 1.6))

    def finish(self) -> Square:
        thin = np.array(self.thin) if self.thin else np.zeros((0, 2, 3))
        bounds = np.array([[*ring.min(0), *ring.max(0)] for ring in self.shadows]).reshape(-1, 4)
        near, far = meshes.merge(self.meshes + self.fine), meshes.merge(self.meshes + self.coarse)
        return Square(self.origin, near, far, thin, tuple(self.shadows), bounds)

    def inside(self, points: np.ndarray) -> np.ndarray:
        """(...,) bool: points (..., 2) lie in the square, off its rim."""
        return ((points > self.low) & (points < self.high)).all(-1)

    def buildings(self, paved: shapely.Geometry) -> None:
        """A row of houses along the streets and a taller, looser row behind it."""
        for setback, tall in ((3.5, 1.0), (30.0, 1.7)):
            blocked = paved.buffer(setback - 0.6, quad_segs=2)
            shapely.prepare(blocked)
            for ring in _rings(paved.buffer(setback, quad_segs=3).simplify(0.3), self.bounds):
                self._row(ring, blocked, tall)

    def _row(self, ring: np.ndarray, blocked: shapely.Geometry, tall: float) -> None:
        steps = np.hypot(*np.diff(ring, axis=0).T)
        station = np.concatenate([[0.0], np.cumsum(steps)])
        at = float(self.rng.uniform(0.0, 3.0))
        while at < station[-1] - 8.0:
            if not self.inside(np.array([np.interp(at + 8.0, station, ring[:, k]) for k in (0, 1)])):
                at += _STRIDE_M
                continue
            width = BAY_M * int(self.rng.integers(3, 8))
            depth = BAY_M * int(self.rng.integers(3, 6))
            height = self._height(tall)
            gap = float(self.rng.choice([0.3, 0.3, 2.5, 7.0]))
            tint, style = self.rng.integers(len(TINTS)), self.rng.integers(HOUSE_STYLES)
            ends = np.stack([np.interp([at, at + width], station, ring[:, k]) for k in (0, 1)], axis=1)
            corners = self._try_house(ends, width, depth, blocked)
            if corners is None:
                at += _STRIDE_M
                continue
            pitched = height < 10.0 and depth < 14.0 and bool(self.rng.random() < 0.6)
            self.meshes.append(house(corners - self.origin, height, TINTS[tint], int(style), pitched, self.rng))
            self.taken.append(shapely.Polygon(corners))
            self.shadows.append(_shadow(corners, height + (2.0 if pitched else 0.0)))
            at += width + gap

    def _height(self, tall: float) -> float:
        floors = 2 + self.rng.geometric(0.75 - 0.5 * self.density) * (0.6 + 1.2 * self.density) * tall
        return FLOOR_M * float(min(round(floors), 16))

    def _try_house(self, ends: np.ndarray, width: float, depth: float, blocked: shapely.Geometry) -> np.ndarray | None:
        """Corners (4, 2) of a house with its front between `ends`, or None where it does not fit."""
        along = ends[1] - ends[0]
        chord = float(np.hypot(*along))
        if chord < 0.8 * width:
            return None
        along = along / chord
        middle = ends.mean(0)
        # The ring keeps the street on its right.
        back = np.array([-along[1], along[0]])
        left, right = middle - along * width / 2.0, middle + along * width / 2.0
        corners = np.stack([left, right, right + back * depth, left + back * depth])
        if not self.inside(corners).all():
            return None
        polygon = shapely.Polygon(corners)
        if blocked.intersects(polygon) or (self.taken and shapely.dwithin(self.taken, polygon, 0.2).any()):
            return None
        return corners

    def lamp_posts(self, roads: shapely.Geometry) -> None:
        """Every 30 m, half a metre from the road, the arm towards it."""
        for ring in _rings(roads.buffer(0.6, quad_segs=2).simplify(0.2), self.bounds):
            points, normals = _stations(ring, 30.0, float(self.rng.uniform(5.0, 25.0)))
            kept = self.inside(points)
            for point, normal in zip(points[kept] - self.origin, normals[kept], strict=True):
                self.meshes.append(meshes.transform(lamp_post(), point, np.arctan2(-normal[1], -normal[0])))
                arm = point - normal * 1.7
                self._add_thin(point - 0.15, point + 0.15, 0.0, 7.6)
                self._add_thin(np.minimum(point, arm) - 0.2, np.maximum(point, arm) + 0.2, 7.3, 7.7)

    def stop_signs(self, signs: Sequence[tuple[np.ndarray, float]]) -> None:
        """A red octagon on a post at each foot, facing the traffic."""
        for foot, heading in signs:
            point = foot - self.origin
            self.meshes.append(meshes.transform(stop_sign(), point, heading))
            self._add_thin(point - 0.5, point + 0.5, 0.0, 2.9)

    def trees(self, paved: shapely.Geometry) -> None:
        """A row behind the sidewalk, and some in the yards."""
        spots = [
            _stations(ring, 10.0 + 8.0 * self.density, float(self.rng.uniform(0.0, 10.0)))[0]
            for ring in _rings(paved.buffer(1.5, quad_segs=2).simplify(0.3), self.bounds)
        ]
        count = int(22 * (1.0 - self.density))
        spots.append(self.origin + self.rng.uniform(4.0, SQUARE_M - 4.0, (count, 2)))
        points = np.concatenate(spots)
        points = points[self.inside(points)]
        points += self.rng.uniform(-0.4, 0.4, points.shape)
        feet = shapely.points(points)
        shapely.prepare(paved)
        free = ~shapely.dwithin(paved, feet, 0.9)
        if self.taken:
            free &= ~shapely.dwithin(shapely.multipolygons(self.taken), feet, 0.9)
        for point in points[free]:
            height, seed = float(self.rng.uniform(4.5, 9.5)), int(self.rng.integers(8))
            kind, tone = int(self.rng.integers(3)), int(self.rng.integers(len(LEAVES)))
            local, radius = point - self.origin, 0.23 * height
            for coarse, parts in ((False, self.fine), (True, self.coarse)):
                parts.append(meshes.transform(tree(kind, tone, seed, coarse), local, 0.8 * seed, 0.0, height))
            self._add_thin(local - radius, local + radius, 0.15 * height, height)
            self._add_thin(local - 0.2, local + 0.2, 0.0, 0.5 * height)
            crown = point - SUN[:2] / SUN[2] * height * 0.62
            self.shadows.append(crown + meshes.circle(radius * 0.9, 10))

    def _add_thin(self, low: np.ndarray, high: np.ndarray, bottom: float, top: float) -> None:
        self.thin.append(np.array([[*low, bottom], [*high, top]]))


def _rings(area: shapely.Geometry, bounds: shapely.Polygon) -> list[np.ndarray]:
    """Closed outlines (K, 2) of an area that come near `bounds`, the area on their right-hand side."""
    result = []
    for part in shapely.get_parts(area):
        if part.geom_type != "Polygon" or part.is_empty:
            continue
        for ring in shapely.get_rings(shapely.orient_polygons(part, exterior_cw=True)):
            if ring.intersects(bounds):
                result.append(shapely.get_coordinates(ring))
    return result


def _stations(ring: np.ndarray, spacing: float, start: float) -> tuple[np.ndarray, np.ndarray]:
    """Points (S, 2) along an outline every `spacing` metres, and the normals (S, 2) that point away from the area."""
    delta = np.diff(ring, axis=0)
    steps = np.hypot(*delta.T)
    station = np.concatenate([[0.0], np.cumsum(steps)])
    at = np.arange(start, station[-1], spacing)
    segment = np.clip(np.searchsorted(station, at, side="right") - 1, 0, len(steps) - 1)
    along = delta[segment] / np.maximum(steps[segment], 1e-9)[:, None]
    return ring[segment] + along * (at - station[segment])[:, None], np.stack([-along[:, 1], along[:, 0]], axis=1)


def _shadow(corners: np.ndarray, height: float) -> np.ndarray:
    """Outline (K, 2) of the shadow of a block with the given foot."""
    moved = corners - SUN[:2] / SUN[2] * height
    hull = shapely.convex_hull(shapely.multipoints(np.concatenate([corners, moved])))
    return shapely.get_coordinates(hull)[:-1]
