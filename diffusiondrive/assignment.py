"""Exact one-to-one assignment of a batch of cost tables, without leaving the device that they lie on.

On the CPU scipy solves table after table. On CUDA one Triton program solves one table by shortest augmenting paths
(Jonker and Volgenant, Computing 38, 1987; the same method as scipy's): rows are assigned one after the other, each
along the cheapest path of reassignments, while dual prices keep reduced costs non-negative. All of it is float64, so
that costs of very different size do not blur. The host waits for nothing.

`assign` is one opaque operation to torch.compile, so a compiled training step may contain it.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without a GPU need not bring it
    triton = None

HUGE = 1e9  # stands for NaN and ±∞: a diverged batch must reach the guard that names its scenes, not die in the solver


def assign(costs: Tensor) -> Tensor:
    """Costs (B, N, N) -> column of each row (B, N) int64, a permutation of least total cost. No gradient.

    NaN and +∞ count as 1e9, -∞ as -1e9. Among permutations of equal cost any may come back.
    """
    return _assign(costs.detach().nan_to_num(nan=HUGE, posinf=HUGE, neginf=-HUGE))


def assign_on_host(costs: Tensor) -> Tensor:
    """The same through scipy, wherever the costs lie; on CUDA the host waits for them."""
    tables = costs.detach().nan_to_num(nan=HUGE, posinf=HUGE, neginf=-HUGE).cpu().numpy()
    columns = np.stack([linear_sum_assignment(table)[1] for table in tables]) if len(tables) else np.empty((0, 0))
    return torch.from_numpy(columns).to(costs.device, torch.int64).view(costs.shape[:2])


@torch.library.custom_op("diffusiondrive::assign", mutates_args=())
def _assign(costs: Tensor) -> Tensor:
    if costs.is_cuda and triton is not None:
        return assign_by_triton(costs)
    return assign_on_host(costs)


@_assign.register_fake
def _(costs: Tensor) -> Tensor:
    return costs.new_empty(costs.shape[:2], dtype=torch.int64)


def assign_by_triton(costs: Tensor) -> Tensor:
    """Finite costs (B, N, N) on a GPU -> (B, N) int64."""
    batch, count = costs.shape[:2]
    columns = torch.empty((batch, count), dtype=torch.int64, device=costs.device)
    if batch and count:
        size = max(triton.next_power_of_2(count), 2)
        _solve[(batch,)](costs.contiguous(), columns, COUNT=count, SIZE=size, num_warps=max(1, min(size // 64, 8)))
    return columns


if triton is not None:

    @triton.jit
    def _solve(costs, columns, COUNT: tl.constexpr, SIZE: tl.constexpr):
        """One table. Vectors are indexed by column (`prices`, `owner`, `nearest`, `before`) or by row (`duals`)."""
        table = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, SIZE)
        real = lane < COUNT
        infinite = float("inf")
        duals = tl.zeros([SIZE], tl.float64)
        prices = tl.zeros([SIZE], tl.float64)
        owner = tl.full([SIZE], -1, tl.int32)  # the row that has a column; -1: free
        for start in range(COUNT):
            nearest = tl.full([SIZE], infinite, tl.float64)  # reduced length of the shortest path to a column
            before = tl.full([SIZE], -1, tl.int32)  # the column before it on that path; -1: the path starts here
            reached = lane < 0  # columns whose shortest path is known
            asked = lane < 0  # rows that the tree holds
            column = tl.min(tl.where(lane == 0, -1, 0), axis=0)  # -1
            row = start + column + 1  # as a value of the device: `start` itself may be a constant
            while row >= 0:
                asked = asked | (lane == row)
                line = tl.load(costs + (table * COUNT + row) * COUNT + lane, mask=real, other=0.0).to(tl.float64)
                dual = tl.sum(tl.where(lane == row, duals, 0.0), axis=0)
                length = line - dual - prices
                closer = real & (reached == 0) & (length < nearest)
                nearest = tl.where(closer, length, nearest)
                before = tl.where(closer, column, before)
                candidates = tl.where(real & (reached == 0), nearest, infinite)
                step = tl.min(candidates, axis=0)
                column = tl.min(tl.where(candidates == step, lane, SIZE), axis=0)
                duals = tl.where(asked, duals + step, duals)
                prices = tl.where(reached, prices - step, prices)
                nearest = tl.where(reached, nearest, nearest - step)
                reached = reached | (lane == column)
                row = tl.sum(tl.where(lane == column, owner, 0), axis=0)
            while column >= 0:  # shift the owners along the path
                previous = tl.sum(tl.where(lane == column, before, 0), axis=0)
                mover = tl.where(previous < 0, start, tl.sum(tl.where(lane == previous, owner, 0), axis=0))
                owner = tl.where(lane == column, mover, owner)
                column = previous
        tl.store(columns + table * COUNT + owner, lane.to(tl.int64), mask=real)
