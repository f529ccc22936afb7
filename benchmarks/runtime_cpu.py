"""Latency of every CPU backend beside the plain published computation, in one run, with the arithmetic floor.

    python benchmarks/runtime_cpu.py                                   # full size, random weights (same speed)
    python benchmarks/runtime_cpu.py planner=checkpoints/city_nano backends=[reference,eager,onnx]

Backends take turns, a plan each, over a few frames, so that a busy machine slows all of them alike; `ratio` is the
median over the rounds of (reference time / backend time). The floor of a backend's arithmetic is its multiply-adds
over the float32 rate that a 3×3 convolution of this planner reaches at best in the same run, and is compared with the
backend's best time. Operator profiles say where the
time goes before (reference) and after.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffusiondrive.runtime import Runtime
from diffusiondrive.runtime.benchmark import load
from diffusiondrive.runtime.onnx_backend import OnnxBackend, OnnxPlanner, cached_export
from diffusiondrive.runtime.program import PlanProgram, ReferenceProgram
from diffusiondrive.runtime.runtime import random_features
from diffusiondrive.runtime.torch_backends import example_inputs
from diffusiondrive.runtime.winograd import use_winograd
from navsim_eval.command_line import run_tool
from navsim_eval.environment import describe_environment
from navsim_eval.files import atomic_write

PROFILED_OPS = 12
FRAMES = 4
PAUSE_S = 0.05  # idle threads of one library spin for a while and would take a core from the next
REFERENCE = "reference"


@dataclass
class RuntimeCpuConfig:
    """planner: checkpoint, or random:VARIANT;  rounds: timed turns, after `warmup` untimed ones of every backend."""

    planner: str = "random:diffusiondrive"
    backends: list[str] = field(default_factory=lambda: [REFERENCE, "eager", "compile", "onnx"])
    threads: int = 2
    rounds: int = 15
    warmup: int = 2
    seed: int = 0
    output: str = "benchmarks/results/runtime_cpu.json"


@torch.inference_mode()
def main(config: RuntimeCpuConfig) -> None:
    torch.set_num_threads(config.threads)
    planner = load(config.planner, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    frames = [random_features(planner, 1, generator) for _ in range(FRAMES)]
    names = dict.fromkeys([REFERENCE, *config.backends])
    runtimes = {name: Runtime(planner, backend=name, device="cpu") for name in names}
    for runtime in runtimes.values():
        runtime.warm_up(config.warmup)
    plans = {name: runtime.plan(frames[0]).candidates for name, runtime in runtimes.items()}
    convolution, product = rate_probes()
    calls: dict[str, Callable[[int], object]] = {
        name: lambda number, runtime=runtime: runtime.plan(frames[number % FRAMES])
        for name, runtime in runtimes.items()
    }
    calls |= {"convolution": lambda _: convolution.run(), "product": lambda _: product.run()}
    times = take_turns(calls, config.rounds)
    rate = convolution.gflop / times["convolution"].min() * 1e3
    arguments = example_inputs(planner, 1)
    winograd = PlanProgram(planner)
    use_winograd(winograd.encoder)
    rewritten = count_gflop(PlanProgram(planner), arguments)
    work = dict.fromkeys(runtimes, rewritten) | {
        REFERENCE: count_gflop(ReferenceProgram(planner), arguments),
        "compile": count_gflop(winograd, arguments),
    }
    rows = {}
    for name, runtime in runtimes.items():
        gflop = work[name]
        rows[name] = {
            "p50_ms": float(np.median(times[name])),
            "min_ms": float(times[name].min()),
            "max_ms": float(times[name].max()),
            "ratio": float(np.median(times[REFERENCE] / times[name])),
            "gflop": gflop,
            "floor_ms": gflop / rate * 1e3,
            "floor_over_min": gflop / rate * 1e3 / float(times[name].min()),
            "startup_s": runtime.startup_s,
            "max_difference_m": float((plans[name] - plans[REFERENCE]).abs().max()),
        }
    result = {
        "planner": config.planner,
        "parameters": sum(p.numel() for p in planner.parameters()),
        "threads": config.threads,
        "rounds": config.rounds,
        "float32_gflop_per_s": {
            "convolution 3x3, 256 channels, 64x64": float(rate),
            "matrix product 1024": float(product.gflop / times["product"].min() * 1e3),
        },
        "backends": rows,
        "profile_ms": {name: profile_ops(runtime, frames) for name, runtime in runtimes.items()},
        "environment": describe_environment(),
    }
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    show(rows, rate)
    print(f"written: {config.output}")


@dataclass
class RateProbe:
    """A float32 kernel whose work is known."""

    gflop: float
    run: Callable[[], object]


def rate_probes() -> tuple[RateProbe, RateProbe]:
    """What this machine reaches: a convolution of the planner's size in its best layout, and a matrix product."""
    layer = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)
    image = torch.randn(1, 256, 64, 64).to(memory_format=torch.channels_last)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    convolution = RateProbe(2 * 9 * 256 * 256 * 64 * 64 / 1e9, lambda: layer(image))
    return convolution, RateProbe(2 * 1024**3 / 1e9, lambda: a @ b)


def take_turns(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, np.ndarray]:
    """(rounds,) milliseconds of every call, one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            call(number)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def count_gflop(program: nn.Module, arguments: tuple[torch.Tensor, ...]) -> float:
    """Convolutions and matrix products of one plan, two operations a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        program.eval()(*arguments)
    return counter.get_total_flops() / 1e9


def profile_ops(runtime: Runtime, frames: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Milliseconds a plan of the operators that take longest (their own time), and of the rest."""
    if isinstance(runtime.backend, OnnxBackend):
        milliseconds = onnx_times(runtime, frames)
    else:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for frame in frames:
                runtime.plan(frame)
        milliseconds = {op.key: op.self_cpu_time_total / 1e3 for op in recorded.key_averages()}
    ranked = sorted(milliseconds.items(), key=lambda item: -item[1])
    top = dict(ranked[:PROFILED_OPS]) | {"rest": sum(value for _, value in ranked[PROFILED_OPS:])}
    return {name: round(value / len(frames), 2) for name, value in top.items()}


def onnx_times(runtime: Runtime, frames: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The same graphs with onnxruntime's own profiler, one plan a frame."""
    exported = cached_export(runtime.planner, runtime.batch, runtime.auxiliary, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        graphs = OnnxPlanner(exported, runtime.device, profile=f"{folder}/trace")
        for frame in frames:
            graphs({name: tensor.numpy() for name, tensor in frame.items()})
        return graphs.operator_times()


def show(rows: dict[str, dict[str, float]], rate: float) -> None:
    columns = ("p50_ms", "min_ms", "ratio", "gflop", "floor_ms", "floor_over_min", "startup_s", "max_difference_m")
    table = Table("backend", *columns, title=f"floor: arithmetic at {rate:.0f} float32 GFLOP/s")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.3g}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_tool(main, RuntimeCpuConfig, "benchmark_runtime_cpu", __doc__))
