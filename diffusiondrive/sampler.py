"""From a start to proposals: the loop of denoising passes, in exchangeable parts.

    InitialDistribution.start(batch noise)        -> sample (B, M, T, 2), normalised
    Denoiser.prepare(context, …), .denoise(…)     -> Denoised                       (decoder.py)
    Kernel.step(sample, clean, label, next_label) -> sample at the next level
    Selector.select(poses, logits)                -> chosen mode (B,)

Each is small enough to be replaced alone; chance enters only through the noise given to `start`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusiondrive.decoder import Denoised, SceneCache
from diffusiondrive.perception import SceneContext
from diffusiondrive.schedule import Schedule
from diffusiondrive.space import TrajectorySpace


class InitialDistribution(Protocol):
    """Where a plan starts."""

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """Standard normal noise (B, M, T, 2) -> start samples (B, M, T, 2), normalised, at `schedule.start_level`."""


class Denoiser(Protocol):
    """The network that says what the clean trajectories are."""

    space: TrajectorySpace

    def prepare(self, context: SceneContext, anchors: Tensor) -> SceneCache:
        """What no pass changes."""

    def denoise(self, sample: Tensor, label: Tensor, cache: SceneCache) -> Denoised:
        """One pass at level `label`."""


class Kernel(Protocol):
    """How a sample moves to the next level."""

    def step(self, sample: Tensor, clean: Tensor, label: int, next_label: int) -> Tensor:
        """Sample and predicted clean trajectories (B, M, T, 2), normalised -> sample at `next_label`."""


class Selector(Protocol):
    """Which of the proposals is driven."""

    def select(self, poses: Tensor, logits: Tensor) -> Tensor:
        """poses (B, M, T, 3), logits (B, M) -> mode (B,) int64."""


class AnchorNoise(nn.Module):
    """Start at the k-means anchors plus truncated noise. Anchors (M, T, 2) in metres are part of the weights."""

    def __init__(self, anchors: Tensor, space: TrajectorySpace):
        super().__init__()
        self.space = space
        self.anchors = nn.Parameter(anchors.detach().clone().float(), requires_grad=False)

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """Noise (B, M, T, 2) -> noised anchors at the schedule's start level, not clamped."""
        clean = self.space.normalise(self.anchors)
        return schedule.add_noise(clean, noise.to(clean), schedule.start_level)


class DDIM:
    """Deterministic update (η = 0) for a network that predicts the clean sample.

    The noise estimate uses the prediction as it is, the new sample the prediction clipped to [-1, 1], as published.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def step(self, sample: Tensor, clean: Tensor, label: int, next_label: int) -> Tensor:
        s = self.schedule
        noise = (sample - s.signal(label) * clean) / s.noise(label)
        return s.signal(next_label) * clean.clamp(-1, 1) + s.noise(next_label) * noise


class LogitSelector:
    """The mode with the highest logit."""

    def select(self, poses: Tensor, logits: Tensor) -> Tensor:
        return logits.argmax(dim=1)


@dataclass(frozen=True)
class Chain:
    """A denoising run of K passes.

    samples: (B, M, T, 2) tensors, normalised, before each pass; if complete, also after the update of the last one
    passes:  K results
    """

    samples: tuple[Tensor, ...]
    passes: tuple[Denoised, ...]


def sample(
    start: Tensor,
    denoiser: Denoiser,
    cache: SceneCache,
    schedule: Schedule,
    kernel: Kernel,
    complete: bool = False,
) -> Chain:
    """Run the schedule from `start` (B, M, T, 2). `complete`: also the last update, which no plan needs."""
    samples, passes = [start], []
    for number, (label, next_label) in enumerate(zip(schedule.labels, schedule.next_labels, strict=True), 1):
        # Made on the device: a copy from the host would synchronise.
        told = torch.full((1,), label, dtype=torch.int64, device=start.device)
        denoised = denoiser.denoise(samples[-1], told, cache)
        passes.append(denoised)
        if complete or number < len(schedule.labels):
            clean = denoiser.space.normalise(denoised.poses[-1][..., :2])
            samples.append(kernel.step(samples[-1], clean, label, next_label))
    return Chain(tuple(samples), tuple(passes))
