"""The ego-status MLP: learns, is deterministic, survives a round trip, refuses other folders."""

from __future__ import annotations

import numpy as np
import pytest

from diffusiondrive.baselines.ego_mlp import EgoMLPConfig, EgoMLPPlanner, EgoStatusMLP, fit
from navsim_eval.errors import DataError, UserError
from navsim_eval.scene import Frame, Scene

SMALL = EgoMLPConfig(hidden=64, epochs=100, batch_size=16, learning_rate=5e-3)


def straight_scene(speed: float) -> Scene:
    frames = tuple(
        Frame(
            token=f"{speed:.3f}-{i}", log_name="log", scene_token="scene", map_name="map", timestamp_us=i * 500_000,
            ego_pose=np.array([0.5 * speed * i, 0.0, 0.0]), ego_velocity=np.array([speed, 0.0]),
            ego_acceleration=np.zeros(2), driving_command=np.array([0, 1, 0, 0]),
        )
        for i in range(14)
    )  # fmt: skip
    return Scene(frames)


SCENES = [straight_scene(speed) for speed in np.linspace(0.0, 12.0, 64)]


def test_learns_to_drive_straight_at_the_given_speed(tmp_path):
    losses = []
    model = fit(SCENES, SMALL, progress=lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.1 * losses[0]
    planner = EgoMLPPlanner(model.save_pretrained(tmp_path))
    plans = planner.plan(SCENES[10:13])
    human = np.stack([scene.human_trajectory() for scene in SCENES[10:13]])
    assert plans.trajectory.shape == (3, 8, 3)
    assert np.abs(plans.trajectory - human).max() < 2.0
    assert len(planner.describe()["weights_sha256"]) == 64


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    short = EgoMLPConfig(hidden=8, epochs=2)
    first, again, other = fit(SCENES, short), fit(SCENES, short), fit(SCENES, EgoMLPConfig(hidden=8, epochs=2, seed=1))
    for name, weight in first.state_dict().items():
        assert (weight == again.state_dict()[name]).all()
    assert any((w != other.state_dict()[n]).any() for n, w in first.state_dict().items())


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        EgoStatusMLP.from_pretrained(tmp_path)
    fit(SCENES[:2], EgoMLPConfig(hidden=8, epochs=1)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden": 8', '"hidden": 16'))
    with pytest.raises(DataError, match="size mismatch"):
        EgoStatusMLP.from_pretrained(tmp_path)


def test_no_scenes():
    with pytest.raises(UserError, match="no scenes"):
        fit([])
