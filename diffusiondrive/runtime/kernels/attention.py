"""Attention of a few queries to a few keys in one launch, the query's projection (and the norm before it) included."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusiondrive.runtime.kernels.linear import FusedLinear


@triton.jit
def _attend(
    x, weight, bias, column_sum, keys, values, y,
    queries, count, depth, head_width, x_scene, x_row, k_scene, k_row, v_scene, v_row, y_scene, y_row, scale, eps,
    PROJECT: tl.constexpr, NORM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scene, head = tl.program_id(0), tl.program_id(1)
    m = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    feature = tl.arange(0, WIDTH)
    asks, inside = m < queries, feature < head_width
    column = head * head_width + feature
    x_start = x + scene * x_scene + m * x_row
    both = asks[:, None] & inside[None, :]
    if PROJECT:
        query = tl.zeros((QUERIES, WIDTH), tl.float32)
        if NORM:
            entries = tl.zeros((QUERIES, DEPTH), tl.float32)
            products = tl.zeros((QUERIES, DEPTH), tl.float32)
        for start in range(0, depth, DEPTH):
            k = start + tl.arange(0, DEPTH)
            reach = (k < depth)[None, :]
            a = tl.load(x_start[:, None] + k[None, :], mask=asks[:, None] & reach, other=0.0)
            b = tl.load(weight + column[:, None] * depth + k[None, :], mask=inside[:, None] & reach, other=0.0)
            if NORM:
                entries += a
                products += a * a
            query = tl.dot(a.to(b.dtype), tl.trans(b), query, input_precision=PRECISION)
        if NORM:
            mean = tl.sum(entries, 1) / depth
            spread = 1 / tl.sqrt(tl.maximum(tl.sum(products, 1) / depth - mean * mean, 0.0) + eps)
            of_column = tl.load(column_sum + column, mask=inside, other=0.0)
            query = spread[:, None] * (query - mean[:, None] * of_column[None, :])
        query += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    else:
        query = tl.load(x_start[:, None] + column[None, :], mask=both, other=0.0)
    entry = tl.arange(0, KEYS)
    there = entry < count
    of_key = there[:, None] & inside[None, :]
    key = tl.load(keys + scene * k_scene + entry[:, None] * k_row + column[None, :], mask=of_key, other=0.0)
    value = tl.load(values + scene * v_scene + entry[:, None] * v_row + column[None, :], mask=of_key, other=0.0)
    score = tl.dot(query * scale, tl.trans(key), input_precision=PRECISION)
    score = tl.where(there[None, :], score, float("-inf"))
    share = tl.exp(score - tl.max(score, 1)[:, None])
    share = share / tl.sum(share, 1)[:, None]
    mixed = tl.dot(share, value, input_precision=PRECISION)
    tl.store(y + scene * y_scene + m[:, None] * y_row + column[None, :], mixed, mask=both)


def attend(
    x: Tensor, keys: Tensor, values: Tensor, heads: int, precision: str, projection: FusedLinear | None = None
) -> Tensor:
    """softmax(q kᵀ / √d) v of every head, float32.

    x: (B or 1, Q, K) that `projection` turns into queries, or without it the queries (B or 1, Q, D) themselves
    keys, values: (B, N, D), rows of any stride -> (B, Q, D);  precision: of products, as in `FusedLinear`
    """
    batch = len(keys)
    x = x.expand(batch, -1, -1)
    width = keys.shape[2]
    y = torch.empty(batch, x.shape[1], width, dtype=torch.float32, device=x.device)
    head_width = width // heads
    block = 32 if x.shape[1] > 16 else 16
    used = projection or _NoProjection(x)
    _attend[(batch, heads, triton.cdiv(x.shape[1], block))](
        x, used.weight, used.bias, used.column_sum, keys, values, y,
        x.shape[1], keys.shape[1], x.shape[2], head_width, x.stride(0), x.stride(1), keys.stride(0), keys.stride(1),
        values.stride(0), values.stride(1), y.stride(0), y.stride(1), head_width**-0.5, used.eps,
        PROJECT=projection is not None, NORM=used.normed, QUERIES=block,
        KEYS=max(16, triton.next_power_of_2(keys.shape[1])), WIDTH=max(16, triton.next_power_of_2(head_width)),
        DEPTH=max(16, min(triton.next_power_of_2(x.shape[2]), 256)), PRECISION=precision, num_warps=4, num_stages=2,
    )  # fmt: skip
    return y


class _NoProjection:
    """Stands where a projection's tensors are not read."""

    normed, eps = False, 0.0

    def __init__(self, any_tensor: Tensor):
        self.weight = self.bias = self.column_sum = any_tensor
