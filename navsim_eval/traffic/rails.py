"""What reactive traffic starts from: the vehicles of now, each on the centre line of one lane.

Computed once per scene from the current frame and the map, independent of any plan, and kept in the metric cache.

Source: NAVSIM v2's IDM traffic agents, after nuPlan's IDM agents. Oddities that decide about scores are kept: a vehicle
stays on the one lane (or connector) that it is on now and stops at its end, the last vertex of that lane's line is
left out, heading differences are not wrapped when the lane is chosen, and a lane without a speed limit inherits the
limit of the vehicle before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.formats.maps import Layer, RoadMap
from navsim_eval.formats.synthetic import FutureStep
from navsim_eval.geometry import box_corners, ego_corners
from navsim_eval.pdm.observation import global_objects
from navsim_eval.pdm.path import with_headings
from navsim_eval.pdm.types import Observation, TrafficStart
from navsim_eval.scene import Frame

DEFAULT_TARGET_SPEED = 10.0  # m/s, until a lane with a speed limit was met
SNAP_DISTANCE = 3.0  # m, a vehicle further from the line is not driven
PARKED_SPEED = 0.1  # m/s
_CHORD = 0.5  # m, over which the direction of a line is taken
_REPEATED = 1e-8  # m, closer vertices count once


def start_of_traffic(
    frames: Sequence[Frame | FutureStep], kept: Observation, dropped: Observation, road_map: RoadMap
) -> TrafficStart:
    """What reactive traffic starts from.

    frames: now and the observed future;  kept, dropped: the recorded tracks that are clear of the ego now, and those
    that touch it
    """
    tokens = np.concatenate([kept.tokens, dropped.tokens])
    row_of = {token: row for row, token in enumerate(tokens.tolist())}
    seen = [global_objects(frame) for frame in frames]
    name_of: dict[str, str] = {}
    for objects in reversed(seen):  # a track is what it was when it was first seen
        name_of |= dict(zip(objects.tokens.tolist(), objects.names.tolist(), strict=True))
    now = seen[0]
    vehicles = np.flatnonzero(now.names == "vehicle")
    speed = np.hypot(*now.velocity[vehicles].T)
    rails = lay_rails(now.poses[vehicles], now.sizes[vehicles], speed, frames[0].ego_pose, road_map)
    track = np.array([row_of[token] for token in now.tokens[vehicles]], np.int32)
    return TrafficStart(
        replayed=np.array([name_of[token] != "vehicle" for token in tokens.tolist()], bool),
        seen_now=np.isin(tokens, now.tokens),
        dropped_tokens=dropped.tokens,
        dropped_poses=dropped.poses,
        dropped_sizes=dropped.sizes,
        dropped_is_agent=dropped.is_agent,
        dropped_speed=dropped.speed,
        vehicle=track[rails.vehicle],
        line=rails.line,
        snapped=rails.snapped,
        progress=rails.progress,
        target_speed=rails.target_speed,
        points=rails.points,
        offsets=rails.offsets,
        standing=track[rails.standing],
    )


@dataclass(frozen=True)
class Rails:
    """Vehicles put onto lanes; fields as in `TrafficStart`, vehicles counted within the frame."""

    vehicle: np.ndarray
    line: np.ndarray
    snapped: np.ndarray
    progress: np.ndarray
    target_speed: np.ndarray
    points: np.ndarray
    offsets: np.ndarray
    standing: np.ndarray


def lay_rails(
    poses: np.ndarray, sizes: np.ndarray, speed: np.ndarray, ego_pose: np.ndarray, road_map: RoadMap
) -> Rails:
    """Put the vehicles of now onto their lanes.

    poses: (N, 3) box centres, in the order of the frame;  sizes: (N, 2) length, width;  speed: (N,) m/s
    ego_pose: (3,) rear axle

    A vehicle drives if its lane's line is at most 3 m away and its box, put onto the line, touches neither the ego nor
    a vehicle before it. It stands if it is further away than that, or parked (below 0.1 m/s) outside lanes and
    intersections. Any other vehicle vanishes after now.
    """
    below = _Below(poses, road_map)
    driven, standing, lines, taken = [], [], {}, [shapely.polygons(ego_corners(ego_pose))]
    target = DEFAULT_TARGET_SPEED
    for row, (pose, size) in enumerate(zip(poses, sizes, strict=True)):
        edge = _starting_edge(pose, below.edges(row), road_map)
        if edge is None:
            if speed[row] < PARKED_SPEED and not below.on_road(row):
                standing.append(row)
            continue
        progress, snapped = _nearest_pose(road_map.baseline(edge), pose)
        if np.hypot(*(snapped[:2] - pose[:2])) > SNAP_DISTANCE:
            standing.append(row)
            continue
        box = shapely.polygons(box_corners(snapped, *size))
        if shapely.intersects(box, taken).any():
            continue
        taken.append(box)
        target = road_map.speed_limit(edge) or target
        driven.append((row, lines.setdefault(edge, len(lines)), *snapped, progress, target))
    table = np.array(driven, np.float64).reshape(-1, 7)
    points = [road_map.baseline(edge) for edge in lines]
    return Rails(
        vehicle=table[:, 0].astype(np.int32),
        line=table[:, 1].astype(np.int32),
        snapped=table[:, 2:5],
        progress=table[:, 5],
        target_speed=table[:, 6],
        points=np.concatenate([np.zeros((0, 2)), *points]),
        offsets=np.cumsum([0, *map(len, points)]),
        standing=np.array(standing, np.int32),
    )


class _Below:
    """What of the map lies below each of N points: rows (ascending) of polygons that hold it, boundaries excluded."""

    def __init__(self, poses: np.ndarray, road_map: RoadMap):
        connectors = road_map.layer("gen_lane_connectors_scaled_width_polygons")
        self._lanes = self._found(poses, road_map.layer("lanes_polygons"))
        self._intersections = self._found(poses, road_map.layer("intersections"))
        self._connectors = self._found(poses, connectors)
        self._lane_ids, self._connector_ids = (
            road_map.layer("lanes_polygons").ids,
            connectors.keys("lane_connector_fid"),
        )

    @staticmethod
    def _found(poses: np.ndarray, layer: Layer) -> list[np.ndarray]:
        point, row = layer.tree.query(shapely.points(poses[:, :2]), predicate="within")
        return [np.sort(row[point == index]) for index in range(len(poses))]

    def on_road(self, index: int) -> bool:
        return len(self._lanes[index]) > 0 or len(self._intersections[index]) > 0

    def edges(self, index: int) -> np.ndarray:
        """Lanes below a point; where there is none, the connectors below it if it is in an intersection."""
        if len(self._lanes[index]):
            return self._lane_ids[self._lanes[index]]
        return self._connector_ids[self._connectors[index] if len(self._intersections[index]) else np.zeros(0, int)]


def _starting_edge(pose: np.ndarray, edges: np.ndarray, road_map: RoadMap) -> str | None:
    """Which of the edges below a vehicle (3,) is best in line with it; None if there is none."""
    if len(edges) < 2:
        return str(edges[0]) if len(edges) else None
    differences = [abs(_nearest_pose(road_map.baseline(edge), pose)[1][2] - pose[2]) for edge in edges]
    return str(edges[int(np.argmin(differences))])


def _nearest_pose(line: np.ndarray, pose: np.ndarray) -> tuple[float, np.ndarray]:
    """Arc length and pose (3,) of the point of a line (M, 2) nearest to a pose; heading over half a metre ahead."""
    curve = shapely.linestrings(line)
    progress = float(shapely.line_locate_point(curve, shapely.points(pose[:2])))
    here, ahead = shapely.get_coordinates(shapely.line_interpolate_point(curve, [progress, progress + _CHORD]))
    step = ahead - here
    if not step.any():  # at the end: look back
        step = here - shapely.get_coordinates(shapely.line_interpolate_point(curve, progress - _CHORD))[0]
    return progress, np.array([*here, np.arctan2(step[1], step[0])])


def driven_line(line: np.ndarray) -> np.ndarray:
    """Vertices (K, 3) of a line (M, 2) that a vehicle drives along: without repetitions and without the last one.

    A line that would shrink to a point keeps its last vertex (the published evaluator fails on it).
    """
    poses = with_headings(line)
    apart = np.hypot(*np.diff(line, axis=0).T) > _REPEATED
    kept = poses[:-1][apart]
    return kept if len(kept) > 1 else poses[np.append(apart, True)]
