"""Augmentation disturbs sensors, never targets, and draws by (seed, token) alone."""

from __future__ import annotations

import pytest
import torch

from diffusiondrive.training.augmentation import AugmentationConfig, augment
from navsim_eval.errors import UserError

STRONG = AugmentationConfig(camera_gain=0.3, camera_offset=0.1, lidar_drop=0.5, blind=0.3, status_noise=0.1)


@pytest.fixture
def features() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "camera_feature": torch.rand(40, 3, 8, 16, generator=generator),
        "lidar_feature": torch.rand(40, 1, 8, 8, generator=generator),
        "status_feature": torch.rand(40, 8, generator=generator) + 1,
    }


TOKENS = [f"token{i}" for i in range(40)]


def test_off_by_default(features) -> None:
    assert augment(features, TOKENS, 0, AugmentationConfig()) is features


def test_a_sample_does_not_depend_on_its_batch(features) -> None:
    whole = augment(features, TOKENS, 7, STRONG)
    part = augment({name: value[10:13] for name, value in features.items()}, TOKENS[10:13], 7, STRONG)
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][10:13])
    other = augment(features, TOKENS, 8, STRONG)
    assert not torch.equal(other["camera_feature"], whole["camera_feature"])


def test_each_disturbance_stays_within_its_bounds(features) -> None:
    disturbed = augment(features, TOKENS, 0, STRONG)
    camera, lidar, status = (disturbed[name] for name in features)
    assert camera.min() >= 0 and camera.max() <= 1
    blind = (camera.flatten(1).amax(1) == 0).float().mean(), (lidar.flatten(1).amax(1) == 0).float().mean()
    assert all(0.1 < share < 0.55 for share in blind)
    emptied = (lidar == 0) & (features["lidar_feature"] > 0)
    assert emptied.any() and torch.equal(lidar[~emptied], features["lidar_feature"][~emptied])
    assert torch.equal(status[:, :4], features["status_feature"][:, :4]), "the command is no measurement"
    ratio = status[:, 4:6] / features["status_feature"][:, 4:6]
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])


def test_impossible_strengths_are_refused() -> None:
    with pytest.raises(UserError, match=r"augmentation\.blind: 2\.0 is not in \[0, 1\]"):
        AugmentationConfig(blind=2.0)
