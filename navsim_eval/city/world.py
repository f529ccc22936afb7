"""What stands beside the roads of any map: buildings, trees, lamp posts, stop signs and traffic lights.

Scenery is made square by square from the map and a seed, so a place looks the same whenever it is visited. Nothing
stands on roads, sidewalks (but lamp posts), or car parks. Coordinates: global (UTM) metres; heights above ground.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.city import meshes
from navsim_eval.city.approaches import Approaches, signalised_connectors
from navsim_eval.city.meshes import Mesh
from navsim_eval.city.textures import BAY_M, FLOOR_M, FOLIAGE, HOUSE_STYLES
from navsim_eval.formats.maps import RoadMap

SQUARE_M = 128.0
SUN = np.array([0.52, -0.42, 0.74]) / np.linalg.norm([0.52, -0.42, 0.74])
_ROADS = (
    "lane_groups_polygons", "lanes_polygons", "intersections", "gen_lane_connectors_scaled_width_polygons",
    "lane_group_connectors", "generic_drivable_areas", "carpark_areas",
)  # fmt: skip
_MAX_SQUARES = 64
_HEAD_SPACING_M, _HEAD_HEIGHT_M = 0.72, 5.4
_LONGEST_JUNCTION_M = 45.0
_TINTS = np.array(
    [[196, 120, 92], [172, 104, 82], [214, 196, 166], [226, 214, 188], [190, 186, 178], [168, 170, 172],
     [204, 176, 140], [150, 128, 112], [222, 222, 216], [182, 156, 130], [206, 148, 116], [160, 164, 176]],
    np.float32,
)  # fmt: skip
_ROOFS = np.array([[92, 88, 86], [112, 70, 56], [80, 84, 92], [128, 122, 116]], np.float32)
_LEAVES = np.array([[74, 104, 46], [92, 118, 52], [62, 92, 48], [112, 124, 56]], np.float32)
_BARK = np.array([92, 74, 58], np.float32)
_STEEL = np.array([104, 108, 112], np.float32)


@dataclass(frozen=True)
class Square:
    """The scenery of one square.

    mesh:    vertices relative to `origin`
    thin:    (T, 2, 3) float64 lower and upper corners, relative to `origin`, of things narrower than a few pixels
    shadows: polygons (K, 2) in global metres
    """

    origin: np.ndarray
    mesh: Mesh
    thin: np.ndarray
    shadows: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Signal:
    """One traffic light head.

    connector: lane connector that it controls
    head:      (3,) centre of the head, global x, y and height [m];  facing: heading of the traffic it addresses [rad]
    post:      (2,) foot of the post, global, where this head carries the arm of its approach; else None
    """

    connector: str
    head: np.ndarray
    facing: float
    post: np.ndarray | None


class Scenery:
    """Static surroundings of one map, made lazily."""

    def __init__(self, road_map: RoadMap, approaches: Approaches, seed: int = 0):
        self._map = road_map
        self._approaches = approaches
        self._seed = seed
        self._gantries: dict[tuple[str, ...], list[Signal]] = {}
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
        """Shadow polygons (K, 2) of everything that stands within 40 m of the given square."""
        low = np.floor(np.array([x0 - 40.0, y0 - 40.0]) / SQUARE_M).astype(int)
        high = np.floor(np.array([x1 + 40.0, y1 + 40.0]) / SQUARE_M).astype(int)
        result: list[np.ndarray] = []
        for ix in range(low[0], high[0] + 1):
            for iy in range(low[1], high[1] + 1):
                result += self.square(ix, iy).shadows
        return result

    # --- one square ---

    def _build(self, ix: int, iy: int) -> Square:
        rng = np.random.default_rng([self._seed, ix & 0xFFFFFFFF, iy & 0xFFFFFFFF])
        origin = np.array([ix, iy], np.float64) * SQUARE_M
        bounds = shapely.box(*origin, *(origin + SQUARE_M))
        roads = self._union(_ROADS, bounds)
        if roads.is_empty:
            return Square(origin, meshes.merge([]), np.zeros((0, 2, 3)), ())
        paved = shapely.union(roads, self._union(("walkways",), bounds))
        builder = _SquareBuilder(origin, bounds, rng)
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

    # --- traffic lights ---

    @functools.cached_property
    def _signals_by_group(self) -> dict[str, tuple[str, ...]]:
        """Lane group → its signalised connectors, ascending row."""
        connectors = self._map.layer("lane_connectors")
        exits = connectors.keys("exit_lane_fid").tolist()
        groups: dict[str, list[str]] = {}
        for row in np.flatnonzero(signalised_connectors(self._map)):
            if exits[row] in self._approaches.rows:
                group = str(self._approaches.groups[self._approaches.rows[exits[row]]])
                groups.setdefault(group, []).append(str(connectors.ids[row]))
        return {group: tuple(members) for group, members in groups.items()}

    def signals(self, x: float, y: float, radius: float, listed: Collection[str] = ()) -> list[Signal]:
        """Heads for lanes that end within `radius` of (x, y): of connectors with a signal in the map, or `listed`."""
        near = np.hypot(self._approaches.ends[:, 0] - x, self._approaches.ends[:, 1] - y) < radius
        extra = self._listed_by_group(listed)
        result: list[Signal] = []
        for group in sorted(set(self._approaches.groups[near].tolist())):
            members = tuple(dict.fromkeys([*self._signals_by_group.get(group, ()), *extra.get(group, ())]))
            if members:
                result += self._gantry(members)
        return result

    def _listed_by_group(self, listed: Collection[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for connector in sorted(listed):
            for lane in self._map.incoming(connector):
                group = str(self._approaches.groups[self._approaches.rows[lane]])
                groups.setdefault(group, []).append(connector)
        return groups

    def _gantry(self, connectors: tuple[str, ...]) -> list[Signal]:
        """The heads of one approach: beyond the junction, in line with their lanes, on one arm from the right."""
        if connectors not in self._gantries:
            self._gantries[connectors] = self._place_gantry(connectors)
        return self._gantries[connectors]

    def _place_gantry(self, connectors: tuple[str, ...]) -> list[Signal]:
        rows = [self._approaches.rows[self._map.incoming(connector)[0]] for connector in connectors]
        direction = self._approaches.directions[rows].mean(0)
        ahead = direction / max(float(np.hypot(*direction)), 1e-9)
        right = np.array([ahead[1], -ahead[0]])
        ends = self._approaches.ends[rows]
        reach = max(self._far_side(end, ahead) + float((end - ends[0]) @ ahead) for end in ends)
        places = np.empty(len(connectors))
        for row in set(rows):
            # Heads of one lane hang side by side, left turns on the left.
            lane = [k for k in range(len(rows)) if rows[k] == row]
            lane.sort(key=lambda k: (-self._turn(connectors[k]), connectors[k]))
            for slot, k in enumerate(lane):
                places[k] = (ends[k] - ends[0]) @ right + _HEAD_SPACING_M * (slot - (len(lane) - 1) / 2.0)
        centres = ends[0] + ahead * reach + places[:, None] * right
        post = self._roadside(ends[0] + ahead * reach + places.max() * right, right)
        facing = float(np.arctan2(ahead[1], ahead[0]))
        carrier = int(np.argmin(places))
        return [
            Signal(connector, np.array([*centre, _HEAD_HEIGHT_M]), facing, post if k == carrier else None)
            for k, (connector, centre) in enumerate(zip(connectors, centres, strict=True))
        ]

    def _turn(self, connector: str) -> float:
        """Change of heading along a connector, left positive [rad]."""
        path = self._map.baseline(connector)
        first, last = path[1] - path[0], path[-1] - path[-2]
        return float(np.arctan2(first[0] * last[1] - first[1] * last[0], first @ last))

    def _far_side(self, start: np.ndarray, ahead: np.ndarray) -> float:
        """Distance from a lane's end, straight on, to just beyond the junction's surface [m]."""
        layer = self._map.layer("intersections")
        ray = shapely.LineString([start + 0.5 * ahead, start + _LONGEST_JUNCTION_M * ahead])
        longest = 12.0
        for row in np.sort(layer.tree.query(shapely.Point(start + ahead), predicate="dwithin", distance=1.0)):
            crossed = shapely.get_coordinates(shapely.intersection(ray, layer.geometries[row]))
            if len(crossed):
                longest = max(longest, float(((crossed - start) @ ahead).max()))
        return min(longest, _LONGEST_JUNCTION_M) + 1.0

    def _roadside(self, point: np.ndarray, right: np.ndarray) -> np.ndarray:
        """First place to the right of `point` that is not road, at most 18 m away."""
        offsets = np.arange(1.0, 18.0, 0.5)
        candidates = point + offsets[:, None] * right
        free = np.flatnonzero(~self._on_road(candidates))
        return candidates[free[0]] + 0.4 * right if len(free) else candidates[-1]

    def _on_road(self, points: np.ndarray) -> np.ndarray:
        """(N,) bool: points (N, 2) that lie on some drivable polygon."""
        road = np.zeros(len(points), bool)
        probes = shapely.points(points)
        for name in _ROADS:
            layer = self._map.layer(name)
            if len(layer):
                road[layer.tree.query(probes, predicate="intersects")[0]] = True
        return road

    def _stop_signs(self, origin: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """Foot (2,) and heading of the traffic addressed, of the signs whose lane ends in the square at `origin`."""
        ends = self._approaches.ends
        inside = ((ends >= origin) & (ends < origin + SQUARE_M)).all(1) & self._approaches.stop_sign
        signs: dict[str, tuple[np.ndarray, float]] = {}
        for row in np.flatnonzero(inside):
            ahead = self._approaches.directions[row]
            foot = self._roadside(ends[row] - ahead, np.array([ahead[1], -ahead[0]]))
            signs.setdefault(str(self._approaches.groups[row]), (foot, float(np.arctan2(ahead[1], ahead[0]))))
        return list(signs.values())


class _SquareBuilder:
    """Collects the scenery of a square; each step avoids what the earlier ones placed."""

    def __init__(self, origin: np.ndarray, bounds: shapely.Polygon, rng: np.random.Generator):
        self.origin, self.bounds, self.rng = origin, bounds, rng
        self.inner = bounds.buffer(-0.5)
        self.meshes: list[Mesh] = []
        self.thin: list[np.ndarray] = []
        self.shadows: list[np.ndarray] = []
        self.taken: list[shapely.Polygon] = []
        # The character of the quarter: from low houses to office blocks.
        self.density = float(rng.beta(1.2, 1.6))

    def finish(self) -> Square:
        thin = np.array(self.thin) if self.thin else np.zeros((0, 2, 3))
        return Square(self.origin, meshes.merge(self.meshes), thin, tuple(self.shadows))

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
        low, high = self.origin + 4.0, self.origin + SQUARE_M - 4.0
        while at < station[-1] - 8.0:
            here = [np.interp(at + 8.0, station, ring[:, k]) for k in (0, 1)]
            if (here < low).any() or (here > high).any():
                at += 4.0
                continue
            width = BAY_M * int(self.rng.integers(3, 8))
            depth = BAY_M * int(self.rng.integers(3, 6))
            height = self._height(tall)
            gap = float(self.rng.choice([0.3, 0.3, 2.5, 7.0]))
            tint, style = self.rng.integers(len(_TINTS)), self.rng.integers(HOUSE_STYLES)
            ends = np.stack([np.interp([at, at + width], station, ring[:, k]) for k in (0, 1)], axis=1)
            placed = self._try_house(ends, width, depth, blocked)
            if placed is None:
                at += 4.0
                continue
            corners = placed
            pitched = height < 10.0 and depth < 14.0 and bool(self.rng.random() < 0.6)
            self.meshes.append(_house(corners - self.origin, height, _TINTS[tint], int(style), pitched, self.rng))
            self.taken.append(shapely.Polygon(corners).buffer(0.2, join_style="mitre"))
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
        polygon = shapely.Polygon(corners)
        if not self.inner.contains(polygon) or blocked.intersects(polygon):
            return None
        if self.taken and shapely.intersects(self.taken, polygon).any():
            return None
        return corners

    def lamp_posts(self, roads: shapely.Geometry) -> None:
        """Every 30 m, half a metre from the road, the arm towards it."""
        for ring in _rings(roads.buffer(0.6, quad_segs=2).simplify(0.2), self.bounds):
            for point, normal in _stations(ring, 30.0, float(self.rng.uniform(5.0, 25.0))):
                if not self.inner.contains(shapely.Point(point)):
                    continue
                local = point - self.origin
                self.meshes.append(meshes.transform(_lamp_post(), local, np.arctan2(-normal[1], -normal[0])))
                self.thin.append(np.array([[*(local - 0.15), 0.0], [*(local + 0.15), 7.6]]))
                arm = local - normal * 1.7
                self.thin.append(
                    np.array([[*(np.minimum(local, arm) - 0.2), 7.3], [*(np.maximum(local, arm) + 0.2), 7.7]])
                )

    def stop_signs(self, signs: Sequence[tuple[np.ndarray, float]]) -> None:
        """A red octagon on a post at each foot, facing the traffic."""
        for foot, heading in signs:
            local = foot - self.origin
            self.meshes.append(meshes.transform(_stop_sign(), local, heading))
            self.thin.append(np.array([[*(local - 0.5), 0.0], [*(local + 0.5), 2.9]]))

    def trees(self, paved: shapely.Geometry) -> None:
        """A row behind the sidewalk, and some in the yards."""
        shapely.prepare(paved)
        spots = []
        for ring in _rings(paved.buffer(1.5, quad_segs=2).simplify(0.3), self.bounds):
            spots += [point for point, _ in _stations(ring, 10.0 + 8.0 * self.density, self.rng.uniform(0.0, 10.0))]
        count = int(22 * (1.0 - self.density))
        spots += list(self.origin + self.rng.uniform(4.0, SQUARE_M - 4.0, (count, 2)))
        for spot in spots:
            point = np.asarray(spot) + self.rng.uniform(-0.4, 0.4, 2)
            height = float(self.rng.uniform(4.5, 9.5))
            kind, tone = int(self.rng.integers(3)), self.rng.integers(len(_LEAVES))
            seed = int(self.rng.integers(8))
            disc = shapely.Point(point).buffer(0.9)
            if paved.intersects(disc) or not self.inner.contains(disc):
                continue
            if self.taken and shapely.intersects(self.taken, disc).any():
                continue
            local = point - self.origin
            radius = 0.23 * height
            self.meshes.append(meshes.transform(_tree(kind, int(tone), seed), local, seed * 0.8, 0.0, height))
            self.thin.append(np.array([[*(local - radius), 0.15 * height], [*(local + radius), height]]))
            self.thin.append(np.array([[*(local - 0.2), 0.0], [*(local + 0.2), 0.5 * height]]))
            shift = -SUN[:2] / SUN[2] * height * 0.62
            self.shadows.append(point + shift + meshes.circle(radius * 0.9, 10))


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


def _stations(ring: np.ndarray, spacing: float, start: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Points along an outline with the normal that points away from the area, every `spacing` metres."""
    delta = np.diff(ring, axis=0)
    steps = np.hypot(*delta.T)
    station = np.concatenate([[0.0], np.cumsum(steps)])
    result = []
    for at in np.arange(start, station[-1], spacing):
        segment = min(int(np.searchsorted(station, at, side="right")) - 1, len(steps) - 1)
        along = delta[segment] / max(steps[segment], 1e-9)
        point = ring[segment] + along * (at - station[segment])
        result.append((point, np.array([-along[1], along[0]])))
    return result


def _shadow(corners: np.ndarray, height: float) -> np.ndarray:
    """Outline (K, 2) of the shadow of a block with the given foot."""
    moved = corners - SUN[:2] / SUN[2] * height
    hull = shapely.convex_hull(shapely.multipoints(np.concatenate([corners, moved])))
    return shapely.get_coordinates(hull)[:-1]


def _house(
    corners: np.ndarray, height: float, tint: np.ndarray, style: int, pitched: bool, rng: np.random.Generator
) -> Mesh:
    """Walls with a front picture, and a flat or a pitched roof. corners: (4, 2) counter-clockwise, front first."""
    base = np.c_[corners, np.zeros(4)]
    top = np.c_[corners, np.full(4, height)]
    vertices = np.concatenate([base, top])
    sides = np.array([[k, (k + 1) % 4, (k + 1) % 4 + 4, k + 4] for k in range(4)])
    points, faces, group = meshes.quads(vertices, sides)
    walls = meshes.flat_mesh(points, faces, tint, group)
    for k in range(4):
        along = corners[(k + 1) % 4] - corners[k]
        along = along / np.hypot(*along)
        walls.wall[2 * k : 2 * k + 2] = (*along, along @ corners[k], style)
    roof_color = _ROOFS[int(rng.integers(len(_ROOFS)))]
    if not pitched:
        lip = shapely.get_coordinates(shapely.Polygon(corners).buffer(0.25, join_style="mitre").exterior)[:-1]
        if shapely.is_ccw(shapely.LinearRing(lip)):
            slab = meshes.prism(lip, height, height + 0.5)
        else:
            slab = meshes.prism(lip[::-1], height, height + 0.5)
        return meshes.merge([walls, meshes.flat_mesh(*slab[:2], roof_color * 1.25, slab[2])])
    rise = 0.36 * float(np.hypot(*(corners[3] - corners[0])))
    ridge = np.stack([(corners[0] + corners[3]) / 2.0, (corners[1] + corners[2]) / 2.0])
    eave = np.c_[corners, np.full(4, height)]
    gable_points = np.concatenate([eave, np.c_[ridge, np.full(2, height + rise)]])
    slopes, slope_faces, slope_group = meshes.quads(gable_points, np.array([[0, 1, 5, 4], [2, 3, 4, 5]]))
    gables = meshes.flat_mesh(gable_points, np.array([[3, 0, 4], [1, 2, 5]]), tint * 0.95)
    return meshes.merge([walls, meshes.flat_mesh(slopes, slope_faces, roof_color, slope_group), gables])


@functools.lru_cache(maxsize=1)
def _lamp_post() -> Mesh:
    pole = meshes.prism(meshes.circle(0.09, 6), 0.0, 7.6, 0.7)
    arm = meshes.box((0.0, -0.05, 7.5), (1.7, 0.05, 7.6))
    lamp = meshes.box((1.2, -0.14, 7.42), (1.85, 0.14, 7.52))
    foot = meshes.prism(meshes.circle(0.16, 6), 0.0, 0.6)
    return meshes.merge([meshes.flat_mesh(p[0], p[1], _STEEL * shade, p[2])
                         for p, shade in ((pole, 1.0), (arm, 1.0), (lamp, 1.6), (foot, 0.8))])  # fmt: skip


@functools.lru_cache(maxsize=1)
def _stop_sign() -> Mesh:
    """Facing traffic that drives along +x, that is, shown towards -x."""
    parts = []
    for x, radius, color in ((0.0, 0.42, (232, 232, 228)), (-0.012, 0.37, (196, 24, 30))):
        ring = meshes.circle(radius, 8, np.pi / 8.0)
        points = np.c_[np.full(8, x), -ring[:, 0], ring[:, 1] + 2.4]
        fan = np.stack([np.zeros(6, np.int64), np.arange(1, 7), np.arange(2, 8)], axis=1)
        parts.append(meshes.flat_mesh(points, fan, color, np.zeros(6)))
    for low, high in ((-0.27, -0.17), (-0.11, -0.01), (0.05, 0.15), (0.19, 0.29)):  # the word, from afar
        letter = meshes.quads(
            [[-0.022, -low, 2.31], [-0.022, -high, 2.31], [-0.022, -high, 2.49], [-0.022, -low, 2.49]], [[0, 1, 2, 3]]
        )
        parts.append(meshes.flat_mesh(letter[0], letter[1], (236, 236, 232), letter[2]))
    back = meshes.prism(meshes.circle(0.04, 6) + np.array([0.06, 0.0]), 0.0, 2.75)
    plate = meshes.box((0.004, -0.34, 2.08), (0.02, 0.34, 2.72))
    parts += [meshes.flat_mesh(p[0], p[1], _STEEL, p[2]) for p in (back, plate)]
    return meshes.merge(parts)


@functools.lru_cache(maxsize=128)
def _tree(kind: int, tone: int, seed: int) -> Mesh:
    """A tree of height 1: round, oval or conical crown of leaf clumps on a trunk."""
    rng = np.random.default_rng([kind, tone, seed, 5])
    trunk = meshes.prism(meshes.circle(0.022, 6), 0.0, 0.5, 0.7)
    parts = [meshes.flat_mesh(trunk[0], trunk[1], _BARK, trunk[2])]
    if kind == 2:
        for z0, z1, radius in ((0.16, 0.62, 0.20), (0.40, 0.84, 0.15), (0.62, 1.0, 0.10)):
            cone = meshes.prism(meshes.circle(radius, 9, rng.uniform(0, 1)), z0, z1, 0.06)
            shade = rng.uniform(0.72, 1.08, (len(cone[1]), 1))
            parts.append(_leafy(meshes.flat_mesh(cone[0], cone[1], _LEAVES[2] * 0.85 * shade, cone[2])))
        return meshes.merge(parts)
    clumps = [(0.0, 0.0, 0.66, 0.20)]
    clumps += [(*(0.11 * np.array([np.cos(a), np.sin(a)])), rng.uniform(0.52, 0.84), rng.uniform(0.10, 0.14))
               for a in np.arange(5) * 1.257 + rng.uniform(0, 1)]  # fmt: skip
    clumps.append((0.0, 0.0, 0.87, 0.125))
    for place, (x, y, z, radius) in enumerate(clumps):
        points, faces, _ = meshes.sphere() if place == 0 else meshes.icosahedron()
        bumpy = points * (radius * rng.uniform(0.86, 1.12, (len(points), 1)))
        vertices = bumpy * np.array([1.0, 1.0, 1.0 if kind == 0 else 1.15]) + np.array([x, y, z])
        shade = rng.uniform(0.70, 1.15, (len(faces), 1))
        parts.append(_leafy(meshes.flat_mesh(vertices, faces, _LEAVES[tone] * shade)))
    return meshes.merge(parts)


def _leafy(mesh: Mesh) -> Mesh:
    """The mesh with a picture of leaves on each face, running along the face's own horizontal direction."""
    normals = mesh.normals
    level = np.hypot(normals[:, 0], normals[:, 1])
    along = np.where(level[:, None] > 1e-3, np.stack([-normals[:, 1], normals[:, 0]], axis=1), np.array([1.0, 0.0]))
    along = along / np.maximum(np.hypot(*along.T)[:, None], 1e-9)
    mesh.wall[:, :2], mesh.wall[:, 3] = along, FOLIAGE
    return mesh


_LAMP_COLORS = {True: (255.0, 40.0, 30.0), False: (40.0, 235.0, 110.0)}


def signal_mesh(signal: Signal, is_red: bool | None, origin: np.ndarray) -> Mesh:
    """Head with three lamps, and the post and arm it carries. Vertices relative to `origin` (2,).

    is_red: the upper or the lower lamp shines; None leaves all dark
    """
    head, height = signal.head[:2] - origin, float(signal.head[2])
    parts = []
    if signal.post is not None:
        foot, mast = signal.post - origin, height + 0.75
        across = head - foot
        pole = meshes.prism(meshes.circle(0.12, 6), 0.0, mast + 0.1)
        arm = meshes.box((0.0, -0.06, mast - 0.12), (max(float(np.hypot(*across)), 0.1) + 0.3, 0.06, mast))
        steel = meshes.merge([meshes.flat_mesh(p[0], p[1], _STEEL, p[2]) for p in (pole, arm)])
        parts.append(meshes.transform(steel, foot, float(np.arctan2(across[1], across[0]))))
    # The head is drawn looking back along -x, towards the traffic.
    housing = meshes.box((-0.14, -0.24, -0.66), (0.14, 0.24, 0.66))
    board = meshes.box((0.10, -0.33, -0.76), (0.13, 0.33, 0.76))
    local = [
        meshes.flat_mesh(housing[0], housing[1], (34, 36, 34), housing[2]),
        meshes.flat_mesh(board[0], board[1], (24, 26, 24), board[2]),
    ]
    for slot, (z, dark) in enumerate(((0.43, (70, 22, 20)), (0.0, (74, 58, 20)), (-0.43, (20, 62, 36)))):
        lit = is_red is not None and slot == (0 if is_red else 2)
        disc = meshes.circle(0.18, 12)
        ring = np.c_[np.full(12, -0.145), -disc[:, 0], disc[:, 1] + z]
        fan = np.stack([np.zeros(10, np.int64), np.arange(1, 11), np.arange(2, 12)], axis=1)
        lamp = meshes.flat_mesh(ring, fan, _LAMP_COLORS[is_red] if lit else dark, np.zeros(10))
        lamp.glow[:] = lit
        local.append(lamp)
    parts.append(meshes.transform(meshes.merge(local), head, signal.facing, height))
    return meshes.merge(parts)

