"""Worlds that react: one per simulated plan, with the boxes that the plan meets there, and what the metric says of it.

Only collisions and time to collision look at other road users. In its own world, a plan is judged together with the
reference plan, which did not cause that world's traffic but is compared with the plan in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_eval.metrics.areas import AreaFlags, area_flags, locate
from navsim_eval.metrics.collision import STOPPED_SPEED, no_at_fault_collisions
from navsim_eval.metrics.footprint import Boxes, Footprints, find_contacts, rectangles_touch
from navsim_eval.metrics.scene_batch import PreparedScene, SceneBatch
from navsim_eval.metrics.time_to_collision import LEADS, time_to_collision_within_bound
from navsim_eval.pdm.types import SIMULATION_DT, MetricCache, StateIndex
from navsim_eval.traffic.rails import driven_line
from navsim_eval.traffic.reactive_idm import Driven, Vehicles, drive


@dataclass(frozen=True)
class Tracks:
    """All tracks of one scene, M of them; coordinates relative to the scene's origin.

    poses: (T, M, 3) where they are if nothing reacts: replayed tracks all the time, vehicles only now; NaN elsewhere
    half_sizes: (M, 2);  is_agent, is_stopped: (M,) bool;  driven, standing: rows of vehicles that move, or stay
    """

    poses: np.ndarray
    half_sizes: np.ndarray
    is_agent: np.ndarray
    is_stopped: np.ndarray
    driven: np.ndarray
    standing: np.ndarray

    @staticmethod
    def of(scene: PreparedScene) -> Tracks:
        seen, start = scene.cache.observation, scene.cache.traffic
        poses = np.concatenate([seen.poses, start.dropped_poses], axis=1) - np.append(scene.origin, 0.0)
        poses[0, ~start.seen_now] = np.nan
        poses[1:, ~start.replayed] = np.nan
        is_agent = np.concatenate([seen.is_agent, start.dropped_is_agent])
        speed = np.concatenate([seen.speed, start.dropped_speed])
        return Tracks(
            poses=poses,
            half_sizes=np.concatenate([seen.sizes, start.dropped_sizes]) / 2.0,
            is_agent=is_agent,
            is_stopped=~is_agent | (speed <= STOPPED_SPEED),
            driven=start.vehicle,
            standing=start.standing,
        )


def vehicles_of(cache: MetricCache) -> Vehicles:
    """The driven vehicles of a scene as they are now. One without a velocity drives as fast as the ego."""
    seen, start = cache.observation, cache.traffic
    sizes = np.concatenate([seen.sizes, start.dropped_sizes])[start.vehicle]
    speed = np.concatenate([seen.speed, start.dropped_speed])[start.vehicle]
    ego_speed = np.hypot(cache.initial_state[StateIndex.VX], cache.initial_state[StateIndex.VY])
    return Vehicles(
        line=start.line,
        progress=start.progress,
        target_speed=start.target_speed,
        snapped=start.snapped,
        length=sizes[:, 0],
        width=sizes[:, 1],
        speed=np.where(np.isnan(speed), ego_speed, speed),
        lines=tuple(map(driven_line, np.split(start.points, start.offsets[1:-1]))) if len(start.vehicle) else (),
    )


def judge_in_own_worlds(
    scenes: Sequence[PreparedScene], batch: SceneBatch, states: Tensor, last_ttc_index: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collision sub-scores under reactive traffic.

    states: (S, 1 + P, 41, 11) relative to the origins: the reference plan, then P plans, each with a world of its own
    Returns two dictionaries of (S, P), for the plans and for the reference plan in the worlds of the plans:
    `no_at_fault_collisions`, `time_to_collision_within_bound`, `first_collision_index`, `first_ttc_index`.
    """
    count = states.shape[1] - 1
    scene_of = np.repeat(np.arange(len(scenes)), count)
    origin = batch.origin.cpu().numpy()
    ego_states = states[:, 1:].flatten(0, 1).cpu().numpy().copy()
    ego_states[..., :2] += origin[scene_of, None]
    driven = drive([vehicles_of(scene.cache) for scene in scenes], scene_of, ego_states)
    boxes = world_boxes([Tracks.of(scene) for scene in scenes], scene_of, driven, origin, states.device)

    footprints = Footprints.of(states)
    flags = area_flags(locate(footprints, batch.areas.polygons), batch.areas)
    ego, flags = (_by_world(item, count) for item in (footprints, flags))
    areas = _SharedAreas(batch, torch.from_numpy(scene_of).to(states.device))
    contacts = find_contacts(ego, boxes, LEADS, SIMULATION_DT)
    collisions, first_collision = no_at_fault_collisions(contacts, ego, boxes, flags, areas)
    time_to_collision, first_violation = time_to_collision_within_bound(
        contacts, ego, boxes, flags, areas, last_ttc_index
    )
    values = {
        "no_at_fault_collisions": collisions,
        "time_to_collision_within_bound": time_to_collision,
        "first_collision_index": first_collision,
        "first_ttc_index": first_violation,
    }
    reference, plans = ({k: v[:, row].unflatten(0, (len(scenes), count)) for k, v in values.items()} for row in (0, 1))
    return plans, reference


def _by_world(rows: Footprints | AreaFlags, count: int) -> Footprints | AreaFlags:
    """(S, 1 + P, T) per row → (S · P, 2, T) per world: the reference plan and the plan whose world it is."""

    def paired(value: Tensor) -> Tensor:
        return torch.stack([value[:, :1].expand(-1, count, -1), value[:, 1:]], dim=2).flatten(0, 1)

    return type(rows)(*(paired(getattr(rows, name)) for name in rows.__dataclass_fields__))


class _SharedAreas:
    """The areas of scenes as worlds see them: world w uses the geometry of its scene (as `DrivableAreas`)."""

    def __init__(self, batch: SceneBatch, scene_of: Tensor):
        self._polygons, self._scene_of = batch.areas.polygons, scene_of
        self.lanes = batch.areas.lanes[:, scene_of]
        self.intersections = batch.areas.intersections[:, scene_of]
        self.polygons = self

    def locate(self, lookup: str, world: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._polygons.locate(lookup, self._scene_of[world], x, y)


def world_boxes(
    scenes: Sequence[Tracks], scene_of: np.ndarray, driven: Driven, origin: np.ndarray, device: torch.device | str
) -> Boxes:
    """All boxes of each world over time. origin: (S, 2) of the scenes."""
    steps, count = min(len(scene.poses) for scene in scenes), max(1, *(len(scene.is_agent) for scene in scenes))
    poses = np.full((len(scenes), steps, count, 3), np.nan)
    sizes, flags = np.zeros((len(scenes), count, 2)), np.zeros((3, len(scenes), count), bool)
    for row, scene in enumerate(scenes):
        number = len(scene.is_agent)
        poses[row, :, :number], sizes[row, :number] = scene.poses[:steps], scene.half_sizes
        flags[0, row, :number], flags[1, row, :number] = scene.is_agent, scene.is_stopped
    poses, sizes, flags = poses[scene_of], sizes[scene_of], flags[:, scene_of]
    for row, scene in enumerate(scenes):
        mine = np.flatnonzero(scene_of == row)
        moved = driven.poses[mine, : steps - 1, : len(scene.driven)] - np.append(origin[row], 0.0)
        poses[np.ix_(mine, np.arange(1, steps), scene.driven)] = moved
        stays = _unharmed(scene, moved)[..., None]
        poses[np.ix_(mine, np.arange(1, steps), scene.standing)] = np.where(
            stays, scene.poses[0, scene.standing], np.nan
        )
    x, y, heading = torch.from_numpy(poses).to(device).unbind(-1)
    half_length, half_width = torch.from_numpy(sizes).to(device).unbind(-1)
    cos, sin = torch.cos(heading), torch.sin(heading)
    flags = torch.from_numpy(flags).to(device)
    return Boxes(x.contiguous(), y.contiguous(), cos, sin, half_length.contiguous(), half_width.contiguous(), *flags)


def _unharmed(scene: Tracks, moved: np.ndarray) -> np.ndarray:
    """(W, T, B) bool: standing vehicles that no driven one (W, T, A, 3) touches at that time."""
    standing, reach = scene.poses[0, scene.standing], np.hypot(*scene.half_sizes.T)
    unharmed = np.ones((*moved.shape[:2], len(standing)), bool)
    for index, row in enumerate(scene.standing):
        distance = np.hypot(*(moved[..., :2] - standing[index, :2]).transpose(3, 0, 1, 2))
        world, time, place = np.nonzero(distance <= reach[scene.driven] + reach[row])
        other = torch.from_numpy(moved[world, time, place])
        dx, dy = (torch.from_numpy(standing[index, :2]) - other[:, :2]).unbind(-1)
        heading = torch.tensor(standing[index, 2])
        half = torch.from_numpy(scene.half_sizes[scene.driven[place]])
        touched = rectangles_touch(
            dx, dy, torch.cos(other[:, 2]), torch.sin(other[:, 2]), half[:, 0], half[:, 1],
            torch.cos(heading), torch.sin(heading), *scene.half_sizes[row],
        ).numpy()  # fmt: skip
        unharmed[world[touched], time[touched], index] = False
    return unharmed
