"""Centrelines of several scenes: nearest points and arc lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Polylines:
    """Lines of S scenes, padded to M segments with copies of their last point.

    start: (S, M, 2);  step: (S, M, 2) to the end of the segment;  length: (S, M);  arc_length: (S, M) at the start
    """

    start: Tensor
    step: Tensor
    length: Tensor
    arc_length: Tensor

    @staticmethod
    def of(lines: list[np.ndarray], device: torch.device | str = "cpu") -> Polylines:
        """Pack vertices (M_s + 1, 2) per scene, given relative to the scene's origin."""
        longest = max(len(line) for line in lines)
        points = np.stack([np.pad(line, ((0, longest - len(line)), (0, 0)), mode="edge") for line in lines])
        vertices = torch.from_numpy(points).to(device=device, dtype=torch.float64)
        step = torch.diff(vertices, dim=1)
        length = torch.linalg.vector_norm(step, dim=-1)
        return Polylines(vertices[:, :-1], step, length, torch.cumsum(length, dim=1) - length)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Arc length (S, Q) of the nearest point of each line to points x, y (S, Q); in a tie the first."""
        dx = x[..., None] - self.start[:, None, :, 0]
        dy = y[..., None] - self.start[:, None, :, 1]
        step_x, step_y = self.step[:, None, :, 0], self.step[:, None, :, 1]
        squared = (self.length**2)[:, None]
        fraction = (dx * step_x + dy * step_y) / torch.where(squared > 0.0, squared, 1.0)
        fraction = fraction.clamp(0.0, 1.0)
        distance = (dx - fraction * step_x) ** 2 + (dy - fraction * step_y) ** 2
        nearest = distance.argmin(dim=-1)
        fraction = torch.gather(fraction, -1, nearest[..., None]).squeeze(-1)
        return torch.gather(self.arc_length, -1, nearest) + fraction * torch.gather(self.length, -1, nearest)
