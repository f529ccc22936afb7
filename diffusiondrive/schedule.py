"""The diffusion schedule: how much noise each level has, and which levels a plan visits.

A level t in 0 … 999 has signal √ᾱ_t and noise √(1-ᾱ_t); "level" -1 is the clean sample (ᾱ = 1). Everything that a
sampler needs is listed explicitly: the label given to the network in each pass, the level that the update after the
pass goes to, and the level of the start noise. Deriving them from a step ratio is how the published planner came to
start at 8, call it 10, and step to 9; the preset `reference` reproduces that, `consistent` does what the labels say.
Both are truncated: they start from noised anchors. `full` is the untruncated chain of a plain diffusion policy.

Source: DDIM (arXiv 2010.02502) with the settings of DiffusionDrive (arXiv 2411.15139): 1000 levels,
`scaled_linear` betas from 1e-4 to 0.02, x0 prediction, η = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from navsim_eval.errors import UserError

LEVELS = 1000
BETA_START, BETA_END = 1e-4, 0.02
CLEAN = -1
LABEL_SPAN = 20  # labels of a truncated plan are spread over [0, 20), whatever the number of passes
REFERENCE_START = 8
FULL = "full"
PRESETS = ("reference", "consistent", FULL)
ANCHOR, TARGET, MIXED = "anchor", "target", "mixed"
NOISE_SOURCES = (ANCHOR, TARGET, MIXED)


@dataclass
class ScheduleConfig:
    """Which levels training draws from and which a plan visits.

    preset: `reference` (published behaviour, bit for bit); `consistent` (start at the first label, update from each
        label to the next, from the last to the clean sample); `full` (no anchors: from pure noise through labels
        spread over all 1000 levels, DDIM's leading spacing)
    steps: passes of the denoiser per plan, a divisor of 20 (1, 2, 4, 5, 10, 20), of 1000 under `full`
    train_levels: training draws t uniformly from 0 … train_levels - 1
    noise_source: what training diffuses: every `anchor` (published); the human plan in place of the anchor nearest to
        it (`target`); or either, with equal chance for each scene (`mixed`). `full` diffuses the human plan: `target`
    """

    preset: str = "reference"
    steps: int = 2
    train_levels: int = 50
    noise_source: str = ANCHOR

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"schedule.preset: '{self.preset}' is none of {', '.join(PRESETS)}")
        if self.noise_source not in NOISE_SOURCES:
            raise UserError(f"schedule.noise_source: '{self.noise_source}' is none of {', '.join(NOISE_SOURCES)}")
        if self.steps < 1 or self.span % self.steps:
            few = ", ".join(str(n) for n in range(1, 21) if self.span % n == 0)
            raise UserError(f"schedule.steps: {self.steps} does not divide {self.span}; use for example {few}")
        if not self.span <= self.train_levels <= LEVELS:
            raise UserError(
                f"schedule.train_levels: {self.train_levels} must lie between {self.span} (a plan's labels are "
                f"below it) and {LEVELS} (the length of the noise table)"
            )
        if not self.truncated and self.noise_source != TARGET:
            raise UserError(
                f"schedule.noise_source: '{self.noise_source}' needs anchors, which '{FULL}' has not: use {TARGET}"
            )

    @property
    def truncated(self) -> bool:
        """Whether plans start from noised anchors."""
        return self.preset != FULL

    @property
    def span(self) -> int:
        """The labels of a plan are spread evenly over [0, span)."""
        return LABEL_SPAN if self.truncated else LEVELS


class Schedule(nn.Module):
    """Noise table plus the explicit itinerary of a plan.

    labels: level told to the denoiser in each pass; next_labels: level that the update after that pass goes to;
    start_level: level of the noise that is added to the anchors (pure noise has none and starts at the first label).
    """

    def __init__(self, labels: tuple[int, ...], next_labels: tuple[int, ...], start_level: int):
        super().__init__()
        if len(labels) != len(next_labels) or not labels:
            raise ValueError(f"schedule: {len(labels)} labels but {len(next_labels)} next labels")
        self.labels, self.next_labels, self.start_level = labels, next_labels, start_level
        # float32 throughout, in torch, on the CPU: a float64 table moves the final poses by up to 2.5e-4 m.
        betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, LEVELS, dtype=torch.float32, device="cpu") ** 2
        alphas = torch.cumprod(1 - betas, dim=0)
        signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
        # As Python numbers: constants for a compiler, no copy from the device at run time.
        self._signal, self._noise = signal.tolist(), noise.tolist()
        for name, table in (("alphas", alphas), ("signal_table", signal), ("noise_table", noise)):
            self.register_buffer(name, table.to(torch.get_default_device()), persistent=False)

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> Schedule:
        spacing = config.span // config.steps
        labels = tuple(range(config.span - spacing, -1, -spacing))
        if config.preset == "reference":
            return cls(labels, tuple(label - 1 for label in labels), REFERENCE_START)
        return cls(labels, (*labels[1:], CLEAN), labels[0])

    def signal(self, level: int) -> float:
        """√ᾱ of a level; 1 for the clean sample."""
        return 1.0 if level == CLEAN else self._signal[level]

    def noise(self, level: int) -> float:
        """√(1-ᾱ) of a level; 0 for the clean sample."""
        return 0.0 if level == CLEAN else self._noise[level]

    def add_noise(self, clean: Tensor, noise: Tensor, level: int | Tensor) -> Tensor:
        """√ᾱ_t · clean + √(1-ᾱ_t) · noise.

        clean, noise: broadcastable to (B, M, T, 2), normalised. level: one level, or (B,) int64, one a scene.
        """
        if isinstance(level, int):
            return self.signal(level) * clean + self.noise(level) * noise
        each = (-1, 1, 1, 1)
        return self.signal_table[level].view(each) * clean + self.noise_table[level].view(each) * noise
