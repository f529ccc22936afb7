"""The scene: the ego drives east at 8 m/s towards a red light; an oncoming car waits, another has just crossed.

Metres around `ORIGIN`, x east, y north, one lane a direction:

    lane 11 eastward  y = −1.75, x −60 … 30    connector 31    lane 21   x 50 … 140     the route
    lane 12 westward  y = +1.75, x −60 … 30    connector 32    lane 22   x 50 … 140
    intersection 900  x 30 … 50, y −10 … 10; a road crosses it from south to north (lanes 41, 42, 51, 52)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import shapely

from navsim_eval.formats.geopackage import FeatureTable
from navsim_eval.formats.map_store import MapStore, write_map
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import to_global, to_local
from navsim_eval.scene import FRAME_INTERVAL_S, Annotations, Frame, Scene

ORIGIN = np.array([664_000.0, 3_997_000.0])
LOCATION, VERSION, EPSG = "us-nv-las-vegas-strip", "9.15.1915", 32611
LANE_WIDTH, HALF = 3.5, 1.75
SPEED, SPEED_LIMIT = 8.0, 12.0  # m/s
LIGHT_AT = 30.0  # m ahead of the rear axle now
_HISTORY, _FUTURE = 4, 10


def make_road_map(folder: Path) -> RoadMap:
    """Write the map as a GeoPackage into a folder and open it."""
    lanes = {  # id: (block, centre line)
        11: (110, _line((-60, -HALF), (30, -HALF))), 21: (210, _line((50, -HALF), (140, -HALF))),
        22: (220, _line((140, HALF), (50, HALF))), 12: (120, _line((30, HALF), (-60, HALF))),
        41: (410, _line((41.75, -60), (41.75, -10))), 42: (420, _line((41.75, 10), (41.75, 70))),
        51: (510, _line((38.25, 70), (38.25, 10))), 52: (520, _line((38.25, -10), (38.25, -60))),
    }  # fmt: skip
    connectors = {  # id: (block, from lane, to lane, centre line)
        31: (310, 11, 21, _line((30, -HALF), (50, -HALF))),
        32: (320, 22, 12, _line((50, HALF), (30, HALF))),
        43: (430, 41, 42, _line((41.75, -10), (41.75, 10))),
        53: (530, 51, 52, _line((38.25, 10), (38.25, -10))),
    }
    layers = {
        "lanes_polygons": _table(
            lanes, [_strip(line) for _, line in lanes.values()],
            lane_group_fid=[block for block, _ in lanes.values()], speed_limit_mps=[SPEED_LIMIT] * len(lanes),
        ),
        "lane_connectors": _table(
            connectors, [line for *_, line in connectors.values()],
            exit_lane_fid=[start for _, start, _, _ in connectors.values()],
            entry_lane_fid=[end for _, _, end, _ in connectors.values()],
            lane_group_connector_fid=[block for block, *_ in connectors.values()],
            speed_limit_mps=[SPEED_LIMIT] * len(connectors),
        ),
        "gen_lane_connectors_scaled_width_polygons": _table(
            [3000 + fid for fid in connectors], [_strip(line) for *_, line in connectors.values()],
            lane_connector_fid=list(connectors),
        ),
        "baseline_paths": _table(
            [2000 + fid for fid in (*lanes, *connectors)], [e[-1] for e in (*lanes.values(), *connectors.values())],
            lane_fid=[*map(float, lanes), *[np.nan] * len(connectors)],
            lane_connector_fid=[*[np.nan] * len(lanes), *map(float, connectors)],
        ),
        "lane_groups_polygons": _table([b for b, _ in lanes.values()], [_strip(line) for _, line in lanes.values()]),
        "lane_group_connectors": _table(
            [block for block, *_ in connectors.values()], [_strip(line) for *_, line in connectors.values()],
            from_lane_group_fid=[lanes[start][0] for _, start, _, _ in connectors.values()],
            to_lane_group_fid=[lanes[end][0] for _, _, end, _ in connectors.values()],
        ),
        "intersections": _table([900], [_box(30, 50, -10, 10)]),
        "carpark_areas": _table([], []),
        "walkways": _table([700, 701], [_box(-60, 30, -6.5, -3.5), _box(-60, 30, 3.5, 6.5)]),
        "crosswalks": _table([600], [_box(31, 34, -6.5, 6.5)]),
    }  # fmt: skip
    write_map(folder, LOCATION, VERSION, layers, EPSG)
    return MapStore(folder).get(LOCATION)


def make_scene(x_of_ego: np.ndarray) -> Scene:
    """The window of 4 + 10 frames.

    x_of_ego: (10,) metres that the recorded driver is ahead at 0.5, 1.0, … 5.0 s; before now he drove at `SPEED`
    """
    times = FRAME_INTERVAL_S * np.arange(-_HISTORY + 1, _FUTURE + 1)
    ahead = np.concatenate([SPEED * times[:_HISTORY], x_of_ego])
    return Scene(tuple(_frame(index, time, x) for index, (time, x) in enumerate(zip(times, ahead, strict=True))))


def _frame(index: int, seconds: float, ahead: float) -> Frame:
    ego = np.array([ORIGIN[0] + ahead, ORIGIN[1] - HALF, 0.0])
    return Frame(
        token=f"{index:016x}", log_name="crossing", scene_token="0" * 16, map_name=LOCATION,
        timestamp_us=1_600_000_000_000_000 + round((seconds + 2.0) * 1e6), ego_pose=ego,
        ego_velocity=np.array([SPEED, 0.0]), ego_acceleration=np.zeros(2), driving_command=np.array([0, 1, 0, 0]),
        roadblock_ids=("110", "310", "210"), traffic_lights=(("31", True), ("32", True), ("43", False), ("53", False)),
        annotations=_annotations(ego, seconds),
    )  # fmt: skip


def _annotations(ego: np.ndarray, seconds: float) -> Annotations:
    """A car that has just crossed, one that waits opposite, a pedestrian on the walkway."""
    objects = [  # class, track, place now, velocity, size
        ("vehicle", "crossed", (41.75, 14.0, np.pi / 2), (0.0, 9.0), (4.6, 1.9, 1.6)),
        ("vehicle", "waiting", (54.0, HALF, np.pi), (0.0, 0.0), (4.6, 1.9, 1.6)),
        ("pedestrian", "walker", (12.0, -5.2, 0.0), (1.2, 0.0), (0.7, 0.7, 1.8)),
    ]
    poses = np.array([[x + vx * seconds, y + vy * seconds, h] for _, _, (x, y, h), (vx, vy), _ in objects])
    poses[:, :2] += ORIGIN
    local, sizes = to_local(ego, poses), np.array([size for *_, size in objects])
    velocity = np.array([v for *_, v, _ in objects])
    return Annotations(
        boxes=np.column_stack([local[:, :2], sizes[:, 2] / 2, sizes, local[:, 2]]),
        names=np.array([name for name, *_ in objects]),
        velocity=to_global(np.array([0.0, 0.0, -ego[2]]), np.column_stack([velocity, np.zeros(3)]))[:, :2],
        track_tokens=np.array([track for _, track, *_ in objects]),
    )


def _line(start: tuple[float, float], end: tuple[float, float]) -> shapely.LineString:
    return shapely.segmentize(shapely.LineString(np.array([start, end]) + ORIGIN), 2.0)


def _strip(line: shapely.LineString) -> shapely.Polygon:
    return line.buffer(LANE_WIDTH / 2, cap_style="flat")


def _box(x0: float, x1: float, y0: float, y1: float) -> shapely.Polygon:
    return shapely.box(x0 + ORIGIN[0], y0 + ORIGIN[1], x1 + ORIGIN[0], y1 + ORIGIN[1])


def _table(fids, geometries: list[shapely.Geometry], **columns: list) -> FeatureTable:
    shapes = np.empty(len(geometries), object)
    shapes[:] = geometries
    return FeatureTable(np.array(list(fids), np.int64), shapes, {n: np.array(v) for n, v in columns.items()})
