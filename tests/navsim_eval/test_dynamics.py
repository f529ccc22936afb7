"""Interpolation, least-squares profiles, tracker and bicycle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.geometry import to_global, wrap_angle
from navsim_eval.pdm.dynamics import (
    curvature_profile,
    interpolate_trajectory,
    sample_times_us,
    simulate,
    speed_profile,
)
from navsim_eval.pdm.types import StateIndex
from tests.golden import needs_golden
from tests.golden.pdms import debug_scenes, load

START_US = 1_630_000_000_123_457
DT, STEPS = 0.1, 40


def state(x=0.0, y=0.0, heading=0.0, speed=0.0) -> np.ndarray:
    values = np.zeros(StateIndex.SIZE)
    values[[StateIndex.X, StateIndex.Y, StateIndex.HEADING, StateIndex.VX]] = x, y, heading, speed
    return values


def curved_plans(seed: int, count: int) -> np.ndarray:
    """(count, 8, 3) drivable plans: constant curvature and acceleration."""
    rng = np.random.default_rng(seed)
    time = np.arange(1, 9) * 0.5
    distance = rng.uniform(2, 14, (count, 1)) * time + rng.uniform(-1, 1, (count, 1)) * time**2 / 2
    curvature = rng.uniform(-0.05, 0.05, (count, 1))
    heading = curvature * distance
    return np.stack([np.sin(heading) / curvature, (1 - np.cos(heading)) / curvature, heading], axis=-1)


def angle_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(wrap_angle(np.asarray(a) - np.asarray(b))).max())


@needs_golden
def test_interpolated_poses_and_states_equal_the_reference() -> None:
    poses, final = load("candidates")["poses"], load("scores_v1")["simulated_final_state"]
    for scene in debug_scenes():
        debug = scene.debug
        initial, start = debug["initial_state"], debug["reference_times_us"][0]
        sampled = interpolate_trajectory(initial[:3], start, poses[scene.row]).numpy()
        np.testing.assert_allclose(sampled[..., :2], debug["candidate_interpolated"][..., :2], atol=1e-8)
        assert angle_error(sampled[..., 2], debug["candidate_interpolated"][..., 2]) < 1e-9
        for states, expected in (
            (simulate(initial, sampled), debug["candidate_simulated"]),
            (simulate(initial, debug["proposal_poses"]), debug["proposal_simulated"]),
        ):
            columns = np.arange(StateIndex.SIZE) != StateIndex.HEADING
            np.testing.assert_allclose(states.numpy()[..., columns], expected[..., columns], rtol=0, atol=1e-7)
            assert angle_error(states.numpy()[..., 2], expected[..., 2]) < 1e-7
        columns = [StateIndex.X, StateIndex.Y, StateIndex.VX, StateIndex.YAW_ACCELERATION]
        last = simulate(initial, sampled).numpy()[:, -1, columns]
        np.testing.assert_allclose(last, final[scene.row][:, columns], rtol=0, atol=1e-7)


def test_sample_times_are_truncated_to_microseconds_and_may_come_early() -> None:
    times = sample_times_us(START_US).numpy() - START_US
    assert set(times - np.arange(STEPS + 1) * 100_000) <= {-1, 0}
    assert (times < np.arange(STEPS + 1) * 100_000).any()


def test_samples_lie_on_the_straight_line_between_poses() -> None:
    plan = np.array([[2.0, 0.0, 0.0], [5.0, 1.0, 0.2]])
    sampled = interpolate_trajectory(np.zeros(3), 0, plan).numpy()
    np.testing.assert_allclose(sampled[[2, 5, 8, 10]], [[0.8, 0, 0], [2, 0, 0], [3.8, 0.6, 0.12], [5, 1, 0.2]])


def test_a_short_trajectory_stays_at_its_last_pose() -> None:
    sampled = interpolate_trajectory(np.zeros(3), START_US, curved_plans(0, 1)[0, :4]).numpy()
    np.testing.assert_array_equal(sampled[21:], np.broadcast_to(sampled[-1], sampled[21:].shape))
    np.testing.assert_allclose(sampled[-1, :2], curved_plans(0, 1)[0, 3, :2])


def test_headings_turn_the_short_way_across_pi() -> None:
    plan = np.array([[0.0, 0.0, 0.2]] * 8)
    sampled = interpolate_trajectory(np.array([0.0, 0.0, 3.1]), START_US, plan).numpy()
    assert (np.abs(sampled[:, 2]) > 2.9).all() and (np.abs(sampled[:, 2]) <= np.pi).all()


def directions(target: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.cos(target[2]), torch.sin(target[2])])


def test_speed_profile_solves_its_least_squares_problem() -> None:
    target = torch.from_numpy(np.array(interpolate_trajectory(np.zeros(3), 0, curved_plans(3, 5))).transpose(2, 1, 0))
    integrate = np.concatenate([np.ones((STEPS, 1)), DT * np.tril(np.ones((STEPS, STEPS - 1)), -1)], axis=1)
    penalty = np.zeros((38, STEPS))
    penalty[range(37), range(1, 38)] = 1.0  # the published difference matrix, in which only the last row differs
    penalty[37, 38:] = -1.0, 1.0
    for row in range(5):
        x, y, heading = target[..., row].numpy()
        cos, sin = np.cos(heading[:-1, None]), np.sin(heading[:-1, None])
        system = np.concatenate([DT * cos * integrate, DT * sin * integrate, 1e-2 * penalty])
        right = np.concatenate([np.diff(x), np.diff(y), np.zeros(38)])
        expected = integrate @ np.linalg.lstsq(system, right, rcond=None)[0]
        np.testing.assert_allclose(speed_profile(target, directions(target))[:, row], expected, atol=1e-9)


def test_curvature_profile_solves_its_least_squares_problem() -> None:
    target = torch.from_numpy(np.array(interpolate_trajectory(np.zeros(3), 0, curved_plans(4, 5))).transpose(2, 1, 0))
    speed = speed_profile(target, directions(target))
    integrate = np.concatenate([np.ones((STEPS, 1)), DT * np.tril(np.ones((STEPS, STEPS - 1)), -1)], axis=1)
    for row in range(5):
        penalty = np.diag(np.sqrt([1e-10] + [1e-2] * (STEPS - 1)))
        system = np.concatenate([DT * speed[:, row].numpy()[:, None] * integrate, penalty])
        right = np.concatenate([np.diff(target[2, :, row].numpy()), np.zeros(STEPS)])
        expected = integrate @ np.linalg.lstsq(system, right, rcond=None)[0]
        np.testing.assert_allclose(curvature_profile(target, speed)[:, row], expected, atol=1e-8)


def test_a_standing_ego_told_to_stand_does_not_move_at_all() -> None:
    start = state(664_123.0, 3_997_456.0, 1.234)
    states = simulate(start, np.tile(start[:3], (STEPS + 1, 1))).numpy()
    np.testing.assert_array_equal(states, np.tile(start, (STEPS + 1, 1)))


def test_straight_on_at_constant_speed_is_followed_exactly() -> None:
    poses = np.zeros((STEPS + 1, 3))
    poses[:, 0] = 10.0 * DT * np.arange(STEPS + 1)
    states = simulate(state(speed=10.0), poses).numpy()
    np.testing.assert_allclose(states[:, 0], poses[:, 0], atol=1e-8)
    assert np.abs(states[:, 1]).max() == 0.0


def test_a_lateral_offset_is_worked_off_and_steering_stays_bounded() -> None:
    poses = np.zeros((STEPS + 1, 3))
    poses[:, 0], poses[:, 1] = 8.0 * DT * np.arange(STEPS + 1), 1.0
    states = simulate(state(speed=8.0), poses).numpy()
    assert abs(states[-1, 1] - 1.0) < 0.3
    spun = simulate(state(speed=8.0), np.column_stack([poses[:, :2], np.linspace(0, 20, STEPS + 1)])).numpy()
    assert np.abs(spun[:, StateIndex.STEERING]).max() <= np.pi / 3


def test_the_first_step_of_the_bicycle_worked_by_hand() -> None:
    """Reference 1 m/s faster throughout: the tracker asks for 10/11 m/s², a third of which arrives in one step."""
    poses = np.zeros((STEPS + 1, 3))
    poses[:, 0] = 6.0 * DT * np.arange(STEPS + 1)
    second = simulate(state(speed=5.0), poses).numpy()[1]
    acceleration = (10.0 / 11.0) / 3.0
    np.testing.assert_allclose(second[[0, 3, 5]], [0.5, 5.0 + DT * acceleration, acceleration], atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(0, 39))
def test_a_row_does_not_depend_on_the_rows_beside_it(seed: int, count: int, row: int) -> None:
    plans, row = curved_plans(seed, count), row % count
    sampled = interpolate_trajectory(np.zeros(3), START_US, plans)
    together = simulate(state(speed=6.0), sampled)
    alone = simulate(state(speed=6.0), interpolate_trajectory(np.zeros(3), START_US, plans[row]))
    np.testing.assert_allclose(together[row], alone, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(st.floats(-3.0, 3.0), st.floats(-500.0, 500.0), st.floats(-500.0, 500.0))
def test_moving_the_world_moves_the_states(turn: float, x: float, y: float) -> None:
    origin, plans = np.array([x, y, turn]), curved_plans(7, 6)
    here = simulate(state(speed=6.0), interpolate_trajectory(np.zeros(3), START_US, plans)).numpy()
    there = simulate(state(x, y, turn, 6.0), interpolate_trajectory(origin, START_US, plans)).numpy()
    moved = to_global(origin, here[..., :3])
    np.testing.assert_allclose(there[..., :2], moved[..., :2], atol=1e-8)
    assert angle_error(there[..., 2], moved[..., 2]) < 1e-9
    np.testing.assert_allclose(there[..., 3:], here[..., 3:], atol=1e-8)


def test_rows_of_different_scenes_share_a_batch() -> None:
    plans = curved_plans(9, 4).reshape(2, 2, 8, 3)
    initial = np.stack([state(speed=3.0), state(100.0, 50.0, 1.0, 9.0)])
    starts = torch.tensor([START_US, START_US + 77])
    poses = interpolate_trajectory(initial[:, None, :3], starts[:, None], plans)
    states = simulate(initial[:, None], poses)
    assert states.shape == (2, 2, STEPS + 1, StateIndex.SIZE)
    for scene in range(2):
        own = interpolate_trajectory(initial[scene, :3], starts[scene], plans[scene])
        np.testing.assert_allclose(states[scene], simulate(initial[scene], own), atol=1e-11)


def test_poses_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(\.\.\., 41, 3\)"):
        simulate(state(), np.zeros((40, 3)))
