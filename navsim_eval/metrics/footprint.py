"""The ground the ego covers in each simulated state, and which boxes it touches.

Coordinates are metres relative to an origin near the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_eval.geometry import Vehicle
from navsim_eval.metrics import circles
from navsim_eval.pdm.types import StateIndex

EGO_RADIUS = (Vehicle.HALF_LENGTH**2 + Vehicle.HALF_WIDTH**2) ** 0.5


@dataclass(frozen=True)
class Footprints:
    """Ego boxes of simulated states, each field (S, P, T): scenes, proposals, time. Metres, radians, m/s.

    x, y: rear axle;  cos, sin: of the heading;  speed: hypot(vx, vy);  center_x, center_y: middle of the box.
    """

    x: Tensor
    y: Tensor
    cos: Tensor
    sin: Tensor
    speed: Tensor
    center_x: Tensor
    center_y: Tensor

    @staticmethod
    def of(states: Tensor) -> Footprints:
        """Footprints of states (S, P, T, 11)."""
        x, y, heading, vx, vy = (states[..., i].contiguous() for i in range(StateIndex.VY + 1))
        cos, sin = torch.cos(heading), torch.sin(heading)
        reach = Vehicle.REAR_AXLE_TO_CENTER
        return Footprints(x, y, cos, sin, torch.hypot(vx, vy), x + reach * cos, y + reach * sin)

    def at(self, scene: Tensor, proposal: Tensor, time: Tensor) -> Footprints:
        """The states with these indices (M,), as fields of shape (M,)."""
        _, proposals, steps = self.x.shape
        index = (scene * proposals + proposal) * steps + time
        return Footprints(
            *(torch.index_select(getattr(self, name).reshape(-1), 0, index) for name in self.__dataclass_fields__)
        )

    def corners(self) -> tuple[Tensor, Tensor]:
        """x and y, each (S, 4, P, T): front-left, rear-left, rear-right, front-right; (M, 4) of M states."""
        lon = (Vehicle.HALF_LENGTH, -Vehicle.HALF_LENGTH, -Vehicle.HALF_LENGTH, Vehicle.HALF_LENGTH)
        lat = (Vehicle.HALF_WIDTH, Vehicle.HALF_WIDTH, -Vehicle.HALF_WIDTH, -Vehicle.HALF_WIDTH)
        xs = [self.center_x + a * self.cos - b * self.sin for a, b in zip(lon, lat, strict=True)]
        ys = [self.center_y + a * self.sin + b * self.cos for a, b in zip(lon, lat, strict=True)]
        return torch.stack(xs, dim=1), torch.stack(ys, dim=1)


@dataclass(frozen=True)
class Boxes:
    """Objects of S scenes over time as tensors, padded to N objects; an absent object has a NaN position.

    x, y, cos, sin: (S, T, N) centre and direction;  half_length, half_width: (S, N)
    is_agent:   (S, N) bool  vehicle, pedestrian, bicycle
    is_stopped: (S, N) bool  static class, or its first observed speed is at most 0.05 m/s
    is_ignored: (S, N) bool  never collided with
    """

    x: Tensor
    y: Tensor
    cos: Tensor
    sin: Tensor
    half_length: Tensor
    half_width: Tensor
    is_agent: Tensor
    is_stopped: Tensor
    is_ignored: Tensor

    def at(self, scene: Tensor, time: Tensor, item: Tensor) -> Boxes:
        """The boxes with these indices (M,), as fields of shape (M,)."""
        _, steps, count = self.x.shape
        placed = (scene * steps + time) * count + item
        moving = (torch.index_select(value.reshape(-1), 0, placed) for value in (self.x, self.y, self.cos, self.sin))
        lasting = (self.half_length, self.half_width, self.is_agent, self.is_stopped, self.is_ignored)
        return Boxes(*moving, *(torch.index_select(value.reshape(-1), 0, scene * count + item) for value in lasting))


@dataclass(frozen=True)
class Contacts:
    """Ego footprints that touch an object: flat index tensors (M,) int64, in no particular order.

    The ego of state `time`, moved straight ahead for `lead` steps, touches the object as it is at `time + lead`.
    touches_front: (M,) bool  the object touches the ego's front bumper
    cos_bearing:   (M,)  cosine of the angle between ego heading and the way from rear axle (at `time`) to the object
    """

    scene: Tensor
    proposal: Tensor
    time: Tensor
    lead: Tensor
    object: Tensor
    touches_front: Tensor
    cos_bearing: Tensor

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the ego's states: scene, proposal, time."""
        return self.scene, self.proposal, self.time

    def where(self, chosen: Tensor) -> Contacts:
        """The contacts selected by a (M,) bool tensor."""
        index = torch.nonzero(chosen).squeeze(1)  # once for all: on a GPU it waits for what was asked for before
        return Contacts(*(torch.index_select(getattr(self, name), 0, index) for name in self.__dataclass_fields__))


def find_contacts(ego: Footprints, boxes: Boxes, leads: tuple[int, ...], dt: float) -> Contacts:
    """All contacts of the footprints with boxes, for each number of steps in `leads`; touching counts.

    States for which `time + lead` lies beyond the boxes' time range are not looked at.
    """
    found = [_contacts_at(ego, boxes, lead, dt) for lead in leads]
    return Contacts(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _contacts_at(ego: Footprints, boxes: Boxes, lead: int, dt: float) -> tuple[Tensor, ...]:
    steps = min(ego.x.shape[2], boxes.x.shape[1] - lead)
    shift = lead * dt * ego.speed[..., :steps]
    center_x = ego.center_x[..., :steps] + shift * ego.cos[..., :steps]
    center_y = ego.center_y[..., :steps] + shift * ego.sin[..., :steps]
    scene, time, proposal, item = candidates(center_x, center_y, boxes, lead)

    own, box = ego.at(scene, proposal, time), boxes.at(scene, time + lead, item)
    away_x, away_y = box.x - own.x, box.y - own.y
    shift = lead * dt * own.speed
    dx, dy = box.x - (own.center_x + shift * own.cos), box.y - (own.center_y + shift * own.sin)
    direction = (own.cos, own.sin)
    other = (box.cos, box.sin, box.half_length, box.half_width)
    touching = rectangles_touch(dx, dy, *direction, Vehicle.HALF_LENGTH, Vehicle.HALF_WIDTH, *other)
    front_x, front_y = dx - Vehicle.HALF_LENGTH * own.cos, dy - Vehicle.HALF_LENGTH * own.sin
    front = rectangles_touch(front_x, front_y, *direction, 0.0, Vehicle.HALF_WIDTH, *other)
    cos_bearing = (own.cos * away_x + own.sin * away_y) / torch.hypot(away_x, away_y)
    found = (scene, proposal, time, torch.full_like(time, lead), item, front, cos_bearing)
    chosen = torch.nonzero(touching).squeeze(1)
    return tuple(torch.index_select(column, 0, chosen) for column in found)


def candidates(center_x: Tensor, center_y: Tensor, boxes: Boxes, lead: int) -> tuple[Tensor, ...]:
    """Scene, time, proposal, object (M,) where circles around ego (S, P, T) and object, `lead` steps later, overlap."""
    x, y = center_x.transpose(1, 2), center_y.transpose(1, 2)
    object_x, object_y = (value[:, lead : lead + x.shape[1]] for value in (boxes.x, boxes.y))
    squared_reach = (EGO_RADIUS + torch.hypot(boxes.half_length, boxes.half_width)) ** 2
    squared_reach = squared_reach.masked_fill(boxes.is_ignored, circles.NOWHERE)
    # Most objects are never near any proposal: they are left out first.
    items = circles.packed(circles.near_any(x, y, object_x, object_y, squared_reach[:, None]).any(dim=1))
    object_x, object_y = (
        torch.gather(value, 2, items[:, None].expand(-1, x.shape[1], -1)) for value in (object_x, object_y)
    )
    near = circles.near_each(x, y, object_x, object_y, torch.gather(squared_reach, 1, items)[:, None])
    scene, time, proposal, place = torch.nonzero(near, as_tuple=True)
    return scene, time, proposal, items[scene, place]


def rectangles_touch(dx, dy, cos_a, sin_a, length_a, width_a, cos_b, sin_b, length_b, width_b) -> Tensor:
    """Whether two rectangles touch or overlap, by separating axes; elementwise.

    dx, dy: from centre a to centre b;  lengths and widths are half sizes, 0 makes a rectangle a line segment
    """
    cos = torch.abs(cos_a * cos_b + sin_a * sin_b)
    sin = torch.abs(sin_a * cos_b - cos_a * sin_b)
    return (
        (torch.abs(dx * cos_a + dy * sin_a) <= length_a + length_b * cos + width_b * sin)
        & (torch.abs(dy * cos_a - dx * sin_a) <= width_a + length_b * sin + width_b * cos)
        & (torch.abs(dx * cos_b + dy * sin_b) <= length_b + length_a * cos + width_a * sin)
        & (torch.abs(dy * cos_b - dx * sin_b) <= width_b + length_a * sin + width_a * cos)
    )
