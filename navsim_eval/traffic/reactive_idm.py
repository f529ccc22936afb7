"""Reactive traffic: vehicles on rails that follow what is in their way, by an Intelligent Driver Model.

A *world* is one scene with one simulated ego. Vehicles react to the ego and to each other, so every plan has traffic of
its own; but most vehicles never notice the ego and do the same in all worlds of a scene. Geometry (what lies ahead of a
vehicle, what ground it takes) is therefore computed once per distinct state of a vehicle, in array operations over all
worlds of all scenes; only vehicles that do follow the ego are computed world by world.

Source: NAVSIM v2's IDM traffic agents (`navsim_IDM_traffic_agents`), after nuPlan's IDM agents; IDM: Treiber et al.
2000. Steps are 0.1 s; at step t vehicles see the ego of step t - 1, its box around the rear axle instead of its centre
(as published), and vehicles before them in the frame's order where those already went. Traffic lights are not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.geometry import Vehicle, box_corners, wrap_angle
from navsim_eval.pdm.types import SIMULATION_DT, StateIndex
from navsim_eval.traffic.lines import Lines

RADIUS = 100.0  # m around the ego's rear axle; a vehicle that is further away once is gone
MIN_GAP = 1.0  # m
HEADWAY = 1.5  # s
MAX_ACCELERATION = 1.0  # m/s²
COMFORTABLE_DECELERATION = 2.0  # m/s²
EXPONENT = 4
_SIMPLIFY = 1e-5  # m, as the published evaluator cleans outlines


@dataclass(frozen=True)
class Vehicles:
    """Driven vehicles of one scene as they are now, A of them, and the L lines that they drive along.

    line, progress, target_speed, snapped: as in `TrafficStart`
    length, width: (A,) m;  speed: (A,) m/s;  lines: L arrays (V_l, 3) of x, y, heading
    """

    line: np.ndarray
    progress: np.ndarray
    target_speed: np.ndarray
    snapped: np.ndarray
    length: np.ndarray
    width: np.ndarray
    speed: np.ndarray
    lines: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Driven:
    """Driven vehicles over time, W worlds, T steps from the first after now, A places (NaN: not there).

    poses: (W, T, A, 3) box centre, global;  speed: (W, T, A)
    """

    poses: np.ndarray
    speed: np.ndarray


def drive(scenes: Sequence[Vehicles], scene_of: np.ndarray, ego: np.ndarray) -> Driven:
    """Let the vehicles of each world's scene react to its ego.

    scene_of: (W,) scene of each world;  ego: (W, T + 1, 11) simulated states of the ego, global, 0.1 s apart from now
    Place a of a world is vehicle a of its scene.
    """
    traffic = _Traffic(scenes, np.asarray(scene_of))
    steps = ego.shape[1] - 1
    poses = np.full((len(ego), steps, traffic.places, 3), np.nan)
    speed = np.full(poses.shape[:3], np.nan)
    for step in range(steps):
        traffic.advance(ego[:, step])
        for place in range(traffic.places):
            active = traffic.active[:, place]
            poses[active, step, place] = traffic.pose[active, place]
            speed[active, step, place] = traffic.speed[active, place]
    return Driven(poses, speed)


class _Traffic:
    """State of all vehicles in all worlds; (W, A) unless said otherwise.

    shapes[a]: (U,) outlines taken by vehicles at place a, one per distinct state;  which: index of the own one
    bounds:    (W, A, 4) of the own outline
    """

    def __init__(self, scenes: Sequence[Vehicles], scene_of: np.ndarray):
        first_line = np.cumsum([0] + [len(scene.lines) for scene in scenes])
        self.lines = Lines.of([line for scene in scenes for line in scene.lines])
        self.places = max((len(scene.line) for scene in scenes), default=0)

        def packed(values: Iterable[np.ndarray], fill: float = 0) -> np.ndarray:
            values = list(values)
            table = np.full((len(scenes), self.places, *values[0].shape[1:]), fill, values[0].dtype)
            for row, value in enumerate(values):
                table[row, : len(value)] = value
            return table[scene_of]

        self.scene_of = scene_of
        self.line = packed(scene.line.astype(int) + first for scene, first in zip(scenes, first_line, strict=False))
        self.length, self.width = packed(s.length for s in scenes), packed(s.width for s in scenes)
        self.target = packed((scene.target_speed for scene in scenes), 1.0)
        self.progress = packed(scene.progress for scene in scenes)
        self.speed = packed(scene.speed for scene in scenes)
        self.active = packed((np.ones(len(scene.line), bool) for scene in scenes), False)
        self.pose = np.zeros((len(scene_of), self.places, 3))
        self.which = np.zeros((len(scene_of), self.places), int)
        self.bounds = np.full((len(scene_of), self.places, 4), np.nan)
        self.shapes = [np.empty(0, object)] * self.places
        self._take_places(packed(scene.snapped for scene in scenes))

    def _take_places(self, snapped: np.ndarray) -> None:
        """At first, vehicles take their own box (W, A, 3) and nothing ahead of it."""
        for place in range(self.places):
            rows = np.flatnonzero(self.active[:, place])
            self.pose[rows, place] = self.lines.poses(self.line[rows, place], self.progress[rows, place])
            _, example, which = np.unique(self.scene_of[rows], return_index=True, return_inverse=True)
            one = rows[example]
            boxes = box_corners(snapped[one, place], self.length[one, place], self.width[one, place])
            self._set_shapes(place, rows, shapely.polygons(boxes), which)

    def advance(self, ego: np.ndarray) -> None:
        """One step of all vehicles, place by place, against the ego (W, 11)."""
        distance = np.hypot(*(self.pose[..., :2] - ego[:, None, :2]).transpose(2, 0, 1))
        self.active &= distance <= RADIUS
        outline = shapely.polygons(box_corners(ego[:, StateIndex.POSE], Vehicle.LENGTH, Vehicle.WIDTH))
        for place in range(self.places):
            rows = np.flatnonzero(self.active[:, place])
            if len(rows):
                lead = self._leads(place, rows, ego, outline)
                self._move(place, rows, *lead)

    # --- what a vehicle follows --------------------------------------------------------------------------------------

    def _leads(self, place: int, rows: np.ndarray, ego: np.ndarray, outline: np.ndarray) -> tuple[np.ndarray, ...]:
        """Gap [m], speed along the own heading [m/s] and rear length [m] of what vehicles (rows, place) follow."""
        which = self.which[rows, place]
        _, example = np.unique(which, return_index=True)
        one = rows[example]
        ahead = np.empty(len(self.shapes[place]), object)
        ahead[which[example]] = self.lines.ahead(
            self.line[one, place], self.progress[one, place], self.width[one, place] / 2
        )
        ahead_bounds = shapely.bounds(ahead)[which]

        gap = np.full((len(rows), self.places + 1), np.inf)  # the last column is the ego
        near = _overlap(ahead_bounds[:, None], self.bounds[rows]) & self.active[rows]
        near[:, place] = False
        for other in np.flatnonzero(near.any(axis=0)):
            chosen = np.flatnonzero(near[:, other])
            gap[chosen, other] = self._gaps(
                ahead, self.shapes[place], self.shapes[other], which[chosen], self.which[rows[chosen], other]
            )
        chosen = np.flatnonzero(_overlap(ahead_bounds, shapely.bounds(outline[rows])))
        gap[chosen, -1] = self._gaps(ahead, self.shapes[place], outline, which[chosen], rows[chosen])

        leader = gap.argmin(axis=1)
        nearest = gap.min(axis=1)
        tied = np.flatnonzero(((gap == nearest[:, None]).sum(axis=1) > 1) & np.isfinite(nearest))
        for row in tied:
            leader[row] = self._tie(place, rows[row], ahead[which[row]], outline[rows[row]], np.isfinite(gap[row]))
        return self._lead_vectors(place, rows, leader, nearest, ego)

    @staticmethod
    def _gaps(ahead, own, others, which: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Distance (C,) from the own outline to another that lies ahead, inf if it does not; each pair once."""
        if not len(which):
            return np.zeros(0)
        pair, inverse = np.unique(which * len(others) + other, return_inverse=True)
        mine, theirs = np.divmod(pair, len(others))
        met = shapely.intersects(ahead[mine], others[theirs])
        distance = np.full(len(pair), np.inf)
        distance[met] = shapely.distance(own[mine[met]], others[theirs[met]])
        return distance[inverse]

    def _tie(self, place: int, world: int, ahead, outline, met: np.ndarray) -> int:
        """Which of several equally near outlines counts: the first that the published evaluator's search tree meets."""
        order = [*np.flatnonzero(self.active[world]), self.places]
        outlines = [outline if k == self.places else self.shapes[k][self.which[world, k]] for k in order]
        found = [order[k] for k in shapely.STRtree(outlines).query(ahead) if met[order[k]]]
        shape = dict(zip(order, outlines, strict=True))
        own = self.shapes[place][self.which[world, place]]
        return found[int(shapely.STRtree([shape[k] for k in found]).nearest(own))]

    def _lead_vectors(self, place, rows, leader, gap, ego) -> tuple[np.ndarray, ...]:
        heading = self.pose[rows, place, 2]
        is_ego, is_free = leader == self.places, np.isinf(gap)
        other = np.minimum(leader, self.places - 1)
        lead_speed = np.where(
            is_ego, np.hypot(ego[rows, StateIndex.VX], ego[rows, StateIndex.VY]), self.speed[rows, other]
        )
        lead_heading = np.where(is_ego, ego[rows, StateIndex.HEADING], self.pose[rows, other, 2])
        along = np.where(is_free, 0.0, lead_speed * np.cos(wrap_angle(lead_heading - heading)))
        to_go = self.lines.end(self.line[rows, place]) - self.progress[rows, place]
        return np.where(is_free, to_go, gap), along, np.where(is_free, self.length[rows, place] / 2, 0.0)

    # --- motion ------------------------------------------------------------------------------------------------------

    def _move(self, place: int, rows: np.ndarray, gap: np.ndarray, lead_speed: np.ndarray, rear: np.ndarray) -> None:
        """An Euler step of the IDM, and the ground that the vehicles then take."""
        speed = self.speed[rows, place]
        approach = speed * (speed - lead_speed) / (2.0 * np.sqrt(MAX_ACCELERATION * COMFORTABLE_DECELERATION))
        wanted = MIN_GAP + speed * HEADWAY + approach
        room = np.maximum(gap - rear, MIN_GAP)
        free = (speed / self.target[rows, place]) ** EXPONENT
        acceleration = MAX_ACCELERATION * (1.0 - free - (wanted / room) ** 2)
        acceleration = np.clip(acceleration, -COMFORTABLE_DECELERATION, MAX_ACCELERATION)
        self.progress[rows, place] += SIMULATION_DT * speed
        self.speed[rows, place] = np.maximum(speed + SIMULATION_DT * acceleration, 0.0)

        state = np.column_stack([self.scene_of[rows], self.progress[rows, place], self.speed[rows, place]])
        _, example, which = np.unique(state, axis=0, return_index=True, return_inverse=True)
        one = rows[example]
        line, progress, width = self.line[one, place], self.progress[one, place], self.width[one, place]
        pose = self.lines.poses(line, progress)
        self.pose[rows, place] = pose[which]
        half_length = self.length[one, place] / 2
        reach = progress + half_length + self.speed[one, place] * HEADWAY
        box = shapely.polygons(box_corners(pose, 2 * half_length, width))
        ground = self.lines.section(line, progress - half_length, reach, width / 2)
        shapes = shapely.simplify(shapely.union(box, ground), _SIMPLIFY)
        self._set_shapes(place, rows, shapes, which)

    def _set_shapes(self, place: int, rows: np.ndarray, shapes: np.ndarray, which: np.ndarray) -> None:
        self.shapes[place] = shapes
        self.which[rows, place] = which
        self.bounds[rows, place] = shapely.bounds(shapes)[which]


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(...) bool: bounding boxes (..., 4) meet; NaN meets nothing."""
    return (a[..., 0] <= b[..., 2]) & (b[..., 0] <= a[..., 2]) & (a[..., 1] <= b[..., 3]) & (b[..., 1] <= a[..., 3])
