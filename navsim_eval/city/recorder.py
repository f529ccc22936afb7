"""From simulated traffic to NAVSIM frames: what the ego's log would hold at 2 Hz.

One `Recorder` per district knows the network, the traffic, the furniture and the map ids; `frames` turns one vehicle's
drive into consecutive frames. Frames are in UTM; annotations in the ego frame of their own time. Driving commands need
the finished map and are filled in by `driving_command`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from navsim_eval.city.ego import EgoMotion
from navsim_eval.city.furniture import Furniture
from navsim_eval.city.network import District
from navsim_eval.city.road_map import MapIds
from navsim_eval.city.sumo_net import Network
from navsim_eval.city.traffic import STEP_S, Track, Traffic
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import to_local
from navsim_eval.pdm.drivable import build_drivable_map
from navsim_eval.pdm.lane_graph import lane_graph
from navsim_eval.pdm.path import Path as LanePath
from navsim_eval.pdm.route import correct_route, route_centerline, starting_lane
from navsim_eval.scene import COMMANDS, FRAME_INTERVAL_S, Annotations, Frame

HISTORY_FRAMES, FUTURE_FRAMES = 3, 10  # of a scene, around its current frame
FRAME_STEPS = round(FRAME_INTERVAL_S / STEP_S)
RADIUS_M = 90.0  # objects farther from the ego are not annotated
SIGNAL_RADIUS_M = 130.0
ROUTE_AHEAD_M = 400.0
COMMAND_LOOKAHEAD_M, COMMAND_OFFSET_M = 20.0, 2.0
EPOCH_S = 1_620_000_000  # start of every recording, May 2021
UNKNOWN_COMMAND = np.array([0, 0, 0, 1])


def token(*parts: object) -> str:
    """16 hex digits that depend on nothing but the parts."""
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Moving:
    """All road users at one step, local frame. poses: box centres x, y, heading."""

    poses: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    speed: np.ndarray
    ids: np.ndarray
    tokens: np.ndarray


class Recorder:
    """Makes frames of a district."""

    def __init__(self, district: District, network: Network, ids: MapIds, traffic: Traffic, furniture: Furniture):
        self.district, self.network, self.ids = district, network, ids
        self.traffic, self.furniture = traffic, furniture
        self._moving: dict[int, _Moving] = {}

    def frames(self, track: Track, motion: EgoMotion, first: int, count: int, log_name: str) -> list[Frame]:
        """`count` frames from step `first` on, FRAME_STEPS apart, with unknown command and without sensors."""
        return [self._frame(track, motion, first + k * FRAME_STEPS, log_name) for k in range(count)]

    def route(self, track: Track, motion: EgoMotion, step: int) -> tuple[str, ...]:
        """Blocks from the one under the rear axle on, lane groups and their connectors in driving order.

        Empty where the recording no longer tells (behind the start, or at the end of the trip).
        """
        blocks, starts, ends = self._blocks(track, motion)
        here = motion.progress[step - motion.first]
        if not len(starts) or here < starts[0]:
            return ()
        first = int(np.searchsorted(ends, here, side="right"))
        ahead = starts[first:] <= here + ROUTE_AHEAD_M
        return tuple(str(block) for block in blocks[first:][ahead])

    def known_route(self, track: Track, motion: EgoMotion) -> tuple[float, float]:
        """Where the known route starts and ends, as arc length of the bumper's trace [m]."""
        _, starts, ends = self._blocks(track, motion)
        return (float(starts[0]), float(ends[-1])) if len(starts) else (np.inf, -np.inf)

    def moving(self, step: int) -> _Moving:
        """Road users at a step."""
        if step not in self._moving:
            present = [t for t in self.traffic.tracks if t.first <= step <= t.last]
            fronts = np.array([t.poses[step - t.first] for t in present]).reshape(-1, 3)
            sizes = np.array([(t.kind.length, t.kind.width, t.kind.height) for t in present]).reshape(-1, 3)
            back = np.column_stack([np.cos(fronts[:, 2]), np.sin(fronts[:, 2])]) * sizes[:, :1] / 2
            self._moving[step] = _Moving(
                poses=np.column_stack([fronts[:, :2] - back, fronts[:, 2]]),
                sizes=sizes,
                names=np.array([t.kind.annotation for t in present], dtype=str),
                speed=np.array([t.speed[step - t.first] for t in present]),
                ids=np.array([t.id for t in present], dtype=str),
                tokens=np.array([self._track_tokens[t.id] for t in present], dtype=str),
            )
        return self._moving[step]

    def _frame(self, track: Track, motion: EgoMotion, step: int, log_name: str) -> Frame:
        row = step - motion.first
        local = motion.poses[row]
        pose = np.array([*(local[:2] + self.district.offset), np.arctan2(np.sin(local[2]), np.cos(local[2]))])
        time_us = (EPOCH_S + 86_400 * self.district.index) * 1_000_000 + round(step * STEP_S * 1e6)
        return Frame(
            token=token(self.district.split, self.district.seed, track.id, step),
            log_name=log_name,
            scene_token=token("scene", self.district.split, self.district.seed, track.id, step // 200),
            map_name=self.district.location.name,
            timestamp_us=time_us,
            ego_pose=pose,
            ego_velocity=np.array([motion.velocity[row], 0.0]),
            ego_acceleration=motion.acceleration[row].copy(),
            driving_command=UNKNOWN_COMMAND,
            roadblock_ids=self.route(track, motion, step),
            traffic_lights=self._lights(local, step),
            annotations=self._annotations(track, local, step),
        )

    def _annotations(self, track: Track, ego: np.ndarray, step: int) -> Annotations:
        moving, still = self.moving(step), self.furniture
        names = np.concatenate([moving.names, still.names])
        poses = np.concatenate([moving.poses, still.poses])
        sizes = np.concatenate([moving.sizes, still.sizes])
        speed = np.concatenate([moving.speed, np.zeros(len(still.names))])
        tokens = np.concatenate([moving.tokens, self._furniture_tokens])
        near = np.hypot(*(poses[:, :2] - ego[:2]).T) < RADIUS_M
        near[: len(moving.ids)] &= moving.ids != track.id
        boxes = to_local(ego, poses[near])
        velocity = speed[near, None] * np.column_stack([np.cos(boxes[:, 2]), np.sin(boxes[:, 2])])
        return Annotations(
            boxes=np.column_stack([boxes[:, :2], sizes[near, 2] / 2, sizes[near], boxes[:, 2]]),
            names=names[near],
            velocity=velocity,
            track_tokens=tokens[near].astype(str),
        )

    def _track_token(self, name: str) -> str:
        return token("track", self.district.split, self.district.seed, name)

    @cached_property
    def _track_tokens(self) -> dict[str, str]:
        return {track.id: self._track_token(track.id) for track in self.traffic.tracks}

    @cached_property
    def _furniture_tokens(self) -> np.ndarray:
        return np.array([self._track_token(f"still-{k}") for k in range(len(self.furniture.names))], dtype=str)

    def _lights(self, ego: np.ndarray, step: int) -> tuple[tuple[str, bool], ...]:
        """State of the connectors of signalised junctions around; yellow and green both count as not red."""
        points, connectors = self._signals
        near = np.flatnonzero(np.hypot(*(points - ego[:2]).T) < SIGNAL_RADIUS_M)
        lights = []
        for k in near:
            connector, (light, index) = connectors[k]
            lights.append((str(connector), self.traffic.signal_state(light, step)[index] in "rR"))
        return tuple(lights)

    @cached_property
    def _signals(self) -> tuple[np.ndarray, list[tuple[int, tuple[str, int]]]]:
        links = [link for link in self.network.links if link.signal]
        points = np.array([link.shape[0] for link in links]).reshape(-1, 2)
        return points, [(self.ids.connectors[k.from_lane, k.to_lane], k.signal) for k in links]

    def _blocks(self, track: Track, motion: EgoMotion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Map blocks of the whole trip and where each starts and ends, as arc length of the bumper's trace [m].

        Read off the lanes that SUMO reports for the bumper; the part of the route not driven during the recording is
        measured on the network.
        """
        if track.id not in self._block_cache:
            self._block_cache[track.id] = self._measure_blocks(track, motion)
        return self._block_cache[track.id]

    @cached_property
    def _block_cache(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return {}

    def _measure_blocks(self, track: Track, motion: EgoMotion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        front, lanes = motion.front_progress, track.lanes[motion.first - track.first :]
        position = -1
        blocks: list[int] = []
        starts: list[float] = []
        previous = None
        for lane, arc in zip(lanes, front, strict=True):
            edge = lane.rsplit("_", 1)[0]
            if edge == previous or (edge.startswith(":") and previous is not None and previous.startswith(":")):
                continue
            previous = edge
            if edge.startswith(":"):
                if position < 0:  # entered the recording inside a junction: the street before it is unknown
                    continue
                block = self.ids.group_connectors[track.route[position], track.route[position + 1]]
            else:
                position = track.route.index(edge, max(position, 0))
                block = self.ids.groups[edge]
            blocks.append(block)
            starts.append(float(arc))
        if not blocks:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        arc = max(float(front[-1]), starts[-1]) + 1.0
        for before, after in zip(track.route[position:-1], track.route[position + 1 :], strict=True):
            connector = self.ids.group_connectors[before, after]
            if blocks[-1] != connector:
                blocks.append(connector)
                starts.append(arc)
            blocks.append(self.ids.groups[after])
            starts.append(arc + 1.0)
            arc += self.network.car_lanes(after)[0].length
        return np.array(blocks), np.array(starts), np.array([*starts[1:], max(arc, starts[-1])])


def driving_command(frame: Frame, road_map: RoadMap) -> np.ndarray:
    """(4,) one-hot left, straight, right, unknown, by NAVSIM's rule: where the route's centre line is 20 m ahead.

    The sideways offset is measured in the frame of the centre line's pose next to the rear axle.
    """
    if not frame.roadblock_ids:
        return UNKNOWN_COMMAND
    graph = lane_graph(road_map)
    route = correct_route(frame.roadblock_ids, frame.ego_pose, graph, token=frame.token)
    drivable_map = build_drivable_map(road_map, frame.ego_pose, route.lanes)
    start = starting_lane(route, drivable_map, frame.ego_pose, graph)
    return command_on(route_centerline(route, start, graph), frame.ego_pose)


def command_on(centerline: np.ndarray, ego_pose: np.ndarray) -> np.ndarray:
    """Driving command of a pose (3,) on a centre line (M, 3)."""
    path = LanePath(centerline)
    here = float(path.project(ego_pose[:2]))
    near, ahead = path.interpolate(np.array([here, here + COMMAND_LOOKAHEAD_M]))
    side = to_local(near, ahead)[1]
    name = "left" if side >= COMMAND_OFFSET_M else "right" if side <= -COMMAND_OFFSET_M else "straight"
    return np.array([int(name == command) for command in COMMANDS])
