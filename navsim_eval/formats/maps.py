"""nuPlan maps as roads: how lanes, connectors and road blocks relate, where they lie, what drives on them.

Words: an *edge* is a lane or a lane connector (the drivable strip through an intersection); a *block* is a roadblock
(lane group) or a roadblock connector (lane group connector). Lanes never link to lanes directly: lanes and connectors
alternate, and so do roadblocks and roadblock connectors.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.errors import DataError
from navsim_eval.formats.map_layers import MAP_REMEDY, Layer, MapFile


class RoadMap(MapFile):
    """A city's map: its layers, and the relations between their rows by id.

    Raises DataError that names file and layer for an id that nothing belongs to and for an empty geometry.
    """

    # --- edges: lanes and lane connectors ---

    def is_connector(self, edge_id: str) -> bool:
        """Whether the id names a lane connector (False: a lane, or nothing)."""
        return edge_id in self.layer("lane_connectors").row

    def has_edge(self, edge_id: str) -> bool:
        """Whether the id names a lane or a lane connector of this map."""
        return edge_id in self.layer("lanes_polygons").row or self.is_connector(edge_id)

    def baseline(self, edge_id: str) -> np.ndarray:
        """(M, 2) float64 vertices of the edge's centre line in driving direction, as stored; M is 2 or more."""
        layer = self.layer("baseline_paths")
        vertices = shapely.get_coordinates(self._geometry(layer, self._baseline_rows, edge_id))
        if len(vertices) < 2:
            raise DataError(self.path, f"a single point for id {edge_id}", field=layer.name, remedy=MAP_REMEDY)
        return vertices

    def polygon(self, edge_id: str) -> shapely.Geometry:
        """Surface of the edge: the lane's own polygon, or the connector's scaled-width polygon."""
        if self.is_connector(edge_id):
            layer = self.layer("gen_lane_connectors_scaled_width_polygons")
            return self._geometry(layer, self._connector_polygon_rows, edge_id)
        layer = self.layer("lanes_polygons")
        return self._geometry(layer, layer.row, edge_id)

    def outgoing(self, edge_id: str) -> tuple[str, ...]:
        """Edges entered when this one is left, ascending fid."""
        return self._edge_graph.outgoing.get(edge_id, ())

    def incoming(self, edge_id: str) -> tuple[str, ...]:
        """Edges from which this one is entered, ascending fid."""
        return self._edge_graph.incoming.get(edge_id, ())

    def speed_limit(self, edge_id: str) -> float | None:
        """Speed limit [m/s], None where the map has none."""
        layer = self.layer("lane_connectors" if self.is_connector(edge_id) else "lanes_polygons")
        value = layer.columns["speed_limit_mps"][self._row(layer, layer.row, edge_id)]
        try:
            limit = float(value)
        except ValueError as error:
            field = f"{layer.name}.speed_limit_mps"
            raise DataError(self.path, f"'{value}' is no number", field=field, remedy=MAP_REMEDY) from error
        return limit if np.isfinite(limit) else None

    def block_of(self, edge_id: str) -> str | None:
        """Block that the edge belongs to: lane → roadblock, connector → roadblock connector; None if NULL."""
        if edge_id not in self._block_by_edge:
            raise DataError(self.path, f"no lane or lane connector with id {edge_id}")
        return self._block_by_edge[edge_id] or None

    # --- blocks: roadblocks and roadblock connectors ---

    def is_block_connector(self, block_id: str) -> bool:
        """Whether the id names a roadblock connector. An id found in both layers is a roadblock, as in nuPlan."""
        return block_id not in self.layer("lane_groups_polygons").row and (
            block_id in self.layer("lane_group_connectors").row
        )

    def has_block(self, block_id: str) -> bool:
        """Whether the id names a roadblock or roadblock connector of this map."""
        return block_id in self.layer("lane_groups_polygons").row or self.is_block_connector(block_id)

    def block_polygon(self, block_id: str) -> shapely.Geometry:
        """Surface of a roadblock or roadblock connector."""
        layer = self.layer("lane_group_connectors" if self.is_block_connector(block_id) else "lane_groups_polygons")
        return self._geometry(layer, layer.row, block_id)

    def roadblock_outgoing(self, block_id: str) -> tuple[str, ...]:
        """Blocks entered when this one is left, ascending fid."""
        return self._block_graph.outgoing.get(block_id, ())

    def roadblock_incoming(self, block_id: str) -> tuple[str, ...]:
        """Blocks from which this one is entered, ascending fid."""
        return self._block_graph.incoming.get(block_id, ())

    def interior_edges(self, block_id: str) -> tuple[str, ...]:
        """Lanes of a roadblock, or connectors of a roadblock connector, ascending fid."""
        kind = "lane_connectors" if self.is_block_connector(block_id) else "lanes_polygons"
        return self._interior[kind].get(block_id, ())

    @functools.cached_property
    def connector_polygon_ids(self) -> np.ndarray:
        """(n,) str: lane connector of each row of the layer of connector polygons."""
        return self.layer("gen_lane_connectors_scaled_width_polygons").keys("lane_connector_fid")

    # --- indices behind the relations, each built on first use ---

    @functools.cached_property
    def _baseline_rows(self) -> dict[str, int]:
        layer = self.layer("baseline_paths")
        return _first_rows(layer.keys("lane_fid")) | _first_rows(layer.keys("lane_connector_fid"))

    @functools.cached_property
    def _connector_polygon_rows(self) -> dict[str, int]:
        return _first_rows(self.connector_polygon_ids)

    @functools.cached_property
    def _edge_graph(self) -> _Graph:
        connectors, lanes = self.layer("lane_connectors"), self.layer("lanes_polygons")
        before, after = connectors.keys("exit_lane_fid"), connectors.keys("entry_lane_fid")
        return _alternating_graph(connectors, before, after, lanes)

    @functools.cached_property
    def _block_graph(self) -> _Graph:
        connectors, groups = self.layer("lane_group_connectors"), self.layer("lane_groups_polygons")
        before, after = connectors.keys("from_lane_group_fid"), connectors.keys("to_lane_group_fid")
        return _alternating_graph(connectors, before, after, groups)

    @functools.cached_property
    def _interior(self) -> dict[str, dict[str, tuple[str, ...]]]:
        lanes, connectors = self.layer("lanes_polygons"), self.layer("lane_connectors")
        return {
            "lanes_polygons": _grouped(lanes.keys("lane_group_fid"), lanes.ids),
            "lane_connectors": _grouped(connectors.keys("lane_group_connector_fid"), connectors.ids),
        }

    @functools.cached_property
    def _block_by_edge(self) -> dict[str, str]:
        lanes, connectors = self.layer("lanes_polygons"), self.layer("lane_connectors")
        blocks = dict(zip(lanes.ids.tolist(), lanes.keys("lane_group_fid").tolist(), strict=True))
        keys = connectors.keys("lane_group_connector_fid").tolist()
        return blocks | dict(zip(connectors.ids.tolist(), keys, strict=True))

    def _row(self, layer: Layer, rows: Mapping[str, int], id_: str) -> int:
        if id_ not in rows:
            raise DataError(self.path, f"nothing belongs to id {id_}", field=layer.name, remedy=MAP_REMEDY)
        return rows[id_]

    def _geometry(self, layer: Layer, rows: Mapping[str, int], id_: str) -> shapely.Geometry:
        geometry = layer.geometries[self._row(layer, rows, id_)]
        if geometry is None or geometry.is_empty:
            raise DataError(self.path, f"empty geometry for id {id_}", field=layer.name, remedy=MAP_REMEDY)
        return geometry


@dataclass(frozen=True)
class _Graph:
    """Successors and predecessors by id."""

    outgoing: Mapping[str, tuple[str, ...]]
    incoming: Mapping[str, tuple[str, ...]]


def _alternating_graph(connectors: Layer, before: np.ndarray, after: np.ndarray, nodes: Layer) -> _Graph:
    """Graph in which each connector joins one node `before` with one node `after`; NULL and unknown ids are no link."""
    outgoing: defaultdict[str, list[str]] = defaultdict(list)
    incoming: defaultdict[str, list[str]] = defaultdict(list)
    for connector, source, target in zip(connectors.ids.tolist(), before.tolist(), after.tolist(), strict=True):
        if source in nodes.row:
            outgoing[source].append(connector)
            incoming[connector].append(source)
        if target in nodes.row:
            outgoing[connector].append(target)
            incoming[target].append(connector)
    return _Graph({k: tuple(v) for k, v in outgoing.items()}, {k: tuple(v) for k, v in incoming.items()})


def _grouped(keys: np.ndarray, ids: np.ndarray) -> dict[str, tuple[str, ...]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, id_ in zip(keys.tolist(), ids.tolist(), strict=True):
        groups[key].append(id_)
    return {key: tuple(members) for key, members in groups.items() if key}


def _first_rows(keys: np.ndarray) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, key in enumerate(keys.tolist()):
        if key:
            rows.setdefault(key, row)
    return rows
