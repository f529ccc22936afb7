"""Exported graphs: fixed shapes, the planner's own plan in onnxruntime, refusal where they differ or cannot be made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime import Runtime
from diffusiondrive.runtime import export as exporting
from diffusiondrive.runtime.export import ExportedPlanner, export_planner
from diffusiondrive.runtime.export_check import check_export
from navsim_eval.errors import UserError
from tests.diffusiondrive.planners import make_features
from tests.diffusiondrive.test_rewrites import lively_planner

onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")
from diffusiondrive.runtime.onnx_backend import OnnxPlanner, cached_export  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def planner() -> DiffusionDrive:
    return lively_planner("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def exported(planner: DiffusionDrive, cache: Path) -> ExportedPlanner:
    return cached_export(planner, 1, True, torch.float32, cache / "onnx")


def test_graphs_give_the_planners_plan_for_any_noise_and_anchors(planner, exported) -> None:
    before = planner.initial.anchors.clone()
    differences = check_export(planner, exported, frames=3, seed=0)
    assert set(differences) == {
        "candidates", "logits", "trajectory", "agent_states", "agent_logits", "bev_semantic_map",
    }  # fmt: skip
    assert max(differences.values()) <= 1e-4
    assert torch.equal(planner.initial.anchors, before)


def test_labels_are_an_input_too(planner, exported) -> None:
    """Labels are what the network is told; the schedule of noise levels is the planner's."""
    graphs = OnnxPlanner(exported, torch.device("cpu"))
    features = {name: tensor.numpy() for name, tensor in make_features(planner.config, 1).items()}
    labels = torch.tensor([37, 5])
    inputs = make_features(planner.config, 1)
    with torch.inference_mode():
        context = planner.perceive(inputs)
        cache = planner.decoder.prepare(context, planner.initial.anchors)
        sample = planner.initial.start(planner.default_noise, planner.schedule)
        for number, level in enumerate(planner.schedule.labels):
            denoised = planner.decoder.denoise(sample, labels[number : number + 1], cache)
            clean = planner.space.normalise(denoised.poses[-1][..., :2])
            sample = planner.kernel.step(sample, clean, level, planner.schedule.next_labels[number])
    plan = graphs(features, labels=labels.numpy())
    np.testing.assert_allclose(plan["candidates"], denoised.poses[-1].numpy(), atol=1e-4)
    assert np.abs(graphs(features)["candidates"] - plan["candidates"]).max() > 1e-3


def test_operator_times_of_both_graphs(planner, exported, tmp_path) -> None:
    graphs = OnnxPlanner(exported, torch.device("cpu"), profile=str(tmp_path / "trace"))
    graphs({name: tensor.numpy() for name, tensor in make_features(planner.config, 1).items()})
    times = graphs.operator_times()
    assert {"Conv", "Gather", "MatMul"} <= set(times) and all(value >= 0 for value in times.values())
    assert not list(tmp_path.iterdir())


def test_graphs_state_fixed_shapes_and_hold_no_grid_sample(planner, exported) -> None:
    for file in (exported.encoder, exported.denoiser):
        model = onnx.load(str(file))
        onnx.checker.check_model(model)
        described = json.loads(next(p.value for p in model.metadata_props if p.key == "diffusiondrive"))
        assert described["batch"] == 1 and described["labels"] == [10, 0]
        for value in (*model.graph.input, *model.graph.output):
            assert all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim), value.name
        assert "GridSample" not in {node.op_type for node in model.graph.node}
    shapes = exported.description["denoiser"]["inputs"]
    assert shapes["noise"] == ["FLOAT", 1, 6, 8, 2] and shapes["labels"] == ["INT64", 2]
    assert np.array_equal(exported.defaults()["anchors"], planner.initial.anchors.numpy())


def test_backend_reuses_the_cached_export(planner, exported, cache, monkeypatch) -> None:
    monkeypatch.setenv("DIFFUSIONDRIVE_CACHE", str(cache))
    monkeypatch.setattr(exporting, "_graph", None)  # exporting again would fail
    runtime = Runtime(planner, backend="onnx", device="cpu", auxiliary=True)
    features = make_features(planner.config, 1, seed=4)
    plan, plain = (r.plan(features) for r in (runtime, Runtime(planner, backend="reference", device="cpu")))
    torch.testing.assert_close(plan.candidates, plain.candidates, rtol=0, atol=1e-4)
    torch.testing.assert_close(plan.bev_semantic_map, plain.bev_semantic_map, rtol=0, atol=1e-4)
    assert plan.mode.tolist() == plain.mode.tolist()


def test_other_weights_get_another_export(planner, exported, cache, monkeypatch) -> None:
    monkeypatch.setattr(exporting, "_graph", None)
    other = lively_planner("tiny")
    with torch.no_grad():
        other.decoder.layers[0].classification[-1].bias.add_(1e-3)
    with pytest.raises(TypeError):
        cached_export(other, 1, True, torch.float32, cache / "onnx")


def test_check_sees_a_graph_of_other_weights(planner, exported) -> None:
    other = lively_planner("tiny")
    with torch.no_grad():
        other.decoder.layers[1].regression[-1].bias.add_(1e-2)
    assert max(check_export(other, exported, frames=1, seed=0).values()) > 1e-3


def test_missing_package_is_one_line(planner, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript.*\[export\]"):
        export_planner(planner, tmp_path)


def test_precision_that_the_cpu_does_not_have(planner) -> None:
    with pytest.raises(UserError, match="backend=onnx on cpu: precision fp16 is none of float32"):
        Runtime(planner, backend="onnx", precision="fp16", device="cpu")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/export.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_command_line_exports_and_checks_the_shipped_planner(tmp_path) -> None:
    done = run("planner=checkpoints/city_nano", f"output={tmp_path}", "check=2")
    assert done.returncode == 0, done.stderr
    assert "largest difference from the planner over 2 frames" in done.stdout
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["defaults.npz", "denoiser.onnx", "encoder.onnx", "graphs.json"]


def test_command_line_without_a_planner() -> None:
    done = run()
    assert done.returncode == 2 and "planner is not set" in done.stderr
