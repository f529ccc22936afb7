"""The regression head of TransFuser: one trajectory, straight from the ego query.

Under the planner's seams it is a denoiser of a single pass that does not look at the sample it is given. Sources:
TransFuser (arXiv 2205.15997) and NAVSIM's agent of that name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusiondrive.decoder import POSE, Denoised
from diffusiondrive.perception import SceneContext
from diffusiondrive.space import TrajectorySpace
from navsim_eval.errors import UserError


@dataclass
class RegressionConfig:
    """hidden: width of the head's hidden layer."""

    hidden: int = 1024

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise UserError(f"regression.hidden: {self.hidden} must be at least 1")


class RegressionHead(nn.Module):
    """Ego query (B, 1, D) -> one trajectory (B, 1, T, 3): x, y [m] as they come, heading bounded by ±π."""

    def __init__(self, space: TrajectorySpace, width: int, poses: int, config: RegressionConfig):
        super().__init__()
        self.space, self.poses = space, poses
        self.layers = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, poses * POSE))

    def prepare(self, context: SceneContext, anchors: Tensor | None) -> Tensor:
        """The ego query is all that the head reads."""
        return context.ego

    def denoise(self, sample: Tensor, label: Tensor, cache: Tensor) -> Denoised:
        """The trajectory; neither `sample` nor `label` matters."""
        raw = self.layers(cache).float().unflatten(-1, (self.poses, POSE))  # (B, 1, T, 3)
        poses = torch.cat([raw[..., :2], math.pi * raw[..., 2:].tanh()], dim=-1)
        return Denoised(poses[..., :2].detach(), (poses,), (poses.new_zeros(poses.shape[:2]),))
