"""Where lanes end at junctions, what makes traffic stop there, and where the roadside is. Global (UTM) metres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.formats.maps import RoadMap

ROAD_LAYERS = (
    "lane_groups_polygons", "lanes_polygons", "intersections", "gen_lane_connectors_scaled_width_polygons",
    "lane_group_connectors", "generic_drivable_areas",
)  # fmt: skip
STOP_SIGN = 1  # stop_polygons.stop_polygon_type_fid
_NEAR_M = 2.0


@dataclass(frozen=True)
class Approaches:
    """The ends of all lanes, in the order of the map's lane layer.

    lanes: (L,) str lane ids;  groups: (L,) str lane group ids;  rows: lane id → position in these arrays
    ends:  (L, 2) float64 last point of the centre line;  directions: (L, 2) unit vectors of travel there
    stop_line, stop_sign: (L,) bool, a line is painted across the lane, a stop sign stands beside it
    """

    lanes: np.ndarray
    groups: np.ndarray
    rows: dict[str, int]
    ends: np.ndarray
    directions: np.ndarray
    stop_line: np.ndarray
    stop_sign: np.ndarray


def signalised_connectors(road_map: RoadMap) -> np.ndarray:
    """(C,) bool for the rows of the lane connector layer: governed by a traffic light's stop line."""
    connectors = road_map.layer("lane_connectors")
    texts = connectors.columns.get("traffic_light_stop_line_fids")
    if texts is None:
        return np.zeros(len(connectors), bool)
    return np.array([bool(str(text or "").strip()) for text in texts.tolist()], bool)


def find_approaches(road_map: RoadMap) -> Approaches:
    """Collect the lane ends of a map. A stop polygon within two metres of an end belongs to it."""
    lanes = road_map.layer("lanes_polygons")
    connectors, stops = road_map.layer("lane_connectors"), road_map.layer("stop_polygons")
    ends, directions = np.zeros((len(lanes), 2)), np.zeros((len(lanes), 2))
    for row, lane in enumerate(lanes.ids.tolist()):
        path = road_map.baseline(lane)
        step = path[-1] - path[-2]
        ends[row], directions[row] = path[-1], step / max(float(np.hypot(*step)), 1e-9)
    left_by_signal = set(connectors.keys("exit_lane_fid")[signalised_connectors(road_map)].tolist())
    stop_line = np.isin(lanes.ids, list(left_by_signal))
    stop_sign = np.zeros(len(lanes), bool)
    if len(stops):
        near, polygon = stops.tree.query(shapely.points(ends), predicate="dwithin", distance=_NEAR_M)
        stop_line[near] = True
        kinds = np.asarray(stops.columns["stop_polygon_type_fid"], np.float64)
        stop_sign[near[kinds[polygon] == STOP_SIGN]] = True
    rows = {lane: row for row, lane in enumerate(lanes.ids.tolist())}
    return Approaches(lanes.ids, lanes.keys("lane_group_fid"), rows, ends, directions, stop_line, stop_sign)


def roadside(road_map: RoadMap, point: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(2,) first place on the ray from `point` to the `right` that is neither road nor car park, at most 18 m away."""
    offsets = np.arange(1.0, 18.0, 0.5)
    candidates = point + offsets[:, None] * right
    probes = shapely.points(candidates)
    paved = np.zeros(len(offsets), bool)
    for name in (*ROAD_LAYERS, "carpark_areas"):
        layer = road_map.layer(name)
        if len(layer):
            paved[layer.tree.query(probes, predicate="intersects")[0]] = True
    free = np.flatnonzero(~paved)
    return candidates[free[0]] + 0.4 * right if len(free) else candidates[-1]
