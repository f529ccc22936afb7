"""Decoded images to the camera strip, points to LiDAR counts: what `device_features` computes, in one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _strip(
    images, row, row_weight, camera, column, column_weight, y,
    height, width, image_stride, channel_stride, row_stride, column_stride, COLUMNS: tl.constexpr,
):  # fmt: skip
    line, channel = tl.program_id(1), tl.program_id(2)
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < width
    total = tl.zeros((COLUMNS,), tl.int32)
    for down in tl.static_range(2):
        source_row = tl.load(row + down * height + line)
        of_row = tl.load(row_weight + down * height + line)
        across = tl.zeros((COLUMNS,), tl.int32)  # one row of the strip, in 1/2048
        for tap in tl.static_range(2):
            of_camera = tl.load(camera + tap * width + place, mask=inside, other=0)
            source = tl.load(column + tap * width + place, mask=inside, other=0)
            weight = tl.load(column_weight + tap * width + place, mask=inside, other=0)
            where = of_camera * image_stride + channel * channel_stride + source_row * row_stride
            pixel = tl.load(images + where + source * column_stride, mask=inside, other=0)
            across += pixel.to(tl.int32) * weight
        total += (of_row * (across >> 4)) >> 16
    value = ((total + 2) >> 2).to(tl.float32)
    # Correctly rounded, as on the host: CUDA would multiply by the reciprocal.
    tl.store(y + (channel * height + line) * width + place, tl.math.div_rn(value, 255.0), mask=inside)


@triton.jit
def _count(
    cloud, edges, counts, points, row_stride, point_stride, cells, range_m, ground, ceiling, POINTS: tl.constexpr
):
    point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    live = point < points
    x = tl.load(cloud + point * point_stride, mask=live, other=float("nan"))
    y = tl.load(cloud + row_stride + point * point_stride, mask=live, other=float("nan"))
    z = tl.load(cloud + 2 * row_stride + point * point_stride, mask=live, other=float("nan"))
    counts_here = (z > ground) & (z < ceiling) & (tl.abs(x) <= range_m) & (tl.abs(y) <= range_m)
    row, column = _bin(x, edges, cells, range_m, counts_here), _bin(y, edges, cells, range_m, counts_here)
    tl.atomic_add(counts + row * cells + column, 1, mask=counts_here)


@triton.jit
def _bin(value, edges, cells, range_m, counts_here):
    """Bin of a value among float64 edges, closed on the left, the last one on both sides."""
    exact = value.to(tl.float64)
    guess = tl.where(counts_here, (value + range_m) * cells / (2 * range_m), 0.0).to(tl.int32)
    guess = tl.minimum(tl.maximum(guess, 0), cells - 1)
    for _ in tl.static_range(2):  # float32 may miss by one
        guess = tl.where(tl.load(edges + guess, mask=counts_here, other=0.0) > exact, guess - 1, guess)
        guess = tl.maximum(guess, 0)
        above = tl.load(edges + guess + 1, mask=counts_here, other=0.0) <= exact
        guess = tl.minimum(tl.where(counts_here & above, guess + 1, guess), cells - 1)
    return guess


def strip(images: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """(3 cameras, 3, H, W) uint8, any strides -> (3, height, width) float32 in [0, 1].

    tables: row, row_weight (2, height); camera, column, column_weight (2, width); weights int32 in 1/2048
    """
    height, width = tables["row"].shape[1], tables["column"].shape[1]
    y = torch.empty(3, height, width, device=images.device)
    _strip[(triton.cdiv(width, 256), height, 3)](
        images, tables["row"], tables["row_weight"], tables["camera"], tables["column"], tables["column_weight"], y,
        height, width, *images.stride(), COLUMNS=256, num_warps=2,
    )  # fmt: skip
    return y


def count_points(cloud: Tensor, edges: Tensor, range_m: float, ground: float, ceiling: float) -> Tensor:
    """(≥ 3, P) float32 -> points a cell, (N, N) int32; edges: N + 1 of each axis, float64 [m].

    ground, ceiling: heights that a point must lie strictly between, compared in float32.
    """
    cells, points = len(edges) - 1, cloud.shape[1]
    counts = torch.zeros(cells, cells, dtype=torch.int32, device=cloud.device)
    if points:
        _count[(triton.cdiv(points, 512),)](
            cloud, edges, counts, points, *cloud.stride(), cells, range_m, ground, ceiling, POINTS=512, num_warps=4
        )
    return counts
