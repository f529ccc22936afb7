"""Maps (channels last): pooled into tokens, resized tokens added, max pooling, the planning map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusiondrive.runtime.kernels.linear import FusedLinear, Norm

CHANNELS_LAST = torch.channels_last


@triton.jit
def _pool(
    x, added, y, channels, height, width, rows, columns, y_scene, y_row, scale,
    ADD: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    scene, place = cell // (rows * columns), cell % (rows * columns)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    high, wide = height // rows, width // columns
    top, left = (place // columns) * high, (place % columns) * wide
    across = tl.arange(0, WIDE)
    total = tl.zeros((CHANNELS,), tl.float32)
    for down in range(0, HIGH):
        pixel = (scene * height + top + down) * width + left + across
        value = tl.load(
            x + pixel[:, None] * channels + channel[None, :], mask=(across < wide)[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(value.to(tl.float32), 0)
    total = total * scale
    if ADD:
        total += tl.load(added + place * channels + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + scene * y_scene + place * y_row + channel, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _interpolate(
    tokens, place, channel, both, height, width, rows, columns, t_row, CELLS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Bilinear (align_corners=False) mix of a scene's tokens at `place`, a cell of height × width; float32.

    tokens: where the scene's tokens begin (CELLS,);  both: which cells and channels exist
    """
    down = tl.maximum(((place // width).to(tl.float32) + 0.5) * rows / height - 0.5, 0.0)
    across = tl.maximum(((place % width).to(tl.float32) + 0.5) * columns / width - 0.5, 0.0)
    top, left = down.to(tl.int32), across.to(tl.int32)
    bottom, right = tl.minimum(top + 1, rows - 1), tl.minimum(left + 1, columns - 1)
    lower, later = down - top.to(tl.float32), across - left.to(tl.float32)
    value = tl.zeros((CELLS, CHANNELS), tl.float32)
    for corner in tl.static_range(4):
        row = bottom if corner >= 2 else top
        column = right if corner % 2 == 1 else left
        share = (lower if corner >= 2 else 1 - lower) * (later if corner % 2 == 1 else 1 - later)
        token = tokens + (row * columns + column) * t_row
        value += share[:, None] * tl.load(token[:, None] + channel[None, :], mask=both, other=0.0).to(tl.float32)
    return value


@triton.jit
def _resize(
    base, tokens, y, pixels, channels, height, width, rows, columns, t_scene, t_row,
    ADD: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    both = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    scene, place = pixel // (height * width), pixel % (height * width)
    start = tokens + scene * t_scene
    value = _interpolate(start, place, channel, both, height, width, rows, columns, t_row, PIXELS, CHANNELS)
    where = pixel[:, None] * channels + channel[None, :]
    if ADD:
        value += tl.load(base + where, mask=both, other=0.0).to(tl.float32)
    tl.store(y + where, value.to(y.dtype.element_ty), mask=both)


@triton.jit
def _max_pool(
    x, bias, y, pixels, channels, height, width, rows, columns,
    BIAS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    both = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    scene, place = pixel // (rows * columns), pixel % (rows * columns)
    down, across = 2 * (place // columns), 2 * (place % columns)
    largest = tl.full((PIXELS, CHANNELS), float("-inf"), tl.float32)
    for tap in tl.static_range(9):
        row, column = down + (tap // 3 - 1), across + (tap % 3 - 1)
        there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        source = (scene * height + row) * width + column
        value = tl.load(
            x + source[:, None] * channels + channel[None, :], mask=both & there[:, None], other=float("-inf")
        )
        largest = tl.maximum(largest, value.to(tl.float32))
    if BIAS:  # a bias and ReLU may as well come after the maximum
        largest += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        largest = tl.maximum(largest, 0.0)
    tl.store(y + pixel[:, None] * channels + channel[None, :], largest.to(y.dtype.element_ty), mask=both)


@triton.jit
def _planning_map(
    neck, weight, bias, coarse, gain, shift, y,
    cells, channels, width_out, height, width, rows, columns, c_scene, c_row, border, eps,
    CELLS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    live = cell < cells
    column = tl.arange(0, WIDTH)
    inside = column < width_out
    both = live[:, None] & inside[None, :]
    value = tl.zeros((CELLS, WIDTH), tl.float32)
    for start in range(0, channels, DEPTH):
        k = start + tl.arange(0, DEPTH)
        reach = (k < channels)[None, :]
        a = tl.load(neck + cell[:, None] * channels + k[None, :], mask=live[:, None] & reach, other=0.0)
        b = tl.load(weight + column[:, None] * channels + k[None, :], mask=inside[:, None] & reach, other=0.0)
        value = tl.dot(a.to(b.dtype), tl.trans(b), value, input_precision=PRECISION)
    value += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    scene, place = cell // (height * width), cell % (height * width)
    start = coarse + scene * c_scene
    value += _interpolate(start, place, column, both, height, width, rows, columns, c_row, CELLS, WIDTH)
    value = tl.maximum(value, 0.0)
    off = tl.where(both, value - (tl.sum(tl.where(both, value, 0.0), 1) / width_out)[:, None], 0.0)
    spread = 1 / tl.sqrt(tl.sum(off * off, 1) / width_out + eps)
    value = off * spread[:, None] * tl.load(gain + column, mask=inside, other=0.0)[None, :]
    value += tl.load(shift + column, mask=inside, other=0.0)[None, :]
    line, across = place // width + border, place % width + border
    place_out = (scene * (height + 2 * border) + line) * (width + 2 * border) + across
    tl.store(y + place_out[:, None] * width_out + column[None, :], value, mask=both)


def pool(x: Tensor, grid: tuple[int, int], out: Tensor, added: Tensor | None = None) -> Tensor:
    """Means of the cells of a map (B, C, H, W) (+ added (cells, C)) into the tokens `out` (B, cells, C)."""
    batch, channels, height, width = x.shape
    rows, columns = grid
    high, wide = height // rows, width // columns
    block = min(64, triton.next_power_of_2(channels))
    _pool[(batch * rows * columns, triton.cdiv(channels, block))](
        _dense(x), out if added is None else added, out, channels, height, width, rows, columns, out.stride(0),
        out.stride(1), 1 / (high * wide), ADD=added is not None, HIGH=high, WIDE=triton.next_power_of_2(wide),
        CHANNELS=block, num_warps=1,
    )  # fmt: skip
    return out


def add_resized(base: Tensor | None, tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Bilinear (align_corners=False) from tokens (B, cells, C) to a map (B, C, *size), added to `base` in its place."""
    batch, _, channels = tokens.shape
    height, width = size
    if base is None:
        y = _empty(tokens, batch, channels, height, width)
    else:
        y = _dense(base)
    pixels, block = batch * height * width, min(64, triton.next_power_of_2(channels))
    count = 32 if pixels >= 4096 else 8
    _resize[(triton.cdiv(pixels, count), triton.cdiv(channels, block))](
        y, tokens, y, pixels, channels, height, width, *grid, tokens.stride(0), tokens.stride(1),
        ADD=base is not None, PIXELS=count, CHANNELS=block, num_warps=4,
    )  # fmt: skip
    return y


def max_pool(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """3×3, step 2, padding 1: (B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉). bias: pools ReLU(x + bias) instead."""
    batch, channels, height, width = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    y = _empty(x, batch, channels, rows, columns)
    pixels, block = batch * rows * columns, min(64, triton.next_power_of_2(channels))
    _max_pool[(triton.cdiv(pixels, 32), triton.cdiv(channels, block))](
        _dense(x), y if bias is None else bias, y, pixels, channels, height, width, rows, columns,
        BIAS=bias is not None, PIXELS=32, CHANNELS=block, num_warps=4,
    )  # fmt: skip
    return y


def planning_map(
    neck: Tensor, to_neck: FusedLinear, coarse: Tensor, grid: tuple[int, int], norm: Norm, out: Tensor, border: int
) -> Tensor:
    """norm(ReLU(neck Wᵀ + b + resized coarse)) into the inside of `out` (B, H + 2 border, W + 2 border, D), float32.

    neck: (B, C, H, W); coarse: (B, cells, D) on `grid`. The border of `out` is left as it is.
    """
    batch, channels, height, width = neck.shape
    cells, width_out = batch * height * width, len(to_neck.weight)
    _planning_map[(triton.cdiv(cells, 32),)](
        _dense(neck), to_neck.weight, to_neck.bias, coarse, norm.gain, norm.shift, out,
        cells, channels, width_out, height, width, *grid, coarse.stride(0), coarse.stride(1), border, norm.eps,
        CELLS=32, DEPTH=32, WIDTH=triton.next_power_of_2(width_out), PRECISION=to_neck.precision, num_warps=8,
        num_stages=2,
    )  # fmt: skip
    return out


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)
