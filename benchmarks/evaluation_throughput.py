"""An evaluation of a split as large as navtest, 12,146 scenes: wall time by stage, memory over time, killed workers.

    python benchmarks/evaluation_throughput.py data.root=data/city data.maps=data/city/maps

The scenes are those of a small split, repeated: every copy of a log gets tokens and a name of its own and is written to
a temporary folder, so that nothing is shared between the copies and every scene is read, cached, planned and scored for
itself. Inference is that of a cheap planner; the trained one plans the scenes of the small split from its feature
cache, and its time is stated per scene. While metric caches are built and while scores are computed, one worker is
killed in the middle; each copy of a scene must get the score of its original all the same.

Memory is the resident size of the parent and of each worker, sampled every half second, and what of it is their own:
without pages of files, such as memory-mapped caches, which the system takes back when it needs them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from diffusiondrive.evaluation import make_planner
from diffusiondrive.feature_cache import FeatureCacheConfig, RawSamples, build_feature_cache
from diffusiondrive.features import FeatureConfig
from diffusiondrive.planner import DiffusionDrive
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.evaluate import EvaluateConfig, evaluate
from navsim_eval.executor import run_jobs, usable_cores
from navsim_eval.files import atomic_write
from navsim_eval.formats.logs import read_log, write_log
from navsim_eval.formats.map_store import MapStore
from navsim_eval.infer import infer

SPLIT = "repeated"
SAMPLE_S = 0.5
QUANTILES = (0.25, 0.5, 0.75, 1.0)


@dataclass
class ThroughputConfig:
    """split: whose scenes are repeated;  scenes: how many there shall be;  workers: 0 is one per core
    planner: cheap, plans all scenes;  trained: its time is taken on at most `trained_scenes`, empty leaves it out
    """

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "test"
    scenes: int = 12_146
    metric: list[str] = field(default_factory=lambda: ["pdms_v1", "epdms_v2"])
    planner: str = "constant_velocity"
    trained: str = "checkpoints/city_nano"
    trained_scenes: int = 120
    workers: int = 0
    output: str = "benchmarks/results/evaluation_throughput_2_cores.json"


def main(config: ThroughputConfig) -> None:
    workers = config.workers or usable_cores()
    originals = SceneDataset.from_config(config.data, config.split)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = time.perf_counter()
        copies = repeat_split(originals, root / "navsim_logs" / SPLIT, config.scenes, workers)
        print(f"{len(originals)} scenes of split {config.split}, {copies} times: {time.perf_counter() - started:.0f} s")
        watch = Watch()
        settings = EvaluateConfig(
            data=replace(config.data, root=str(root)), planner=config.planner, split=SPLIT, metric=config.metric,
            output_dir=str(root / "out"), max_scenes=config.scenes, workers=workers, report=False,
        )  # fmt: skip
        runs = evaluate(settings, make_planner, watch.stage)
        same = {run.results.metric: compare_copies(run.folder / "scores.csv", originals) for run in runs}
        summary = {run.results.metric: run.summary["verdict"] for run in runs}
        trained = time_trained(config, originals, root / "features") if config.trained else None
    result = {
        "scenes": config.scenes,
        "made of": f"{len(originals)} scenes of split {config.split}, repeated {copies} times",
        "workers": workers,
        "planner": config.planner,
        "stages": [stage.as_row() for stage in watch.stages],
        "verdict": summary,
        "copies scored as their original": same,
        "trained planner": trained,
        "memory over time [MB]": {stage.title: stage.series() for stage in watch.stages},
        "environment": describe_environment(),
    }
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"written: {config.output}")


# --- the repeated split ----------------------------------------------------------------------------------------------


def repeat_split(originals: SceneDataset, folder: Path, scenes: int, workers: int) -> int:
    """Write the logs of a data set under new tokens until there are `scenes`; returns how often (last time in part)."""
    copies = -(-scenes // len(originals))
    jobs = [(originals.logs / f"{name}.pkl", folder, copy) for copy in range(copies) for name in originals.log_names]
    outcomes = run_jobs(write_copy, tqdm(jobs, desc="copies of logs", unit="log"), workers=workers, chunk_size=16)
    for outcome in outcomes:
        if not outcome.ok:
            raise RuntimeError(outcome.error)
    return copies


def write_copy(job: tuple[Path, Path, int]) -> None:
    """One log with another name and other tokens. Names sort copy by copy."""
    source, folder, copy = job
    name = f"{copy:04d}-{source.stem}"
    frames = [replace(frame, log_name=name, token=token_of(frame.token, copy)) for frame in read_log(source)]
    write_log(folder / f"{name}.pkl", frames)


def token_of(token: str, copy: int) -> str:
    """Token of a frame in a copy; copy 0 keeps its own."""
    return hashlib.sha256(f"{token}/{copy}".encode()).hexdigest()[:16] if copy else token


def compare_copies(scores: Path, originals: SceneDataset) -> dict[str, int]:
    """How many copies have exactly the scores of their original, cell by cell."""
    with scores.open(newline="") as file:
        rows = {row["token"]: [row[name] for name in row if name not in ("", "token")] for row in csv.DictReader(file)}
    counts = {"compared": 0, "equal": 0}
    for token in originals.tokens:
        copy = 1
        while (other := rows.get(token_of(token, copy))) is not None:
            counts["compared"] += 1
            counts["equal"] += other == rows[token]
            copy += 1
    return counts


# --- time and memory by stage ----------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes of a process: resident, pages shared with others included, and those of it that belong to no file."""

    resident: int
    own: int


@dataclass
class Stage:
    """One stage: wall time, and memory [bytes] (see `Memory`) of the parent and of each worker over time."""

    title: str
    scenes: int
    done: int = 0
    seconds: float = 0.0
    killed: int = 0
    times: list[float] = field(default_factory=list)
    parent: list[Memory] = field(default_factory=list)
    workers: dict[int, list[tuple[float, Memory]]] = field(default_factory=lambda: defaultdict(list))

    def as_row(self) -> dict[str, Any]:
        largest = [size.resident for samples in self.workers.values() for _, size in samples]
        together, own = self._total().T
        return {
            "stage": self.title,
            "seconds": round(self.seconds, 1),
            "scenes a second": round(self.scenes / self.seconds, 1),
            "workers seen": len(self.workers),
            "workers killed": self.killed,
            "peak parent MB": round(max((size.resident for size in self.parent), default=0) / 1e6),
            "peak worker MB": round(max(largest, default=0) / 1e6),
            "all together MB at 1/4, 1/2, 3/4, end": [round(size / 1e6) for size in at_quantiles(together)],
            "of it their own": [round(size / 1e6) for size in at_quantiles(own)],
        }

    def _total(self) -> np.ndarray:
        """(n, 2) of parent and workers together."""
        total = np.array(self.parent, float).reshape(-1, 2)
        for samples in self.workers.values():
            for when, size in samples:
                total[np.searchsorted(self.times, when)] += size
        return total

    def series(self, points: int = 40) -> dict[str, list]:
        """At most so many samples: seconds since the stage began, parent, all together, and what is their own."""
        chosen = np.unique(np.linspace(0, len(self.times) - 1, min(points, len(self.times))).astype(int))
        total, own = self._total().T
        return {
            "seconds": [round(self.times[i] - self.times[0], 1) for i in chosen],
            "parent": [round(self.parent[i].resident / 1e6) for i in chosen],
            "all": [round(total[i] / 1e6) for i in chosen],
            "own": [round(own[i] / 1e6) for i in chosen],
        }


def at_quantiles(values: np.ndarray) -> list[float]:
    """Median over the tenth of a stage before each quantile."""
    tenth = max(len(values) // 10, 1)
    ends = [max(int(len(values) * quantile), tenth) for quantile in QUANTILES] if len(values) else []
    return [float(np.median(values[end - tenth : end])) for end in ends]


class Watch:
    """Takes the time of every stage of an evaluation, samples memory meanwhile, and kills a worker halfway."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A `navsim_eval.evaluate.Progress`."""
        stage = Stage(title, total)
        self.stages.append(stage)
        over = threading.Event()
        sampler = threading.Thread(target=sample, args=(stage, over), daemon=True)
        started = time.perf_counter()
        sampler.start()
        with tqdm(total=total, desc=title, unit="scene") as bar:

            def advance(done: int) -> None:
                bar.update(done)
                stage.done += done
                if not stage.killed and stage.done > total // 2 and (victims := alive_workers()):
                    os.kill(victims[0], signal.SIGKILL)
                    stage.killed += 1

            yield advance
        stage.seconds = time.perf_counter() - started
        over.set()
        sampler.join()


def sample(stage: Stage, over: threading.Event) -> None:
    while not over.wait(SAMPLE_S):
        now, parent = time.perf_counter(), memory_of(os.getpid())
        stage.times.append(now)
        stage.parent.append(parent)
        for pid in alive_workers():
            if (size := memory_of(pid)).resident:
                stage.workers[pid].append((now, size))


def alive_workers() -> list[int]:
    """Worker processes: children of the server that this process forks them from."""
    return [worker for child in children(os.getpid()) for worker in children(child)]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # gone meanwhile
        return []


def memory_of(pid: int) -> Memory:
    """Memory of a process; nothing when it is gone."""
    try:
        _, resident, of_files, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except (OSError, ValueError):
        return Memory(0, 0)
    page = os.sysconf("SC_PAGE_SIZE")
    return Memory(resident * page, (resident - of_files) * page)


# --- the trained planner ---------------------------------------------------------------------------------------------


def time_trained(config: ThroughputConfig, originals: SceneDataset, cache: Path) -> dict[str, float]:
    """Milliseconds a scene of the trained planner from its feature cache, on a bounded sample."""
    sample = originals.subset(tokens=originals.tokens[: config.trained_scenes])
    features = FeatureConfig.for_planner(DiffusionDrive.from_pretrained(config.trained).config)
    cached = FeatureCacheConfig(features=features, labels=False)
    samples = RawSamples(sample, MapStore(config.data.maps, config.data.map_version), features, labels=False)
    started = time.perf_counter()
    build_feature_cache(cache, samples, config.split, cached, workers=config.workers)
    building = time.perf_counter() - started
    settings = EvaluateConfig(data=config.data, planner=config.trained, split=config.split, cache=str(cache))
    planner = make_planner(config.trained, settings, lambda scene: None)
    infer(planner, sample.subset(tokens=sample.tokens[:16]), settings.batch_size, settings.seed)  # warm up
    started = time.perf_counter()
    infer(planner, sample, settings.batch_size, settings.seed)
    seconds = time.perf_counter() - started
    return {
        "planner": planner.name,
        "scenes": len(sample),
        "feature cache ms a scene": round(1e3 * building / len(sample), 1),
        "inference ms a scene": round(1e3 * seconds / len(sample), 1),
        f"minutes for {config.scenes} scenes at this rate": round(seconds / len(sample) * config.scenes / 60, 1),
    }


def show(result: dict[str, Any]) -> None:
    columns = list(result["stages"][0])
    table = Table(*columns, title=f"{result['scenes']} scenes ({result['made of']}), {result['workers']} workers")
    for row in result["stages"]:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=160).print(table)
    for name in ("verdict", "copies scored as their original", "trained planner"):
        print(f"{name}: {result[name]}")


if __name__ == "__main__":
    sys.exit(run_tool(main, ThroughputConfig, "benchmark_evaluation_throughput", __doc__))
