"""The runtime: features in host memory in, a plan in host memory out, the same one on every backend."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime import Runtime, torch_backends
from diffusiondrive.runtime.device import float32_rule
from navsim_eval.errors import UserError
from tests.diffusiondrive.planners import make_features
from tests.diffusiondrive.test_rewrites import lively_planner


@pytest.fixture(scope="module")
def planner() -> DiffusionDrive:
    return lively_planner("tiny")


def features(planner: DiffusionDrive, batch: int = 1) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in make_features(planner.config, batch).items()}


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_plan_equals_the_planners_own(planner: DiffusionDrive, backend: str) -> None:
    runtime = Runtime(planner, backend=backend, device="cpu", auxiliary=True)
    inputs = features(planner)
    with torch.inference_mode():
        expected = planner({name: torch.from_numpy(array) for name, array in inputs.items()})
    plan = runtime.plan(inputs)
    torch.testing.assert_close(plan.candidates, expected.candidates, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plan.trajectory, expected.trajectory, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plan.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plan.agents.states, expected.agents.states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plan.bev_semantic_map, expected.bev_semantic_map, rtol=1e-5, atol=1e-5)
    assert plan.mode.tolist() == expected.mode.tolist() and plan.mode.dtype == torch.int64


def test_from_pretrained_and_determinism(planner: DiffusionDrive, tmp_path) -> None:
    runtime = Runtime.from_pretrained(planner.save_pretrained(tmp_path / "planner"), device="cpu")
    assert runtime.warm_up(plans=2) > 0 and runtime.startup_s > 0
    inputs = features(planner)
    first, second = runtime.plan(inputs), runtime.plan(inputs)
    assert torch.equal(first.candidates, second.candidates)
    other = runtime.plan(inputs, noise=np.ones((1, *planner.noise_shape), np.float32))
    assert not torch.equal(first.candidates, other.candidates)
    assert first.agents is None


def test_a_plan_is_not_overwritten_by_the_next(planner: DiffusionDrive) -> None:
    runtime = Runtime(planner, device="cpu", batch=2)
    first = runtime.plan(features(planner, 2))
    kept = first.candidates.clone()
    runtime.plan({name: array * 0.5 for name, array in features(planner, 2).items()})
    assert torch.equal(first.candidates, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "quantum"}, "backend: 'quantum' is none of reference, eager"),
        ({"precision": "int4"}, "precision: 'int4' is none of float32"),
        ({"device": "tpu7"}, "device: 'tpu7'"),
        ({"batch": 0}, "batch: 0"),
        ({"backend": "reference", "precision": "bf16"}, "reference computes in float32"),
    ],
)
def test_options_that_do_not_exist(planner: DiffusionDrive, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Runtime(planner, **({"device": "cpu"} | change))


def test_inputs_that_do_not_fit(planner: DiffusionDrive) -> None:
    runtime = Runtime(planner, device="cpu")
    with pytest.raises(UserError, match="2 scenes, but this runtime was made for batch=1"):
        runtime.plan(features(planner, 2))
    with pytest.raises(UserError, match="noise has shape"):
        runtime.plan(features(planner), noise=np.zeros((1, 2, 8, 2), np.float32))
    with pytest.raises(UserError, match="'lidar_feature' is missing"):
        runtime.plan({name: array for name, array in features(planner).items() if name != "lidar_feature"})


def test_backends_that_need_a_gpu_or_a_package_say_so(planner: DiffusionDrive, monkeypatch) -> None:
    for name in ("cudagraph", "compile+cudagraph", "fused"):
        with pytest.raises(UserError, match="needs an NVIDIA GPU"):
            Runtime(planner, backend=name, device="cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="needs tensorrt, which is not installed"):
        Runtime(planner, backend="tensorrt", device="cpu")


def test_compile_without_a_compiler_says_so(planner: DiffusionDrive, monkeypatch) -> None:
    monkeypatch.setattr(torch_backends, "CPU_COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        Runtime(planner, backend="compile", device="cpu")


@pytest.mark.parametrize(
    ("given", "kept"), [("", False), ("/tmp/torchinductor_somebody", False), ("/data/my_compiler_cache", True)]
)
def test_compiled_code_is_kept_where_it_survives(tmp_path, monkeypatch, given: str, kept: bool) -> None:
    monkeypatch.setenv("DIFFUSIONDRIVE_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    torch_backends.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (given if kept else str(tmp_path / "inductor"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_backbone_stays_close(planner: DiffusionDrive, precision: str) -> None:
    """Geometry and the denoiser are float32, so poses keep their resolution."""
    inputs = features(planner)
    exact = Runtime(planner, device="cpu").plan(inputs)
    half = Runtime(planner, precision=precision, device="cpu").plan(inputs)
    difference = (half.candidates - exact.candidates).abs().max()
    assert 0 < difference < 0.2 and half.candidates.dtype == torch.float32


def test_float32_rule_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with float32_rule("tf32"):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    with float32_rule("bf16"):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.slow
def test_compiled_plan(planner: DiffusionDrive, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = features(planner)
    plan, exact = (Runtime(planner, backend=name, device="cpu").plan(inputs) for name in ("compile", "reference"))
    torch.testing.assert_close(plan.candidates, exact.candidates, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "compile", "cudagraph", "compile+cudagraph", "fused"])
def test_gpu_backends_give_the_plain_plan(planner: DiffusionDrive, backend: str) -> None:
    exact = Runtime(planner, backend="reference", device="cuda")
    runtime = Runtime(planner, backend=backend, device="cuda")
    for seed in range(3):  # a captured graph must read its inputs anew
        inputs = {name: t.numpy() for name, t in make_features(planner.config, 1, seed).items()}
        noise = torch.randn(1, *planner.noise_shape)
        plan, expected = runtime.plan(inputs, noise), exact.plan(inputs, noise)
        torch.testing.assert_close(plan.candidates, expected.candidates, rtol=1e-4, atol=1e-4)
        on_device = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
        assert torch.equal(runtime.plan(on_device, noise).candidates, plan.candidates)
