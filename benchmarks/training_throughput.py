"""Samples a second that training is fed with, and can digest: the packed cache against pickles as published.

    python benchmarks/training_throughput.py data.root=data/city split=train
    python benchmarks/training_throughput.py data.root=data/city split=train model=diffusiondrive device=cuda batch=64

Loader: one process, one thread, full-size features (256×1024 camera, 256² LiDAR) of the same scenes, in the same
shuffled batches, files in the page cache. Four ways: our packed cache as training reads it (8 bits), the same and then
made float32 on this core, the packed cache with JPEG cameras, and the published layout (one gzip pickle of float32
tensors for the features and one for the targets of every scene, torch's own collation). The ways take turns; the first
reading of the packed cache compares checksums and is reported for itself. That all give the same numbers is asserted.

Step: one optimiser step of the planner `model`, fed from each cache of its own feature size, cut into data wait, copy
(to the device, and to float32), forward with losses, backward, optimiser. On CUDA ours runs in bf16 with channels-last
weights, pinned asynchronous copies and fused AdamW, the published equivalent in fp16 with loss scaling; on the CPU both
run in float32. Parts are timed with the device synchronised at every border; `samples/s` is measured without that.
"""

from __future__ import annotations

import gzip
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset, default_collate

from diffusiondrive.anchors import cluster_anchors, human_plans
from diffusiondrive.dataset import PlanningDataset, Sample, collate, to_model_input
from diffusiondrive.feature_cache import FeatureCache, FeatureCacheConfig, RawSamples, build_feature_cache
from diffusiondrive.features import FeatureConfig, to_float
from diffusiondrive.losses import planner_loss
from diffusiondrive.noise import training_draw
from diffusiondrive.planner import DiffusionDrive, PlannerConfig
from diffusiondrive.runtime.benchmark import resolve_device
from diffusiondrive.training.config import OptimizerConfig
from diffusiondrive.training.module import parameter_groups
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.formats.maps import MapStore

ROUNDS = 2  # turns of the two pipelines
PARTS = ("data wait", "copy", "forward", "backward", "optimiser")


@dataclass
class ThroughputConfig:
    """samples: scenes (the first of the split);  batch: of the loader and the step;  repeats: turns of every way.

    steps:   optimiser steps timed, after `warm_up` others;  0: no step
    workers: loader processes of the step (0: in this process);  device: of the step: auto, cpu, cuda
    threads: of torch in the step (0: all cores); the loader always has one
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: PlannerConfig = field(default_factory=PlannerConfig)
    split: str = "train"
    samples: int = 200
    batch: int = 16
    repeats: int = 5
    steps: int = 8
    warm_up: int = 2
    workers: int = 0
    device: str = "auto"
    threads: int = 0
    seed: int = 0
    output: str = "benchmarks/results/training_throughput.json"


def main(config: ThroughputConfig) -> None:
    scenes = SceneDataset.from_config(config.data, config.split, max_scenes=config.samples)
    result = {"split": config.split, "batch": config.batch, "environment": describe_environment()}
    with tempfile.TemporaryDirectory() as folder:
        caches = Caches.build(Path(folder) / "full", scenes, config, FeatureConfig())
        result["samples"] = len(caches.packed)
        result["loader"] = measure_loaders(caches, config)
        show(result["loader"], "loader, one core")
        if config.steps:
            features = FeatureConfig.for_planner(config.model)
            own = (
                caches
                if features == caches.packed.features
                else Caches.build(Path(folder) / "own", scenes, config, features)
            )
            result["step"] = measure_steps(own, scenes, config)
            show(result["step"]["rows"], f"step, {config.model.name} on {result['step']['device']}")
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    print(f"written: {config.output}")


def show(rows: dict[str, dict[str, float]], title: str) -> None:
    columns = list(next(iter(rows.values())))
    table = Table(title, *columns)
    for name, row in rows.items():
        table.add_row(
            name, *(f"{row[column]:.3g}" if row[column] < 1000 else f"{row[column]:.0f}" for column in columns)
        )
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


# --- the caches ------------------------------------------------------------------------------------------------------


@dataclass
class Caches:
    """The same scenes three times: packed without loss, packed with JPEG cameras, pickled as published."""

    packed: PlanningDataset
    jpeg: PlanningDataset
    pickles: PickleDataset
    megabytes: dict[str, float]

    @staticmethod
    def build(folder: Path, scenes: SceneDataset, config: ThroughputConfig, features: FeatureConfig) -> Caches:
        maps = MapStore(config.data.maps, config.data.map_version)
        for name, codec in (("packed", "lossless"), ("jpeg", "jpeg")):
            kind = FeatureCacheConfig(features=features, camera_codec=codec)
            raw = RawSamples(scenes, maps, kind.features, kind.targets)
            print(f"building: {build_feature_cache(folder / name, raw, config.split, kind)}", file=sys.stderr)
        packed = FeatureCache(folder / "packed")
        if len(packed) < config.batch:
            raise UserError(f"samples: {len(packed)} readable scenes are fewer than one batch of {config.batch}")
        pickles = PickleDataset.write(folder / "pickles", packed, scenes)
        megabytes = {
            name: sum(path.stat().st_size for path in (folder / name).rglob("*.*")) / len(packed) / 1e6
            for name in ("packed", "jpeg", "pickles")
        }
        jpeg = FeatureCache(folder / "jpeg")
        return Caches(PlanningDataset(packed), PlanningDataset(jpeg), pickles, megabytes)


class PickleDataset(Dataset):
    """The published training cache: <folder>/<log>/<token>/transfuser_{feature,target}.gz, each a gzip stream (level 1)
    of a pickled dict of tensors, camera and LiDAR as float32. Only files that this script wrote are unpickled."""

    def __init__(self, folders: list[Path]):
        self.folders = folders

    @classmethod
    def write(cls, folder: Path, cache: FeatureCache, scenes: SceneDataset) -> PickleDataset:
        folders = []
        for token in cache.tokens:
            features, targets = cache[token]
            folders.append(folder / scenes.log_of(token) / token)
            folders[-1].mkdir(parents=True)
            tensors = {name: torch.tensor(array) for name, array in to_float(features, cache.features).items()}
            cls._dump(folders[-1] / "transfuser_feature.gz", tensors)
            labels = {name: torch.tensor(array) for name, array in targets.items()}
            labels["bev_semantic_map"] = labels["bev_semantic_map"].float()
            cls._dump(folders[-1] / "transfuser_target.gz", labels)
        return cls(folders)

    @staticmethod
    def _dump(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        with gzip.open(path, "wb", compresslevel=1) as file:
            pickle.dump(tensors, file)

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> tuple[dict, dict, str]:
        parts = []
        for name in ("transfuser_feature", "transfuser_target"):
            with gzip.open(self.folders[index] / f"{name}.gz", "rb") as file:
                parts.append(pickle.load(file))
        return *parts, self.folders[index].name


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


def measure_steps(caches: Caches, scenes: SceneDataset, config: ThroughputConfig) -> dict[str, object]:
    """Milliseconds of each part of a step, and samples a second, for both pipelines."""
    device = resolve_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    anchors = torch.from_numpy(cluster_anchors(human_plans(scenes).trajectories, config.model.modes, config.seed))
    pipelines = {}
    for name, published in (("ours", False), ("published equivalent", True)):
        torch.manual_seed(config.seed)
        planner = DiffusionDrive(config.model, anchors).to(device).train()
        pipelines[name] = Step(planner, caches, published, device, config)
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(ROUNDS):
        for name, step in pipelines.items():
            parts[name] += step.run(split=True)
            if device.type == "cuda":  # what takes place when nobody waits at the borders
                seconds[name] += [sum(times.values()) for times in step.run(split=False)]
    rows = {}
    for name in pipelines:
        per_step = {part: statistics.median(times[part] for times in parts[name]) * 1e3 for part in PARTS}
        durations = seconds[name] or [sum(times.values()) for times in parts[name]]
        rows[name] = {
            "samples/s": config.batch / statistics.fmean(durations),
            **{f"{part} ms": value for part, value in per_step.items()},
            "data wait %": 100 * per_step["data wait"] / sum(per_step.values()),
        }
    arithmetic = {"ours": "bf16", "published equivalent": "fp16"} if device.type == "cuda" else "float32"
    return {"device": str(device), "threads": torch.get_num_threads(), "arithmetic": arithmetic, "rows": rows}


class Step:
    """A training loop reduced to what takes time. published: pickles, default collation, eager fp16 on CUDA."""

    def __init__(
        self, planner: DiffusionDrive, caches: Caches, published: bool, device: torch.device, config: ThroughputConfig
    ):
        self.planner, self.published, self.device, self.config = planner, published, device, config
        self.cuda, self.features = device.type == "cuda", caches.packed.features
        if self.cuda and not published:
            planner.to(memory_format=torch.channels_last)
        groups = parameter_groups(planner, OptimizerConfig())
        self.optimizer = torch.optim.AdamW(groups, fused=(self.cuda and not published) or None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.cuda and published)
        self.loader = DataLoader(
            caches.pickles if published else caches.packed,
            batch_size=config.batch,
            shuffle=True,
            generator=torch.Generator().manual_seed(config.seed),
            drop_last=True,
            collate_fn=default_collate if published else collate,
            num_workers=config.workers,
            pin_memory=self.cuda,
            persistent_workers=config.workers > 0,
        )

    def run(self, split: bool) -> list[dict[str, float]]:
        """Seconds of every part of `steps` steps, after `warm_up` others. split: synchronise at every border.

        Without that, the last part of the last step waits for the device, so that only sums mean something.
        """
        steps = []
        batches = self._batches()
        total = self.config.warm_up + self.config.steps
        for number in range(total):
            marks = [time.perf_counter()]

            def mark(marks: list[float] = marks, number: int = number) -> None:
                if self.cuda and (split or (number == total - 1 and len(marks) == len(PARTS))):
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())

            self._one(next(batches), mark)
            if number >= self.config.warm_up:
                ends = zip(PARTS, marks, marks[1:], strict=False)
                steps.append({part: end - begin for part, begin, end in ends})
            elif self.cuda:
                torch.cuda.synchronize()
        return steps

    def _batches(self) -> Iterator:
        while True:
            yield from self.loader

    def _one(self, batch: tuple, mark: Callable[[], None]) -> None:
        mark()  # the batch has just come
        features, targets, tokens = batch
        features, targets = (
            {n: v.to(self.device, non_blocking=True) for n, v in d.items()} for d in (features, targets)
        )
        noise, levels = training_draw(
            tokens, self.config.seed, self.planner.noise_shape, self.planner.config.schedule.train_levels
        )
        noise, levels = noise.to(self.device), levels.to(self.device)
        features = to_model_input(features, self.features)  # float features of the published pipeline pass through
        mark()
        half = torch.float16 if self.published else torch.bfloat16
        with torch.autocast(self.device.type, half, enabled=self.cuda):
            outputs = self.planner.training_outputs(features, noise, levels)
            loss = planner_loss(outputs, targets)["loss"]
        mark()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        mark()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        mark()


if __name__ == "__main__":
    sys.exit(run_tool(main, ThroughputConfig, "benchmark_training_throughput", __doc__))
