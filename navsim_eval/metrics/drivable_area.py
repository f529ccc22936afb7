"""Drivable area compliance (DAC): 1 or 0."""

from __future__ import annotations

import torch
from torch import Tensor

from navsim_eval.metrics.areas import AreaFlags


def drivable_area_compliance(flags: AreaFlags) -> Tensor:
    """Sub-score (S, P): 0 if at any time a corner of the ego lies outside the drivable area, else 1.

    Source: NAVSIM's PDM scorer.
    """
    return (~flags.non_drivable.any(dim=-1)).to(torch.float64)
