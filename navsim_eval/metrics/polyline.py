"""Centrelines of several scenes: nearest points and arc lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_eval.metrics import circles

BLOCK = 8  # segments that are passed over together where a point is far away
_SLACK = 1e-6


@dataclass(frozen=True)
class Polylines:
    """Lines of S scenes, padded with copies of their last point to K blocks of `BLOCK` segments each.

    start_x, start_y, step_x, step_y, length, arc_length: (S * K, BLOCK) start of each segment, the step to its end, its
                  length, and the arc length at its start
    block_x, block_y, block_radius: (S, K) circles around the blocks
    """

    start_x: Tensor
    start_y: Tensor
    step_x: Tensor
    step_y: Tensor
    length: Tensor
    arc_length: Tensor
    block_x: Tensor
    block_y: Tensor
    block_radius: Tensor

    @staticmethod
    def of(lines: list[np.ndarray], device: torch.device | str = "cpu") -> Polylines:
        """Pack vertices (M_s + 1, 2) per scene, given relative to the scene's origin."""
        segments = max(1, -(-(max(len(line) for line in lines) - 1) // BLOCK)) * BLOCK
        points = np.stack([np.pad(line, ((0, segments + 1 - len(line)), (0, 0)), mode="edge") for line in lines])
        vertices = torch.from_numpy(points).to(device=device, dtype=torch.float64)
        step = torch.diff(vertices, dim=1)
        length = torch.linalg.vector_norm(step, dim=-1)
        arc_length = torch.cumsum(length, dim=1) - length
        blocks = vertices.unfold(1, BLOCK + 1, BLOCK)  # (S, K, 2, BLOCK + 1)
        center = (blocks.amin(dim=-1) + blocks.amax(dim=-1)) / 2.0
        radius = torch.linalg.vector_norm(blocks - center[..., None], dim=2).amax(dim=-1)
        columns = (*vertices[:, :-1].unbind(-1), *step.unbind(-1), length, arc_length)
        return Polylines(
            *(column.reshape(-1, BLOCK).contiguous() for column in columns),
            center[..., 0].contiguous(),
            center[..., 1].contiguous(),
            radius,
        )

    def within(self, x: Tensor, y: Tensor, distance: float) -> Tensor:
        """(S, Q) bool: whether points x, y (S, Q) lie at most `distance` metres from their line."""
        squared_reach = (self.block_radius + distance) ** 2
        blocks = circles.packed(circles.near_any(x, y, self.block_x, self.block_y, squared_reach))
        reached = (torch.gather(value, 1, blocks) for value in (self.block_x, self.block_y, squared_reach))
        scene, point, place = torch.nonzero(circles.near_each(x, y, *reached), as_tuple=True)
        row, block = scene * x.shape[1] + point, blocks[scene, place]
        squared, _ = self._to_segments(x, y, row, scene * self.block_radius.shape[1] + block)
        result = torch.zeros_like(x, dtype=torch.bool)
        result.view(-1)[row[squared.amin(dim=-1) <= distance * distance]] = True
        return result

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Arc length (S, Q) of the nearest point of each line to points x, y (S, Q); in a tie the first."""
        to_block = torch.sqrt(self._squared_to_blocks(x, y))
        surely = (to_block + self.block_radius[:, None]).amin(dim=-1, keepdim=True)  # some segment is this near
        candidates = to_block - self.block_radius[:, None] <= surely + _SLACK
        scene, point, block = torch.nonzero(candidates, as_tuple=True)
        row, block = scene * x.shape[1] + point, scene * self.block_radius.shape[1] + block
        squared, fraction = self._to_segments(x, y, row, block)

        best = torch.full((x.numel(),), torch.inf, dtype=x.dtype, device=x.device)
        best.scatter_reduce_(0, row, squared.amin(dim=-1), "amin")
        pair, place = torch.nonzero(squared == best[row][:, None], as_tuple=True)
        row, block = row[pair], block[pair]
        segment = block * BLOCK + place
        nearest = torch.full((x.numel(),), torch.iinfo(torch.int64).max, device=x.device)
        nearest.scatter_reduce_(0, row, segment, "amin")
        arc = self.arc_length[block, place] + fraction[pair, place] * self.length[block, place]
        first = segment == nearest[row]
        result = torch.zeros_like(best)
        result[row[first]] = arc[first]
        return result.reshape(x.shape)

    def _squared_to_blocks(self, x: Tensor, y: Tensor) -> Tensor:
        """(S, Q, K) squared distance to the middle of each block."""
        dx = x[..., None] - self.block_x[:, None]
        dy = y[..., None] - self.block_y[:, None]
        return dx.square_().add_(dy.square_())

    def _to_segments(self, x: Tensor, y: Tensor, row: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance to, and fraction along, each segment of a block: (C, BLOCK) for C pairs.

        row: (C,) index of the point in x and y, flattened;  block: (C,) index of the block, all scenes counted
        """
        start_x, start_y, step_x, step_y, length = (
            torch.index_select(column, 0, block)
            for column in (self.start_x, self.start_y, self.step_x, self.step_y, self.length)
        )
        dx = torch.index_select(x.reshape(-1), 0, row)[:, None] - start_x
        dy = torch.index_select(y.reshape(-1), 0, row)[:, None] - start_y
        fraction = _fraction_along(dx, dy, step_x, step_y, length)
        return (dx - fraction * step_x) ** 2 + (dy - fraction * step_y) ** 2, fraction


def _fraction_along(dx: Tensor, dy: Tensor, step_x: Tensor, step_y: Tensor, length: Tensor) -> Tensor:
    """Where on a segment, from 0 to 1, the point nearest to (dx, dy) lies, both given from the segment's start."""
    squared = length * length
    return ((dx * step_x + dy * step_y) / torch.where(squared > 0.0, squared, 1.0)).clamp(0.0, 1.0)
