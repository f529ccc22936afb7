"""Chance: noise and levels are functions of seed, epoch and token, and distributed as they should be."""

from __future__ import annotations

import pytest
import torch

from diffusiondrive.noise import scene_noise, training_draw


def test_noise_belongs_to_the_token() -> None:
    both = scene_noise(["a", "b"], 0, (20, 8, 2))
    assert both.shape == (2, 20, 8, 2) and both.dtype == torch.float32
    assert torch.equal(scene_noise(["b", "c", "a"], 0, (20, 8, 2))[[2, 0]], both)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(scene_noise(["a"], 1, (20, 8, 2))[0], both[0])


def test_noise_is_the_same_everywhere() -> None:
    """Recorded numbers: published plans depend on them."""
    expected = [2.4259679317474365, 0.28287559747695923, 0.03669806569814682]
    assert scene_noise(["token"], 0, (1, 3, 1)).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_noise_is_standard_normal() -> None:
    noise = scene_noise([str(i) for i in range(400)], 0, (20, 8, 2)).double()
    assert noise.mean().item() == pytest.approx(0, abs=0.01) and noise.std().item() == pytest.approx(1, abs=0.01)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.1)
    across = torch.corrcoef(noise.flatten(1).T[:40])
    assert (across - torch.eye(40)).abs().max().item() < 0.25


def test_training_levels_cover_their_range_evenly() -> None:
    _, levels = training_draw([str(i) for i in range(5000)], 3, (1, 1, 2), 50)
    counts = torch.bincount(levels, minlength=50)
    assert len(counts) == 50 and counts.min() > 60 and counts.max() < 140
