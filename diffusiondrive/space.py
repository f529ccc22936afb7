"""The one home of the numbers that map trajectory points between metres and the normalised space of diffusion.

n = 2 (p - origin) / span - 1 for each axis. The published range is x in [-1.2, 55.7] m ahead and y in [-20, 26] m to
the left of the ego rear axle. Headings are never normalised and never diffused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from navsim_eval.errors import UserError


@dataclass
class SpaceConfig:
    """Metres that -1 stands for (`*_origin`) and the metres between -1 and 1 (`*_span`)."""

    x_origin: float = -1.2
    x_span: float = 56.9
    y_origin: float = -20.0
    y_span: float = 46.0

    def __post_init__(self) -> None:
        if min(self.x_span, self.y_span) <= 0:
            raise UserError(f"space: x_span ({self.x_span}) and y_span ({self.y_span}) must be positive metres")


class TrajectorySpace(nn.Module):
    """Points (..., 2) x, y in metres, ego frame <-> the same points normalised; what is diffused lies in [-1, 1]²."""

    def __init__(self, config: SpaceConfig):
        super().__init__()
        self.register_buffer("origin", torch.tensor([config.x_origin, config.y_origin]), persistent=False)
        self.register_buffer("span", torch.tensor([config.x_span, config.y_span]), persistent=False)

    def normalise(self, points: Tensor) -> Tensor:
        """Metres (..., 2) -> normalised (..., 2), not clipped."""
        return 2 * (points - self.origin) / self.span - 1

    def denormalise(self, points: Tensor) -> Tensor:
        """Normalised (..., 2) -> metres (..., 2), not clipped."""
        return (points + 1) / 2 * self.span + self.origin
