"""What lower precision does to plans: metres, chosen mode and PDMS against float32, over the scenes of a split.

    python benchmarks/precision_drift.py planner=checkpoints/city_nano data.root=data/city split=train
    python benchmarks/precision_drift.py precisions=[tf32,bf16,fp16] backend=cudagraph device=cuda

Same scenes, same noise. Per precision: distance of the chosen plan from float32's (largest over its poses; p50, p99,
max over the scenes), share of scenes with the same mode chosen, and both PDMS. Writes JSON with the environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from diffusiondrive.features import FeatureConfig, compact_features, to_float
from diffusiondrive.noise import scene_noise
from diffusiondrive.runtime import Runtime
from diffusiondrive.runtime.benchmark import load
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.evaluate import score_predictions
from navsim_eval.files import atomic_write
from navsim_eval.infer import infer
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.planners import Plans
from navsim_eval.predictions import Predictions
from navsim_eval.scene import Scene

BASE = "float32"


@dataclass
class PrecisionDriftConfig:
    """max_scenes: of the split (0: all);  metric_cache: folder of metric caches, empty: built for this run;
    pdms: also score, with `workers` processes."""

    data: DataConfig = field(default_factory=DataConfig)
    planner: str = "checkpoints/city_nano"
    precisions: list[str] = field(default_factory=lambda: ["bf16", "fp16"])
    backend: str = "eager"
    device: str = "auto"
    split: str = "train"
    max_scenes: int = 500
    pdms: bool = True
    metric_cache: str = ""
    workers: int = 1
    threads: int = 2
    seed: int = 0
    output: str = "benchmarks/results/precision_drift.json"


class RuntimePlanner:
    """A runtime as the evaluator's planner, one scene a call.

    read: compact features by token, which the runs of all precisions share, so that sensors are decoded once
    """

    def __init__(self, runtime: Runtime, seed: int, read: dict[str, dict[str, np.ndarray]]):
        self.runtime, self.seed, self.name, self.read = runtime, seed, runtime.precision, read
        self.features = FeatureConfig.for_planner(runtime.config)

    def plan(self, scenes: Sequence[Scene]) -> Plans:
        plans = [self._plan(scene) for scene in scenes]
        return Plans(*(np.concatenate(part) for part in zip(*plans, strict=True)))

    def describe(self) -> dict[str, Any]:
        return {"kind": "runtime", "precision": self.runtime.precision}

    def _plan(self, scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if scene.token not in self.read:
            self.read[scene.token] = compact_features(scene, self.features)
        features = to_float(self.read[scene.token], self.features)
        noise = scene_noise([scene.token], self.seed, self.runtime.noise_shape)
        plan = self.runtime.plan({name: array[None] for name, array in features.items()}, noise)
        return plan.trajectory.numpy(), plan.candidates.numpy(), plan.logits.numpy()


def main(config: PrecisionDriftConfig) -> None:
    torch.set_num_threads(config.threads)
    planner = load(config.planner, config.seed)
    dataset = SceneDataset.from_config(config.data, config.split, max_scenes=config.max_scenes or None)
    made: dict[str, Predictions] = {}
    read: dict[str, dict[str, np.ndarray]] = {}
    for precision in dict.fromkeys([BASE, *config.precisions]):
        runtime = Runtime(planner, precision, config.backend, config.device)
        with tqdm(total=len(dataset), desc=precision) as bar:
            made[precision] = infer(RuntimePlanner(runtime, config.seed, read), dataset, 1, config.seed, bar.update)
    scores = score(config, dataset, list(made.values())) if config.pdms else [None] * len(made)
    rows = {
        name: drift(made[BASE], predictions) | {"pdms": pdms}
        for (name, predictions), pdms in zip(made.items(), scores, strict=True)
    }
    if config.pdms:
        for row in rows.values():
            row["pdms_difference"] = row["pdms"] - rows[BASE]["pdms"]
    result = {
        "planner": config.planner,
        "split": config.split,
        "scenes": len(dataset),
        "backend": config.backend,
        "device": str(runtime.device),
        "results": rows,
        "environment": describe_environment(),
    }
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    show(rows)
    print(f"written: {config.output}")


def drift(base: Predictions, other: Predictions) -> dict[str, Any]:
    """Distances [m] and headings [rad] of the chosen plans, over the scenes that both planned."""
    _, own, theirs = np.intersect1d(other.tokens, base.tokens, return_indices=True)
    moved = other.trajectories[own] - base.trajectories[theirs]
    metres = np.linalg.norm(moved[..., :2], axis=-1).max(-1)
    same = other.logits[own].argmax(-1) == base.logits[theirs].argmax(-1)
    candidates = np.linalg.norm((other.candidates[own] - base.candidates[theirs])[..., :2], axis=-1)
    return {
        "scenes": len(own),
        "same_mode": float(same.mean()),
        "chosen_m_p50": float(np.percentile(metres, 50)),
        "chosen_m_p99": float(np.percentile(metres, 99)),
        "chosen_m_max": float(metres.max()),
        "same_mode_m_p99": float(np.percentile(metres[same], 99)) if same.any() else None,
        "any_candidate_m_max": float(candidates.max()),
        "heading_rad_p99": float(np.percentile(np.abs(moved[..., 2]).max(-1), 99)),
    }


def score(config: PrecisionDriftConfig, dataset: SceneDataset, made: list[Predictions]) -> list[float]:
    """PDMS [points of 100] of each."""
    with tempfile.TemporaryDirectory() as folder:
        caches = MetricCaches(config.data, dataset, "pdms_v1", config.metric_cache or folder)
        caches.build(config.workers)
        return [100 * float(r.means()["score"]) for r in score_predictions(made, caches, config.workers)]


def show(rows: dict[str, dict[str, Any]]) -> None:
    columns = list(next(iter(rows.values())))
    table = Table("precision", *columns)
    for name, row in rows.items():
        table.add_row(name, *("–" if row[c] is None else f"{row[c]:.4g}" for c in columns))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_tool(main, PrecisionDriftConfig, "benchmark_precision_drift", __doc__))
