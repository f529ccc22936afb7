"""The map around the ego as scoring sees it: the polygons within a square patch, in the evaluator's list order."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import ego_center
from navsim_eval.pdm.types import AreaKind, DrivableMap

PATCH_HALF_SIDE = 100.0  # m, around the ego's centre


def build_drivable_map(road_map: RoadMap, ego_pose: np.ndarray, route_lanes: Collection[str]) -> DrivableMap:
    """Polygons that meet the patch around the ego: roadblocks, lanes, lane connectors, intersections, car parks.

    ego_pose: (3,) rear axle, global; route_lanes: lanes and connectors of the corrected route.
    Lanes and connectors come with the block that holds them. Roadblock connectors are left out, as are generic
    drivable areas: the published evaluators never load them.
    """
    x, y, _ = ego_center(ego_pose)

    def within_patch(layer_name: str) -> tuple[list[str], list]:
        layer = road_map.layer(layer_name)
        rows = layer.in_square(float(x), float(y), PATCH_HALF_SIDE)
        return layer.ids[rows].tolist(), list(layer.geometries[rows])

    def edges_of(blocks: list[str]) -> tuple[list[str], list]:
        edges = [edge for block in blocks for edge in road_map.interior_edges(block)]
        return edges, [road_map.polygon(edge) for edge in edges]

    roadblocks = within_patch("lane_groups_polygons")
    block_connectors, _ = within_patch("lane_group_connectors")
    areas = {
        AreaKind.ROADBLOCK: roadblocks,
        AreaKind.LANE: edges_of(roadblocks[0]),
        AreaKind.LANE_CONNECTOR: edges_of(block_connectors),
        AreaKind.INTERSECTION: within_patch("intersections"),
        AreaKind.CARPARK: within_patch("carpark_areas"),
    }
    ids = np.array([id_ for found, _ in areas.values() for id_ in found], dtype=np.str_)
    kinds = np.concatenate([np.full(len(found), kind, np.int8) for kind, (found, _) in areas.items()])
    polygons = np.empty(len(ids), dtype=object)
    polygons[:] = [polygon for _, found in areas.values() for polygon in found]
    is_edge = (kinds == AreaKind.LANE) | (kinds == AreaKind.LANE_CONNECTOR)
    return DrivableMap(ids, kinds, is_edge & np.isin(ids, list(route_lanes)), polygons)
