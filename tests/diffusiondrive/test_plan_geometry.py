"""Plans as curves: what fits together is left alone, what doesn't is found, and each way of tying them ties them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiondrive.experiments.geometry import (
    beyond_box,
    beyond_square,
    heading_errors,
    headings_from_paths,
    paths_from_headings,
)

SPEEDS = st.floats(3.0, 15.0)


def circle(speed: float, turn: float) -> np.ndarray:
    """(1, 8, 3) plan of a rear axle at `speed` [m/s] that turns by `turn` [rad] a pose."""
    angle = turn * np.arange(1, 9)
    radius = 0.5 * speed / turn
    return np.stack([radius * np.sin(angle), radius * (1 - np.cos(angle)), angle], axis=-1)[None]


@given(SPEEDS, st.floats(0.01, 0.3), st.sampled_from([-1.0, 1.0]))
@settings(max_examples=50, deadline=None)
def test_a_circle_fits_its_headings(speed: float, turn: float, side: float) -> None:
    plan = circle(speed, side * turn)
    assert np.nanmax(heading_errors(plan)) < 1e-9
    np.testing.assert_allclose(paths_from_headings(plan), plan, atol=1e-9)


@given(SPEEDS, st.floats(0.01, 0.1), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_bent_paths_fit_any_headings(speed: float, turn: float, seed: int) -> None:
    plan = circle(speed, turn)
    plan[..., 2] += np.random.default_rng(seed).uniform(-0.3, 0.3, plan[..., 2].shape)
    assert np.nanmax(heading_errors(plan)) > 1e-3
    tied = paths_from_headings(plan)
    assert np.nanmax(heading_errors(tied)) < 1e-9
    assert (tied[..., 2] == plan[..., 2]).all()


@given(SPEEDS, st.floats(-0.1, 0.1), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_headings_of_a_circle_are_found_from_its_points(speed: float, turn: float, seed: int) -> None:
    plan = circle(speed, turn if abs(turn) > 1e-3 else 1e-3)
    damaged = plan.copy()
    damaged[..., 2] = np.random.default_rng(seed).uniform(-3.0, 3.0, plan[..., 2].shape)
    tied = headings_from_paths(damaged)
    np.testing.assert_allclose(tied[..., 2], plan[..., 2], atol=0.02)  # a parabola is no circle
    assert (tied[..., :2] == plan[..., :2]).all()


def test_a_standing_ego_has_no_error_and_keeps_its_headings() -> None:
    plan = np.zeros((1, 8, 3))
    plan[..., 2] = 0.3
    assert np.isnan(heading_errors(plan)).all()
    assert (headings_from_paths(plan) == plan).all()


def test_a_sidestep_is_an_error_of_its_angle() -> None:
    plan = np.zeros((1, 8, 3))
    plan[..., 0] = plan[..., 1] = 2.0 * np.arange(1, 9)  # heading 0, path at 45°
    assert heading_errors(plan) == pytest.approx(np.pi / 4)


@pytest.mark.parametrize(
    "point, outside", [((31.9, 0.0), False), ((32.1, 0.0), True), ((0.0, -32.1), True), ((-31.0, 31.0), False)]
)
def test_the_map_is_a_square(point: tuple[float, float], outside: bool) -> None:
    assert beyond_square(np.array([[*point, 0.0]]), 32.0).tolist() == [outside]


@pytest.mark.parametrize("point, outside", [((0.0, 0.0), False), ((-2.0, 0.0), True), ((55.0, 30.0), True)])
def test_the_range_is_a_box(point: tuple[float, float], outside: bool) -> None:
    assert beyond_box(np.array([[*point, 0.0]]), (-1.2, -20.0), (55.7, 26.0)).tolist() == [outside]
