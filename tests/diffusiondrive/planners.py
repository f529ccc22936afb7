"""Planners with random weights and inputs for them, for tests of what holds for any weights."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusiondrive.planner import DiffusionDrive, PlannerConfig


def make_planner(config: PlannerConfig, seed: int = 0) -> DiffusionDrive:
    """Random weights without the symmetries of a fresh start (equal layers, zero norms and point weights)."""
    torch.manual_seed(seed)
    planner = DiffusionDrive(config, torch.rand(config.modes, config.poses, 2) * 30)
    with torch.no_grad():
        for parameter in planner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return planner.eval()


def make_features(config: PlannerConfig, batch: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    backbone = config.backbone
    return {
        "camera_feature": torch.rand(batch, 3, *backbone.image_size, generator=generator),
        "lidar_feature": torch.rand(batch, 1, *backbone.lidar_size, generator=generator),
        "status_feature": torch.randn(batch, 8, generator=generator),
    }
