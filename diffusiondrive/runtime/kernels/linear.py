"""Linear layers with what stands around them, in one launch: layer norms before, ReLU and a residual after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

ENOUGH_PROGRAMS = 100  # about one for each multiprocessor
LARGE_ROWS, FEW_ROWS = 2048, 128


@triton.jit
def _linear(
    x, weight, bias, column_sum, first_gain, first_shift, added, residual, gain, shift, y,
    rows, rows_a_scene, n, k, x_scene, x_row, r_scene, r_row, y_scene, y_row, added_scene, eps, first_eps, residual_eps,
    residual_width,
    FIRST: tl.constexpr, NORM: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, RESIDUAL_NORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RESIDUAL_BLOCK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live, inside = m < rows, column < n
    scene, row = m // rows_a_scene, m % rows_a_scene
    x_start = x + scene * x_scene + row * x_row
    w_start = weight + column * k
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if NORM:  # whole tiles: one reduction at the end instead of one a turn
        entries = tl.zeros((ROWS, DEPTH), tl.float32)
        products = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, k, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        if EVEN:
            a = tl.load(x_start[:, None] + depth[None, :], mask=live[:, None], other=0.0)
            b = tl.load(w_start[:, None] + depth[None, :], mask=inside[:, None], other=0.0)
        else:
            reach = (depth < k)[None, :]
            a = tl.load(x_start[:, None] + depth[None, :], mask=live[:, None] & reach, other=0.0)
            b = tl.load(w_start[:, None] + depth[None, :], mask=inside[:, None] & reach, other=0.0)
        if FIRST:  # another norm and a sum before; rows lie here as a whole
            within = live[:, None] & (depth < k)[None, :]
            off = a.to(tl.float32)
            off = tl.where(within, off - (tl.sum(off, 1) / k)[:, None], 0.0)
            off = off / tl.sqrt(tl.sum(off * off, 1) / k + first_eps)[:, None]
            off = off * tl.load(first_gain + depth, mask=depth < k, other=0.0)[None, :]
            off += tl.load(first_shift + depth, mask=depth < k, other=0.0)[None, :]
            off += tl.load(added + (scene * added_scene)[:, None] + depth[None, :], mask=within, other=0.0)
            a = tl.where(within, off, 0.0)
        if NORM:
            exact = a.to(tl.float32)
            entries += exact
            products += exact * exact
        total = tl.dot(a.to(b.dtype), tl.trans(b), total, input_precision=PRECISION)
    if NORM:  # gain and shift are in the weights: (x - mean) W = x W - mean · (sum of W's columns)
        mean = tl.sum(entries, 1) / k
        scale = 1 / tl.sqrt(tl.maximum(tl.sum(products, 1) / k - mean * mean, 0.0) + eps)
        of_column = tl.load(column_sum + column, mask=inside, other=0.0)
        total = scale[:, None] * (total - mean[:, None] * of_column[None, :])
    total += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0)
    both = live[:, None] & inside[None, :]
    if RESIDUAL:
        r_start = residual + scene * r_scene + row * r_row
        added = tl.load(r_start[:, None] + column[None, :], mask=both, other=0.0).to(tl.float32)
        if RESIDUAL_NORM:
            wide = tl.arange(0, RESIDUAL_BLOCK)
            within = live[:, None] & (wide < residual_width)[None, :]
            whole = tl.load(r_start[:, None] + wide[None, :], mask=within, other=0.0).to(tl.float32)
            centre = tl.sum(whole, 1) / residual_width
            off = tl.where(within, whole - centre[:, None], 0.0)
            spread = 1 / tl.sqrt(tl.sum(off * off, 1) / residual_width + residual_eps)
            of_gain = tl.load(gain + column, mask=inside, other=0.0)
            of_shift = tl.load(shift + column, mask=inside, other=0.0)
            added = (added - centre[:, None]) * spread[:, None] * of_gain[None, :] + of_shift[None, :]
        total += added
    y_start = y + scene * y_scene + row * y_row
    tl.store(y_start[:, None] + column[None, :], total.to(y.dtype.element_ty), mask=both)


@triton.jit
def _norm(
    x, gain, shift, added, y, width, rows_a_scene, x_scene, x_row, a_scene, a_row, y_scene, y_row, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    scene, row = m // rows_a_scene, m % rows_a_scene
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + scene * x_scene + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    off = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    normed = off / tl.sqrt(tl.sum(off * off, 0) / width + eps)
    normed = normed * tl.load(gain + column, mask=inside, other=0.0) + tl.load(shift + column, mask=inside, other=0.0)
    if ADD:
        normed += tl.load(added + scene * a_scene + row * a_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + scene * y_scene + row * y_row + column, normed.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Norm:
    """A layer norm's affine part (D,) float32, and its epsilon."""

    gain: Tensor
    shift: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Norm:
        return cls(norm.weight.detach().float().contiguous(), norm.bias.detach().float().contiguous(), norm.eps)

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """(B, R, D) -> its norm, + `added` (B or 1, R or 1, D); same type."""
        batch, rows, width = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        given = x if added is None else added.expand(batch, rows, width)
        _norm[(batch * rows,)](
            x, self.gain, self.shift, given, y, width, rows, x.stride(0), x.stride(1), given.stride(0),
            given.stride(1), y.stride(0), y.stride(1), self.eps,
            ADD=added is not None, BLOCK=triton.next_power_of_2(width), num_warps=4 if width > 128 else 1,
        )  # fmt: skip
        return y


class FusedLinear:
    """y = [ReLU] (norm(x) Wᵀ + b) [+ residual or norm(residual)].

    The norm's affine part is merged into weights and bias; weights keep the type `dtype`, sums are float32.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        norm: Norm | None = None,
        dtype: torch.dtype = torch.float32,
        precision: str = "tf32x3",
    ):
        """weight: (N, K);  precision: of float32 products, as in Triton's `dot` (tf32x3 is float32 to rounding)."""
        exact = weight.detach().double()
        total = torch.zeros(len(weight), device=weight.device).double() if bias is None else bias.detach().double()
        if norm is not None:
            total = total + exact @ norm.shift.double()
            exact = exact * norm.gain.double()
        self.weight = exact.to(dtype).contiguous()
        self.bias = total.float().contiguous()
        self.column_sum = self.weight.double().sum(1).float().contiguous()
        self.eps, self.normed = (norm.eps, True) if norm is not None else (0.0, False)
        self.precision = precision if dtype == torch.float32 else "ieee"

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d, norm: Norm | None = None, **options: object) -> FusedLinear:
        """From a linear layer or a 1×1 convolution."""
        return cls(layer.weight.detach().flatten(1), layer.bias, norm, **options)

    def __call__(
        self,
        x: Tensor,
        relu: bool = False,
        residual: Tensor | None = None,
        residual_norm: Norm | None = None,
        out: Tensor | None = None,
        before: tuple[Norm, Tensor] | None = None,
    ) -> Tensor:
        """x (B, R, K), rows contiguous -> (B, R, N); residual (B or 1, R, N). out: where to write, any row strides.

        before: a norm and what is added to its result (B, 1, K), to be read in the place of x
        """
        batch, rows, depth = x.shape
        width = len(self.weight)
        y = x.new_empty(batch, rows, width) if out is None else out
        other = y if residual is None else residual.expand(batch, rows, width)
        tile = tile_for(batch * rows, width, depth, self.weight.dtype)
        first, added = before or (Norm(self.bias, self.bias, 0.0), x)
        if before:  # whole rows
            tile = Tile(32, 16 if tile.rows == 32 else 64, triton.next_power_of_2(depth), 4, 1)
        grid = (triton.cdiv(batch * rows, tile.rows), triton.cdiv(width, tile.columns))
        normed = residual_norm or Norm(self.bias, self.bias, 0.0)
        _linear[grid](
            x, self.weight, self.bias, self.column_sum, first.gain, first.shift, added, other, normed.gain,
            normed.shift, y,
            batch * rows, rows, width, depth, x.stride(0), x.stride(1), other.stride(0), other.stride(1),
            y.stride(0), y.stride(1), added.stride(0), self.eps, first.eps, normed.eps, width,
            FIRST=before is not None, NORM=self.normed, RELU=relu,
            RESIDUAL=residual is not None, RESIDUAL_NORM=residual_norm is not None,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            RESIDUAL_BLOCK=triton.next_power_of_2(width) if residual_norm is not None else 16,
            EVEN=depth % tile.depth == 0, PRECISION=self.precision,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_for(rows: int, columns: int, depth: int, dtype: torch.dtype) -> Tile:
    """Large tiles where there is enough work for all multiprocessors, else ones that spread it."""
    half = dtype != torch.float32
    depth = max(16, triton.next_power_of_2(depth))
    if rows >= LARGE_ROWS and columns >= 64:
        return Tile(128, 64, min(depth, 64), 4, 3) if half else Tile(64, 64, min(depth, 32), 4, 3)
    if rows <= FEW_ROWS:  # nothing but latency: everything is loaded at once
        return Tile(32, 16, min(depth, 256), 4, 2)
    high, wide = 64, 64
    while triton.cdiv(rows, high) * triton.cdiv(columns, wide) < ENOUGH_PROGRAMS and max(high, wide) > 32:
        high, wide = (high // 2, wide) if high > wide else (high, wide // 2)
    return Tile(high, wide, min(depth, 128 if half else 64), 4, 3)
