"""The plan that replaces a fresh one: shifted on its own path, or braking to a stop along it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusiondrive.runtime.fallback import resample, shift_plan, stop_plan
from navsim_eval.geometry import to_global, to_local

TIMES = 0.5 * np.arange(1, 9)
angles = st.floats(-1.0, 1.0)


def turn(times: np.ndarray, speed: float, yaw_rate: float) -> np.ndarray:
    """Poses of a constant turn that starts at (0, 0, 0)."""
    heading = yaw_rate * times
    chord = speed * times * np.sinc(heading / 2 / np.pi)
    return np.stack([chord * np.cos(heading / 2), chord * np.sin(heading / 2), heading], axis=-1)


def crooked(seed: int) -> np.ndarray:
    """A plan as networks make them: headings that do not quite fit the path."""
    rng = np.random.default_rng(seed)
    plan = turn(TIMES, rng.uniform(0, 15), rng.uniform(-0.4, 0.4))
    return plan + rng.normal(0, [0.3, 0.3, 0.05], plan.shape)


@given(st.integers(0, 10_000))
def test_no_time_and_no_motion_change_nothing(seed):
    plan = crooked(seed)
    np.testing.assert_allclose(shift_plan(plan, 0.0, np.zeros(3)), plan, atol=1e-6)


@given(st.floats(0.0, 2.0), st.floats(1.0, 20.0), st.floats(-0.6, 0.6))
def test_a_constant_turn_shifts_on_its_own_path(elapsed, speed, yaw_rate):
    yaw_rate = np.clip(yaw_rate, -0.2 * speed, 0.2 * speed)  # a car's curvature
    motion = turn(np.array([elapsed]), speed, yaw_rate)[0]
    shifted = shift_plan(turn(TIMES, speed, yaw_rate), elapsed, motion)
    np.testing.assert_allclose(shifted, turn(TIMES, speed, yaw_rate), atol=1e-3)


@given(st.floats(0.0, 2.0), st.floats(0.0, 10.0), st.floats(-2.0, 2.0))
def test_a_constant_acceleration_shifts_on_its_own_path_within_the_plan(elapsed, speed, acceleration):
    def along(times: np.ndarray) -> np.ndarray:
        moving = np.minimum(times, speed / -acceleration if acceleration < 0 else np.inf)
        return speed * moving + acceleration / 2 * moving**2

    zero = np.zeros(8)
    plan = np.stack([along(TIMES), zero, zero], axis=-1)
    motion = np.array([along(np.array([elapsed]))[0], 0.0, 0.0])
    kept = TIMES + elapsed <= 4.0
    shifted = shift_plan(plan, elapsed, motion)[kept]
    # Where it stops, the speed has a kink that 0.5 s samples cannot show.
    np.testing.assert_allclose(shifted[:, 0], along(TIMES + elapsed)[kept] - motion[0], atol=0.04)
    np.testing.assert_allclose(shifted[:, 1:], 0.0, atol=1e-9)


@given(st.integers(0, 10_000), st.floats(-5, 5), st.floats(-5, 5), angles)
def test_motion_alone_is_a_change_of_frame_and_has_an_inverse(seed, x, y, heading):
    plan, motion = crooked(seed), np.array([x, y, heading])
    back = to_local(motion, np.zeros(3))
    shifted = shift_plan(plan, 0.0, motion)
    np.testing.assert_allclose(to_global(motion, shifted), plan, atol=1e-6)
    # Back again by geometry: a second shift would take the present pose for the plan's start.
    np.testing.assert_allclose(to_local(back, shifted), plan, atol=1e-6)


@given(st.floats(0.0, 0.5), st.floats(1.0, 15.0), st.floats(-0.3, 0.3))
def test_a_shift_and_its_inverse(elapsed, speed, yaw_rate):
    yaw_rate = np.clip(yaw_rate, -0.2 * speed, 0.2 * speed)
    plan, motion = turn(TIMES, speed, yaw_rate), turn(np.array([elapsed]), speed, yaw_rate)[0]
    back = to_local(motion, np.zeros(3))
    np.testing.assert_allclose(shift_plan(shift_plan(plan, elapsed, motion), -elapsed, back), plan, atol=2e-3)


@given(st.floats(0.0, 4.0))
def test_a_car_that_stands_keeps_standing(elapsed):
    standing = np.zeros((8, 3))
    np.testing.assert_allclose(shift_plan(standing, elapsed, np.zeros(3)), standing, atol=1e-12)
    wobbling = standing + np.random.default_rng(0).normal(0, 0.02, standing.shape)
    assert np.abs(shift_plan(wobbling, elapsed, np.zeros(3))).max() < 0.5  # 2 cm in 0.5 s are a drift of 4 cm/s


@given(st.integers(0, 500), st.floats(0, 3))
def test_a_batch_is_shifted_like_each_of_its_plans(seed, elapsed):
    plans, motion = np.stack([crooked(seed + k) for k in range(4)]).reshape(2, 2, 8, 3), np.array([1.0, 0.2, 0.1])
    each = [shift_plan(plan, elapsed, motion) for plan in plans.reshape(4, 8, 3)]
    np.testing.assert_allclose(shift_plan(plans, elapsed, motion).reshape(4, 8, 3), each, atol=1e-12)


def test_beyond_its_end_a_plan_does_not_stop_suddenly():
    """The acceleration fades: a plan that speeds up goes on a little faster, one that brakes does not go backward."""
    faster = np.stack([5 * TIMES + TIMES**2 / 2, 0 * TIMES, 0 * TIMES], axis=-1)  # 9 m/s and 1 m/s² at its end
    x = resample(faster, np.array([4.0, 4.5, 5.0, 6.0]))[:, 0]
    speeds = np.diff(x) / [0.5, 0.5, 1.0]
    assert 9.0 < speeds[0] < speeds[1] < speeds[2] == pytest.approx(9.5, abs=0.05)
    braking = np.stack([8 * TIMES - TIMES**2, 0 * TIMES, 0 * TIMES], axis=-1)  # at rest after 4 s
    x = resample(braking, np.arange(4.0, 8.0, 0.5))[:, 0]
    assert (np.diff(x) >= -1e-9).all() and x[-1] - x[0] < 0.1


def test_a_time_before_the_plan_is_refused():
    with pytest.raises(ValueError, match="before its observation"):
        shift_plan(np.zeros((8, 3)), -0.7, np.zeros(3))


@given(st.floats(0.0, 20.0), st.floats(1.0, 6.0))
def test_a_stop_brakes_steadily(speed, deceleration):
    plan = stop_plan(speed, deceleration, 8)
    x = np.concatenate([[0.0], plan[:, 0]])
    mean_speed = np.diff(x) / 0.5
    assert (np.diff(mean_speed) <= 1e-9).all() and (mean_speed >= -1e-9).all()
    assert (-np.diff(mean_speed) / 0.5 <= deceleration + 1e-9).all()
    if speed / deceleration <= 4:
        assert x[-1] == pytest.approx(speed**2 / 2 / deceleration)


@given(st.floats(2.0, 12.0), st.floats(-0.3, 0.3))
def test_a_stop_stays_on_the_path_of_the_last_plan(speed, yaw_rate):
    yaw_rate = np.clip(yaw_rate, -0.2 * speed, 0.2 * speed)
    plan = turn(TIMES, speed, yaw_rate)
    stopped = stop_plan(1.2 * speed, 2.0, 8, plan)  # longer than the plan's own path
    curvature = yaw_rate / speed
    distance = 1.2 * speed * np.minimum(TIMES, 0.6 * speed) - np.minimum(TIMES, 0.6 * speed) ** 2
    np.testing.assert_allclose(stopped, turn(distance, 1.0, curvature), atol=0.02)


def test_a_stop_of_a_standing_or_rolling_back_car_is_standing():
    for speed in (0.0, -1.0):
        np.testing.assert_array_equal(stop_plan(speed, 3.0, 8, crooked(1))[:, :2], np.zeros((8, 2)))
