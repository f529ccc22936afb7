"""Sensors in front of a runtime: the same plan as features by hand, overlapped without losing order or errors."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from diffusiondrive.features import build_features
from diffusiondrive.noise import scene_noise
from diffusiondrive.runtime.benchmark import load
from diffusiondrive.runtime.observation import Observation, read_observation
from diffusiondrive.runtime.pipeline import SensorPlanner
from diffusiondrive.runtime.runtime import Runtime
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.scene import Scene
from tests.worlds import write_world


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[Scene]:
    world = write_world(tmp_path_factory.mktemp("world"), {"roads": 1})
    return list(SceneDataset.from_config(world.data, "roads"))[:3]


@pytest.fixture(scope="module")
def planner() -> SensorPlanner:
    return SensorPlanner(Runtime(load("random:tiny", seed=1), device="cpu"))


@pytest.fixture(scope="module")
def observations(scenes) -> list[Observation]:
    return [read_observation(scene) for scene in scenes]


def test_a_plan_from_bytes_is_the_plan_from_features(scenes, observations, planner):
    for scene, observation in zip(scenes, observations, strict=True):
        features = build_features(scene, planner.feature_config)
        batch = {name: torch.from_numpy(value)[None] for name, value in features.items()}
        expected = planner.runtime.plan(batch)
        torch.testing.assert_close(planner.plan(observation).trajectory, expected.trajectory, rtol=0, atol=0)


def test_noise_of_evaluation(observations, planner):
    seeded = SensorPlanner(planner.runtime, seed=7)
    noise = scene_noise([observations[0].token], 7, planner.runtime.noise_shape)
    expected = planner.plan(observations[0], noise).candidates
    torch.testing.assert_close(seeded.plan(observations[0]).candidates, expected, rtol=0, atol=0)
    assert not torch.equal(planner.plan(observations[0]).candidates, expected)


def test_an_observation_knows_pose_and_clock(scenes, observations):
    for scene, observation in zip(scenes, observations, strict=True):
        assert observation.time_s == pytest.approx(scene.current.timestamp_us * 1e-6)
        assert observation.ego_pose.tolist() == scene.current.ego_pose.tolist()
        assert observation.speed == pytest.approx(scene.current.ego_velocity[0])


def test_a_stream_keeps_order_and_gives_every_frame(observations, planner):
    repeated = observations * 3
    frames = list(planner.stream(iter(repeated)))
    assert [frame.index for frame in frames] == list(range(len(repeated)))
    assert [frame.token for frame in frames] == [o.token for o in repeated]
    for frame, observation in zip(frames, repeated, strict=True):
        torch.testing.assert_close(frame.plan.trajectory, planner.plan(observation).trajectory, rtol=0, atol=0)
    assert list(planner.stream([])) == []


def test_a_damaged_frame_costs_itself_only(observations, planner):
    left, front, right = observations[1].cameras
    broken = replace(observations[1], cameras=(left, front[: len(front) // 2], right))
    frames = list(planner.stream([observations[0], broken, observations[2]]))
    assert [frame.plan is None for frame in frames] == [False, True, False]
    assert "CAM_F0: the image is truncated" in frames[1].error
    with pytest.raises(DataError, match="CAM_F0"):
        planner.plan(broken)


def test_an_error_of_the_source_is_not_swallowed(observations, planner):
    def source():
        yield observations[0]
        raise RuntimeError("the log ended badly")

    frames = planner.stream(source())
    assert next(frames).plan is not None
    with pytest.raises(RuntimeError, match="ended badly"):
        next(frames)


def test_the_next_frame_is_prepared_while_one_is_planned(observations, planner, monkeypatch):
    """Each waits for the other to have begun: without the overlap this would time out."""
    second_begun, prepared = threading.Event(), []
    prepare, plan = planner.prepare, planner.plan_features

    def noting_prepare(observation):
        prepared.append(threading.current_thread().name)
        if len(prepared) == 2:
            second_begun.set()
        return prepare(observation)

    def waiting_plan(features, token, noise=None):
        assert second_begun.wait(10), "frame 2 was not being prepared while frame 1 was planned"
        return plan(features, token, noise)

    monkeypatch.setattr(planner, "prepare", noting_prepare)
    monkeypatch.setattr(planner, "plan_features", waiting_plan)
    assert len(list(planner.stream(observations[:3]))) == 3
    assert all(name.startswith("sensors") for name in prepared)


def test_batches_are_refused():
    with pytest.raises(UserError, match="batch: 2"):
        SensorPlanner(Runtime(load("random:tiny", seed=1), device="cpu", batch=2))


@pytest.mark.gpu
def test_a_stream_on_the_gpu_gives_the_plans_of_single_calls(observations):
    planner = SensorPlanner(Runtime(load("random:tiny", seed=1), device="cuda"))
    for frame, observation in zip(planner.stream(observations * 4), observations * 4, strict=True):
        torch.testing.assert_close(frame.plan.trajectory, planner.plan(observation).trajectory, rtol=0, atol=1e-4)
