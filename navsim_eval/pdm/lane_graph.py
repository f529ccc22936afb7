"""What planning asks again and again about one map, computed once: lane paths with headings, lengths, overlaps.

Words as in `navsim_eval.formats.maps`: an edge is a lane or a lane connector, a block is a roadblock or a roadblock
connector.
"""

from __future__ import annotations

import functools

import numpy as np
import shapely

from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import wrap_angle
from navsim_eval.pdm.path import with_headings

LOOP_OVERLAP = 1.0  # m², two connectors of one route that share more than this cross each other


class LaneGraph:
    """A road map plus the tables that planning derives from it, filled on demand. Get one from `lane_graph`."""

    def __init__(self, road_map: RoadMap):
        self.road_map = road_map
        self._paths: dict[str, np.ndarray] = {}
        self._lengths: dict[str, float] = {}
        self._overlaps: dict[tuple[str, str], bool] = {}

    def path(self, edge: str) -> np.ndarray:
        """(M, 3) x, y, heading of an edge's baseline vertices, global."""
        if edge not in self._paths:
            self._paths[edge] = with_headings(self.road_map.baseline(edge))
        return self._paths[edge]

    def length(self, edge: str) -> float:
        """Length of an edge's baseline [m]."""
        if edge not in self._lengths:
            self._lengths[edge] = float(np.hypot(*np.diff(self.path(edge)[:, :2], axis=0).T).sum())
        return self._lengths[edge]

    def offset(self, edge: str, pose: np.ndarray) -> tuple[float, float]:
        """Distance [m] of a pose (3,) to the nearest baseline vertex, and |heading difference| there [rad]."""
        path = self.path(edge)
        squared = ((path[:, :2] - pose[:2]) ** 2).sum(axis=1)
        nearest = int(np.argmin(squared))
        return float(np.sqrt(squared[nearest])), float(abs(wrap_angle(path[nearest, 2] - pose[2])))

    def connectors_overlap(self, first: str, second: str) -> bool:
        """Whether two roadblock connectors share more than `LOOP_OVERLAP`."""
        if (first, second) not in self._overlaps:
            a, b = (self.road_map.block_polygon(block) for block in (first, second))
            self._overlaps[first, second] = bool(_shared_area(a, b) > LOOP_OVERLAP)
        return self._overlaps[first, second]


@functools.lru_cache(maxsize=16)
def lane_graph(road_map: RoadMap) -> LaneGraph:
    """The graph of a map, one per open map and process."""
    return LaneGraph(road_map)


def _shared_area(a: shapely.Geometry, b: shapely.Geometry) -> float:
    if not shapely.intersects(shapely.envelope(a), shapely.envelope(b)):
        return 0.0
    try:
        return shapely.area(shapely.intersection(a, b))
    except shapely.GEOSException:  # self-touching polygons occur in real maps
        return shapely.area(shapely.intersection(shapely.buffer(a, 0.0), shapely.buffer(b, 0.0)))
