"""Plans a second over batch sizes, and of several planners in one process, with the memory they take.

    python benchmarks/throughput.py planner=checkpoints/city_nano batches=[1,2,4,8,16]
    python benchmarks/throughput.py planner=random:diffusiondrive backend=cudagraph device=cuda precision=bf16

Model features (float32) in host memory, or with inputs=device already on the device, to plans in host memory; random
features in rotation. On a GPU each planner of the second
part has a stream and a thread of its own; on a CPU the planners share the cores. Writes JSON with the environment.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime import Runtime
from diffusiondrive.runtime.benchmark import load
from diffusiondrive.runtime.runtime import random_features
from navsim_eval.command_line import run_tool
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write

FRAMES = 4


@dataclass
class ThroughputConfig:
    """batches: sizes of the curve;  planners: how many planners at once in the second part, batch 1 each;
    calls: timed calls of each point, after `warmup` untimed ones;  inputs: where features lie, host or device."""

    planner: str = "checkpoints/city_nano"
    backend: str = "eager"
    device: str = "auto"
    precision: str = "float32"
    batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    planners: list[int] = field(default_factory=lambda: [1, 2])
    calls: int = 20
    warmup: int = 3
    threads: int = 2
    inputs: str = "host"
    seed: int = 0
    output: str = "benchmarks/results/throughput.json"

    def __post_init__(self) -> None:
        if self.inputs not in ("host", "device"):
            raise UserError(f"inputs: '{self.inputs}' is neither host nor device")


def main(config: ThroughputConfig) -> None:
    torch.set_num_threads(config.threads)
    planner = load(config.planner, config.seed)
    curve = [measure_batch(config, planner, batch) for batch in config.batches]
    together = [measure_together(config, planner, count) for count in config.planners]
    result = {
        "planner": config.planner,
        "backend": config.backend,
        "precision": config.precision,
        "inputs": config.inputs,
        "threads": config.threads,
        "batches": curve,
        "planners": together,
        "environment": describe_environment(),
    }
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    for title, rows in (("batch size", curve), ("planners in one process, batch 1", together)):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{value:.4g}" for value in row.values()))
        Console().print(table)
    print(f"written: {config.output}")


def measure_batch(config: ThroughputConfig, planner: DiffusionDrive, batch: int) -> dict[str, float]:
    """One runtime, one batch size."""
    runtime = Runtime(planner, config.precision, config.backend, config.device, batch)
    step = caller(runtime, config)
    times = [timed(step) for _ in range(config.calls)]
    return {
        "batch": batch,
        "plans_per_s": batch / float(np.median(times)),
        "ms_per_call_p50": 1e3 * float(np.median(times)),
        "ms_per_call_p99": 1e3 * float(np.percentile(times, 99)),
        **memory(runtime.device),
    }


def measure_together(config: ThroughputConfig, planner: DiffusionDrive, count: int) -> dict[str, float]:
    """`count` runtimes with their own weights, each planning in its own thread."""
    runtimes = [Runtime(planner, config.precision, config.backend, config.device) for _ in range(count)]
    steps = [caller(runtime, config) for runtime in runtimes]

    def work(index: int) -> list[float]:
        cuda = runtimes[index].device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if cuda else nullcontext():
            return [timed(steps[index]) for _ in range(config.calls)]

    with ThreadPoolExecutor(count) as pool:
        started = time.perf_counter()
        times = np.concatenate(list(pool.map(work, range(count))))
        seconds = time.perf_counter() - started
    return {
        "planners": count,
        "plans_per_s": count * config.calls / seconds,
        "ms_per_call_p50": 1e3 * float(np.median(times)),
        "ms_per_call_p99": 1e3 * float(np.percentile(times, 99)),
        **memory(runtimes[0].device),
    }


def caller(runtime: Runtime, config: ThroughputConfig) -> Callable[[], Any]:
    """A function that plans the next of a few batches; warm."""
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    generator = torch.Generator().manual_seed(config.seed)
    frames = [random_features(runtime.planner, runtime.batch, generator) for _ in range(FRAMES)]
    if config.inputs == "device":
        frames = [{name: x.to(runtime.device) for name, x in frame.items()} for frame in frames]
    numbers = iter(range(sys.maxsize))

    def step() -> Any:
        return runtime.plan(frames[next(numbers) % FRAMES])

    for _ in range(config.warmup):
        step()
    return step


def timed(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def memory(device: torch.device) -> dict[str, float]:
    """Peak so far [MiB]: of the process, and of the device's allocator since the runtime was built."""
    process = {"process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type != "cuda":
        return process
    return process | {"device_mib": torch.cuda.max_memory_allocated(device) / 2**20}


if __name__ == "__main__":
    sys.exit(run_tool(main, ThroughputConfig, "benchmark_throughput", __doc__))
