"""Where the ego is supposed to go: the logged route mended, the lane it starts on, and the centreline ahead.

Logged routes start behind or beside the ego, have gaps and cross themselves. The correction below is the reference
planner's; the metrics share its result (on-route lanes for driving direction, centreline for progress).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import shapely

from navsim_eval.errors import DataError
from navsim_eval.geometry import ego_center, ego_corners
from navsim_eval.pdm.lane_graph import LaneGraph
from navsim_eval.pdm.types import DrivableMap

CANDIDATE_HALF_SIDE = 1.0  # m, box around the rear axle in which blocks are candidates for the start
MAX_HEADING_ERROR = np.pi / 4
MAX_DISPLACEMENT = 3.0  # m
BACKWARD_DEPTH, FORWARD_DEPTH = 15, 30  # blocks, both ends counted
CENTERLINE_BLOCKS = 30


@dataclass(frozen=True)
class Route:
    """A route as ids of map objects, in driving order.

    logged:  blocks as logged, repeats and unknown ids removed
    blocks:  blocks after correction
    lanes:   lanes and connectors of `blocks`, block by block, each once
    unknown: logged ids that the map does not hold
    """

    logged: tuple[str, ...]
    blocks: tuple[str, ...]
    lanes: tuple[str, ...]
    unknown: tuple[str, ...] = ()


def correct_route(block_ids: Sequence[str], ego_pose: np.ndarray, graph: LaneGraph, token: str = "scene") -> Route:
    """Connect a logged route to the ego, fill its gaps and cut it where it would cross itself.

    block_ids: as logged; ego_pose: (3,) rear axle, global; token: names the scene in errors.
    Raises DataError where no id of the route is in the map.
    """
    unique = tuple(dict.fromkeys(block_ids))
    has_block = graph.road_map.has_block
    logged = tuple(block for block in unique if has_block(block))
    unknown = tuple(block for block in unique if not has_block(block))
    if not logged:
        problem = f"none of {len(unique)} route ids is in the map" if unique else "the route is empty"
        raise DataError(token, problem, field="roadblock_ids", remedy="check that log and map version belong together")
    blocks = _connect_to_ego(list(logged), ego_pose, graph, token)
    blocks = _fill_gaps(blocks, graph)
    blocks = _cut_loops(blocks, graph)
    blocks = list(dict.fromkeys(blocks))
    lanes = dict.fromkeys(lane for block in blocks for lane in graph.road_map.interior_edges(block))
    return Route(logged, tuple(blocks), tuple(lanes), unknown)


def starting_lane(route: Route, drivable_map: DrivableMap, ego_pose: np.ndarray, graph: LaneGraph) -> str:
    """Lane of the route that the ego is on: among those under the rear axle the best aligned one, else a near one.

    Raises DataError where the route has no lanes.
    """
    candidates = np.flatnonzero(drivable_map.on_route)
    under = shapely.intersects(drivable_map.polygons[candidates], shapely.points(ego_pose[:2]))
    here = drivable_map.ids[candidates[under]]
    if len(here):
        errors = [graph.offset(str(lane), ego_pose)[1] for lane in here]
        return str(here[int(np.argmin(errors))])
    if not route.lanes:
        raise DataError(route.blocks[0], "the route's blocks have no lanes", field="roadblock_ids")
    polygons = np.array([graph.road_map.polygon(lane) for lane in route.lanes], dtype=object)
    inside = np.flatnonzero(shapely.contains(polygons, shapely.points(ego_center(ego_pose)[:2])))
    if len(inside):
        return route.lanes[inside[0]]
    return route.lanes[int(np.argmin(shapely.distance(polygons, shapely.polygons(ego_corners(ego_pose)))))]


def route_centerline(route: Route, start: str, graph: LaneGraph) -> np.ndarray:
    """(M, 3) baselines, end to end, of the shortest lane sequence from `start` to the last block ahead.

    Where no sequence reaches that block: the deepest one (the shorter of equally deep ones). Shared end points of
    neighbouring lanes stay doubled.
    """
    start_block = graph.road_map.block_of(start)
    first = route.blocks.index(start_block) if start_block in route.blocks else 0
    goal = route.blocks[first : first + CENTERLINE_BLOCKS][-1]
    lanes = _shortest_lane_sequence(start, set(graph.road_map.interior_edges(goal)), set(route.lanes), graph)
    return np.concatenate([graph.path(lane) for lane in lanes])


def _connect_to_ego(route: list[str], ego_pose: np.ndarray, graph: LaneGraph, token: str) -> list[str]:
    start, candidates = _starting_block(set(route), ego_pose, graph, token)
    if start in route:
        return route
    behind = _search_blocks(route[0], candidates, graph.road_map.roadblock_incoming, BACKWARD_DEPTH)
    if behind:
        return [*reversed(behind[1:]), *route]
    ahead = _search_blocks(start, route[:3], graph.road_map.roadblock_outgoing, FORWARD_DEPTH)
    if ahead:
        return [*ahead, *route[route.index(ahead[-1]) + 1 :]]
    return route


def _fill_gaps(route: list[str], graph: LaneGraph) -> list[str]:
    filled = route[:1]
    for block, following in pairwise(route):
        if block not in graph.road_map.roadblock_incoming(following):
            path = _search_blocks(block, [following], graph.road_map.roadblock_outgoing, FORWARD_DEPTH)
            filled += path[1:-1]
        filled.append(following)
    return filled


def _cut_loops(route: list[str], graph: LaneGraph) -> list[str]:
    met: list[str] = []
    for index, block in enumerate(route):
        if not graph.road_map.is_block_connector(block):
            continue
        if any(graph.connectors_overlap(block, earlier) for earlier in met):
            return route[:index]
        met.append(block)
    return route


def _starting_block(
    route: Collection[str], ego_pose: np.ndarray, graph: LaneGraph, token: str
) -> tuple[str, Collection[str]]:
    """Block that the ego is on, and all blocks that qualify equally well."""
    displacement: dict[str, float] = {}  # smallest of any lane, per candidate block
    on_route: list[tuple[float, str]] = []
    off_route: list[tuple[float, str]] = []
    for block in _candidate_blocks(ego_pose, graph):
        displacement[block] = np.inf
        for lane in graph.road_map.interior_edges(block):
            distance, heading_error = graph.offset(lane, ego_pose)
            displacement[block] = min(displacement[block], distance)
            if heading_error < MAX_HEADING_ERROR and distance < MAX_DISPLACEMENT:
                (on_route if block in route else off_route).append((distance, block))
    if not displacement:
        raise DataError(token, "the map has no lane groups", field="map", remedy="check the map file")
    qualified = on_route or off_route or [(distance, block) for block, distance in displacement.items()]
    start = min(qualified, key=lambda entry: entry[0])[1]  # first of equals
    return start, {block for _, block in qualified}


def _candidate_blocks(ego_pose: np.ndarray, graph: LaneGraph) -> list[str]:
    layers = [graph.road_map.layer(name) for name in ("lane_groups_polygons", "lane_group_connectors")]
    x, y = float(ego_pose[0]), float(ego_pose[1])
    found = [str(layer.ids[row]) for layer in layers for row in layer.in_square(x, y, CANDIDATE_HALF_SIDE)]
    if found:
        return found
    point = shapely.points(x, y)
    nearest = [(layer, shapely.distance(layer.geometries, point)) for layer in layers if len(layer.ids)]
    return [str(layer.ids[int(np.argmin(distance))]) for layer, distance in nearest]


def _search_blocks(
    start: str, goals: Collection[str], neighbours: Callable[[str], Sequence[str]], max_depth: int
) -> list[str]:
    """Breadth-first path [start, …, goal] of at most `max_depth` blocks; empty where there is none.

    The reference expands every occurrence of a block, and of several ways to reach a block at one depth the one
    written last counts. Here each depth keeps its blocks once: in order of first occurrence (the order in which goals
    are met) and of last occurrence (which decides the predecessor). Same result, without the exponential growth.
    """
    by_first, by_last = [start], [start]
    came_from: list[dict[str, str]] = [{}]
    for depth in range(max_depth):
        goal = next((block for block in by_first if block in goals), None)
        if goal is not None:
            path = [goal]
            for parents in reversed(came_from[1 : depth + 1]):
                path.append(parents[path[-1]])
            return path[::-1]
        parents = {}
        last: dict[str, None] = {}
        for block in by_last:
            for neighbour in neighbours(block):
                parents[neighbour] = block
                last.pop(neighbour, None)
                last[neighbour] = None
        by_first = list(dict.fromkeys(neighbour for block in by_first for neighbour in neighbours(block)))
        by_last = list(last)
        came_from.append(parents)
    return []


def _shortest_lane_sequence(start: str, goals: set[str], allowed: set[str], graph: LaneGraph) -> list[str]:
    """Dijkstra over lanes; an edge costs the length of the lane it enters, ties go to the earliest queued."""
    came_from: dict[str, str | None] = {start: None}
    frontier: dict[str, tuple[float, int]] = {start: (1.0, 1)}  # cost, depth; insertion order breaks ties
    expanded: dict[str, tuple[float, int]] = {}
    end = None
    while frontier:
        lane = min(frontier, key=lambda candidate: frontier[candidate][0])
        cost, depth = frontier.pop(lane)
        if lane in goals:
            end = lane
            break
        expanded[lane] = (cost, depth)
        for following in graph.road_map.outgoing(lane):
            if following not in allowed or following in expanded:
                continue
            new_cost = cost + graph.length(following)
            if following not in frontier or new_cost < frontier[following][0]:
                frontier[following] = (new_cost, depth + 1)
                came_from[following] = lane
    if end is None:
        deepest = max(depth for _, depth in expanded.values())
        end = min((lane for lane in expanded if expanded[lane][1] == deepest), key=lambda lane: expanded[lane][0])
    sequence = []
    while end is not None:
        sequence.append(end)
        end = came_from[end]
    return sequence[::-1]
