"""Lane keeping (LK): 1 or 0, in EPDMS only."""

from __future__ import annotations

import torch
from torch import Tensor

from navsim_eval.metrics.areas import AreaFlags
from navsim_eval.metrics.footprint import Footprints
from navsim_eval.metrics.polyline import Polylines

MAX_DEVIATION = 0.5  # metres
MAX_SAMPLES = 20  # 2 s at 10 Hz


def lane_keeping(ego: Footprints, flags: AreaFlags, centerline: Polylines) -> Tensor:
    """Sub-score (S, P): 0 once the ego's centre was more than 0.5 m off the centreline for 2 s without a break.

    Samples in an intersection are left out: they neither count nor break a run.
    Source: NAVSIM v2's PDM scorer.
    """
    flat_x, flat_y = ego.center_x.flatten(1), ego.center_y.flatten(1)
    off = ~centerline.within(flat_x, flat_y, MAX_DEVIATION).reshape(ego.center_x.shape)
    run = torch.zeros_like(ego.x[..., 0])
    longest = run
    for step_off, skipped in zip(off.unbind(-1), flags.in_intersection.unbind(-1), strict=True):
        run = torch.where(skipped, run, torch.where(step_off, run + 1.0, 0.0))
        longest = torch.maximum(longest, run)
    return (longest < MAX_SAMPLES).to(torch.float64)
