"""Coarse tests with circles: which of many things are near enough to be looked at exactly.

Things are given by centre and squared reach; whatever is absent has NaN coordinates or a reach of `NOWHERE`. All tests
may err on the near side by `SLACK`, never on the far side.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 0.1  # metres squared
NOWHERE = -1e30


def near_any(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, squared_reach: Tensor) -> Tensor:
    """(..., N) bool: things (..., N) within reach of the rectangle around points x, y (..., P)."""
    away_x, away_y = (
        torch.maximum(own.amin(dim=-1, keepdim=True) - other, other - own.amax(dim=-1, keepdim=True)).clamp(min=0.0)
        for own, other in ((x, other_x), (y, other_y))
    )
    return away_x**2 + away_y**2 <= squared_reach + SLACK


def near_each(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor, squared_reach: Tensor) -> Tensor:
    """(..., P, N) bool: things (..., N) within reach of each of the points x, y (..., P).

    One matrix product of x² + y² - 2 x ox - 2 y oy + ox² + oy² - reach².
    """
    points = torch.stack([-2.0 * x, -2.0 * y, x**2 + y**2, torch.ones_like(x)], dim=-1)
    squared = other_x**2 + other_y**2 - squared_reach - SLACK
    present = ~torch.isnan(squared)
    columns = [
        torch.where(present, value, fill) for value, fill in ((other_x, 0.0), (other_y, 0.0), (squared, -NOWHERE))
    ]
    return torch.matmul(points, torch.stack([*columns[:2], torch.ones_like(squared), columns[2]], dim=-2)) <= 0.0


def packed(chosen: Tensor) -> Tensor:
    """(S, K) indices of the chosen among N, K the largest count of any scene; filled up with others. chosen: (S, N)."""
    count = max(1, int(chosen.sum(dim=1).max()))
    return torch.topk(chosen.to(torch.uint8), count, dim=1).indices
