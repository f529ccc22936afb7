"""What reactive traffic starts from: the vehicles of now, each on the centre line of one lane.

Computed once per scene from the current frame and the map, independent of any plan, and kept in the metric cache.

Source: NAVSIM v2's IDM traffic agents, after nuPlan's IDM agents. Oddities that decide about scores are kept: a vehicle
stays on the one lane (or connector) that it is on now and stops at its end, the last vertex of that lane's line is
left out, heading differences are not wrapped when the lane is chosen, and a lane without a speed limit inherits the
limit of the vehicle before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely

from navsim_eval.formats.map_layers import Layer
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import box_corners, ego_corners
from navsim_eval.pdm.observation import Objects
from navsim_eval.pdm.path import with_headings
from navsim_eval.pdm.types import Observation, Rails, TrafficStart

DEFAULT_TARGET_SPEED = 10.0  # m/s, until a lane with a speed limit was met
SNAP_DISTANCE = 3.0  # m, a vehicle further from the line is not driven
PARKED_SPEED = 0.1  # m/s
_CHORD = 0.5  # m, over which the direction of a line is taken
_REPEATED = 1e-8  # m, closer vertices count once


def start_of_traffic(
    seen: Sequence[Objects], ego_pose: np.ndarray, kept: Observation, dropped: Observation, road_map: RoadMap
) -> TrafficStart:
    """What reactive traffic starts from.

    seen: objects now and in each frame of the observed future;  ego_pose: (3,) rear axle now
    kept, dropped: the recorded tracks that are clear of the ego now, and those that touch it
    """
    tokens = np.concatenate([kept.tokens, dropped.tokens])
    row_of = {token: row for row, token in enumerate(tokens.tolist())}
    name_of: dict[str, str] = {}
    for objects in reversed(seen):  # a track is what it was when it was first seen
        name_of |= dict(zip(objects.tokens.tolist(), objects.names.tolist(), strict=True))
    now = seen[0]
    vehicles = np.flatnonzero(now.names == "vehicle")
    speed = np.hypot(*now.velocity[vehicles].T)
    rails = lay_rails(now.poses[vehicles], now.sizes[vehicles], speed, ego_pose, road_map)
    track = np.array([row_of[token] for token in now.tokens[vehicles]], np.int32)
    return TrafficStart(
        replayed=np.array([name_of[token] != "vehicle" for token in tokens.tolist()], bool),
        seen_now=np.isin(tokens, now.tokens),
        dropped_tokens=dropped.tokens,
        dropped_poses=dropped.poses,
        dropped_sizes=dropped.sizes,
        dropped_is_agent=dropped.is_agent,
        dropped_speed=dropped.speed,
        **{**vars(rails), "vehicle": track[rails.vehicle], "standing": track[rails.standing]},
    )


def lay_rails(
    poses: np.ndarray, sizes: np.ndarray, speed: np.ndarray, ego_pose: np.ndarray, road_map: RoadMap
) -> Rails:
    """Put the vehicles of now, counted from 0 as given, onto their lanes.

    poses: (N, 3) box centres, in the order of the frame;  sizes: (N, 2) length, width;  speed: (N,) m/s
    ego_pose: (3,) rear axle

    A vehicle drives if its lane's line is at most 3 m away and its box, put onto the line, touches neither the ego nor
    a vehicle before it. It stands if it is further away than that, or parked (below 0.1 m/s) outside lanes and
    intersections. Any other vehicle vanishes after now.
    """
    below = _Below(poses, road_map)
    edges = [below.edges(row) for row in range(len(poses))]
    nearest = _Nearest(poses, edges, road_map)
    boxes = shapely.polygons(box_corners(nearest.pose, sizes[:, 0], sizes[:, 1]))
    touches_ego = shapely.intersects(boxes, shapely.polygons(ego_corners(ego_pose)))
    touches = shapely.intersects(boxes[:, None], boxes)
    far = np.hypot(*(nearest.pose[:, :2] - poses[:, :2]).T) > SNAP_DISTANCE
    driven, standing, lines, taken = [], [], {}, np.zeros(len(poses), bool)
    target = DEFAULT_TARGET_SPEED
    for row, edge in enumerate(nearest.edge):
        if edge is None:
            if speed[row] < PARKED_SPEED and not below.on_road(row):
                standing.append(row)
        elif far[row]:
            standing.append(row)
        elif not touches_ego[row] and not touches[row, taken].any():
            taken[row] = True
            target = road_map.speed_limit(edge) or target
            line = lines.setdefault(edge, len(lines))
            driven.append((row, line, *nearest.pose[row], nearest.progress[row], target))
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
        self._lanes = self._found(poses, road_map.layer("lanes_polygons"))
        self._intersections = self._found(poses, road_map.layer("intersections"))
        self._connectors = self._found(poses, road_map.layer("gen_lane_connectors_scaled_width_polygons"))
        self._lane_ids, self._connector_ids = road_map.layer("lanes_polygons").ids, road_map.connector_polygon_ids

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


class _Nearest:
    """The edge that each of N vehicles starts on: of those below it the one best in line with it.

    edge: None where there is none below;  progress, pose: arc length (N,) and pose (N, 3) of the nearest point of the
    edge's line, heading over half a metre ahead; 0 and the vehicle's own pose where there is no edge
    """

    def __init__(self, poses: np.ndarray, edges: Sequence[np.ndarray], road_map: RoadMap):
        vehicle = np.repeat(np.arange(len(poses)), [len(below) for below in edges])
        names = [str(edge) for below in edges for edge in below]
        curve = {edge: shapely.linestrings(road_map.baseline(edge)) for edge in dict.fromkeys(names)}
        progress, found = _nearest_poses(np.array([curve[edge] for edge in names], object), poses[vehicle])
        turned = np.abs(found[:, 2] - poses[vehicle, 2])
        self.edge: list[str | None] = [None] * len(poses)
        self.progress, self.pose = np.zeros(len(poses)), poses.copy()
        for row in np.unique(vehicle):
            pairs = np.flatnonzero(vehicle == row)
            best = pairs[int(np.argmin(turned[pairs]))]
            self.edge[row], self.progress[row], self.pose[row] = names[best], progress[best], found[best]


def _nearest_poses(curves: np.ndarray, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arc lengths (K,) and poses (K, 3) of the points of K lines nearest to poses (K, 3)."""
    progress = shapely.line_locate_point(curves, shapely.points(poses[:, :2]))
    here, ahead = (
        shapely.get_coordinates(shapely.line_interpolate_point(curves, distance))
        for distance in (progress, progress + _CHORD)
    )
    step = ahead - here
    at_end = ~step.any(axis=1)  # look back
    behind = shapely.line_interpolate_point(curves[at_end], progress[at_end] - _CHORD)
    step[at_end] = here[at_end] - shapely.get_coordinates(behind)
    return progress, np.column_stack([here, np.arctan2(step[:, 1], step[:, 0])])


def driven_line(line: np.ndarray) -> np.ndarray:
    """Vertices (K, 3) of a line (M, 2) that a vehicle drives along: without repetitions and without the last one.

    A line that would shrink to a point keeps its last vertex (the published evaluator fails on it).
    """
    poses = with_headings(line)
    apart = np.hypot(*np.diff(line, axis=0).T) > _REPEATED
    kept = poses[:-1][apart]
    return kept if len(kept) > 1 else poses[np.append(apart, True)]
