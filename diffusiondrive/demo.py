"""The whole story in one go: what `make demo` runs, as the commands that a user would type."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusiondrive.tool_steps import Step, StepRunner
from navsim_eval.config import DataConfig
from navsim_eval.environment import describe_environment
from navsim_eval.executor import usable_cores
from navsim_eval.files import atomic_write

RESULT_KEYS = ("planner", "metric", "split", "pdms", "verdict", "coverage", "means_over_scored")
BASELINES = ("human", "pdm_closed", "constant_velocity", "stationary")


@dataclass
class DemoConfig:
    """What the demo makes, trains and compares.

    scenes:      training scenes of the synthetic city (a fifth of that for the test city, a tenth for validation)
    width:       of the camera images [px]; the small planner sees a strip of 256, so small images cost it nothing
    epochs:      of the live training of the small planner
    checkpoint:  a finished planner that is evaluated beside the one trained live, where its folder exists
    fresh:       forget what an earlier demo finished
    """

    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = "outputs/demo"
    checkpoint: str = "checkpoints/city_nano"
    scenes: int = 600
    width: int = 480
    epochs: int = 8
    seed: int = 0
    fresh: bool = False


def steps(config: DemoConfig) -> list[Step]:
    """All commands, in order."""
    out = Path(config.output_dir)
    cache, planner, mlp = out / "cache", out / "train" / "planner", out / "ego_mlp"
    where = (f"data.root={config.data.root}", f"data.maps={config.data.maps}")
    planners = [*BASELINES, str(mlp), str(planner)]
    if (Path(config.checkpoint) / "model.safetensors").is_file():
        planners.append(config.checkpoint)
    caches = ("kind=both", "features=city_nano", f"output_dir={cache}")

    def tool(name: str, *arguments: str) -> tuple[str, ...]:
        return (f"tools/{name}.py", *where, *arguments)

    city = tool("make_city", f"city.scenes={config.scenes}", f"city.width={config.width}", f"city.seed={config.seed}")
    train = tool(
        "train",
        f"cache={cache / 'train' / 'features'}",
        f"val_cache={cache / 'val' / 'features'}",
        f"metrics={cache / 'train' / 'pdms_v1'}",
        f"val_metrics={cache / 'val' / 'pdms_v1'}",
        f"anchors={out / 'anchors' / 'anchors.npy'}",
        f"trainer.epochs={config.epochs}",
        "trainer.validate_every_epochs=2",
        f"output_dir={out / 'train'}",
        f"seed={config.seed}",
        *_processes(),
    )
    evaluate = tool(
        "evaluate",
        f"planner=[{','.join(planners)}]",
        "split=test",
        f"output_dir={out / 'evaluation'}",
        f"metric_cache={cache / 'test'}",
    )
    latency = tool(
        "benchmark_fps", f"planner={planner}", "split=test", "iterations=100", f"output={out / 'latency.json'}"
    )
    return [
        Step("doctor", "check the machine", tool("doctor"), show=True),
        Step("city", "make the synthetic city", city),
        Step("cache_train", "cache features and metrics of training scenes", tool("cache", "split=train", *caches)),
        Step("cache_val", "the same of the validation scenes", tool("cache", "split=val", *caches)),
        Step("anchors", "cluster anchors", tool("cluster_anchors", f"output_dir={out / 'anchors'}"), show=True),
        Step("ego_mlp", "train the blind baseline", tool("train_ego_mlp", f"output_dir={mlp}")),
        Step("train", "train the planner", train),
        Step("evaluate", "score all planners on the unseen test city", evaluate, show=True),
        Step("latency", "time the planner", latency, show=True),
    ]


def _processes() -> tuple[str, ...]:
    """Without a GPU, train in one process a core (at most two: the batch is small)."""
    import torch

    if torch.cuda.is_available() or usable_cores() < 2:
        return ()
    return ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp")


def run_demo(config: DemoConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run every step that is not finished yet; returns {"seconds": {step: s}, "total_seconds": s}.

    Raises UserError that names the failed command and its log.
    """
    out = Path(config.output_dir)
    settings = {name: getattr(config, name) for name in ("scenes", "width", "epochs", "seed")}
    runner = StepRunner(out, {**settings, "root": config.data.root}, config.fresh, say)
    started = time.monotonic()
    runner.run(steps(config))
    total = runner.total()
    atomic_write(out / "result.json", json.dumps(collect(out, runner.done), indent=2) + "\n")
    say(f"demo finished: {total:.0f} s in all steps, {time.monotonic() - started:.0f} s now")
    say(f"report: {out / 'evaluation' / 'report.html'}")
    return runner.done


def collect(out: Path, done: dict[str, Any]) -> dict[str, Any]:
    """The demo in one file: settings and seconds of the steps, means of every planner, latency, environment."""
    evaluation = out / "evaluation"
    runs = [json.loads(path.read_text()) for path in sorted(evaluation.glob("*/summary.json"))]
    latency = out / "latency.json"
    return {
        **done,
        "planners": [{key: run[key] for key in RESULT_KEYS if key in run} for run in runs],
        "latency": json.loads(latency.read_text()) if latency.is_file() else None,
        "environment": describe_environment(),
    }
