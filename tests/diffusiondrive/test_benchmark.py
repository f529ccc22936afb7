"""The latency benchmark times the planner's own computation, stage by stage, on real encoded inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusiondrive.features import FeatureConfig
from diffusiondrive.noise import scene_noise
from diffusiondrive.runtime.benchmark import load, summarise
from diffusiondrive.runtime.stages import planner_stages, sensor_stages
from navsim_eval.dataset import SceneDataset
from tests.worlds import World, write_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"test": 1})


def test_stages_give_the_planners_own_plan(world: World) -> None:
    planner = load("random:tiny", seed=1).eval()
    scene = next(iter(SceneDataset.from_config(world.data, "test")))
    features, times = sensor_stages(scene, FeatureConfig.for_planner(planner.config))
    noise = scene_noise([scene.token], 0, planner.noise_shape)
    trajectory, planner_times = planner_stages(planner, features, noise, torch.device("cpu"))
    with torch.inference_mode():
        plan = planner({name: torch.from_numpy(array) for name, array in features.items()}, noise=noise)
    torch.testing.assert_close(trajectory, plan.trajectory)
    assert list(times | planner_times) == [
        "decode", "features", "transfer", "backbone", "prepare", "pass 1", "pass 2", "select",
    ]  # fmt: skip
    assert all(value >= 0 for value in (times | planner_times).values())


def test_sums_add_up_and_percentiles_are_ordered() -> None:
    rows = [
        {"decode": 1.0, "features": 1.0, "transfer": 0.5, "backbone": 4.0 + i, "prepare": 1.0, "pass 1": 2.0,
         "pass 2": 2.0, "select": 0.5}
        for i in range(101)
    ]  # fmt: skip
    result = summarise(rows)
    assert result["head_ms"]["p50"] == 5.5
    assert result["model_ms"]["p50"] == 5.5 + 54.0
    assert result["end_to_end_ms"]["p50"] == 62.0
    assert result["fps"] == pytest.approx(1e3 / 62.0)
    numbers = result["end_to_end_ms"]
    assert numbers["p50"] <= numbers["p90"] <= numbers["p99"] <= numbers["max"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/benchmark_fps.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_line_writes_percentiles_and_environment(world: World, tmp_path: Path) -> None:
    output = tmp_path / "fps.json"
    done = run(*world.overrides, "planner=random:tiny", "iterations=5", "warmup=1", "device=cpu", f"output={output}")
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["iterations"] == 5 and result["environment"]["packages"]["torch"]
    assert set(result["stages_ms"]) >= {"decode", "backbone", "pass 1", "pass 2"}
    assert "end to end" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("planner=random:huge", "no planner is called 'huge'"),
        ("precision=int3", "precision: 'int3' is none of"),
        ("split=nowhere", "nowhere"),
        ("planner=no/such/folder", "no/such/folder"),
    ],
)
def test_one_line_for_what_the_user_can_mend(world: World, override: str, message: str) -> None:
    done = run(*world.overrides, "planner=random:tiny", "device=cpu", override)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
