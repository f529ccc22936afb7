"""Samples a second that training is fed with, and can digest: the packed cache against pickles as published.

    python benchmarks/training_throughput.py data.root=data/city split=train
    python benchmarks/training_throughput.py data.root=data/city split=train model=diffusiondrive device=cuda \\
        samples=512 batches=[128,256] steps=20 workers=14 repeats=0

Loader: one process, one thread, full-size features (256×1024 camera, 256² LiDAR) of the same scenes, in the same
shuffled batches, files in the page cache. Four ways: our packed cache as training reads it (8 bits), the same and then
made float32 on this core, the packed cache with JPEG cameras, and the published layout (one gzip pickle of float32
tensors for the features and one for the targets of every scene, torch's own collation). The ways take turns; the first
reading of the packed cache compares checksums and is reported for itself. That all give the same numbers is asserted.

Step: one optimiser step of the planner `model`, fed from each cache of its own feature size, cut into data wait, copy,
forward with losses, backward, optimiser (diffusiondrive/training/throughput.py). On CUDA ours is the step of
trainer=gpu in bf16, compiled unless compile=false, the published equivalent eager fp16 with loss scaling, 64 samples a
step and 4 loader processes, as released; on the CPU both run eagerly in float32 with the same batch. Then Lightning's
own loop with all callbacks is timed at our fastest batch.

Where a split has fewer scenes than `samples`, its scenes are written again and again under other names until there are
so many, in every cache, so that reading them takes as much from disk and memory as that many scenes would.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import default_collate

from diffusiondrive.anchors import cluster_anchors
from diffusiondrive.dataset import PlanningDataset, Sample, to_model_input
from diffusiondrive.feature_cache import FeatureCache, RawSamples
from diffusiondrive.features import FeatureConfig
from diffusiondrive.losses import LossConfig
from diffusiondrive.planner import DiffusionDrive, PlannerConfig
from diffusiondrive.runtime.device import resolve_device
from diffusiondrive.runtime.roofline import measure_rates
from diffusiondrive.targets import TargetConfig
from diffusiondrive.training.cache_comparison import Caches
from diffusiondrive.training.config import OptimizerConfig
from diffusiondrive.training.module import PlannerModule, lay_out_for
from diffusiondrive.training.throughput import (
    PUBLISHED_BATCH,
    PUBLISHED_WORKERS,
    Ours,
    Published,
    measure_trainer,
    settled,
    training_flops,
)
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.formats.map_store import MapStore

OURS, PUBLISHED = "ours", "published equivalent"
PROFILED = 3  # steps


@dataclass
class ThroughputConfig:
    """samples: of every cache; the scenes are the first of the split, repeated where it has fewer
    cache:   a feature cache of the planner's sizes, whose scenes are taken instead; nothing else is read then
    repeats: turns of every way of the loader; 0: the loader is not measured by itself
    batch:   of the loader and the step;  batches: of our step, one after the other; empty: `batch`
    steps:   optimiser steps timed, after `warm_up` others (the first of them compiles);  0: no step
    workers: loader processes of our step (0: in this process);  device: of the step: auto, cpu, cuda
    compile: our step; null: on CUDA;  lightning: also time Lightning's loop
    threads: of torch in the step (0: all cores); the loader always has one
    profile: a file for the operations that took most time in a few more steps of ours; empty: none
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: PlannerConfig = field(default_factory=PlannerConfig)
    split: str = "train"
    cache: str = ""
    samples: int = 200
    batch: int = 16
    batches: list[int] = field(default_factory=list)
    repeats: int = 5
    steps: int = 8
    warm_up: int = 2
    workers: int = 0
    device: str = "auto"
    compile: bool | None = None
    lightning: bool = True
    threads: int = 0
    seed: int = 0
    profile: str = ""
    output: str = "benchmarks/results/training_throughput.json"


def main(config: ThroughputConfig) -> None:
    own, full = FeatureConfig.for_planner(config.model), FeatureConfig()
    result: dict[str, Any] = {"split": config.split, "samples": config.samples, "environment": describe_environment()}
    with tempfile.TemporaryDirectory() as folder:
        caches = None
        if config.repeats:
            caches = build_caches(Path(folder) / "full", config, full)
            result["loader"] = measure_loaders(caches, config)
            show(result["loader"], f"loader, one core, batch {config.batch}")
        if config.steps:
            if caches is None or own != full:
                caches = build_caches(Path(folder) / "own", config, own)
            result["step"] = measure_steps(caches, config, Path(folder))
            show(result["step"]["rows"], f"step, {config.model.name} on {result['step']['device']}")
            print(json.dumps({name: value for name, value in result["step"].items() if name != "rows"}, indent=1))
        result["scenes"] = caches.scenes if caches else 0
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    print(f"written: {config.output}")


def source_of(config: ThroughputConfig, features: FeatureConfig) -> FeatureCache | RawSamples:
    """Where the scenes come from: a cache of these features, or logs, maps and sensor files."""
    if config.cache:
        return FeatureCache(config.cache, features)
    scenes = SceneDataset.from_config(config.data, config.split, max_scenes=config.samples)
    return RawSamples(scenes, MapStore(config.data.maps, config.data.map_version), features, TargetConfig())


def build_caches(folder: Path, config: ThroughputConfig, features: FeatureConfig) -> Caches:
    caches = Caches.build(folder, source_of(config, features), config.samples, jpeg=config.repeats > 0)
    if len(caches.packed) < config.batch:
        raise UserError(f"samples: {len(caches.packed)} readable ones are fewer than one batch of {config.batch}")
    return caches


def show(rows: dict[str, dict[str, float]], title: str) -> None:
    columns = list(next(iter(rows.values())))
    table = Table(title, *columns)
    for name, row in rows.items():
        table.add_row(name, *(f"{x:.3g}" if x < 1000 else f"{x:.0f}" for x in (row[column] for column in columns)))
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


# --- the loader ------------------------------------------------------------------------------------------------------


def measure_loaders(caches: Caches, config: ThroughputConfig) -> dict[str, dict[str, float]]:
    """Samples a second on one core, median of the turns; ratios to the pickles."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    order = np.random.default_rng(config.seed).permutation(len(caches.packed))
    batches = [order[i : i + config.batch].tolist() for i in range(0, len(order) - config.batch + 1, config.batch)]
    features = caches.packed.features

    def pickled(batch: list[int]) -> list:
        return default_collate([caches.pickles[index] for index in batch])

    def as_float(batch: list[int]) -> dict[str, torch.Tensor]:
        return to_model_input(caches.packed.__getitems__(batch).features, features)

    assert_equal(caches.packed.__getitems__(batches[0]), pickled(batches[0]), features)
    fresh = PlanningDataset(FeatureCache(caches.packed.source.reader.folder))
    ways = {
        "packed, 8 bits": (caches.packed.__getitems__, batches, "packed"),
        "packed, then float32": (as_float, batches, "packed"),
        "packed, JPEG cameras": (caches.jpeg.__getitems__, batches, "jpeg"),
        "pickles, as published": (pickled, batches, "pickles"),
    }
    first = rate(fresh.__getitems__, batches)
    for read, some, _ in ways.values():
        rate(read, some[:2])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.repeats):
        for name, (read, some, _) in ways.items():
            rates[name].append(rate(read, some))
    torch.set_num_threads(threads)
    base = statistics.median(rates["pickles, as published"])
    rows = {name: _row(rates[name], base, caches.megabytes[kind]) for name, (_, _, kind) in ways.items()}
    return {"packed, 8 bits, first reading": _row([first], base, caches.megabytes["packed"]), **rows}


def _row(rates: list[float], base: float, megabytes: float) -> dict[str, float]:
    middle = statistics.median(rates)
    return {
        "samples/s": middle,
        "lowest": min(rates),
        "highest": max(rates),
        "times the pickles": middle / base,
        "MB a sample": megabytes,
    }


def rate(read: Callable[[list[int]], object], batches: list[list[int]]) -> float:
    """Samples a second of reading all batches once."""
    start = time.perf_counter()
    for batch in batches:
        read(batch)
    return sum(map(len, batches)) / (time.perf_counter() - start)


def assert_equal(ours: Sample, published: list, features: FeatureConfig) -> None:
    """Both caches hold the same scenes and the same numbers."""
    assert ours.token == list(published[2])
    pairs = [(to_model_input(ours.features, features), published[0]), (ours.targets, published[1])]
    for mine, theirs in pairs:
        assert set(mine) == set(theirs)
        for name, value in mine.items():
            torch.testing.assert_close(value.double(), theirs[name].double(), rtol=0, atol=1e-5)


# --- the step --------------------------------------------------------------------------------------------------------


def measure_steps(caches: Caches, config: ThroughputConfig, folder: Path) -> dict[str, Any]:
    """Both pipelines one after the other, then the trainer at our fastest batch."""
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    cuda, flops = device.type == "cuda", training_flops(config.model)
    compiled = cuda if config.compile is None else config.compile
    human = np.stack([caches.packed.source[token][1]["trajectory"][:, :2] for token in caches.packed.tokens])
    anchors = torch.from_numpy(cluster_anchors(human, config.model.modes, config.seed))
    other = (PUBLISHED_BATCH, PUBLISHED_WORKERS) if cuda else (config.batch, config.workers)
    rates = measure_rates(device, "bf16" if cuda else "float32")

    torch.manual_seed(config.seed)
    planner = DiffusionDrive(config.model, anchors).to(device).train()
    warm_up = settled(config.warm_up, other[1])
    published = Published(planner, caches.pickles, *other, warm_up + config.steps, device)
    base = published.run(warm_up, config.steps)
    rows = {PUBLISHED: base.row(flops) | {"times": 1.0}}
    del published, planner

    planner = DiffusionDrive(config.model, anchors).to(device).train()
    lay_out_for(planner, device)
    warm_up = settled(config.warm_up, config.workers)
    total = warm_up + config.steps
    module = PlannerModule(
        planner, caches.packed.features, LossConfig(), OptimizerConfig(), total, total, config.seed, compiled=compiled
    ).to(device)
    speeds: dict[int, float] = {}
    for batch in config.batches or [config.batch]:
        loop = Ours(module, caches.packed, batch, config.workers, total + PROFILED, device)
        try:
            timing = loop.run(warm_up, config.steps)
        except torch.cuda.OutOfMemoryError:
            print(f"batch {batch}: out of memory", file=sys.stderr)
            continue
        speeds[batch] = timing.samples_per_s
        rows[f"{OURS}, batch {batch}"] = timing.row(flops) | {"times": timing.samples_per_s / base.samples_per_s}
        print(f"batch {batch}: {timing.samples_per_s:.0f} samples/s", file=sys.stderr)
        if config.profile:
            write_profile(loop, Path(config.profile), batch)
    del loop
    if not speeds:
        raise UserError(f"batches: none of {config.batches or [config.batch]} fits into the device's memory")
    best = max(speeds, key=speeds.get)
    trainer = {}
    if config.lightning:
        watched = measure_trainer(module, caches.packed, best, config.workers, warm_up, config.steps, folder / "run")
        trainer = {"trainer": watched | {"times": watched["samples/s"] / base.samples_per_s}}
    return {
        "device": str(device), "threads": torch.get_num_threads(), "workers": config.workers, "compiled": compiled,
        "arithmetic": {OURS: "bf16", PUBLISHED: "fp16"} if cuda else "float32",
        "gflop_a_sample": flops / 1e9, "matrix_tflop_s": rates.flops / 1e12, "copy_gb_s": rates.bytes / 1e9,
        "share_of_matrix_rate": flops * speeds[best] / rates.flops, **trainer, "rows": rows,
    }  # fmt: skip


def write_profile(loop: Ours, path: Path, batch: int) -> None:
    """The operations and kernels that a few more steps spend most time in."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if loop.cuda else [])]
    torch.backends.cudnn.benchmark = loop.benchmark
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(PROFILED):
            loop.step()
    key = "self_device_time_total" if loop.cuda else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90)
    atomic_write(path.with_stem(f"{path.stem}_{batch}"), table + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(main, ThroughputConfig, "benchmark_training_throughput", __doc__))
