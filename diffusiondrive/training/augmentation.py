"""Disturbed sensors, so that a planner trained on few scenes does not learn them by heart.

Targets stay as they are: nothing here moves anything. Every draw is a function of (seed, epoch, token).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.dataset import on_device, to_model_input
from diffusiondrive.features import FeatureConfig
from navsim_eval.errors import UserError


@dataclass
class AugmentationConfig:
    """Strength of the disturbances; zero turns each off (the published recipe has none).

    camera_gain, camera_offset: contrast and brightness vary by up to these shares, each colour for itself
    camera_noise: standard deviation of white noise added to the camera, as a share of the full range
    lidar_drop:   up to this share of the LiDAR cells is emptied
    blind:        share of samples that lose the camera, and the same share that lose the LiDAR
    status_noise: relative standard deviation of velocity and acceleration
    """

    camera_gain: float = 0.0
    camera_offset: float = 0.0
    camera_noise: float = 0.0
    lidar_drop: float = 0.0
    blind: float = 0.0
    status_noise: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0.0 <= value <= 1.0:
                raise UserError(f"augmentation.{name}: {value} is not in [0, 1]")


def augment(
    features: dict[str, Tensor],
    tokens: Sequence[str],
    seed: int,
    config: AugmentationConfig,
    features_config: FeatureConfig | None = None,
) -> dict[str, Tensor]:
    """Features of a batch (camera (B, 3, H, W), LiDAR (B, 1, N, N), status (B, 8)) as disturbed float copies.

    The LiDAR may be absent. Without any disturbance the features come back as they are, 8-bit ones too. Runs where the
    features lie.
    """
    if not any(vars(config).values()):
        return features
    features = to_model_input(features, features_config)
    draws = [np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(token.encode())]) for token in tokens]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = np.stack([draw.uniform(low, high, shape) for draw in draws]).astype(np.float32)
        return on_device(torch.from_numpy(values), features["status_feature"].device)

    camera, lidar, status = (features.get(f"{name}_feature") for name in ("camera", "lidar", "status"))
    gain = 1.0 + config.camera_gain * uniform(-1, 1, 3, 1, 1)
    camera = camera * gain + config.camera_offset * uniform(-1, 1, 3, 1, 1)
    if config.camera_noise:
        generator = torch.Generator(camera.device).manual_seed(zlib.crc32(f"{seed}:{tokens[0]}".encode()))
        noise = torch.randn(camera.shape, generator=generator, device=camera.device)
        camera = camera + config.camera_noise * noise
    if lidar is not None and config.lidar_drop:
        lidar = lidar * (uniform(0, 1, *lidar.shape[1:]) >= config.lidar_drop * uniform(0, 1, 1, 1, 1))
    sees = (uniform(0, 1, 2) >= config.blind).to(camera.dtype)
    moved = 1.0 + config.status_noise * torch.cat([torch.zeros_like(status[:, :4]), _normal(draws, status)], dim=1)
    seen = {} if lidar is None else {"lidar_feature": lidar * sees[:, 1, None, None, None]}
    return {
        "camera_feature": camera.clamp(0, 1) * sees[:, 0, None, None, None],
        **seen,
        "status_feature": status * moved,
    }


def _normal(draws: Sequence[np.random.Generator], status: Tensor) -> Tensor:
    """(B, 4): one draw for the velocity and one for the acceleration of each sample."""
    pairs = np.stack([draw.standard_normal(2) for draw in draws]).astype(np.float32)
    return on_device(torch.from_numpy(pairs.repeat(2, axis=1)), status.device)
