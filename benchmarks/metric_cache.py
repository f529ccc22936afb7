"""Metric caches per second and core, their size, and where the time goes.

    python benchmarks/metric_cache.py data.root=data/city split=test

One process, one thread, map read beforehand. Scenes are prepared together in chunks, as `tools/cache.py kind=metrics`
does it, and in turns with that one by one, for comparison. Figures are medians over the rounds, and processor seconds
are given beside wall seconds, because other programs may share the machine. Bytes are those of the packed record, as
that tool stores it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.files import atomic_write
from navsim_eval.formats.map_store import MapStore
from navsim_eval.metric_caches import DEFLATED, SCENES_TOGETHER
from navsim_eval.metrics.aggregate import WEIGHTS
from navsim_eval.metrics.scene_batch import prepare
from navsim_eval.pdm.cache import build_metric_caches, from_arrays, to_arrays
from navsim_eval.shards import pack, unpack

REFERENCE_SECONDS = 0.5  # a scene; measured separately with the published evaluator, not part of this run


@dataclass
class MetricCacheBenchmarkConfig:
    """scenes: at most so many of the split;  rounds: how often everything is measured."""

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "test"
    scenes: int = 60
    rounds: int = 5
    output: str = "benchmarks/results/metric_cache.json"


def main(config: MetricCacheBenchmarkConfig) -> None:
    torch.set_num_threads(1)
    dataset = SceneDataset.from_config(config.data, config.split, max_scenes=config.scenes)
    maps = MapStore(config.data.maps, config.data.map_version)
    for scene in (dataset[token] for token in dataset.tokens):  # maps and lane graphs are read once per process
        build_metric_caches([scene], [maps.get(scene.map_name)])
    results = {metric: median([both_ways(metric, dataset, maps) for _ in range(config.rounds)]) for metric in WEIGHTS}
    result = {
        "split": config.split,
        "scenes": len(dataset),
        "scenes_together": SCENES_TOGETHER,
        "rounds": config.rounds,
        "reference_seconds_per_scene_measured_separately": REFERENCE_SECONDS,
        "results": results,
        "environment": describe_environment(),
    }
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    columns = list(next(iter(results.values())))
    table = Table("metric", *columns)
    for metric, row in results.items():
        table.add_row(metric, *(f"{row[column]:,.1f}" for column in columns))
    Console(width=180).print(table)
    print(f"written: {config.output}")


def both_ways(metric: str, dataset: SceneDataset, maps: MapStore) -> dict[str, float]:
    """Figures of scenes prepared together, and beside them the speed one by one."""
    alone, together = (measure(metric, dataset, maps, size) for size in (1, SCENES_TOGETHER))
    return {"scenes/s": together["scenes/s"], "scenes/s one by one": alone["scenes/s"], **together}


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of each column."""
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def measure(metric: str, dataset: SceneDataset, maps: MapStore, together: int) -> dict[str, float]:
    """Scenes per second, median and 95th percentile of bytes, and mean milliseconds (processor) a scene by stage.

    together: scenes prepared at a time
    """
    spent: dict[str, list[float]] = {name: [] for name in ("read log", "build", "pack", "load", "prepare")}
    sizes, walls = [], []
    for first in range(0, len(dataset), together):
        wall, clock = time.perf_counter(), _Clock(spent)
        scenes = [dataset.observed(token) for token in dataset.tokens[first : first + together]]
        clock.lap("read log")
        caches = build_metric_caches(scenes, [maps.get(scene.map_name) for scene in scenes], metric)
        clock.lap("build")
        records = [pack(to_arrays(cache), DEFLATED) for cache in caches]
        clock.lap("pack")
        walls.append(time.perf_counter() - wall)
        sizes += [len(record) for record in records]
        caches = [from_arrays({name: array.copy() for name, array in unpack(record).items()}) for record in records]
        clock.lap("load")
        for cache in caches:
            prepare(cache)
        clock.lap("prepare")
    a_scene = {name: sum(laps) / len(dataset) for name, laps in spent.items()}
    return {
        "scenes/s": len(dataset) / sum(walls),
        "scenes/s of processor time": 1.0 / sum(a_scene[name] for name in ("read log", "build", "pack")),
        "kB median": float(np.median(sizes)) / 1e3,
        "kB p95": float(np.percentile(sizes, 95)) / 1e3,
        **{f"ms {name}": seconds * 1e3 for name, seconds in a_scene.items()},
    }


class _Clock:
    """Processor time between laps, collected by name."""

    def __init__(self, spent: dict[str, list[float]]):
        self.spent, self.last = spent, time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.spent[name].append(now - self.last)
        self.last = now


if __name__ == "__main__":
    sys.exit(run_tool(main, MetricCacheBenchmarkConfig, "benchmark_metric_cache", __doc__))
