"""Latency of a planner, from encoded sensor files to a plan in host memory: percentiles by stage and end to end.

    python tools/benchmark_fps.py planner=checkpoints/city_nano
    python tools/benchmark_fps.py planner=random:diffusiondrive device=cuda iterations=1000   # full size, batch 1
    python tools/benchmark_fps.py planner=outputs/train/planner precision=bf16

Frames come from a split whose sensor files exist (default: the synthetic city; make it with tools/make_city.py).
Writes JSON with hardware and versions, prints a table.
"""

from __future__ import annotations

import sys

from rich.console import Console
from tqdm import tqdm

from diffusiondrive.runtime.benchmark import BenchmarkConfig, as_table, benchmark
from navsim_eval.command_line import run_tool


def main(config: BenchmarkConfig) -> None:
    with tqdm(total=config.warmup + config.iterations, unit="plan", delay=0.1) as bar:
        result = benchmark(config, bar.update)
    Console().print(as_table(result))
    print(f"written: {config.output}")


if __name__ == "__main__":
    sys.exit(run_tool(main, BenchmarkConfig, "benchmark_fps", __doc__))
