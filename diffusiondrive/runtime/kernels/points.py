"""Start points and their sine embedding; the row of numbers that a plan is at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusiondrive.decoder import POSE


@triton.jit
def _embed(
    given, clean, periods, sample, points, y,
    modes, coordinates, dims, clean_signal, clean_noise, signal, noise, next_signal, next_noise,
    x_origin, y_origin, x_span, y_span,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    mode = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    live = index < coordinates
    is_x = index % 2 == 0
    origin, span = tl.where(is_x, x_origin, y_origin), tl.where(is_x, x_span, y_span)
    where = mode * coordinates + index
    value = tl.load(given + where, mask=live, other=0.0)
    if FIRST:  # anchors that noise is added to
        start = tl.load(clean + mode % modes * coordinates + index, mask=live, other=0.0)
        value = clean_signal * start + clean_noise * value
    else:  # DDIM from the sample before to the points that the last layer says
        said = 2 * (tl.load(clean + where, mask=live, other=0.0) - origin) / span - 1
        estimate = (value - signal * said) / noise
        value = next_signal * tl.minimum(tl.maximum(said, -1.0), 1.0) + next_noise * estimate
    tl.store(sample + where, value, mask=live)
    point = (tl.minimum(tl.maximum(value, -1.0), 1.0) + 1) / 2 * span + origin
    tl.store(points + where, point, mask=live)
    # Features of a point: those of y, then those of x; sines and cosines in turn.
    feature = tl.arange(0, DIMS)
    period = tl.load(periods + feature, mask=feature < dims, other=1.0)
    angle = (6.283185307179586 * point)[:, None] / period[None, :]
    wave = tl.where((feature % 2 == 0)[None, :], tl.sin(angle), tl.cos(angle))
    slot = (index // 2 * 2 + tl.where(is_x, 1, 0)) * dims
    place = mode * coordinates * dims + slot[:, None] + feature[None, :]
    tl.store(y + place, wave, mask=live[:, None] & (feature < dims)[None, :])


@triton.jit
def _finish(
    raw, base, logits, y, modes, poses, b_scene, row_length,
    MODES: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    scene = tl.program_id(0)
    mode, number = tl.arange(0, MODES), tl.arange(0, NUMBERS)
    numbers = 3 * poses
    there = mode < modes
    both = there[:, None] & (number < numbers)[None, :]
    pose, part = number // 3, number % 3
    said = tl.load(raw + (scene * modes + mode)[:, None] * numbers + number[None, :], mask=both, other=0.0)
    is_place = both & (part < 2)[None, :]
    place = base + scene * b_scene + mode[:, None] * (2 * poses) + (2 * pose + part)[None, :]
    moved = said + tl.load(place, mask=is_place, other=0.0)
    turned = 3.141592653589793 * (2 / (1 + tl.exp(-2 * said)) - 1)
    pose_numbers = tl.where((part < 2)[None, :], moved, turned)
    logit = tl.load(logits + scene * modes + mode, mask=there, other=0.0)
    ranked = tl.where(there, logit, float("-inf"))
    best = tl.max(ranked, 0)
    chosen = tl.min(tl.where((ranked == best) & there, mode, modes - 1), 0)
    row = y + scene * row_length
    driven = tl.sum(tl.where((mode == chosen)[:, None] & both, pose_numbers, 0.0), 0)
    tl.store(row + number, driven, mask=number < numbers)
    tl.store(row + numbers + mode[:, None] * numbers + number[None, :], pose_numbers, mask=both)
    tl.store(row + numbers + modes * numbers + mode, logit, mask=there)
    tl.store(row + numbers + modes * numbers + modes, chosen.to(tl.float32))


@dataclass(frozen=True)
class Levels:
    """Signal and noise of the start, and of every step between passes (at, next)."""

    start: tuple[float, float]
    steps: tuple[tuple[float, float, float, float], ...]


class PointEmbedding:
    """Samples in, and out of it: the next sample, its points [m], their features."""

    def __init__(self, origin: Tensor, span: Tensor, dims: int, levels: Levels):
        self.origin, self.span = [float(v) for v in origin], [float(v) for v in span]
        self.dims, self.levels = dims, levels
        pair = torch.arange(dims, device=origin.device) // 2
        self.periods = (10000 ** (2 * pair / dims)).float().contiguous()

    def start(self, noise: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """noise (B, M, T, 2), clean (M, T, 2) normalised anchors."""
        return self._run(noise.contiguous(), clean, 0, first=True)

    def step(self, sample: Tensor, points: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample before and points [m] that pass `number` says."""
        return self._run(sample, points, number, first=False)

    def _run(self, given: Tensor, clean: Tensor, number: int, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        batch, modes, poses, _ = given.shape
        sample, points = torch.empty_like(given), torch.empty_like(given)
        features = given.new_empty(batch, modes, 2 * poses * self.dims)
        step = (1.0, 1.0, 1.0, 1.0) if first else self.levels.steps[number]
        _embed[(batch * modes,)](
            given, clean, self.periods, sample, points, features, modes, 2 * poses, self.dims,
            *self.levels.start, *step, *self.origin, *self.span,
            FIRST=first, BLOCK=triton.next_power_of_2(2 * poses), DIMS=triton.next_power_of_2(self.dims), num_warps=2,
        )  # fmt: skip
        return sample, points, features


def finish(raw: Tensor, base: Tensor, logits: Tensor) -> Tensor:
    """raw (B, M, 3 T), base (B or 1, M, T, 2) [m], logits (B, M, 1) -> rows of `PlanLayout` without auxiliary parts."""
    batch, modes, numbers = raw.shape
    poses = numbers // POSE
    base = base.expand(batch, modes, poses, 2)
    length = numbers + modes * numbers + modes + 1
    y = torch.empty(batch, length, device=raw.device)
    _finish[(batch,)](
        raw, base, logits, y, modes, poses, base.stride(0), length,
        MODES=triton.next_power_of_2(modes), NUMBERS=triton.next_power_of_2(numbers), num_warps=4,
    )  # fmt: skip
    return y
