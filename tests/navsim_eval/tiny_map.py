"""A map drawn by hand for tests: straight one-lane roadblocks joined by roadblock connectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import shapely

from navsim_eval.formats.geopackage import FeatureTable
from navsim_eval.formats.map_store import MapStore, write_map
from navsim_eval.formats.maps import RoadMap

ORIGIN = np.array([330_000.0, 4_690_000.0])  # within UTM zone 19 N
WIDTH = 4.0
LANE, CONNECTOR = 1000, 5000  # added to a block's id to get the id of its only edge

Point = tuple[float, float]


def write_tiny_map(
    root: Path,
    blocks: Mapping[int, tuple[Point, Point]],
    links: Mapping[int, tuple[int, int]],
    speed_limits: Mapping[int, float] | None = None,
) -> RoadMap:
    """A map under `root`.

    blocks: roadblock id → start and end of its lane, relative to `ORIGIN` [m]
    links:  roadblock connector id → roadblock before it, roadblock after it (straight from end to start)
    speed_limits: by roadblock id [m/s]; missing ones are NULL
    Vertices lie every 2 m; each connector is covered by an intersection polygon. There are no car parks.
    """
    limits = speed_limits or {}
    ends = {block: tuple(np.array(point) + ORIGIN for point in points) for block, points in blocks.items()}
    spans = {link: (ends[before][1], ends[after][0]) for link, (before, after) in links.items()}
    lines = {LANE + block: _line(*span) for block, span in ends.items()}
    lines |= {CONNECTOR + link: _line(*span) for link, span in spans.items()}
    lanes, connectors = [LANE + block for block in blocks], [CONNECTOR + link for link in links]

    def column(values: Sequence[float]) -> np.ndarray:
        return np.array(values, dtype=np.float64)

    layers = {
        "lane_groups_polygons": _table(blocks, [_strip(lines[LANE + block]) for block in blocks]),
        "lanes_polygons": _table(
            lanes,
            [_strip(lines[lane]) for lane in lanes],
            lane_group_fid=column(list(blocks)),
            speed_limit_mps=column([limits.get(block, np.nan) for block in blocks]),
        ),
        "lane_group_connectors": _table(
            links,
            [_strip(lines[CONNECTOR + link]) for link in links],
            from_lane_group_fid=column([before for before, _ in links.values()]),
            to_lane_group_fid=column([after for _, after in links.values()]),
        ),
        "lane_connectors": _table(
            connectors,
            [lines[edge] for edge in connectors],
            exit_lane_fid=column([LANE + before for before, _ in links.values()]),
            entry_lane_fid=column([LANE + after for _, after in links.values()]),
            lane_group_connector_fid=column(list(links)),
            speed_limit_mps=column([np.nan] * len(links)),
        ),
        "gen_lane_connectors_scaled_width_polygons": _table(
            range(1, len(links) + 1),
            [_strip(lines[edge]) for edge in connectors],
            lane_connector_fid=column(connectors),
        ),
        "baseline_paths": _table(
            range(1, len(lines) + 1),
            list(lines.values()),
            lane_fid=column([edge if edge in lanes else np.nan for edge in lines]),
            lane_connector_fid=column([edge if edge in connectors else np.nan for edge in lines]),
        ),
        "intersections": _table(
            range(1, len(links) + 1), [shapely.buffer(_strip(lines[edge]), 1.0) for edge in connectors]
        ),
        "carpark_areas": _table([], []),
    }
    write_map(root, "tiny", "1.0", layers, epsg=32619)
    return MapStore(root).get("tiny")


def _line(start: np.ndarray, end: np.ndarray) -> shapely.LineString:
    count = max(2, int(np.hypot(*(end - start)) / 2.0) + 1)
    return shapely.linestrings(np.linspace(start, end, count))


def _strip(line: shapely.LineString) -> shapely.Polygon:
    return shapely.buffer(line, WIDTH / 2.0, cap_style="flat")


def _table(fids: Sequence[int] | Mapping[int, object], geometries: list, **columns: np.ndarray) -> FeatureTable:
    objects = np.empty(len(geometries), dtype=object)
    objects[:] = geometries
    return FeatureTable(np.array(list(fids), dtype=np.int64), objects, columns)
