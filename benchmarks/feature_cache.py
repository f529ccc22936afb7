"""Size and read time of a feature cache against building the sample from raw files: lossless, JPEG, small planner.

    python benchmarks/feature_cache.py data.root=data/city split=test

One process, one thread, files in the page cache; every sample of the split (at most `samples`) is read `repeats`
times. Writes JSON with the environment; the ratio is raw time over cached time.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from diffusiondrive.feature_cache import FeatureCache, FeatureCacheConfig, RawSamples, build_feature_cache
from diffusiondrive.features import FeatureConfig
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.files import atomic_write
from navsim_eval.formats.map_store import MapStore

NANO = FeatureConfig.for_sizes((96, 384), (128, 128))
VARIANTS = {
    "full size, lossless": FeatureCacheConfig(),
    "full size, JPEG": FeatureCacheConfig(camera_codec="jpeg"),
    "nano, lossless": FeatureCacheConfig(features=NANO),
}


@dataclass
class CacheBenchmarkConfig:
    """samples: at most so many scenes of the split;  repeats: readings of each."""

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "test"
    samples: int = 50
    repeats: int = 10
    output: str = "benchmarks/results/feature_cache.json"


def main(config: CacheBenchmarkConfig) -> None:
    scenes = SceneDataset.from_config(config.data, config.split, max_scenes=config.samples)
    rows = {name: measure(variant, scenes, config) for name, variant in VARIANTS.items()}
    result = {"split": config.split, "samples": len(scenes), "results": rows, "environment": describe_environment()}
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    columns = list(next(iter(rows.values())))
    table = Table("cache", *columns)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.3g}" for column in columns))
    Console().print(table)
    print(f"written: {config.output}")


def measure(variant: FeatureCacheConfig, scenes: SceneDataset, config: CacheBenchmarkConfig) -> dict[str, float]:
    """Bytes a sample, and milliseconds for one sample from raw files and from the cache."""
    maps = MapStore(config.data.maps, config.data.map_version)
    raw = RawSamples(scenes, maps, variant.features, variant.targets)
    with tempfile.TemporaryDirectory() as folder:
        build_feature_cache(folder, raw, config.split, variant, workers=1)
        size = sum(os.path.getsize(path) for path in Path(folder).iterdir())
        cache = FeatureCache(folder, variant.features, variant.targets)
        from_raw = timed(raw.__getitem__, cache.tokens)
        cached = np.concatenate([timed(cache.__getitem__, cache.tokens) for _ in range(config.repeats)])
    return {
        "megabytes": size / len(cache) / 1e6,
        "raw ms p50": float(np.percentile(from_raw, 50)),
        "cached ms p50": float(np.percentile(cached, 50)),
        "cached ms p99": float(np.percentile(cached, 99)),
        "ratio": float(np.median(from_raw) / np.median(cached)),
    }


def timed(read: Callable[[str], object], tokens: tuple[str, ...]) -> np.ndarray:
    """(N,) milliseconds of every reading, checksums and decoding included."""
    durations = []
    for token in tokens:
        start = time.perf_counter()
        read(token)
        durations.append((time.perf_counter() - start) * 1e3)
    return np.array(durations)


if __name__ == "__main__":
    sys.exit(run_tool(main, CacheBenchmarkConfig, "benchmark_feature_cache", __doc__))
