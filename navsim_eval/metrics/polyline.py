"""Centrelines of several scenes: nearest points and arc lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 16  # segments that are passed over together where a point is far away
_SLACK = 1e-6


@dataclass(frozen=True)
class Polylines:
    """Lines of S scenes, padded to M segments (a multiple of `BLOCK`) with copies of their last point.

    start: (S, M, 2);  step: (S, M, 2) to the end of the segment;  length: (S, M);  arc_length: (S, M) at the start
    block_center: (S, M / BLOCK, 2), block_radius: (S, M / BLOCK)  circles around so many segments in a row
    """

    start: Tensor
    step: Tensor
    length: Tensor
    arc_length: Tensor
    block_center: Tensor
    block_radius: Tensor

    @staticmethod
    def of(lines: list[np.ndarray], device: torch.device | str = "cpu") -> Polylines:
        """Pack vertices (M_s + 1, 2) per scene, given relative to the scene's origin."""
        segments = -(-(max(len(line) for line in lines) - 1) // BLOCK) * BLOCK
        points = np.stack([np.pad(line, ((0, segments + 1 - len(line)), (0, 0)), mode="edge") for line in lines])
        vertices = torch.from_numpy(points).to(device=device, dtype=torch.float64)
        step = torch.diff(vertices, dim=1)
        length = torch.linalg.vector_norm(step, dim=-1)
        blocks = vertices.unfold(1, BLOCK + 1, BLOCK)  # (S, M / BLOCK, 2, BLOCK + 1)
        center = (blocks.amin(dim=-1) + blocks.amax(dim=-1)) / 2.0
        radius = torch.linalg.vector_norm(blocks - center[..., None], dim=2).amax(dim=-1)
        return Polylines(vertices[:, :-1], step, length, torch.cumsum(length, dim=1) - length, center, radius)

    def within(self, x: Tensor, y: Tensor, distance: float) -> Tensor:
        """(S, Q) bool: whether points x, y (S, Q) lie at most `distance` metres from their line."""
        dx = x[..., None] - self.block_center[:, None, :, 0]
        dy = y[..., None] - self.block_center[:, None, :, 1]
        reach = (self.block_radius + distance + _SLACK)[:, None]
        scene, point, block = torch.nonzero(dx * dx + dy * dy <= reach * reach, as_tuple=True)
        segment = block[:, None] * BLOCK + torch.arange(BLOCK, device=x.device)
        start, step = self.start[scene[:, None], segment], self.step[scene[:, None], segment]
        dx, dy = x[scene, point][:, None] - start[..., 0], y[scene, point][:, None] - start[..., 1]
        fraction = _fraction_along(dx, dy, step[..., 0], step[..., 1], self.length[scene[:, None], segment])
        squared = (dx - fraction * step[..., 0]) ** 2 + (dy - fraction * step[..., 1]) ** 2
        near = squared.amin(dim=-1) <= distance * distance
        result = torch.zeros_like(x, dtype=torch.bool)
        result[scene[near], point[near]] = True
        return result

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Arc length (S, Q) of the nearest point of each line to points x, y (S, Q); in a tie the first."""
        dx = x[..., None] - self.start[:, None, :, 0]
        dy = y[..., None] - self.start[:, None, :, 1]
        step_x, step_y = self.step[:, None, :, 0], self.step[:, None, :, 1]
        fraction = _fraction_along(dx, dy, step_x, step_y, self.length[:, None])
        distance = (dx - fraction * step_x) ** 2 + (dy - fraction * step_y) ** 2
        nearest = distance.argmin(dim=-1)
        fraction = torch.gather(fraction, -1, nearest[..., None]).squeeze(-1)
        return torch.gather(self.arc_length, -1, nearest) + fraction * torch.gather(self.length, -1, nearest)


def _fraction_along(dx: Tensor, dy: Tensor, step_x: Tensor, step_y: Tensor, length: Tensor) -> Tensor:
    """Where on a segment, from 0 to 1, the point nearest to (dx, dy) lies, both given from the segment's start."""
    squared = length * length
    return ((dx * step_x + dy * step_y) / torch.where(squared > 0.0, squared, 1.0)).clamp(0.0, 1.0)
