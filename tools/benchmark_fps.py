"""Latency of a planner, from encoded sensors in host memory to a plan in host memory: percentiles by stage.

    python tools/benchmark_fps.py planner=checkpoints/city_nano
    python tools/benchmark_fps.py reference_path=true roofline=true                     # full size, random weights
    python tools/benchmark_fps.py device=cuda backend=cudagraph precision=fp16 sensors.decode=nvjpeg reference_path=true

Frames come from a split whose sensor files exist (default: the synthetic city; make it with tools/make_city.py), many
in rotation. reference_path=true times the plain published computation (same weights, eager, float32) frame by frame
beside the runtime, so that the claim is a ratio of one run. roofline=true counts operations and bytes of every stage
and holds them against rates measured in the same run. Writes JSON with hardware, clocks, power and versions, and a
figure (PNG) beside it; prints tables. The protocol is in docs/real_time.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from diffusiondrive.runtime.benchmark import BenchmarkConfig, benchmark
from diffusiondrive.runtime.latency_report import as_table
from diffusiondrive.runtime.roofline import as_table as roofline_table
from navsim_eval.command_line import run_tool


def main(config: BenchmarkConfig) -> None:
    with tqdm(unit="plan", delay=0.1) as bar:
        result = benchmark(config, bar.update)
    Console().print(as_table(result))
    if "roofline" in result:
        Console().print(roofline_table(result["roofline"]))
    print(f"written: {config.output} and {Path(config.output).with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_tool(main, BenchmarkConfig, "benchmark_fps", __doc__))
