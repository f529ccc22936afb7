"""The latency benchmark times the planner's own computation, stage by stage, on real encoded inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusiondrive.runtime.benchmark import BenchmarkConfig, _subject, benchmark, load, measure
from diffusiondrive.runtime.latency_report import compare, summarise
from diffusiondrive.runtime.machine import machine_state, memory_use
from diffusiondrive.runtime.observation import Observation, read_observation
from diffusiondrive.runtime.pipeline import SensorPlanner
from diffusiondrive.runtime.roofline import Rates, StageCount, count_stages, measure_rates, roofline
from diffusiondrive.runtime.runtime import Runtime, random_features
from diffusiondrive.runtime.stages import STAGES, marked
from navsim_eval.config import load_config
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from tests.worlds import World, write_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"test": 1})


@pytest.fixture(scope="module")
def observations(world: World) -> list[Observation]:
    return [read_observation(scene) for scene in SceneDataset.from_config(world.data, "test")]


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_marks_do_not_change_the_plan_and_lie_in_its_order(backend: str) -> None:
    runtime = Runtime(load("random:tiny", seed=1), backend=backend, device="cpu")
    features = random_features(runtime.planner, 1, torch.Generator().manual_seed(0))
    expected = runtime.plan(features).candidates
    seen: list[str] = []
    with marked(runtime.backend.program, seen.append):
        torch.testing.assert_close(runtime.plan(features).candidates, expected, rtol=0, atol=0)
    assert seen == ["backbone", "queries and map", "plan head"]
    runtime.plan(features)
    assert len(seen) == 3, "the marks are gone"


def test_a_program_without_seams_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no seams"), marked(torch.nn.Linear(1, 1), print):
        pass


def test_stages_of_a_plan_add_up(observations: list[Observation]) -> None:
    config = BenchmarkConfig(device="cpu", warmup=1)
    subject, reference = (
        _subject(Runtime(load("random:tiny", seed=1), backend=backend, device="cpu"), True)
        for backend in ("eager", "reference")
    )
    planner = SensorPlanner(subject.runtime)
    sensors, _ = measure(config, planner, subject, reference, observations, 4)
    assert len(sensors) == len(subject.rows) == len(reference.rows) == 4
    for row in (*subject.rows, *reference.rows):
        assert set(row) == {"model", *STAGES}
        assert sum(row[name] for name in STAGES) == pytest.approx(row["model"], abs=1.0)
    result = summarise(sensors, subject.rows)
    assert list(result["stages_ms"]) == ["decode", "features", *STAGES]
    ratios = compare(sensors, reference.rows, result)["speedup"]
    medians = [np.median([row["model"] for row in one.rows]) for one in (reference, subject)]
    assert ratios["model_ms"] == pytest.approx(medians[0] / medians[1], abs=0.01)


def test_sums_add_up_and_percentiles_are_ordered() -> None:
    sensors = [{"decode": 1.0, "features": 1.0}] * 101
    plans = [{"model": 10.0 + i} for i in range(101)]
    result = summarise(sensors, plans)
    assert result["model_ms"]["p50"] == 60.0 and result["end_to_end_ms"]["p50"] == 62.0
    assert result["fps"] == pytest.approx(1e3 / 62.0) and result["model_fps"] == pytest.approx(1e3 / 60.0)
    assert list(result["stages_ms"]) == ["decode", "features", "model"]
    numbers = result["end_to_end_ms"]
    assert numbers["p50"] <= numbers["p90"] <= numbers["p99"] <= numbers["max"] == 112.0


# --- roofline --------------------------------------------------------------------------------------------------------


def test_operations_of_a_plan_are_those_of_the_formulas() -> None:
    """Full size, counted while it runs: the backbone against the number that its layers add up to on paper."""
    planner = load("random:diffusiondrive", seed=0)
    runtime = Runtime(planner, device="cpu")
    features = random_features(planner, 1, torch.Generator().manual_seed(0))
    noise = torch.zeros(1, *runtime.noise_shape)
    stages = {stage.name: stage for stage in count_stages(runtime.backend.program, (*features.values(), noise))}
    assert list(stages) == list(STAGES)
    # 54.19 GFLOP published, less what the last fusion computes for the image map that nothing reads.
    assert 51.5e9 < stages["backbone"].flops < 54.2e9
    assert stages["plan head"].flops < 3e9  # of 19.6 published: the value maps are read at few places only
    weights = sum(stage.weight_bytes for stage in stages.values())
    assert 0.9 * 4 * 60.4e6 < weights < 4.1 * 60.8e6
    assert all(stage.unfused_bytes >= stage.edge_bytes / 4 and stage.launches > 0 for stage in stages.values())


def test_a_half_precision_program_is_counted_with_half_the_bytes() -> None:
    planner = load("random:tiny", seed=0)
    inputs = (*random_features(planner, 1, torch.Generator().manual_seed(0)).values(), torch.zeros(1, 6, 8, 2))
    weights = {}
    for precision in ("float32", "fp16"):
        program = Runtime(planner, precision=precision, device="cpu").backend.program
        weights[precision] = {stage.name: stage.weight_bytes for stage in count_stages(program, inputs)}
    assert weights["fp16"]["backbone"] == weights["float32"]["backbone"] / 2
    assert weights["fp16"]["plan head"] == weights["float32"]["plan head"]


def test_floors_and_gap() -> None:
    stages = [StageCount("backbone", 10**9, 5, 10**6, 10**6, 10**7), StageCount("rest", 0, 1, 0, 10**6, 10**6)]
    result = roofline(stages, Rates(flops=1e12, bytes=1e9), {"backbone": 5.0, "rest": 2.0})
    one, two, total = result["stages"]
    assert (one["compute_floor_ms"], one["memory_floor_ms"], one["floor_ms"], one["gap_ms"]) == (1.0, 2.0, 2.0, 3.0)
    assert (two["floor_ms"], two["gap_ms"]) == (1.0, 1.0)
    assert (total["launches"], total["floor_ms"], total["measured_ms"], total["gap_ms"]) == (6, 3.0, 7.0, 4.0)


def test_rates_are_positive_and_the_machine_describes_itself() -> None:
    rates = measure_rates(torch.device("cpu"), "float32")
    assert 1e9 < rates.flops < 1e14 and 1e8 < rates.bytes < 1e13
    state = machine_state()
    assert set(state) == {"cpu_mhz", "cpu_governor", "cpu_max_khz", "load_average", "gpus"}
    assert memory_use(torch.device("cpu"))["resident_mib"] > 50


# --- command line ----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/benchmark_fps.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_line_writes_percentiles_and_environment(world: World, tmp_path: Path) -> None:
    output = tmp_path / "fps.json"
    extra = ("reference_path=true", "iterations=5", "warmup=1", "device=cpu", f"output={output}")
    done = run(*world.overrides, "planner=random:tiny", *extra)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["iterations"] == 5 and result["environment"]["packages"]["torch"]
    assert set(result["stages_ms"]) == {"decode", "features", *STAGES} == set(result["reference"]["stages_ms"])
    assert result["overlapped_fps"] > 0 and result["reference"]["speedup"]["model_ms"] > 0
    assert result["machine_before"]["load_average"] and result["encoded_bytes"] > 1000
    assert "end to end" in done.stdout and "the reference path" in done.stdout
    assert Image.open(output.with_suffix(".png")).size[0] > 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("planner=random:huge", "no planner is called 'huge'"),
        ("precision=int3", "precision: 'int3' is none of"),
        ("backend=magic", "backend: 'magic' is none of"),
        ("sensors.decode=nvjpeg", "nvjpeg needs a CUDA device"),
        ("split=nowhere", "nowhere"),
        ("planner=no/such/folder", "no/such/folder"),
    ],
)
def test_what_the_user_can_mend(world: World, tmp_path: Path, override: str, message: str) -> None:
    settings = ("planner=random:tiny", "device=cpu", "iterations=1", f"output={tmp_path / 'x.json'}")
    with pytest.raises(UserError, match=message):
        benchmark(load_config(BenchmarkConfig, "benchmark_fps", [*world.overrides, *settings, override]))
