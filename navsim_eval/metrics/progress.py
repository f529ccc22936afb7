"""Ego progress (EP): from metres along the route to a ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from navsim_eval.metrics.footprint import Footprints
from navsim_eval.metrics.polyline import Polylines

MEANINGFUL_PROGRESS = 5.0  # metres; below it, nobody is judged by progress


def raw_progress(ego: Footprints, centerline: Polylines) -> Tensor:
    """Metres (S, P) along the centreline between the projections of the ego's first and last centre, at least 0.

    Source: NAVSIM's PDM scorer. The projection saturates at both ends of the centreline.
    """
    x = torch.cat([ego.center_x[..., 0], ego.center_x[..., -1]], dim=1)
    y = torch.cat([ego.center_y[..., 0], ego.center_y[..., -1]], dim=1)
    start, end = centerline.project(x, y).chunk(2, dim=1)
    return (end - start).clamp(min=0.0)


def ego_progress_v1(raw: Tensor, multiplier: Tensor, best: Tensor) -> Tensor:
    """Sub-score of `pdms_v1`, elementwise: raw progress * multiplier over the best such product of the comparison.

    raw [m], multiplier (product of the multiplicative sub-scores), best [m]: any broadcastable shapes. Where the best
    is not above 5 m, the sub-score is 1, but 0 where the multiplier is 0.
    """
    still = torch.where(multiplier > 0.0, 1.0, 0.0).to(torch.float64)
    return torch.where(best > MEANINGFUL_PROGRESS, raw * multiplier / best, still)


def ego_progress_v2(raw: Tensor, best: Tensor) -> Tensor:
    """Sub-score of `epdms_v2`, elementwise: raw progress over the best (masked) progress, within 0 … 1.

    Unlike in v1 the own progress is not masked by the multiplicative sub-scores. Where the best is not above 5 m: 1.
    """
    return torch.where(best > MEANINGFUL_PROGRESS, (raw / best).clamp(0.0, 1.0), 1.0)
