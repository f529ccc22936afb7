"""No at-fault collision (NC): 1, 0.5 or 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from navsim_eval.metrics.areas import AreaFlags, DrivableAreas, straddles_lanes
from navsim_eval.metrics.footprint import Boxes, Contacts, Footprints

STOPPED_SPEED = 0.05  # m/s
COS_BEHIND = math.cos(math.radians(150.0))


def no_at_fault_collisions(
    contacts: Contacts, ego: Footprints, boxes: Boxes, flags: AreaFlags, areas: DrivableAreas
) -> tuple[Tensor, Tensor]:
    """Sub-score (S, P) and the 0.1 s index of the first at-fault collision (S, P), inf where there is none.

    Every contact of the ego's footprint with an object is judged, first match first: the ego stands (≤ 0.05 m/s): not
    its fault; the object stands or is static: its fault; the object is behind (more than 150° off the heading, from
    the rear axle): not its fault; the object touches the front bumper: its fault; otherwise a side contact, its fault
    where the ego straddles lanes or leaves the drivable area. An object that was once hit without fault is not judged
    again in this proposal. A fault scores 0 against a vehicle, pedestrian or bicycle, 0.5 against anything else.
    Source: NAVSIM's PDM scorer, after nuPlan's at-fault collision metric.
    """
    contacts = contacts.where(contacts.lead == 0)
    ego_stands = ego.speed[contacts.state] <= STOPPED_SPEED
    stands = boxes.is_stopped[contacts.scene, contacts.object]
    behind = contacts.cos_bearing < COS_BEHIND
    at_fault = ~ego_stands & (stands | (~behind & contacts.touches_front))
    at_the_side = ~ego_stands & ~stands & ~behind & ~contacts.touches_front
    at_fault[at_the_side] = careless(contacts.where(at_the_side), ego, flags, areas)
    at_fault &= ~after_an_exempted_contact(contacts, contacts.time, ~at_fault, ego, boxes)

    faults = contacts.where(at_fault)
    severity = torch.where(boxes.is_agent[faults.scene, faults.object], 0.0, 0.5).to(torch.float64)
    return reduce_first(faults, severity, ego)


def careless(contacts: Contacts, ego: Footprints, flags: AreaFlags, areas: DrivableAreas) -> Tensor:
    """(M,) bool: the ego straddles lanes or is off the drivable area at the time of each contact."""
    straddles = straddles_lanes(ego.at(*contacts.state), contacts.scene, areas)
    return straddles | flags.non_drivable[contacts.state]


def after_an_exempted_contact(
    contacts: Contacts, order: Tensor, exempted: Tensor, ego: Footprints, boxes: Boxes
) -> Tensor:
    """(M,) bool: an earlier contact (by `order`) of the same proposal and object was exempted, which ends its story."""
    scenes, proposals, _ = ego.x.shape
    objects = boxes.is_agent.shape[1]
    story = (contacts.scene * proposals + contacts.proposal) * objects + contacts.object
    end = torch.full((scenes * proposals * objects,), torch.iinfo(torch.int64).max, device=order.device)
    end.scatter_reduce_(0, story[exempted], order[exempted], "amin")
    return order > end[story]


def reduce_first(events: Contacts, severity: Tensor, ego: Footprints) -> tuple[Tensor, Tensor]:
    """Lowest `severity` (M,) of each proposal's events and the time of the first; (S, P) each, 1 and inf if none."""
    scenes, proposals, _ = ego.x.shape
    row = events.scene * proposals + events.proposal
    score = torch.ones(scenes * proposals, dtype=torch.float64, device=row.device)
    first = torch.full_like(score, torch.inf)
    score.scatter_reduce_(0, row, severity, "amin")
    first.scatter_reduce_(0, row, events.time.to(torch.float64), "amin")
    return score.reshape(scenes, proposals), first.reshape(scenes, proposals)
