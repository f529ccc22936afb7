"""The ground the ego covers in each simulated state, and which boxes it touches.

Coordinates are metres relative to an origin near the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_eval.geometry import Vehicle
from navsim_eval.pdm.types import StateIndex

EGO_RADIUS = (Vehicle.HALF_LENGTH**2 + Vehicle.HALF_WIDTH**2) ** 0.5
_SLACK = 0.1  # metres squared by which the first, coarse test errs on the safe side
_ABSENT = 1e30


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
        return Contacts(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


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
    squared_reach = (EGO_RADIUS + torch.hypot(boxes.half_length, boxes.half_width)) ** 2 + _SLACK
    squared_reach = squared_reach.masked_fill(boxes.is_ignored, -_ABSENT)
    object_x, object_y = boxes.x[:, lead : lead + steps], boxes.y[:, lead : lead + steps]
    items = _near_any(center_x, center_y, object_x, object_y, squared_reach)
    near = circles_overlap(
        center_x, center_y, _columns(object_x, items), _columns(object_y, items), squared_reach.gather(1, items)
    )
    scene, time, proposal, place = torch.nonzero(near, as_tuple=True)
    item = items[scene, place]

    at = (scene, proposal, time)
    box_at = (scene, time + lead, item)
    ego_cos, ego_sin = ego.cos[at], ego.sin[at]
    box_x, box_y, box_cos, box_sin = (value[box_at] for value in (boxes.x, boxes.y, boxes.cos, boxes.sin))
    half = boxes.half_length[scene, item], boxes.half_width[scene, item]
    dx, dy = box_x - center_x[at], box_y - center_y[at]
    touching = rectangles_touch(
        dx, dy, ego_cos, ego_sin, Vehicle.HALF_LENGTH, Vehicle.HALF_WIDTH, box_cos, box_sin, *half
    )
    chosen = torch.nonzero(touching).squeeze(1)

    scene, proposal, time, item, ego_cos, ego_sin, box_cos, box_sin, dx, dy, box_x, box_y = (
        value[chosen]
        for value in (scene, proposal, time, item, ego_cos, ego_sin, box_cos, box_sin, dx, dy, box_x, box_y)
    )
    half = half[0][chosen], half[1][chosen]
    front_x, front_y = dx - Vehicle.HALF_LENGTH * ego_cos, dy - Vehicle.HALF_LENGTH * ego_sin
    front = rectangles_touch(front_x, front_y, ego_cos, ego_sin, 0.0, Vehicle.HALF_WIDTH, box_cos, box_sin, *half)
    away_x, away_y = box_x - ego.x[scene, proposal, time], box_y - ego.y[scene, proposal, time]
    distance = torch.hypot(away_x, away_y)
    cos_bearing = (ego_cos * away_x + ego_sin * away_y) / distance
    return scene, proposal, time, torch.full_like(time, lead), item, front, cos_bearing


def _near_any(x: Tensor, y: Tensor, object_x: Tensor, object_y: Tensor, squared_reach: Tensor) -> Tensor:
    """(S, K) indices of the objects within reach of some proposal's centre at some time; the others are passed over.

    x, y: (S, P, T);  object_x, object_y: (S, T, N);  squared_reach: (S, N). Judged by the rectangle around all
    proposals of a time step. K is the largest count of any scene; others are filled up with objects out of reach.
    """
    away_x, away_y = (
        torch.maximum(lower.amin(dim=1)[..., None] - value, value - lower.amax(dim=1)[..., None]).clamp(min=0.0)
        for lower, value in ((x, object_x), (y, object_y))
    )
    reached = (away_x**2 + away_y**2 <= squared_reach[:, None]).any(dim=1)
    count = int(reached.sum(dim=1).max())
    return torch.topk(reached.to(torch.uint8), max(count, 1), dim=1).indices


def _columns(values: Tensor, items: Tensor) -> Tensor:
    """(S, T, N) → (S, T, K), the columns `items` (S, K) of each scene."""
    return torch.gather(values, 2, items[:, None].expand(-1, values.shape[1], -1))


def circles_overlap(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, squared_reach: Tensor) -> Tensor:
    """(S, T, P, N) bool: points x, y (S, P, T) lie within reach of others (S, T, N); NaN never does.

    One matrix product of x² + y² - 2 x ox - 2 y oy + ox² + oy² - reach²; callers add slack to `squared_reach` (S, N).
    """
    points = torch.stack([-2.0 * x, -2.0 * y, x**2 + y**2, torch.ones_like(x)], dim=-1).transpose(1, 2)
    squared = other_x**2 + other_y**2 - squared_reach[:, None]
    present = ~torch.isnan(squared)
    columns = [
        torch.where(present, value, fill) for value, fill in ((other_x, 0.0), (other_y, 0.0), (squared, _ABSENT))
    ]
    others = torch.stack([*columns[:2], torch.ones_like(squared), columns[2]], dim=-2)
    return torch.matmul(points, others) <= 0.0


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
