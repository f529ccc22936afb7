"""The whole story in one go: what `make demo` runs, as the commands that a user would type.

Each step is one of the tools in a process of its own; its output goes to a log and, where it is a table, to the
terminal. Finished steps are remembered, so an interrupted demo continues where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from navsim_eval.config import DataConfig
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.executor import usable_cores
from navsim_eval.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
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
    epochs: int = 16
    seed: int = 0
    fresh: bool = False


@dataclass(frozen=True)
class Step:
    """One command of the demo. show: its output belongs on the terminal, not only in the log."""

    name: str
    title: str
    command: tuple[str, ...]
    show: bool = False


def steps(config: DemoConfig) -> list[Step]:
    """All commands, in order."""
    out = Path(config.output_dir)
    cache, planner, mlp = out / "cache", out / "train" / "planner", out / "ego_mlp"
    where = (f"data.root={config.data.root}", f"data.maps={config.data.maps}")
    planners = [*BASELINES, str(mlp), str(planner)]
    if (Path(config.checkpoint) / "model.safetensors").is_file():
        planners.append(config.checkpoint)
    features = ("kind=features", "features=city_nano", f"output_dir={cache}")

    def tool(name: str, *arguments: str) -> tuple[str, ...]:
        return (f"tools/{name}.py", *where, *arguments)

    city = tool(
        "make_city", f"city.scenes={config.scenes}", f"city.width={config.width}", f"city.seed={config.seed}"
    )
    metrics = ("kind=metrics", f"output_dir={cache}")
    train = tool(
        "train",
        f"cache={cache / 'train' / 'features'}",
        f"val_cache={cache / 'val' / 'features'}",
        f"metrics={cache / 'train' / 'pdms_v1'}",
        f"val_metrics={cache / 'val' / 'pdms_v1'}",
        f"anchors={out / 'anchors' / 'anchors.npy'}",
        f"trainer.epochs={config.epochs}",
        "trainer.validate_every_epochs=4",
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
        "benchmark_fps", f"planner={planner}", "split=test", "iterations=200", f"output={out / 'latency.json'}"
    )
    return [
        Step("doctor", "check the machine", tool("doctor"), show=True),
        Step("city", "make the synthetic city", city),
        Step("features_train", "cache training features", tool("cache", "split=train", *features)),
        Step("features_val", "cache validation features", tool("cache", "split=val", *features)),
        Step("metrics_train", "cache what scoring the training scenes needs", tool("cache", "split=train", *metrics)),
        Step("metrics_val", "the same for the validation scenes", tool("cache", "split=val", *metrics)),
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
    done = _finished(out / "steps.json", config)
    started = time.monotonic()
    plan = steps(config)
    for number, step in enumerate(plan, 1):
        if step.name in done["seconds"]:
            say(f"[{number}/{len(plan)}] {step.title}: done before")
            continue
        say(f"[{number}/{len(plan)}] {step.title}\n    python {' '.join(step.command)}")
        begun = time.monotonic()
        _run(step, out / "logs" / f"{step.name}.log")
        done["seconds"][step.name] = round(time.monotonic() - begun, 1)
        atomic_write(out / "steps.json", json.dumps(done, indent=2) + "\n")
        say(f"    {done['seconds'][step.name]:.0f} s")
    done["total_seconds"] = round(sum(done["seconds"].values()), 1)
    atomic_write(out / "steps.json", json.dumps(done, indent=2) + "\n")
    atomic_write(out / "result.json", json.dumps(collect(out, done), indent=2) + "\n")
    say(f"demo finished: {done['total_seconds']:.0f} s in all steps, {time.monotonic() - started:.0f} s now")
    say(f"report: {out / 'evaluation' / 'report.html'}")
    return done


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


def _finished(path: Path, config: DemoConfig) -> dict[str, Any]:
    """Steps that an earlier demo with the same settings finished."""
    settings = {name: getattr(config, name) for name in ("scenes", "width", "epochs", "seed")}
    settings["root"] = config.data.root
    fresh = {"settings": settings, "seconds": {}}
    if config.fresh or not path.is_file():
        return fresh
    before = json.loads(path.read_text())
    return before if before.get("settings") == settings else fresh


def _run(step: Step, log: Path) -> None:
    """Run a step; tables (and progress bars, on a terminal) pass through, everything else is kept in the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread a process: the steps use several processes, and threads that wait for each other slow both down.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / step.command[0]), *step.command[1:]], env=environment, text=True,
            stdout=subprocess.PIPE if step.show else file, stderr=None if sys.stderr.isatty() else file,
        )  # fmt: skip
        for line in process.stdout or ():
            print("    " + line, end="", flush=True)
            file.write(line)
        status = process.wait()
    if status:
        raise UserError(f"{step.title} failed (status {status}): {_last_line(log)}; log: {log}; run it alone: "
                        f"python {' '.join(step.command)}")  # fmt: skip


def _last_line(log: Path) -> str:
    lines: Sequence[str] = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
