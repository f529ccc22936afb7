"""Driving direction compliance (DDC): 1, 0.5 or 0."""

from __future__ import annotations

import torch
from torch import Tensor

from navsim_eval.metrics.areas import AreaFlags
from navsim_eval.metrics.footprint import Footprints

WINDOW = 10  # steps of 0.1 s; a window holds one sample more
TOLERATED = 2.0  # metres
EXCESSIVE = 6.0


def driving_direction_compliance(ego: Footprints, flags: AreaFlags, spare_intersections: bool) -> Tensor:
    """Sub-score (S, P) by how far the ego's centre travels off its route's lanes within any 1 s.

    A step counts where its end lies in no lane or connector of the route (v2: nor in an intersection). The largest sum
    over 11 neighbouring samples decides: below 2 m: 1; below 6 m: 0.5; else 0.
    Source: NAVSIM's PDM scorer, after nuPlan's driving direction metric.
    """
    wrong = flags.oncoming & ~flags.in_intersection if spare_intersections else flags.oncoming
    step = torch.hypot(torch.diff(ego.center_x, dim=-1), torch.diff(ego.center_y, dim=-1))
    step = torch.where(wrong[..., 1:], step, 0.0)
    step = torch.nn.functional.pad(step, (WINDOW + 1, 0))
    distance = step.unfold(-1, WINDOW + 1, 1).sum(dim=-1).amax(dim=-1)
    half = torch.where(distance < EXCESSIVE, 0.5, 0.0).to(torch.float64)
    return torch.where(distance < TOLERATED, 1.0, half)
