"""From a SUMO network to the layers of a nuPlan map.

Lanes of one street become a lane group, movements through a junction become lane connectors, all movements between two
streets one lane group connector, the junction with everything a turning vehicle sweeps one intersection polygon (the
evaluator knows no other drivable surface under a connector). Strips for parked cars and car parks become carpark
areas, bicycle lanes belong to the lane group's polygon without being lanes.

Conventions that the published maps leave open: `traffic_lights.ori_mean_yaw` is the heading of the traffic that the
light controls [rad]; the light stands beyond the intersection, to the right of that traffic. Coordinates: UTM metres.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import shapely

from navsim_eval.city import lines
from navsim_eval.city.network import BICYCLE, PARKING, PEDESTRIAN
from navsim_eval.city.sumo_net import Junction, NetLane, NetLink, Network
from navsim_eval.formats.geopackage import FeatureTable
from navsim_eval.geometry import Vehicle, box_corners

IDS_PER_DISTRICT = 100_000
_LANES, _CONNECTORS, _GROUP_CONNECTORS = 5_000, 20_000, 60_000  # first id of a layer within a district; groups: 0
BASELINE_STEP_M = 1.0
STOP_LINE_DEPTH_M = 1.0
SEAM_M = 0.25  # overlap of neighbouring drivable polygons, so that no corner falls between two
SWEEP_RUN_OUT_M = 7.0  # how far behind a connector a turning vehicle's rear axle still counts as turning
_DASHED, _SOLID, _VIRTUAL = 0, 2, 3
_TRAFFIC_LIGHT_STOP, _YIELD_STOP, _SIGN_STOP = 2, 4, 1
_DEFAULT_JUNCTION, _SIGNAL_JUNCTION, _PASS_THROUGH = 0, 1, 5
_TURN_TYPES = {"s": 0, "l": 1, "L": 1, "r": 2, "R": 2, "t": 3}


@dataclass(frozen=True)
class MapIds:
    """Map ids of what SUMO names: lane id → lane, street → lane group, (lane, lane) → connector, … (all int)."""

    lanes: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    connectors: dict[tuple[str, str], int] = field(default_factory=dict)
    group_connectors: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class CarPark:
    """A paved area for parked cars beside a street. heading: along the bays [rad]; coordinates as the network's."""

    polygon: shapely.Polygon
    heading: float


def assign_ids(network: Network, index: int) -> MapIds:
    """Map ids of district number `index` of its location; depends on the network file alone."""
    base = (index + 1) * IDS_PER_DISTRICT
    ids = MapIds()
    for edge in network.edges:
        lanes = network.car_lanes(edge)
        if not lanes:
            continue
        ids.groups[edge] = base + len(ids.groups)
        for lane in lanes:
            ids.lanes[lane.id] = base + _LANES + len(ids.lanes)
    for link in network.links:
        ids.connectors[link.from_lane, link.to_lane] = base + _CONNECTORS + len(ids.connectors)
        pair = _edges(network, link)
        ids.group_connectors.setdefault(pair, base + _GROUP_CONNECTORS + len(ids.group_connectors))
    return ids


def district_layers(
    network: Network, ids: MapIds, index: int, offset: np.ndarray, car_parks: Sequence[CarPark] = ()
) -> dict[str, FeatureTable]:
    """All map layers of one district. offset: (2,) UTM position of its local origin [m]."""
    rows = _Rows(first=(index + 1) * IDS_PER_DISTRICT)
    surfaces = _add_streets(rows, network, ids)
    connectors = _add_connectors(rows, network, ids, surfaces)
    intersections = _add_intersections(rows, network, ids, surfaces, connectors)
    _add_stops(rows, network, ids, surfaces, intersections)
    _add_footpaths(rows, network)
    for park in car_parks:
        rows.add("carpark_areas", park.polygon, heading=park.heading)
    return rows.tables(offset)


def merge_layers(districts: Iterable[Mapping[str, FeatureTable]]) -> dict[str, FeatureTable]:
    """Layers of several districts as one map; ids are disjoint by construction."""
    districts = list(districts)
    merged = {}
    for name in districts[0]:
        tables = [d[name] for d in districts]
        columns = {c: np.concatenate([t.columns[c] for t in tables]) for c in tables[0].columns}
        fids = np.concatenate([t.fids for t in tables])
        merged[name] = FeatureTable(fids, np.concatenate([t.geometries for t in tables]), columns, tables[0].srs_id)
    return merged


# columns of every layer we write: name → kind (i integer, n nullable integer, r real, t text, b boolean)
_COLUMNS: dict[str, dict[str, str]] = {
    "lane_groups_polygons": {"left_boundary_fid": "i", "right_boundary_fid": "i"},
    "lanes_polygons": {
        **{"lane_fid": "i", "lane_group_fid": "i", "lane_index": "i", "left_boundary_fid": "i"},
        **{"right_boundary_fid": "i", "speed_limit_mps": "r", "lane_type_fid": "i", "width": "r"},
    },
    "lane_connectors": {
        **{"exit_lane_fid": "i", "entry_lane_fid": "i", "lane_group_connector_fid": "i", "speed_limit_mps": "r"},
        **{"traffic_light_stop_line_fids": "t", "exit_lane_group_fid": "i", "entry_lane_group_fid": "i"},
        **{"intersection_fid": "i", "turn_type_fid": "i"},
    },
    "gen_lane_connectors_scaled_width_polygons": {
        **{"lane_connector_fid": "i", "left_boundary_fid": "i", "right_boundary_fid": "i", "baseline_path_fid": "i"},
    },
    "baseline_paths": {"lane_fid": "n", "lane_connector_fid": "n", "path_type_fid": "i"},
    "boundaries": {"boundary_type_fid": "i"},
    "lane_group_connectors": {"from_lane_group_fid": "i", "to_lane_group_fid": "i", "intersection_fid": "i"},
    "intersections": {"intersection_type_fid": "i", "is_mini": "b"},
    "stop_polygons": {
        **{"stop_polygon_type_fid": "i", "lane_group_fid": "i", "lane_fids": "t", "lane_connector_fids": "t"},
        **{"traffic_light_fids": "t"},
    },
    "crosswalks": {"intersection_fids": "t", "is_marked": "b"},
    "walkways": {},
    "carpark_areas": {"heading": "r"},
    "generic_drivable_areas": {},
    "road_segments": {"lane_group_fids": "t"},
    "dubins_nodes": {"radius": "r", "heading": "r"},
    "traffic_lights": {"ori_mean_yaw": "r", "light_face_type_fid": "i"},
}
_DTYPES = {"i": np.int64, "n": np.float64, "r": np.float64, "t": object, "b": bool}
_NULLS = {"i": -1, "n": np.nan, "r": np.nan, "t": "", "b": False}


class _Rows:
    """Rows of all layers while a district is written; local coordinates."""

    def __init__(self, first: int):
        self.first = first
        self._rows: dict[str, list[tuple[int, shapely.Geometry, dict]]] = {name: [] for name in _COLUMNS}

    def add(self, layer: str, geometry: shapely.Geometry, fid: int | None = None, **columns: object) -> int:
        fid = self.first + len(self._rows[layer]) if fid is None else fid
        self._rows[layer].append((fid, geometry, columns))
        return fid

    def geometries(self, layer: str) -> list[shapely.Geometry]:
        return [geometry for _, geometry, _ in self._rows[layer]]

    def fids(self, layer: str) -> list[int]:
        return [fid for fid, _, _ in self._rows[layer]]

    def tables(self, offset: np.ndarray) -> dict[str, FeatureTable]:
        return {name: self._table(name, offset) for name in _COLUMNS}

    def _table(self, name: str, offset: np.ndarray) -> FeatureTable:
        rows = sorted(self._rows[name], key=lambda row: row[0])
        geometries = np.empty(len(rows), object)
        geometries[:] = [geometry for _, geometry, _ in rows]
        if len(rows):
            geometries = shapely.transform(geometries, lambda xy: xy + offset)
        columns = {}
        for column, kind in _COLUMNS[name].items():
            values = [row.get(column, _NULLS[kind]) for _, _, row in rows]
            columns[column] = np.array(values, dtype=_DTYPES[kind])
        return FeatureTable(np.array([fid for fid, _, _ in rows], np.int64), geometries, columns)


@dataclass
class _Surfaces:
    """Smoothed geometry by SUMO id: lane → centre line; street → (left border, right border of the car lanes)."""

    centre: dict[str, np.ndarray] = field(default_factory=dict)
    borders: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def _edges(network: Network, link: NetLink) -> tuple[str, str]:
    return network.lanes[link.from_lane].edge, network.lanes[link.to_lane].edge


def _add_streets(rows: _Rows, network: Network, ids: MapIds) -> _Surfaces:
    surfaces = _Surfaces()
    for edge, group in ids.groups.items():
        lanes = network.car_lanes(edge)
        count = max(2, int(np.ceil(lanes[0].length / BASELINE_STEP_M)) + 1)
        centres = [lines.smooth(lane.shape, count) for lane in lanes]
        borders = _lane_borders(lanes, centres)
        kinds = [_SOLID, *[_DASHED] * (len(lanes) - 1), _SOLID]
        border_ids = [
            rows.add("boundaries", shapely.LineString(line), boundary_type_fid=kind)
            for line, kind in zip(borders, kinds, strict=True)
        ]
        for k, (lane, centre) in enumerate(zip(lanes, centres, strict=True)):
            surfaces.centre[lane.id] = centre
            rows.add(
                "lanes_polygons",
                lines.strip(borders[k], borders[k + 1]),
                fid=ids.lanes[lane.id],
                lane_fid=ids.lanes[lane.id],
                lane_group_fid=group,
                lane_index=k,
                left_boundary_fid=border_ids[k],
                right_boundary_fid=border_ids[k + 1],
                speed_limit_mps=lane.speed,
                lane_type_fid=0,
                width=lane.width,
            )
            line = shapely.LineString(centre)
            rows.add("baseline_paths", line, lane_fid=ids.lanes[lane.id], path_type_fid=0)
        surfaces.borders[edge] = (borders[0], borders[-1])
        _add_street_surface(rows, network, edge, group, borders, (border_ids[0], border_ids[-1]))
    return surfaces


def _lane_borders(lanes: Sequence[NetLane], centres: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Left to right, one line more than lanes; neighbours share the line between them exactly."""
    left = [lines.offset(centre, lane.width / 2) for lane, centre in zip(lanes, centres, strict=True)]
    right = [lines.offset(centre, -lane.width / 2) for lane, centre in zip(lanes, centres, strict=True)]
    shared = [(a + b) / 2 for a, b in zip(right[:-1], left[1:], strict=True)]
    return [left[0], *shared, right[-1]]


def _add_street_surface(
    rows: _Rows, network: Network, edge: str, group: int, borders: Sequence[np.ndarray], border_ids: tuple[int, int]
) -> None:
    """Roadblock polygon (car and bicycle lanes), parking strip, and the road segment that joins them."""
    strips = {lane.use: lane for lane in (network.lanes[i] for i in network.edges[edge])}
    extra = strips[BICYCLE].width if BICYCLE in strips else 0.0
    surface = lines.strip(lines.offset(borders[0], SEAM_M / 2), lines.offset(borders[-1], -extra - SEAM_M / 2))
    rows.add(
        "lane_groups_polygons",
        surface,
        fid=group,
        left_boundary_fid=border_ids[0],
        right_boundary_fid=border_ids[1],
    )
    if BICYCLE in strips:
        rows.add("generic_drivable_areas", lines.strip(borders[-1], lines.offset(borders[-1], -extra)))
    road = surface
    if PARKING in strips:
        lane = strips[PARKING]
        parking = lines.strip(borders[-1], lines.offset(borders[-1], -lane.width))
        heading = float(lines.headings(lane.shape)[len(lane.shape) // 2])
        rows.add("carpark_areas", parking, heading=heading)
        road = lines.largest_part(surface.union(parking))
    rows.add("road_segments", road, lane_group_fids=str(group))


def _add_connectors(rows: _Rows, network: Network, ids: MapIds, surfaces: _Surfaces) -> dict[int, tuple]:
    """Lane connectors with polygon and baseline; returns connector id → (link, centre line, polygon)."""
    signal_stops = _stop_ids(network, ids, rows)
    junction_ids = _intersection_ids(network, rows)
    made = {}
    for link in network.links:
        fid = ids.connectors[link.from_lane, link.to_lane]
        first, last = surfaces.centre[link.from_lane][-1], surfaces.centre[link.to_lane][0]
        raw = lines.without_repeats(np.concatenate([first[None], link.shape[1:-1], last[None]]))
        count = max(3, int(np.ceil(lines.arc_lengths(raw)[-1] / BASELINE_STEP_M)) + 1)
        centre = lines.resample(raw, count)
        widths = np.linspace(network.lanes[link.from_lane].width, network.lanes[link.to_lane].width, count) / 2
        left, right = lines.offset(centre, widths), lines.offset(centre, -widths)
        borders = [rows.add("boundaries", shapely.LineString(b), boundary_type_fid=_VIRTUAL) for b in (left, right)]
        edges = _edges(network, link)
        junction = network.arms[edges[0]][1]
        baseline = rows.add("baseline_paths", shapely.LineString(centre), lane_connector_fid=fid, path_type_fid=0)
        rows.add(
            "lane_connectors",
            shapely.LineString(centre),
            fid=fid,
            exit_lane_fid=ids.lanes[link.from_lane],
            entry_lane_fid=ids.lanes[link.to_lane],
            lane_group_connector_fid=ids.group_connectors[edges],
            speed_limit_mps=link.speed,
            traffic_light_stop_line_fids=str(signal_stops[edges[0]]) if link.signal else "",
            exit_lane_group_fid=ids.groups[edges[0]],
            entry_lane_group_fid=ids.groups[edges[1]],
            intersection_fid=junction_ids[junction],
            turn_type_fid=_TURN_TYPES.get(link.direction, 4),
        )
        polygon = lines.strip(left, right)
        rows.add(
            "gen_lane_connectors_scaled_width_polygons",
            polygon,
            lane_connector_fid=fid,
            left_boundary_fid=borders[0],
            right_boundary_fid=borders[1],
            baseline_path_fid=baseline,
        )
        made[fid] = (link, centre, polygon)
    _add_group_connectors(rows, network, ids, made, junction_ids)
    return made


def _add_group_connectors(rows: _Rows, network: Network, ids: MapIds, made: dict, junction_ids: dict[str, int]) -> None:
    parts = defaultdict(list)
    for link, _, polygon in made.values():
        parts[_edges(network, link)].append(polygon)
    for (start, end), fid in ids.group_connectors.items():
        rows.add(
            "lane_group_connectors",
            lines.without_holes(lines.largest_part(shapely.union_all(parts[start, end]).buffer(0.01))),
            fid=fid,
            from_lane_group_fid=ids.groups[start],
            to_lane_group_fid=ids.groups[end],
            intersection_fid=junction_ids[network.arms[start][1]],
        )


def _intersection_ids(network: Network, rows: _Rows) -> dict[str, int]:
    used = sorted({network.arms[_edges(network, link)[0]][1] for link in network.links})
    return {junction: rows.first + k for k, junction in enumerate(used)}


def _add_intersections(
    rows: _Rows, network: Network, ids: MapIds, surfaces: _Surfaces, connectors: dict[int, tuple]
) -> dict[str, shapely.Polygon]:
    """One polygon a junction: its surface, its connectors, and what the ego sweeps while turning."""
    surfaces_of, swept_of = defaultdict(list), defaultdict(list)
    for link, centre, polygon in connectors.values():
        junction = network.arms[_edges(network, link)[0]][1]
        onward = surfaces.centre[link.to_lane][: int(SWEEP_RUN_OUT_M) + 1]
        surfaces_of[junction].append(polygon)
        swept_of[junction] += _swept(np.concatenate([centre, onward[1:]]))
    streets = shapely.union_all(rows.geometries("lane_groups_polygons")).buffer(-2 * SEAM_M)
    made = {}
    for junction, fid in _intersection_ids(network, rows).items():
        record = network.junctions[junction]
        shape = shapely.Polygon(record.shape).buffer(0) if len(record.shape) >= 3 else shapely.Polygon()
        beside_streets = shapely.union_all(swept_of[junction]).difference(streets)
        surface = shapely.union_all([shape, beside_streets, *surfaces_of[junction]])
        surface = surface.buffer(SEAM_M, quad_segs=2).simplify(0.03)
        made[junction] = lines.without_holes(lines.largest_part(surface))
        arms = {network.arms[edge] for edge in ids.groups if junction in network.arms[edge]}
        neighbours = {node for pair in arms for node in pair} - {junction}
        kind = _SIGNAL_JUNCTION if record.signalised else _PASS_THROUGH if len(neighbours) <= 2 else _DEFAULT_JUNCTION
        rows.add("intersections", made[junction], fid=fid, intersection_type_fid=kind, is_mini=False)
    return made


def _swept(centre: np.ndarray) -> list[shapely.Polygon]:
    """Footprints of the ego whose rear axle follows a line; none for a straight line, which its lane covers."""
    heading = np.unwrap(lines.headings(centre))
    if np.ptp(heading) < np.radians(6.0):
        return []
    axle = np.column_stack([centre, heading])
    middle = axle + Vehicle.REAR_AXLE_TO_CENTER * np.column_stack([np.cos(heading), np.sin(heading), 0 * heading])
    return list(shapely.polygons(box_corners(middle, Vehicle.LENGTH, Vehicle.WIDTH)))


def _stop_ids(network: Network, ids: MapIds, rows: _Rows) -> dict[str, int]:
    """Street → id of the stop polygon at its end, for streets that end at a signal or have to give way."""
    controlled = dict.fromkeys(network.lanes[link.from_lane].edge for link in network.links if _stop_kind(link))
    return {edge: rows.first + k for k, edge in enumerate(controlled)}


def _stop_kind(link: NetLink) -> int | None:
    if link.signal:
        return _TRAFFIC_LIGHT_STOP
    return {"s": _SIGN_STOP, "w": _SIGN_STOP}.get(link.state)


def _add_stops(
    rows: _Rows, network: Network, ids: MapIds, surfaces: _Surfaces, intersections: dict[str, shapely.Polygon]
) -> None:
    links = defaultdict(list)
    for link in network.links:
        links[network.lanes[link.from_lane].edge].append(link)
    blocked = shapely.union_all([*rows.geometries("road_segments"), *intersections.values()])
    for edge, fid in _stop_ids(network, ids, rows).items():
        left, right = (border[::-1] for border in surfaces.borders[edge])
        stations = np.array([STOP_LINE_DEPTH_M, -0.2])
        left, right = (_around_start(border, stations) for border in (left, right))
        kind = next(kind for link in links[edge] if (kind := _stop_kind(link)))
        light = ""
        if kind == _TRAFFIC_LIGHT_STOP:
            light = str(_add_light(rows, network.junctions[network.arms[edge][1]], surfaces.borders[edge], blocked))
        rows.add(
            "stop_polygons",
            lines.strip(left, right),
            fid=fid,
            stop_polygon_type_fid=kind,
            lane_group_fid=ids.groups[edge],
            lane_fids=",".join(str(ids.lanes[lane.id]) for lane in network.car_lanes(edge)),
            lane_connector_fids=",".join(str(ids.connectors[k.from_lane, k.to_lane]) for k in links[edge]),
            traffic_light_fids=light,
        )


def _around_start(line: np.ndarray, stations: np.ndarray) -> np.ndarray:
    """Points at signed distances from the first vertex along the line's first segment."""
    direction = lines.directions(line)[0]
    return line[0] + stations[:, None] * direction


def _add_light(
    rows: _Rows, junction: Junction, borders: tuple[np.ndarray, np.ndarray], blocked: shapely.Geometry
) -> int:
    """A signal on the far side of the junction, right of the traffic it controls and off the road."""
    left, right = borders
    middle = (left[-1] + right[-1]) / 2
    heading = float(lines.headings((left + right) / 2)[-1])
    forward, rightward = np.array([np.cos(heading), np.sin(heading)]), np.array([np.sin(heading), -np.cos(heading)])
    ray = shapely.LineString([middle, middle + 120.0 * forward])
    depth = max(ray.intersection(shapely.Polygon(junction.shape).buffer(0)).length, 8.0)
    point = middle + depth * forward + (np.hypot(*(right[-1] - left[-1])) / 2 + 1.0) * rightward
    while blocked.distance(shapely.Point(point)) < 0.6:
        point = point + 0.5 * rightward
    return rows.add("traffic_lights", shapely.Point(point), ori_mean_yaw=heading, light_face_type_fid=0)


def _add_footpaths(rows: _Rows, network: Network) -> None:
    for lane in network.lanes.values():
        if lane.use == PEDESTRIAN:
            path = lines.smooth(lane.shape, max(2, int(lane.length / 2.0) + 1))
            rows.add("walkways", lines.strip(*(lines.offset(path, side * lane.width / 2) for side in (1, -1))))
    for corners in network.walking_areas:
        if len(corners) >= 3 and (area := lines.largest_part(shapely.Polygon(corners).buffer(0))).area > 0.1:
            rows.add("walkways", area)
    roads = shapely.STRtree(rows.geometries("intersections"))
    areas = rows.fids("intersections")
    for line, width in network.crossings:
        crossing = lines.strip(*(lines.offset(line, side * width / 2) for side in (1, -1)))
        touched = ",".join(str(areas[k]) for k in sorted(roads.query(crossing, predicate="intersects")))
        rows.add("crosswalks", crossing, intersection_fids=touched, is_marked=True)
