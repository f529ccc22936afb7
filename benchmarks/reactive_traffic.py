"""EPDMS with traffic that reacts to the ego (IDM) against replayed traffic: time for a (scene, proposal) pair.

    python benchmarks/reactive_traffic.py data.root=data/city split=test

One process, one thread; metric caches are prepared beforehand, so that only scoring is measured: simulation of the ego,
sub-scores, and with reactive traffic the vehicles of every proposal's own world. Proposals keep the current speed times
a factor and turn a little, so that they differ. For each number of proposals the two kinds of traffic are measured in
turn, `repeats` times; the smallest time counts. Writes JSON with the environment; the ratio is reactive over replayed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.files import atomic_write
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.metrics.scene_batch import PreparedScene, prepare
from navsim_eval.scoring import score
from navsim_eval.traffic import POLICIES


@dataclass
class ReactiveTrafficConfig:
    """scenes: at most so many of the split, spread over it;  proposals: numbers of them a scene;  repeats: runs."""

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "test"
    scenes: int = 40
    proposals: list[int] = field(default_factory=lambda: [1, 16, 64])
    repeats: int = 2
    output: str = "benchmarks/results/reactive_traffic.json"


def main(config: ReactiveTrafficConfig) -> None:
    dataset = SceneDataset.from_config(config.data, config.split)
    tokens = dataset.tokens[:: max(1, len(dataset) // config.scenes)][: config.scenes]
    caches = MetricCaches(config.data, dataset, "epdms_v2")
    scenes = [prepare(caches[token]) for token in tokens]
    vehicles = [len(scene.cache.traffic.vehicle) for scene in scenes]
    rows = {f"{count} proposals": measure(scenes, count, config.repeats) for count in config.proposals}
    result = {
        "split": config.split,
        "scenes": len(scenes),
        "driven_vehicles_per_scene": {"mean": float(np.mean(vehicles)), "max": int(max(vehicles))},
        "results": rows,
        "environment": describe_environment(),
    }
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    columns = list(next(iter(rows.values())))
    table = Table("scenes × proposals", *columns)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.3g}" for column in columns))
    Console().print(table)
    print(f"{len(scenes)} scenes, {np.mean(vehicles):.1f} driven vehicles a scene; written: {config.output}")


def measure(scenes: Sequence[PreparedScene], count: int, repeats: int) -> dict[str, float]:
    """Milliseconds for a pair with each kind of traffic."""
    plans = np.stack([proposals(scene, count) for scene in scenes])
    best = dict.fromkeys(POLICIES, np.inf)
    for _ in range(repeats):
        for traffic in POLICIES:
            start = time.perf_counter()
            score(scenes, plans, metric="epdms_v2", traffic=traffic)
            best[traffic] = min(best[traffic], (time.perf_counter() - start) * 1e3 / plans.shape[0] / count)
    replayed, reactive = (best[traffic] for traffic in POLICIES)
    return {"replayed ms": replayed, "reactive ms": reactive, "ratio": reactive / replayed}


def proposals(scene: PreparedScene, count: int) -> np.ndarray:
    """(count, 8, 3) plans that go on at 0 to 1.5 times the current speed, on arcs to both sides."""
    rng = np.random.default_rng(0)
    speed = np.linspace(0.0, 1.5, count + 1)[1:, None] * max(float(scene.cache.initial_state[3]), 2.0)
    curvature = rng.uniform(-0.02, 0.02, (count, 1))
    distance = 0.5 * np.arange(1, 9) * speed
    heading = curvature * distance
    return np.stack([distance * np.sinc(heading / np.pi), distance * heading / 2.0, heading], axis=-1)


if __name__ == "__main__":
    sys.exit(run_tool(main, ReactiveTrafficConfig, "benchmark_reactive_traffic", __doc__))
