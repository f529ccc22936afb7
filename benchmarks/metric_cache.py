"""Metric caches per second and core, their size, and where the time goes.

    python benchmarks/metric_cache.py data.root=data/city split=test

One process, one thread, map read beforehand. Processor seconds are given beside wall seconds, because other programs
may share the machine. Bytes are those of the packed record, as `tools/cache.py kind=metrics` stores it.
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
from navsim_eval.formats.maps import MapStore
from navsim_eval.metric_caches import DEFLATED
from navsim_eval.metrics.aggregate import WEIGHTS
from navsim_eval.metrics.scene_batch import prepare
from navsim_eval.pdm.cache import build_metric_cache, from_arrays, to_arrays
from navsim_eval.shards import pack, unpack

REFERENCE_SECONDS = 0.5  # a scene; measured separately with the published evaluator, not part of this run


@dataclass
class MetricCacheBenchmarkConfig:
    """scenes: at most so many of the split."""

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "test"
    scenes: int = 60
    output: str = "benchmarks/results/metric_cache.json"


def main(config: MetricCacheBenchmarkConfig) -> None:
    torch.set_num_threads(1)
    dataset = SceneDataset.from_config(config.data, config.split, max_scenes=config.scenes)
    maps = MapStore(config.data.maps, config.data.map_version)
    for scene in (dataset[token] for token in dataset.tokens):  # maps and lane graphs are read once per process
        build_metric_cache(scene, maps.get(scene.map_name))
    results = {metric: measure(metric, dataset, maps) for metric in WEIGHTS}
    result = {
        "split": config.split,
        "scenes": len(dataset),
        "reference_seconds_per_scene_measured_separately": REFERENCE_SECONDS,
        "results": results,
        "environment": describe_environment(),
    }
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    columns = list(next(iter(results.values())))
    table = Table("metric", *columns)
    for metric, row in results.items():
        table.add_row(metric, *(f"{row[column]:,.1f}" for column in columns))
    Console(width=160).print(table)
    print(f"written: {config.output}")


def measure(metric: str, dataset: SceneDataset, maps: MapStore) -> dict[str, float]:
    """Scenes per second, median and 95th percentile of bytes, and mean milliseconds (processor) by stage."""
    spent: dict[str, list[float]] = {name: [] for name in ("read log", "build", "pack", "load", "prepare")}
    sizes, walls = [], []
    for token in dataset.tokens:
        wall, clock = time.perf_counter(), _Clock(spent)
        scene = dataset[token]
        clock.lap("read log")
        cache = build_metric_cache(scene, maps.get(scene.map_name), metric)
        clock.lap("build")
        record = pack(to_arrays(cache), DEFLATED)
        clock.lap("pack")
        walls.append(time.perf_counter() - wall)
        sizes.append(len(record))
        cache = from_arrays({name: array.copy() for name, array in unpack(record).items()})
        clock.lap("load")
        prepare(cache)
        clock.lap("prepare")
    made = [sum(parts) for parts in zip(*(spent[name] for name in ("read log", "build", "pack")), strict=True)]
    return {
        "scenes/s": 1.0 / float(np.mean(walls)),
        "scenes/s of processor time": 1.0 / float(np.mean(made)),
        "kB median": float(np.median(sizes)) / 1e3,
        "kB p95": float(np.percentile(sizes, 95)) / 1e3,
        **{f"ms {name}": float(np.mean(values)) * 1e3 for name, values in spent.items()},
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
