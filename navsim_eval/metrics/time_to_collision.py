"""Time to collision within bound (TTC): 1 or 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from navsim_eval.metrics.areas import AreaFlags, DrivableAreas, rear_axle_in_intersection
from navsim_eval.metrics.collision import COS_BEHIND, after_an_exempted_contact, careless, reduce_first
from navsim_eval.metrics.footprint import Boxes, Contacts, Footprints

LEADS = (0, 3, 6, 9)  # steps of 0.1 s that the ego is projected ahead
MOVING_SPEED = 0.005  # m/s
COS_AHEAD = math.cos(math.radians(30.0))


def time_to_collision_within_bound(
    contacts: Contacts, ego: Footprints, boxes: Boxes, flags: AreaFlags, areas: DrivableAreas, last_time: int
) -> tuple[Tensor, Tensor]:
    """Sub-score (S, P) and the 0.1 s index of the first violation (S, P), inf where there is none.

    The ego of each state (up to index `last_time`: 40 in v1, 31 in v2) is moved straight ahead at its speed for 0, 0.3,
    0.6 and 0.9 s and held against the objects as they are then. A contact of a moving ego (≥ 0.005 m/s) is a violation
    if the object is ahead (within 30° of the heading, from the rear axle of the unmoved ego), or if the ego straddles
    lanes, leaves the drivable area or has its rear axle in an intersection, and the object is not behind (150°). An
    object whose contact was no violation is not judged again in this proposal.
    Source: NAVSIM's PDM scorer, after nuPlan's time-to-collision metric.
    """
    contacts = contacts.where(contacts.time <= last_time)
    contacts = contacts.where(ego.speed[contacts.state] >= MOVING_SPEED)
    ahead = contacts.cos_bearing > COS_AHEAD
    behind = contacts.cos_bearing < COS_BEHIND
    beside = ~ahead & ~behind
    violation = ahead.clone()
    violation[beside] = _exposed(contacts.where(beside), ego, flags, areas)
    order = contacts.time * (LEADS[-1] + 1) + contacts.lead
    violation &= ~after_an_exempted_contact(contacts, order, ~violation, ego, boxes)

    violations = contacts.where(violation)
    return reduce_first(violations, torch.zeros_like(violations.cos_bearing), ego)


def _exposed(contacts: Contacts, ego: Footprints, flags: AreaFlags, areas: DrivableAreas) -> Tensor:
    """(M,) bool: where contacts beside the ego count."""
    crossing = rear_axle_in_intersection(ego.at(*contacts.state), contacts.scene, areas)
    return crossing | careless(contacts, ego, flags, areas)
