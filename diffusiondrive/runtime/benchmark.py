"""How long a plan takes: latency percentiles by stage and end to end, from encoded sensors to poses in host memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from diffusiondrive.features import FeatureConfig
from diffusiondrive.noise import scene_noise
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.device import resolve_device
from diffusiondrive.runtime.stages import planner_stages, sensor_stages
from diffusiondrive.variants import planner_config
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.scene import Scene

PERCENTILES = (50, 90, 99)
MODEL_STAGES = ("backbone", "prepare", "pass", "select")
HEAD_STAGES = ("prepare", "pass", "select")


@dataclass
class BenchmarkConfig:
    """What is timed.

    planner:    folder or file of a checkpoint; "random:NAME" times a named variant with random weights (same speed)
    split:      frames come from this split, in rotation; its sensor files must exist
    frames:     how many different frames are in the rotation
    iterations: timed plans, after `warmup` untimed ones
    device:     auto, cpu, cuda, cuda:1, …;  precision: float32, tf32, bf16, fp16 (autocast)
    threads:    CPU threads of torch (0: torch's own choice)
    """

    data: DataConfig = field(default_factory=DataConfig)
    planner: str = "random:diffusiondrive"
    split: str = "test"
    frames: int = 32
    iterations: int = 200
    warmup: int = 10
    device: str = "auto"
    precision: str = "float32"
    threads: int = 0
    seed: int = 0
    output: str = "outputs/benchmark_fps.json"


def benchmark(config: BenchmarkConfig, progress: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Time `config.iterations` plans, one scene each; writes and returns the result.

    Result: `stages_ms`, `model_ms` (backbone to chosen trajectory), `head_ms`, `end_to_end_ms`: each with mean, p50,
    p90, p99, max; `fps` = 1000 / end-to-end p50; configuration and environment. Raises UserError without usable frames.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    planner = load(config.planner, config.seed).to(device).eval()
    features = FeatureConfig.for_planner(planner.config)
    scenes = usable_scenes(config, features)
    noise = scene_noise([scene.token for scene in scenes], config.seed, planner.noise_shape).to(device)
    rows: list[dict[str, float]] = []
    with precision_context(config.precision, device):
        for number in range(config.warmup + config.iterations):
            index = number % len(scenes)
            inputs, times = sensor_stages(scenes[index], features)
            _, planner_times = planner_stages(planner, inputs, noise[index : index + 1], device)
            if number >= config.warmup:
                rows.append(times | planner_times)
            progress(1)
    result = summarise(rows) | {
        "planner": config.planner,
        "parameters": sum(p.numel() for p in planner.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": config.precision,
        "batch": 1,
        "frames_in_rotation": len(scenes),
        "iterations": config.iterations,
        "warmup": config.warmup,
        "environment": describe_environment(),
    }
    atomic_write(Path(config.output), json.dumps(result, indent=2) + "\n")
    return result


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Statistics of each stage and of the sums that people quote."""
    stages = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    model = sum(v for name, v in stages.items() if name.split()[0] in MODEL_STAGES)
    head = sum(v for name, v in stages.items() if name.split()[0] in HEAD_STAGES)
    total = sum(stages.values())
    return {
        "fps": float(1e3 / np.percentile(total, 50)),
        "model_fps": float(1e3 / np.percentile(model, 50)),
        "end_to_end_ms": statistics(total),
        "model_ms": statistics(model),
        "head_ms": statistics(head),
        "stages_ms": {name: statistics(values) for name, values in stages.items()},
    }


def statistics(values: np.ndarray) -> dict[str, float]:
    """Mean, percentiles and maximum, in the unit of the values."""
    numbers = {"mean": values.mean(), **{f"p{p}": np.percentile(values, p) for p in PERCENTILES}, "max": values.max()}
    return {name: round(float(value), 4) for name, value in numbers.items()}


def as_table(result: dict[str, Any]) -> Table:
    """The result as people read it: stages, then the sums."""
    title = f"{result['planner']} · {result['device']} · {result['precision']} · batch 1 · {result['threads']} threads"
    table = Table("stage", *(f"{name} [ms]" for name in ("p50", "p90", "p99", "max")), title=title)
    rows = {
        **result["stages_ms"],
        "plan head": result["head_ms"],
        "model": result["model_ms"],
        "end to end": result["end_to_end_ms"],
    }
    for name, numbers in rows.items():
        section = name == list(result["stages_ms"])[-1]
        cells = (f"{numbers[p]:.2f}" for p in ("p50", "p90", "p99", "max"))
        table.add_row(name, *cells, end_section=section)
    table.caption = f"{result['fps']:.1f} plans/s end to end, {result['model_fps']:.1f} plans/s for the model alone"
    return table


def load(name: str, seed: int) -> DiffusionDrive:
    """A checkpoint, or `random:VARIANT`: a named variant with random weights and straight anchors."""
    if not name.startswith("random:"):
        return DiffusionDrive.from_pretrained(name)
    config = planner_config(name.removeprefix("random:"))
    config.backbone.image_weights = "none"
    torch.manual_seed(seed)
    seconds = torch.arange(1, config.poses + 1) / 2
    speeds = torch.linspace(0.5, 12.0, config.modes)
    anchors = torch.stack([speeds[:, None] * seconds, torch.zeros(config.modes, config.poses)], dim=-1)
    return DiffusionDrive(config, anchors)


def usable_scenes(config: BenchmarkConfig, features: FeatureConfig) -> list[Scene]:
    """Up to `config.frames` scenes whose sensor files can be read."""
    scenes: list[Scene] = []
    first_problem = ""
    for scene in SceneDataset.from_config(config.data, config.split):
        try:
            sensor_stages(scene, features)
            scenes.append(scene)
        except (UserError, OSError) as error:
            first_problem = first_problem or str(error)
        if len(scenes) == config.frames:
            break
    if not scenes:
        raise UserError(f"split {config.split}: no scene has readable sensors; first problem: {first_problem}")
    return scenes


def precision_context(name: str, device: torch.device):
    """Autocast for bf16 and fp16; float32 and tf32 set the matrix-product rule. Raises UserError for other names."""
    if name in ("float32", "tf32"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        return torch.autocast(device.type, enabled=False)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in types:
        raise UserError(f"precision: '{name}' is none of float32, tf32, bf16, fp16")
    return torch.autocast(device.type, types[name])
