"""Reduced-scale JPEG decoding against exact decoding: time, pixels, and how far the plan moves.

    python benchmarks/sensor_decode.py data.root=data/city planner=checkpoints/city_nano

Same frames, alternating; one plan of the same planner with the same noise for each. `features ms` and `decode ms` are
medians; differences are of the camera feature in levels (1/255) and of the chosen trajectory in metres. The published
sizes are measured beside the planner's own (time and pixels only: shrinking differs with the size of the strip).
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from diffusiondrive.features import FeatureConfig
from diffusiondrive.runtime.observation import Observation, read_observation
from diffusiondrive.runtime.runtime import Runtime
from diffusiondrive.runtime.sensors import HostSensors, SensorConfig
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.files import atomic_write

MODES = ("turbo", "reduced")


@dataclass
class DecodeBenchmarkConfig:
    """scenes: at most so many of the split;  threads: that decode (0: as the runtime does)."""

    data: DataConfig = field(default_factory=DataConfig)
    planner: str = "checkpoints/city_nano"
    split: str = "test"
    scenes: int = 120
    threads: int = 0
    output: str = "benchmarks/results/sensor_decode.json"


def main(config: DecodeBenchmarkConfig) -> None:
    scenes = SceneDataset.from_config(config.data, config.split, max_scenes=config.scenes)
    observations = [read_observation(scene) for scene in scenes]
    runtime = Runtime.from_pretrained(config.planner, device="cpu")
    sizes = {"planner's": FeatureConfig.for_planner(runtime.config), "published": FeatureConfig()}
    rows = {}
    for name, features in sizes.items():
        rows[name] = compare(features, observations, config.threads, runtime if name == "planner's" else None)
    result = {
        "planner": config.planner, "split": config.split, "scenes": len(observations), "results": rows,
        "environment": describe_environment(),
    }  # fmt: skip
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    table = Table("", *rows)
    for key in rows["planner's"]:
        table.add_row(key, *(str(row.get(key, "")) for row in rows.values()))
    Console().print(table)
    print(f"written: {config.output}")


def compare(
    features: FeatureConfig, observations: list[Observation], threads: int, runtime: Runtime | None
) -> dict[str, Any]:
    """Both decoders on every observation; with a runtime also their plans."""
    sensors = {mode: HostSensors(features, SensorConfig(decode=mode, threads=threads)) for mode in MODES}
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    levels, moved, same_mode = [], [], []
    for observation in observations:
        seen = {}
        for mode, one in sensors.items():
            started = time.perf_counter()
            decoded = one.decode(observation)
            between = time.perf_counter()
            seen[mode] = one.features(decoded, observation.status)
            times[mode].append((between - started, time.perf_counter() - between))
        exact, reduced = (seen[mode]["camera_feature"] for mode in MODES)
        levels.append(float((exact - reduced).abs().mean()) * 255)
        if runtime is not None:
            plans = [runtime.plan(seen[mode]) for mode in MODES]
            moved.append(float((plans[0].trajectory - plans[1].trajectory)[..., :2].norm(dim=-1).mean()))
            same_mode.append(bool(torch.equal(plans[0].mode, plans[1].mode)))
    median = {mode: np.median(np.array(spans), axis=0) * 1e3 for mode, spans in times.items()}
    result = {f"{mode} decode ms": round(float(median[mode][0]), 2) for mode in MODES}
    result |= {f"{mode} features ms": round(float(median[mode][1]), 2) for mode in MODES}
    result["speedup"] = round(float(median["turbo"].sum() / median["reduced"].sum()), 2)
    result["mean pixel difference [levels]"] = round(float(np.mean(levels)), 3)
    if moved:
        result["plan moved p50 [m]"] = round(float(np.median(moved)), 4)
        result["plan moved p99 [m]"] = round(float(np.percentile(moved, 99)), 4)
        result["same mode"] = round(float(np.mean(same_mode)), 4)
    return result


if __name__ == "__main__":
    sys.exit(run_tool(main, DecodeBenchmarkConfig, "benchmark_sensor_decode", __doc__))
