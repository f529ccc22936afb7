"""The denoiser's look at the planning map: a 3×3 convolution at the corners of the look-ups, mixed over the points.

First launch: the 16 products of Winograd's F(2×2, 3×3) for the 4×4 cells around every point, whose transform (four
cells a product) is made while they are read. Second launch: the way back to the four corners, ReLU, bilinear weights,
the query's softmax over its points, and the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusiondrive.runtime.denoiser import CornerLookup
from diffusiondrive.runtime.encoder import BORDER


@triton.jit
def _axis(coordinate, range_m, cells):
    """First of the four cells, counted with the border, and the weights of the two in the middle (zero outside)."""
    position = ((coordinate / range_m + 1) * cells - 1) / 2
    position = tl.where(position == position, position, -1.0)  # NaN must not become an address
    position = tl.minimum(tl.maximum(position, -1.0), cells.to(tl.float32))
    lower = tl.minimum(tl.floor(position), cells.to(tl.float32) - 1)
    share = position - lower
    first = tl.where(lower >= 0, 1 - share, 0.0)
    second = tl.where(lower <= cells - 2, share, 0.0)
    return lower.to(tl.int32) + 1, first, second


@triton.jit
def _products(
    points, plane, weight, products, count, points_a_scene, width, rows, columns, range_m,
    POINTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    product = tl.program_id(2)
    i, j = product // 4, product % 4
    # Transform along an axis: cells first + sign · second, for the four products in turn (winograd.TO_PRODUCT).
    first_i, first_j = tl.where(i == 3, 1, i), tl.where(j == 3, 1, j)
    second_i, second_j = tl.where(i == 2, 1, tl.where(i == 3, 3, 2)), tl.where(j == 2, 1, tl.where(j == 3, 3, 2))
    sign_i, sign_j = tl.where(i == 1, 1.0, -1.0), tl.where(j == 1, 1.0, -1.0)
    point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live, inside = point < count, column < width
    x = tl.load(points + 2 * point, mask=live, other=0.0)
    y = tl.load(points + 2 * point + 1, mask=live, other=0.0)
    top, _, _ = _axis(x, range_m, rows)
    left, _, _ = _axis(y, range_m, columns)
    line = columns + 4
    start = (point // points_a_scene * (rows + 4) + top) * line + left
    cell_11 = plane + (start + first_i * line + first_j) * width
    cell_12 = plane + (start + first_i * line + second_j) * width
    cell_21 = plane + (start + second_i * line + first_j) * width
    cell_22 = plane + (start + second_i * line + second_j) * width
    total = tl.zeros((POINTS, COLUMNS), tl.float32)
    for begin in range(0, width, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        both = live[:, None] & (k < width)[None, :]
        upper = tl.load(cell_11[:, None] + k[None, :], mask=both, other=0.0)
        upper += sign_j * tl.load(cell_12[:, None] + k[None, :], mask=both, other=0.0)
        lower = tl.load(cell_21[:, None] + k[None, :], mask=both, other=0.0)
        lower += sign_j * tl.load(cell_22[:, None] + k[None, :], mask=both, other=0.0)
        w = tl.load(
            weight + (product * width + k)[:, None] * width + column[None, :],
            mask=(k < width)[:, None] & inside[None, :],
            other=0.0,
        )
        total = tl.dot((upper + sign_i * lower).to(w.dtype), w, total, input_precision=PRECISION)
    where = (product * count + point)[:, None] * width + column[None, :]
    tl.store(products + where, total, mask=live[:, None] & inside[None, :])


@triton.jit
def _load_product(products, index, count, point, width, column, mask):
    where = (index * count + point)[:, None] * width + column[None, :]
    return tl.load(products + where, mask=mask, other=0.0)


@triton.jit
def _mix(
    points, products, bias, query, point_weight, point_bias, y,
    count, poses, width, rows, columns, modes, q_scene, q_row, range_m,
    POSES: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    mode = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    pose = tl.arange(0, POSES)
    live = pose < poses
    point = mode * poses + pose
    both = live[:, None] & inside[None, :]
    # The query's weights over its points.
    whole = tl.arange(0, WIDTH)
    asked = tl.load(query + mode // modes * q_scene + mode % modes * q_row + whole, mask=whole < width, other=0.0)
    of_point = tl.load(
        point_weight + pose[:, None] * width + whole[None, :],
        mask=live[:, None] & (whole < width)[None, :],
        other=0.0,
    )
    logit = tl.sum(of_point * asked[None, :], 1) + tl.load(point_bias + pose, mask=live, other=0.0)
    logit = tl.where(live, logit, float("-inf"))
    share = tl.exp(logit - tl.max(logit, 0))
    share = share / tl.sum(share, 0)
    x = tl.load(points + 2 * point, mask=live, other=0.0)
    z = tl.load(points + 2 * point + 1, mask=live, other=0.0)
    _, upper, lower = _axis(x, range_m, rows)
    _, left, right = _axis(z, range_m, columns)
    of_bias = tl.load(bias + column, mask=inside, other=0.0)
    mixed = tl.zeros((COLUMNS,), tl.float32)
    # Back to the corners (winograd.TO_OUTPUT), rows first: 1 1 1 0 and 0 1 -1 -1.
    for down in tl.static_range(2):
        for across in tl.static_range(2):
            value = tl.zeros((POSES, COLUMNS), tl.float32)
            for a in tl.static_range(3):
                for b in tl.static_range(3):
                    sign_a = -1.0 if down == 1 and a > 0 else 1.0
                    sign_b = -1.0 if across == 1 and b > 0 else 1.0
                    index = (a + down) * 4 + b + across
                    value += sign_a * sign_b * _load_product(products, index, count, point, width, column, both)
            value = tl.maximum(value + of_bias[None, :], 0.0)
            weight = share * (lower if down == 1 else upper) * (right if across == 1 else left)
            mixed += tl.sum(value * weight[:, None], 0)
    tl.store(y + mode * width + column, mixed, mask=inside)


class FusedLookup:
    """`denoiser.CornerLookup` without its output layer."""

    def __init__(self, lookup: CornerLookup, dtype: torch.dtype, precision: str):
        """dtype: of the product weights;  precision: of float32 products, as in `FusedLinear`."""
        self.range_m, self.precision = lookup.range_m, precision
        self.product_weight = lookup.product_weight.to(dtype).contiguous()
        self.bias = lookup.bias.contiguous()
        self.point_weight = lookup.point_weights.weight.detach().contiguous()
        self.point_bias = lookup.point_weights.bias.detach().contiguous()

    def __call__(self, query: Tensor, points: Tensor, plane: Tensor) -> Tensor:
        """query (B, M, D), points (B, M, T, 2) [m], planning map (B, H + 4, W + 4, D) -> what is seen (B, M, D)."""
        batch, modes, poses, _ = points.shape
        rows, columns, width = plane.shape[1] - 2 * BORDER, plane.shape[2] - 2 * BORDER, plane.shape[3]
        count = batch * modes * poses
        products = torch.empty(16, count, width, device=plane.device)
        wide = min(64, max(16, triton.next_power_of_2(width)))
        _products[(triton.cdiv(count, 32), triton.cdiv(width, wide), 16)](
            points, plane, self.product_weight, products, count, modes * poses, width, rows, columns, self.range_m,
            POINTS=32, COLUMNS=wide, DEPTH=min(64, wide), PRECISION=self.precision, num_warps=4, num_stages=2,
        )  # fmt: skip
        y = torch.empty(batch, modes, width, device=plane.device)
        _mix[(batch * modes, triton.cdiv(width, wide))](
            points, products, self.bias, query, self.point_weight, self.point_bias, y,
            count, poses, width, rows, columns, modes, query.stride(0), query.stride(1), self.range_m,
            POSES=triton.next_power_of_2(poses), COLUMNS=wide, WIDTH=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
        return y
