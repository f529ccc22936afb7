"""Fused kernels against torch: in Triton's interpreter, and (marked `gpu`) compiled.

Whether kernels are interpreted is decided when Triton is imported, so a process of its own runs the tests below.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton comes with torch's builds for Linux only")

from diffusiondrive.features import FeatureConfig
from diffusiondrive.runtime import Runtime
from diffusiondrive.runtime.device_features import LidarHistogram, StripSampler
from diffusiondrive.runtime.fused_backbone import ConvolutionReLU
from diffusiondrive.runtime.fused_program import FusedProgram
from diffusiondrive.runtime.kernels.attention import attend
from diffusiondrive.runtime.kernels.linear import FusedLinear, Norm
from diffusiondrive.runtime.kernels.maps import add_resized, max_pool, pool
from diffusiondrive.runtime.kernels.sensors import count_points, strip
from diffusiondrive.runtime.program import PlanProgram
from diffusiondrive.variants import tiny
from navsim_eval.errors import UserError
from tests.diffusiondrive.planners import make_planner
from tests.diffusiondrive.test_rewrites import EXACT, inputs, lively_planner

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_everything_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_in_the_interpreter(pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["--slow"] if pytestconfig.getoption("--slow") else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and done.stdout.count(".") > 10, done.stdout + done.stderr


def test_without_a_gpu_it_says_what_to_take() -> None:
    with pytest.raises(UserError, match="backend=fused needs an NVIDIA GPU"):
        Runtime(lively_planner("tiny"), backend="fused", device="cpu")


# --- whole plans -----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("schedule", "batch"), [({}, 1), pytest.param({"preset": "consistent", "steps": 4}, 2, marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_plan_equals_the_rewritten_planners(schedule: dict, batch: int) -> None:
    planner = lively_planner("tiny", **schedule)
    program, arguments = PlanProgram(planner, auxiliary=True), inputs(planner, batch)
    torch.testing.assert_close(FusedProgram(program, batch, "float32")(*arguments), program(*arguments), **EXACT)


@interpreted
@pytest.mark.slow
@torch.inference_mode()
def test_anchors_as_base_and_a_status_in_the_ego_query() -> None:
    config = tiny()
    config.decoder.base, config.perception.status_to_ego, config.perception.decoder_layers = "anchors", True, 2
    planner = make_planner(config)
    program, arguments = PlanProgram(planner), inputs(planner, 1)
    torch.testing.assert_close(FusedProgram(program, 1, "float32")(*arguments), program(*arguments), **EXACT)


# --- one by one ------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 1, 8), (20, 24, 96), (31, 17, 40), (150, 70, 128)])
@pytest.mark.parametrize("normed", [False, True])
def test_linear(rows: int, width: int, depth: int, normed: bool) -> None:
    torch.manual_seed(rows)
    layer, norm = nn.Linear(depth, width), nn.LayerNorm(depth)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, residual = 3 + torch.randn(2, rows, depth), torch.randn(1, rows, width)
    fused = FusedLinear.of(layer, Norm.of(norm) if normed else None)
    expected = layer(norm(x) if normed else x).relu() + residual
    torch.testing.assert_close(fused(x, relu=True, residual=residual), expected, rtol=1e-5, atol=2e-5)


@interpreted
def test_linear_reads_and_writes_parts_of_tensors_and_norms_its_residual() -> None:
    layer, norm = nn.Linear(32, 16), nn.LayerNorm(16)
    nn.init.normal_(norm.weight)
    wide, out, residual = torch.randn(2, 9, 64), torch.zeros(2, 7, 16), torch.randn(2, 4, 16)
    x = wide[:, 3:7, 32:]
    FusedLinear.of(layer)(x, residual=residual, residual_norm=Norm.of(norm), out=out[:, 2:6])
    torch.testing.assert_close(out[:, 2:6], layer(x) + norm(residual), **EXACT)
    assert not out[:, :2].any() and not out[:, 6:].any()


@interpreted
@pytest.mark.parametrize("projected", [False, True])
def test_attention(projected: bool) -> None:
    ask, norm = nn.Linear(24, 32), nn.LayerNorm(24)
    x = torch.randn(2, 19, 24 if projected else 32)
    memory = torch.randn(2, 37, 64)
    keys, values = memory.chunk(2, dim=2)
    query = ask(norm(x)) if projected else x
    split = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in (query, keys, values))
    expected = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    projection = FusedLinear.of(ask, Norm.of(norm)) if projected else None
    torch.testing.assert_close(attend(x, keys, values, 4, "tf32x3", projection), expected, **EXACT)


@interpreted
def test_maps() -> None:
    x = torch.randn(2, 24, 8, 12).contiguous(memory_format=torch.channels_last)
    tokens, added = torch.empty(2, 10, 24), torch.randn(8, 24)
    pool(x, (2, 4), tokens[:, 1:9], added)
    expected = F.adaptive_avg_pool2d(x, (2, 4)).flatten(2).transpose(1, 2) + added
    torch.testing.assert_close(tokens[:, 1:9], expected, **EXACT)
    bias = torch.randn(24)
    torch.testing.assert_close(max_pool(x), F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0)
    pooled = F.max_pool2d((x + bias[:, None, None]).relu(), 3, 2, 1)
    torch.testing.assert_close(max_pool(x, bias), pooled, **EXACT)
    small = torch.randn(2, 24, 2, 4)
    cells = small.flatten(2).transpose(1, 2).contiguous()
    resized = F.interpolate(small, (8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(add_resized(None, cells, (2, 4), (8, 12)), resized, **EXACT)
    torch.testing.assert_close(add_resized(x.clone(), cells, (2, 4), (8, 12)), x + resized, **EXACT)


def test_channels_of_zeros_do_not_change_a_convolution() -> None:
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(1, 3, 6, 7)
    fused, padded = ConvolutionReLU(conv), F.pad(x, (0, 0, 0, 0, 0, 5))
    torch.testing.assert_close(fused(padded), conv(x).relu(), **EXACT)
    assert fused.weight.shape == (5, 8, 3, 3)


@interpreted
@pytest.mark.parametrize("size", [(16, 64), (27, 96)])
def test_strip(size: tuple[int, int]) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 108, 192, 3), np.uint8)).permute(0, 3, 1, 2)
    sampler = StripSampler((108, 192), FeatureConfig(camera_height=size[0], camera_width=size[1]))
    assert torch.equal(strip(images, dict(sampler.named_buffers())), sampler(images))


@interpreted
@pytest.mark.parametrize(("range_m", "cells"), [(32.0, 256), (31.3, 37)])
def test_counts_of_points_on_edges_outside_and_nowhere(range_m: float, cells: int) -> None:
    histogram = LidarHistogram(FeatureConfig(lidar_cells=cells, lidar_range=range_m))
    edges, heights = histogram.edges.float(), torch.tensor([0.2, 0.3, 100.0, 1.0])
    on_edges = torch.stack([edges[torch.randint(0, cells + 1, (500,))] for _ in range(2)])
    points = torch.cat([on_edges, 80 * torch.rand(2, 500) - 40, torch.full((2, 9), float("nan"))], dim=1)
    cloud = torch.cat([points, heights[torch.randint(0, 4, (1, points.shape[1]))]])
    counts = count_points(cloud, histogram.edges, range_m, *histogram.height_numbers)
    assert torch.equal((counts.clamp(max=5).float() / 5)[None], histogram(cloud)) and counts.sum() > 100


# --- compiled --------------------------------------------------------------------------------------------------------


def plan_rows(planner, backend: str, precision: str, arguments: tuple[Tensor, ...]) -> Tensor:
    names = ("camera_feature", "lidar_feature", "status_feature")
    runtime = Runtime(planner, precision, backend, "cuda", batch=len(arguments[0]))
    return runtime.plan(dict(zip(names, arguments[:3], strict=True)), arguments[3]).candidates


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "batch"), [("tiny", 3), ("city_nano", 1), ("diffusiondrive", 2)])
def test_compiled_kernels_give_the_plain_plan(name: str, batch: int) -> None:
    planner = lively_planner(name)
    arguments = inputs(planner, batch)
    exact = plan_rows(planner, "reference", "float32", arguments)
    torch.testing.assert_close(plan_rows(planner, "fused", "float32", arguments), exact, rtol=1e-4, atol=1e-4)
    for precision in ("tf32", "fp16", "bf16"):
        assert (plan_rows(planner, "fused", precision, arguments) - exact).abs().max() < 0.2


@pytest.mark.gpu
def test_half_precision_of_kernels_is_a_matter_of_types() -> None:
    x = torch.randn(1, 100, 64, device="cuda", dtype=torch.float16)
    layer = nn.Linear(64, 48).cuda()
    fused = FusedLinear.of(layer, dtype=torch.float16)(x)
    assert fused.dtype == torch.float16
    torch.testing.assert_close(fused.float(), layer(x.float()), rtol=2e-2, atol=2e-2)
