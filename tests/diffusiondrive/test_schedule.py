"""Noise table, itineraries, updates, and the normalised space."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusiondrive.sampler import DDIM
from diffusiondrive.schedule import CLEAN, Schedule, ScheduleConfig
from diffusiondrive.space import SpaceConfig, TrajectorySpace
from navsim_eval.errors import UserError

REFERENCE = Schedule.from_config(ScheduleConfig())


@pytest.mark.parametrize(
    ("level", "alpha", "signal", "noise"),
    [
        (0, "0x1.fff2e4p-1", 0.999949991703, 0.010000829585),
        (8, "0x1.ff7d36p-1", 0.999500989914, 0.031588625163),
        (9, "0x1.ff6cd6p-1", 0.999438464642, 0.033507801592),
        (10, "0x1.ff5c12p-1", 0.999374449253, 0.035365015268),
        (49, "0x1.fb7396p-1", 0.995548188686, 0.094253778458),
    ],
)
def test_table_has_the_published_float32_values(level, alpha, signal, noise) -> None:
    assert REFERENCE.alphas[level].item() == float.fromhex(alpha)
    # The reference took square roots as powers, which some machines round differently: one unit in the last place.
    assert REFERENCE.signal(level) == pytest.approx(signal, abs=6e-8)
    assert REFERENCE.noise(level) == pytest.approx(noise, abs=4e-9)


def test_table_is_the_published_formula() -> None:
    betas = np.linspace(math.sqrt(1e-4), math.sqrt(0.02), 1000) ** 2
    np.testing.assert_allclose(REFERENCE.alphas.numpy(), np.cumprod(1 - betas), rtol=2e-5)


@pytest.mark.parametrize(
    ("preset", "steps", "labels", "next_labels", "start"),
    [
        ("reference", 2, (10, 0), (9, -1), 8),
        ("reference", 1, (0,), (-1,), 8),
        ("reference", 4, (15, 10, 5, 0), (14, 9, 4, -1), 8),
        ("consistent", 2, (10, 0), (0, -1), 10),
        ("consistent", 1, (0,), (-1,), 0),
        ("consistent", 4, (15, 10, 5, 0), (10, 5, 0, -1), 15),
        ("consistent", 10, tuple(range(18, -1, -2)), (*range(16, -1, -2), -1), 18),
    ],
)
def test_itineraries(preset, steps, labels, next_labels, start) -> None:
    schedule = Schedule.from_config(ScheduleConfig(preset=preset, steps=steps))
    assert (schedule.labels, schedule.next_labels, schedule.start_level) == (labels, next_labels, start)


def test_reference_update_is_the_closed_form() -> None:
    """10 -> 9: y <- 0.947484 y + 0.052547 x0 where x0 is inside the box; the clip acts on the new sample alone."""
    kernel = DDIM(REFERENCE)
    y, x0 = torch.tensor([0.3, 0.3]), torch.tensor([-0.5, 1.4])
    r = 0.947484437
    expected = r * y + torch.tensor([0.052546727 * -0.5, 0.999438465 * 1.0 - 0.946891738 * 1.4])
    torch.testing.assert_close(kernel.step(y, x0, 10, 9), expected, atol=1e-6, rtol=0)


def test_consistent_update_is_the_closed_form() -> None:
    kernel = DDIM(Schedule.from_config(ScheduleConfig(preset="consistent")))
    y, x0 = torch.tensor([0.3]), torch.tensor([-0.5])
    torch.testing.assert_close(kernel.step(y, x0, 10, 0), 0.28277 * y + 0.71736 * x0, atol=1e-4, rtol=0)
    torch.testing.assert_close(kernel.step(y, x0, 0, CLEAN), x0)


@given(st.integers(0, 999), st.integers(-1, 998))
def test_a_perfect_prediction_lands_on_the_forward_process(label, next_label) -> None:
    """If x0 is right, the update gives exactly what adding the same noise at the next level would have given."""
    generator = torch.Generator().manual_seed(label)
    clean = torch.rand(4, 3, 8, 2, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(4, 3, 8, 2, generator=generator, dtype=torch.float64)
    sample = REFERENCE.add_noise(clean, noise, label)
    moved = DDIM(REFERENCE).step(sample, clean, label, next_label)
    torch.testing.assert_close(moved, REFERENCE.add_noise(clean, noise, next_label), atol=1e-10, rtol=0)


def test_levels_may_differ_by_scene() -> None:
    clean, noise = torch.rand(6, 8, 2), torch.randn(3, 6, 8, 2)
    levels = torch.tensor([0, 10, 49])
    together = REFERENCE.add_noise(clean, noise, levels)
    for row, level in enumerate(levels.tolist()):
        assert torch.equal(together[row], REFERENCE.add_noise(clean, noise[row], level))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preset": "ddpm"}, ("ddpm", "reference", "consistent")),
        ({"steps": 3}, ("3", "20")),
        ({"train_levels": 10}, ("10", "20")),
    ],
)
def test_bad_configuration_says_what_and_what_else(values, words) -> None:
    with pytest.raises(UserError) as caught:
        ScheduleConfig(**values)
    assert all(word in str(caught.value) for word in words)


def test_space_corners_and_centre() -> None:
    space = TrajectorySpace(SpaceConfig())
    metres = torch.tensor([[-1.2, -20.0], [55.7, 26.0], [27.25, 3.0]])
    torch.testing.assert_close(space.normalise(metres), torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))


@given(st.floats(-200, 200), st.floats(-200, 200))
def test_space_round_trip(x, y) -> None:
    space = TrajectorySpace(SpaceConfig()).double()
    point = torch.tensor([x, y], dtype=torch.float64)
    torch.testing.assert_close(space.denormalise(space.normalise(point)), point, atol=1e-9, rtol=0)


def test_space_refuses_an_empty_range() -> None:
    with pytest.raises(UserError, match="x_span"):
        SpaceConfig(x_span=0.0)
