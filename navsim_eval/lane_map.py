"""A map out of lanes: enough layers of a nuPlan map to plan routes, paint training targets and score plans.

Lanes side by side in one direction form a *block*; a connector leads from a lane to a lane of the next block. Scoring
calls a point drivable inside a block, an intersection or a car park, so every connector gets an intersection under it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely

from navsim_eval.errors import UserError
from navsim_eval.formats.geopackage import FeatureTable
from navsim_eval.formats.map_store import write_map

DEFAULT_WIDTH = 3.5  # m
_OVERLAP = 0.05  # m that neighbouring surfaces reach into each other: a corner on a common edge is inside neither
_FIRST_BASELINE, _FIRST_SURFACE, _FIRST_INTERSECTION, _FIRST_BOUNDARY = 10**6, 2 * 10**6, 3 * 10**6, 4 * 10**6


@dataclass(frozen=True)
class Lane:
    """A lane. id: unique among lanes and connectors;  block: id of its block, unique among blocks

    centre: (n, 2) centre line [m] in driving direction, UTM;  index: 0 for the leftmost lane of the block
    """

    id: int
    block: int
    centre: np.ndarray
    index: int = 0
    width: float = DEFAULT_WIDTH
    speed_limit: float | None = None


@dataclass(frozen=True)
class Connector:
    """The way from the end of a lane to the start of another. block: id shared by connectors of the same two blocks."""

    id: int
    block: int
    source: int
    target: int
    centre: np.ndarray
    width: float = DEFAULT_WIDTH
    speed_limit: float | None = None
    stop_for_red: bool = False


def write_lane_map(
    root: Path | str,
    location: str,
    lanes: Sequence[Lane],
    connectors: Sequence[Connector] = (),
    *,
    epsg: int,
    version: str = "1.0",
    walkways: Sequence[shapely.Polygon] = (),
    car_parks: Sequence[shapely.Polygon] = (),
) -> Path:
    """Write <root>/<location>/<version>/map.gpkg with all layers that anything here reads. Returns its path.

    epsg: UTM zone of the coordinates (326zz north, 327zz south)
    Raises UserError for ids that occur twice, connectors between lanes that are not there, lines of one point.
    """
    _check(lanes, connectors)
    edges = [*lanes, *connectors]
    lines = {edge.id: shapely.LineString(np.asarray(edge.centre, float)) for edge in edges}
    surfaces = {edge.id: _surface(lines[edge.id], edge.width) for edge in edges}
    layers = {
        "lanes_polygons": _table(
            [lane.id for lane in lanes],
            [surfaces[lane.id] for lane in lanes],
            lane_fid=[lane.id for lane in lanes],
            lane_group_fid=[lane.block for lane in lanes],
            lane_index=[lane.index for lane in lanes],
            left_boundary_fid=[_boundary(lane.id, 0) for lane in lanes],
            right_boundary_fid=[_boundary(lane.id, 1) for lane in lanes],
            speed_limit_mps=[_limit(lane) for lane in lanes],
        ),
        "lane_connectors": _table(
            [c.id for c in connectors],
            [lines[c.id] for c in connectors],
            exit_lane_fid=[c.source for c in connectors],
            entry_lane_fid=[c.target for c in connectors],
            lane_group_connector_fid=[c.block for c in connectors],
            intersection_fid=[_FIRST_INTERSECTION + c.block for c in connectors],
            speed_limit_mps=[_limit(c) for c in connectors],
            traffic_light_stop_line_fids=["0" if c.stop_for_red else "" for c in connectors],
        ),
        "gen_lane_connectors_scaled_width_polygons": _table(
            [_FIRST_SURFACE + c.id for c in connectors],
            [surfaces[c.id] for c in connectors],
            lane_connector_fid=[c.id for c in connectors],
            left_boundary_fid=[_boundary(c.id, 0) for c in connectors],
            right_boundary_fid=[_boundary(c.id, 1) for c in connectors],
        ),
        "baseline_paths": _table(
            [_FIRST_BASELINE + edge.id for edge in edges],
            [lines[edge.id] for edge in edges],
            lane_fid=[float(lane.id) for lane in lanes] + [np.nan] * len(connectors),
            lane_connector_fid=[np.nan] * len(lanes) + [float(c.id) for c in connectors],
        ),
        "boundaries": _table(
            [_boundary(edge.id, side) for edge in edges for side in (0, 1)],
            [lines[edge.id].offset_curve(sign * edge.width / 2) for edge in edges for sign in (1, -1)],
            boundary_type_fid=[2] * 2 * len(edges),
        ),
        **_blocks(lanes, connectors, surfaces),
        "walkways": _table(range(1, len(walkways) + 1), walkways),
        "carpark_areas": _table(range(1, len(car_parks) + 1), car_parks, heading=[0.0] * len(car_parks)),
        "crosswalks": _table([], []),
        "generic_drivable_areas": _table([], []),
    }
    return write_map(root, location, version, layers, epsg)


def _blocks(
    lanes: Sequence[Lane], connectors: Sequence[Connector], surfaces: Mapping[int, shapely.Polygon]
) -> dict[str, FeatureTable]:
    groups = {block: [lane.id for lane in lanes if lane.block == block] for block in sorted({n.block for n in lanes})}
    links = {block: [c for c in connectors if c.block == block] for block in sorted({c.block for c in connectors})}
    block_of = {lane.id: lane.block for lane in lanes}
    joined = [_union([surfaces[c.id] for c in some]) for some in links.values()]
    return {
        "lane_groups_polygons": _table(groups, [_union([surfaces[i] for i in ids]) for ids in groups.values()]),
        "lane_group_connectors": _table(
            links,
            joined,
            from_lane_group_fid=[block_of[some[0].source] for some in links.values()],
            to_lane_group_fid=[block_of[some[0].target] for some in links.values()],
            intersection_fid=[_FIRST_INTERSECTION + block for block in links],
        ),
        "intersections": _table(
            [_FIRST_INTERSECTION + block for block in links], joined, intersection_type_fid=[5] * len(links)
        ),
    }


def _check(lanes: Sequence[Lane], connectors: Sequence[Connector]) -> None:
    if not lanes:
        raise UserError("lane map: there are no lanes")
    seen: set[int] = set()
    for edge in (*lanes, *connectors):
        if edge.id in seen or not 0 < edge.id < _FIRST_BASELINE:
            raise UserError(f"lane map: id {edge.id} occurs twice, or is not in 1 … {_FIRST_BASELINE - 1}")
        seen.add(edge.id)
        if np.ndim(edge.centre) != 2 or np.shape(edge.centre)[1] != 2 or len(edge.centre) < 2:
            raise UserError(f"lane map: centre of {edge.id} has shape {np.shape(edge.centre)}, (n ≥ 2, 2) is expected")
    ids = {lane.id for lane in lanes}
    for connector in connectors:
        lost = [lane for lane in (connector.source, connector.target) if lane not in ids]
        if lost:
            raise UserError(f"lane map: connector {connector.id} names lane {lost[0]}, which is not there")
    blocks = {lane.block for lane in lanes} & {connector.block for connector in connectors}
    if blocks:
        raise UserError(f"lane map: block {min(blocks)} is of lanes and of connectors; the ids must differ")


def _surface(line: shapely.LineString, width: float) -> shapely.Polygon:
    return line.buffer(width / 2 + _OVERLAP, cap_style="flat")


def _union(polygons: Sequence[shapely.Polygon]) -> shapely.Geometry:
    return shapely.union_all(list(polygons)).buffer(_OVERLAP, join_style="mitre")


def _limit(edge: Lane | Connector) -> float:
    return np.nan if edge.speed_limit is None else edge.speed_limit


def _boundary(edge: int, side: int) -> int:
    return _FIRST_BOUNDARY + 2 * edge + side


def _table(fids, geometries: Sequence[shapely.Geometry], **columns: list) -> FeatureTable:
    array = np.empty(len(geometries), dtype=object)
    array[:] = list(geometries)
    kinds = {name: object if name.endswith("_fids") else None for name in columns}
    values = {name: np.array(column, kinds[name]) for name, column in columns.items()}
    ids = np.array(list(fids), np.int64)
    order = np.argsort(ids, kind="stable")
    return FeatureTable(ids[order], array[order], {name: column[order] for name, column in values.items()})
