"""Baselines, plans and the predictions file."""

from __future__ import annotations

import numpy as np
import pytest

from navsim_eval.errors import DataError, UserError
from navsim_eval.planners import Plans, constant_velocity, make_baseline, pdm_closed, stationary
from navsim_eval.predictions import Predictions, scene_facts
from navsim_eval.scene import Scene
from navsim_eval.selfcheck import street
from tests.worlds import drive


def a_scene(speed: float = 8.0) -> Scene:
    return Scene(tuple(drive("log", 14, speed=speed)))


def test_constant_velocity_is_the_float32_plan_of_the_devkit():
    plan = constant_velocity(a_scene(8.0))
    assert plan.dtype == np.float32
    np.testing.assert_array_equal(plan, np.column_stack([4.0 * np.arange(1, 9), np.zeros(8), np.zeros(8)]))


def test_human_is_the_recorded_future_and_stationary_does_not_move():
    planner = make_baseline("human")
    plans = planner.plan([a_scene(6.0), a_scene(8.0)])
    assert plans.trajectory.shape == (2, 8, 3)
    np.testing.assert_allclose(plans.trajectory[0, :, 0], 3.0 * np.arange(1, 9), atol=1e-6)
    assert not stationary(a_scene()).any()


def test_a_withheld_future_is_a_broken_scene_not_a_crash():
    with pytest.raises(DataError, match="has 4 future frames"):
        make_baseline("human").plan([Scene(tuple(drive("log", 8)))])


def test_pdm_closed_samples_the_reference_every_half_second_in_the_ego_frame():
    plan = pdm_closed(street())
    time = 0.5 * np.arange(1, 9)
    np.testing.assert_allclose(plan[:, 0], 8.0 * time - 0.65 * time**2, atol=1e-8)
    np.testing.assert_allclose(plan[:, 1:], 0.0, atol=1e-8)
    with pytest.raises(UserError, match="metric cache"):
        make_baseline("pdm_closed")


def test_unknown_name_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'constant_velocity'"):
        make_baseline("constant_velocty")
    with pytest.raises(UserError, match="known: human"):
        make_baseline("zzz")


@pytest.mark.parametrize(
    "parts",
    [
        (np.zeros((2, 7, 3)),),
        (np.zeros((2, 8, 3)), np.zeros((1, 5, 8, 3))),
        (np.zeros((2, 8, 3)), np.zeros((2, 5, 8, 3)), np.zeros((2, 4))),
    ],
)
def test_plans_of_the_wrong_shape_are_refused(parts):
    with pytest.raises(ValueError, match="shape"):
        Plans(*parts)


def test_predictions_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [a_scene(), a_scene()]
    written = Predictions(
        np.array(["1e7330", "0042"]), rng.normal(size=(2, 8, 3)), rng.normal(size=(2, 5, 8, 3)).astype(np.float32),
        rng.normal(size=(2, 5)), scene_facts(scenes), {"planner": {"name": "x"}, "seed": 1},
    )  # fmt: skip
    read = Predictions.load(written.save(tmp_path / "predictions.npz"))
    assert read.tokens.tolist() == ["1e7330", "0042"]
    for name in ("trajectories", "candidates", "logits"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert read.facts["command"].tolist() == ["straight", "straight"] and read.facts["speed"][0] == 8.0
    assert read.manifest["planner"] == {"name": "x"}
    with np.load(tmp_path / "predictions.npz") as file:  # the layout that tools/score.py reads
        assert file["trajectories"].shape == (2, 1, 8, 3)


def test_damaged_predictions_are_named(tmp_path):
    path = tmp_path / "predictions.npz"
    with pytest.raises(DataError, match="stage=infer"):
        Predictions.load(path)
    Predictions(np.array(["a"]), np.zeros((1, 8, 3)), manifest={}).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="not a readable npz"):
        Predictions.load(path)
    np.savez(path, tokens=np.array(["a"]))
    with pytest.raises(DataError, match="trajectories"):
        Predictions.load(path)
