"""Traffic lights: where the heads of each approach hang, and what they look like.

The map knows stop lines and the logs know the state of each lane connector, but neither says where a light stands; so
every approach gets a gantry beyond the junction, one head for each connector, in line with its lane.
Coordinates: global (UTM) metres; heights above ground.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.city import meshes
from navsim_eval.city.approaches import Approaches, roadside, signalised_connectors
from navsim_eval.city.meshes import Mesh
from navsim_eval.formats.maps import RoadMap

_HEAD_SPACING_M, _HEAD_HEIGHT_M = 0.72, 5.4
_LONGEST_JUNCTION_M = 45.0
_STEEL = np.array([104, 108, 112], np.float32)


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


class Signals:
    """The traffic lights of one map, placed when first asked for."""

    def __init__(self, road_map: RoadMap, approaches: Approaches):
        self._map = road_map
        self._approaches = approaches
        self._gantries: dict[tuple[str, ...], list[Signal]] = {}

    @functools.cached_property
    def _by_group(self) -> dict[str, tuple[str, ...]]:
        """Lane group → its signalised connectors, ascending row."""
        connectors = self._map.layer("lane_connectors")
        exits = connectors.keys("exit_lane_fid").tolist()
        groups: dict[str, list[str]] = {}
        for row in np.flatnonzero(signalised_connectors(self._map)):
            if exits[row] in self._approaches.rows:
                group = str(self._approaches.groups[self._approaches.rows[exits[row]]])
                groups.setdefault(group, []).append(str(connectors.ids[row]))
        return {group: tuple(members) for group, members in groups.items()}

    def near(self, x: float, y: float, radius: float, listed: Collection[str] = ()) -> list[Signal]:
        """Heads for lanes that end within `radius` of (x, y): of connectors with a signal in the map, or `listed`."""
        near = np.hypot(self._approaches.ends[:, 0] - x, self._approaches.ends[:, 1] - y) < radius
        extra = self._listed_by_group(listed)
        result: list[Signal] = []
        for group in sorted(set(self._approaches.groups[near].tolist())):
            members = tuple(dict.fromkeys([*self._by_group.get(group, ()), *extra.get(group, ())]))
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
        post = roadside(self._map, ends[0] + ahead * reach + places.max() * right, right)
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
    parts.append(meshes.transform(_head(is_red), head, signal.facing, height))
    return meshes.merge(parts)


@functools.cache
def _head(is_red: bool | None) -> Mesh:
    """Housing, board and three lamps around the origin, shown towards -x: to traffic that drives along +x."""
    housing = meshes.box((-0.14, -0.24, -0.66), (0.14, 0.24, 0.66))
    board = meshes.box((0.10, -0.33, -0.76), (0.13, 0.33, 0.76))
    parts = [
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
        parts.append(lamp)
    return meshes.merge(parts)
