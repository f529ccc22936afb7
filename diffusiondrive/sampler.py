"""From a start to proposals: the loop of denoising passes, in exchangeable parts.

    InitialDistribution.start(noise, schedule)    -> sample (B, M, T, 2), normalised
    Denoiser.prepare(context, …), .denoise(…)     -> Denoised                       (decoder.py, baselines/)
    Kernel.step(sample, clean, label, next_label) -> sample at the next level
    Selector.select(poses, logits)                -> chosen mode (B,)

Each is small enough to be replaced alone; chance enters only through the noise given to `start`. DiffusionDrive starts
from noised anchors and takes the mode with the highest logit; planners without anchors start from pure noise and take
their first sample, because nothing ranks the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusiondrive.decoder import Denoised
from diffusiondrive.perception import SceneContext
from diffusiondrive.schedule import Schedule
from diffusiondrive.space import TrajectorySpace


class InitialDistribution(Protocol):
    """Where a plan starts."""

    anchors: Tensor | None  # (M, T, 2) [m], one a mode; None where modes are interchangeable samples

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """Standard normal noise (B, M, T, 2) -> start samples (B, M, T, 2), normalised, at the plan's first level."""

    def clean(self, human: Tensor | None, of_human: Tensor | None) -> Tensor:
        """What training diffuses, normalised, broadcastable to (B, M, T, 2).

        human: (B, T, 2) recorded plans [m]; of_human: (B,) bool, scenes in which the human plan itself is diffused
        """


class Denoiser(Protocol):
    """The network that says what the clean trajectories are."""

    space: TrajectorySpace

    def prepare(self, context: SceneContext, anchors: Tensor | None) -> Any:
        """What no pass changes."""

    def denoise(self, sample: Tensor, label: Tensor, cache: Any) -> Denoised:
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

    def clean(self, human: Tensor | None, of_human: Tensor | None) -> Tensor:
        """The anchors; where `of_human` asks for it, the human plan takes the place of the anchor nearest to it."""
        clean = self.space.normalise(self.anchors)
        if of_human is None:
            return clean
        human = human.to(clean)
        nearest = torch.linalg.vector_norm(human[:, None] - self.anchors, dim=-1).mean(-1).argmin(-1)  # (B,)
        replaced = of_human[:, None] & (torch.arange(len(clean), device=clean.device) == nearest[:, None])  # (B, M)
        return torch.where(replaced[..., None, None], self.space.normalise(human)[:, None], clean)


class PureNoise(nn.Module):
    """Start at N(0, 1): a plain diffusion policy, and planners that do not diffuse at all."""

    anchors = None

    def __init__(self, space: TrajectorySpace):
        super().__init__()
        self.space = space

    def start(self, noise: Tensor, schedule: Schedule) -> Tensor:
        return noise

    def clean(self, human: Tensor | None, of_human: Tensor | None) -> Tensor:
        """The human plan, the same for all samples: (B, 1, T, 2)."""
        if human is None:
            raise ValueError("without anchors, training diffuses the human plan, and none is given")
        return self.space.normalise(human)[:, None]


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


class FirstSample:
    """The first of interchangeable samples."""

    def select(self, poses: Tensor, logits: Tensor) -> Tensor:
        return torch.zeros(len(poses), dtype=torch.int64, device=poses.device)


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
    cache: Any,
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
