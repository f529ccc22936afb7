"""How long a plan takes: latency percentiles by stage and end to end, from encoded sensors to poses in host memory.

One frame at a time, real encoded frames in rotation, after a warm-up. The plain published computation (same weights,
eager, float32) may be timed frame by frame beside the runtime, so that a claim is a ratio of one run. The protocol is
in docs/real_time.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusiondrive.noise import scene_noise
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.device import float32_rule, resolve_device
from diffusiondrive.runtime.latency_figure import draw_latency
from diffusiondrive.runtime.latency_report import columns, compare, summarise
from diffusiondrive.runtime.machine import machine_state, memory_use
from diffusiondrive.runtime.observation import Observation, read_observation
from diffusiondrive.runtime.pipeline import SensorPlanner
from diffusiondrive.runtime.program import PlainProgram, PlanProgram, ReferenceProgram
from diffusiondrive.runtime.roofline import count_stages, measure_rates, roofline
from diffusiondrive.runtime.runtime import Runtime
from diffusiondrive.runtime.sensors import SensorConfig
from diffusiondrive.runtime.stages import REST, STAGES, StageClock, marked
from diffusiondrive.variants import planner_config
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write

_CUT = (PlanProgram, ReferenceProgram, PlainProgram)  # programs with seams
GPU_ITERATIONS, LEAST_ITERATIONS = 1000, 50
GPU_TURN = 50  # plans in a row; one of each in turn would empty caches between plans that are a millisecond long


@dataclass
class BenchmarkConfig:
    """What is timed.

    planner:    folder or file of a checkpoint; "random:NAME" times a named variant with random weights (same speed)
    backend, precision, device: of the runtime; see `Runtime`
    reference_path: also time the plain published computation (eager, float32), taking turns with the runtime
    split:      frames come from this split, in rotation; its sensor files must exist;  frames: how many different ones
    iterations: timed plans, after `warmup` untimed ones. 0: 1,000 on a GPU; on a CPU what fits into `seconds`, at least
        50 and at most 1,000
    threads:    CPU threads of torch (0: torch's own choice)
    stages:     cut the eager backend (and the reference) at their seams; off, only whole plans are timed
    overlap:    also measure throughput with frame n + 1 prepared while frame n is planned
    roofline:   count operations and bytes of each stage, and measure the rates that they are held against
    output:     JSON; a figure of the same name is written beside it (.png)
    """

    data: DataConfig = field(default_factory=DataConfig)
    planner: str = "random:diffusiondrive"
    backend: str = "eager"
    precision: str = "float32"
    device: str = "auto"
    reference_path: bool = False
    sensors: SensorConfig = field(default_factory=SensorConfig)
    split: str = "test"
    frames: int = 32
    iterations: int = 0
    seconds: float = 60.0
    warmup: int = 10
    threads: int = 0
    stages: bool = True
    overlap: bool = True
    roofline: bool = False
    seed: int = 0
    output: str = "outputs/benchmark_fps.json"

    def __post_init__(self) -> None:
        for name in ("frames", "warmup"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.iterations < 0 or not self.seconds > 0:
            raise UserError("iterations must not be negative, seconds must be positive")


@dataclass
class Subject:
    """A runtime under the clock. `cut`: the eager program whose seams are marked, or None."""

    runtime: Runtime
    cut: torch.nn.Module | None
    rows: list[dict[str, float]] = field(default_factory=list)

    def plan(self, features: dict[str, torch.Tensor], noise: torch.Tensor, keep: bool) -> None:
        """Time one plan, features on the device to plan in host memory, wall clock; its stages where there are seams.

        On a GPU the stages come from CUDA events; `device ms` is the span between the first and the last of them.
        """
        clock = StageClock(self.runtime.device)
        started = time.perf_counter()
        if self.cut is None:
            self.runtime.plan(features, noise)
        else:
            with marked(self.cut, clock.stop):
                self.runtime.plan(features, noise)
        clock.stop(REST)
        wall = 1e3 * (time.perf_counter() - started)
        spans = clock.milliseconds()
        row = {"model": wall} | (spans if self.cut is not None else {})
        if self.runtime.device.type == "cuda":
            row["device"] = sum(spans.values())
        if keep:
            self.rows.append(row)


def benchmark(config: BenchmarkConfig, progress: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Time plans of single scenes; writes and returns the result.

    Result: `end_to_end_ms` (encoded sensors to plan, both in host memory), `model_ms` (features to plan), `stages_ms`,
    each with mean, p50, p90, p99, max; `fps` = 1000 / end-to-end p50; `reference` likewise and `speedup` where asked
    for; machine before and after, memory, configuration, environment. Raises UserError without usable frames.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    module = load(config.planner, config.seed)
    subject = _subject(Runtime(module, config.precision, config.backend, device), config.stages)
    planner = SensorPlanner(subject.runtime, config.sensors)
    reference = _subject(Runtime(module, backend="reference", device=device), True) if config.reference_path else None
    observations = usable_observations(config, planner)
    before = machine_state()
    subject.runtime.warm_up()
    iterations = config.iterations or default_iterations(config, planner, reference, observations[0])
    sensor_rows, span = measure(config, planner, subject, reference, observations, iterations, progress)
    result: dict[str, Any] = summarise(sensor_rows, subject.rows)
    if reference is not None:
        result["reference"] = compare(sensor_rows, reference.rows, result)
    if config.overlap:
        result["overlapped_fps"] = overlapped_fps(planner, observations, min(iterations, 200))
    if config.backend == "fused" and config.stages:
        result["stages_captured_alone_ms"] = captured_stages(planner)
    if config.roofline:
        alone = result.get("stages_captured_alone_ms")
        result["roofline"] = measure_roofline(config, planner, module, observations[0], alone)
    result |= {
        "planner": config.planner,
        "parameters": sum(p.numel() for p in module.parameters()),
        "backend": config.backend,
        "precision": config.precision,
        "decode": config.sensors.decode,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch": 1,
        "frames_in_rotation": len(observations),
        "encoded_bytes": int(np.mean([sum(map(len, o.cameras)) + len(o.cloud) for o in observations])),
        "iterations": iterations,
        "warmup": config.warmup,
        "startup_s": round(subject.runtime.startup_s, 3),
        "measured_for_s": round(span, 1),
        "memory": memory_use(device),
        "machine_before": before,
        "machine_after": machine_state(),
        "environment": describe_environment(),
    }
    atomic_write(Path(config.output), json.dumps(result, indent=2) + "\n")
    draw_latency(result, _samples(sensor_rows, subject, reference), Path(config.output).with_suffix(".png"))
    return result


def measure(
    config: BenchmarkConfig,
    planner: SensorPlanner,
    subject: Subject,
    reference: Subject | None,
    observations: Sequence[Observation],
    iterations: int,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[list[dict[str, float]], float]:
    """Times of sensors, for each timed frame, and the seconds that it took. Plans' times are left in the subjects.

    Runtime and reference take turns: plan by plan on a CPU, `GPU_TURN` plans on a GPU.
    """
    noise = scene_noise([o.token for o in observations], config.seed, planner.runtime.noise_shape)
    rows: list[dict[str, float]] = []
    total = config.warmup + iterations
    turn = GPU_TURN if planner.runtime.device.type == "cuda" else 1
    started = time.perf_counter()
    for first in range(0, total, turn):
        numbers = range(first, min(first + turn, total))
        for number in numbers:
            index = number % len(observations)
            features, times = timed_sensors(planner, observations[index])
            subject.plan(features, noise[index : index + 1], number >= config.warmup)
            rows += [times] if number >= config.warmup else []
            progress(1)
        for number in numbers if reference else ():
            index = number % len(observations)
            features, _ = timed_sensors(planner, observations[index])
            reference.plan(features, noise[index : index + 1], number >= config.warmup)
    return rows, time.perf_counter() - started


def timed_sensors(planner: SensorPlanner, observation: Observation) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Features on the device, finished, and the wall milliseconds of `decode` and `features`."""
    device = planner.runtime.device
    marks = [time.perf_counter()]
    decoded = planner.sensors.decode(observation)
    marks.append(time.perf_counter())
    features = planner.sensors.features(decoded, observation.status)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    marks.append(time.perf_counter())
    return features, {"decode": 1e3 * (marks[1] - marks[0]), "features": 1e3 * (marks[2] - marks[1])}


def default_iterations(
    config: BenchmarkConfig, planner: SensorPlanner, reference: Subject | None, observation: Observation
) -> int:
    """1,000 on a GPU; on a CPU as many as `seconds` allow, judged by one frame."""
    if planner.runtime.device.type == "cuda":
        return GPU_ITERATIONS
    started = time.perf_counter()
    features = planner.prepare(observation)
    for runtime in (planner.runtime, *([reference.runtime] if reference else [])):
        runtime.plan(features)
    return int(np.clip(config.seconds / (time.perf_counter() - started), LEAST_ITERATIONS, GPU_ITERATIONS))


def overlapped_fps(planner: SensorPlanner, observations: Sequence[Observation], plans: int) -> float:
    """Plans a second when the next frame's sensors are processed while one is planned."""
    source = (observations[number % len(observations)] for number in range(plans + 3))
    frames = planner.stream(source)
    for _ in islice(frames, 3):
        pass
    started = time.perf_counter()
    count = sum(1 for _ in frames)
    return round(count / (time.perf_counter() - started), 2)


def captured_stages(planner: SensorPlanner) -> dict[str, dict[str, float]]:
    """Milliseconds of each stage of the fused program, captured alone."""
    from diffusiondrive.runtime.captured_stages import stage_latencies  # needs Triton, as the backend does

    backend = planner.runtime.backend
    with float32_rule(planner.runtime.precision):
        return stage_latencies(backend.kept, backend.static)


def measure_roofline(
    config: BenchmarkConfig,
    planner: SensorPlanner,
    module: DiffusionDrive,
    observation: Observation,
    alone: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """The rewritten program's operations and bytes against rates of this machine.

    Its stages are timed here again, operation by operation; or `alone` has what they take in the fused program.
    """
    eager = _subject(Runtime(module, config.precision, "eager", planner.runtime.device), True)
    features = planner.prepare(observation)
    noise = module.default_noise.cpu()[None].reshape(1, *planner.runtime.noise_shape)
    for number in range(25):
        eager.plan(features, noise, keep=number >= 5)
    measured = {name: float(np.median([row[name] for row in eager.rows])) for name in STAGES}
    if alone:
        measured = {name: alone[name]["p50"] if name in alone else 0.0 for name in STAGES}
    inputs = tuple(x.to(planner.runtime.device) for x in (*features.values(), noise))
    with float32_rule(config.precision):
        stages = count_stages(eager.cut, inputs)
    return roofline(stages, measure_rates(planner.runtime.device, config.precision), measured)


# --- subjects --------------------------------------------------------------------------------------------------------


def _samples(
    sensors: Sequence[dict[str, float]], subject: Subject, reference: Subject | None
) -> dict[str, dict[str, np.ndarray]]:
    """Single latencies for the figure: {runtime, reference} → {model, end to end}."""
    before = sum(columns(sensors).values())
    subjects = {"runtime": subject} | ({"reference": reference} if reference else {})
    models = {name: columns(one.rows)["model"] for name, one in subjects.items()}
    return {name: {"model": model, "end to end": before + model} for name, model in models.items()}


def load(name: str, seed: int) -> DiffusionDrive:
    """A checkpoint, or `random:VARIANT`: a named variant with random weights and straight anchors."""
    if not name.startswith("random:"):
        return DiffusionDrive.from_pretrained(name)
    config = planner_config(name.removeprefix("random:"))
    config.backbone.image_weights = "none"
    torch.manual_seed(seed)
    if not config.anchored:
        return DiffusionDrive(config)
    seconds = torch.arange(1, config.poses + 1) / 2
    speeds = torch.linspace(0.5, 12.0, config.modes)
    anchors = torch.stack([speeds[:, None] * seconds, torch.zeros(config.modes, config.poses)], dim=-1)
    return DiffusionDrive(config, anchors)


def usable_observations(config: BenchmarkConfig, planner: SensorPlanner) -> list[Observation]:
    """Up to `config.frames` scenes whose sensors can be read, as bytes in memory."""
    found: list[Observation] = []
    first_problem = ""
    for scene in SceneDataset.from_config(config.data, config.split):
        try:
            observation = read_observation(scene)
            planner.prepare(observation)
            found.append(observation)
        except (UserError, OSError) as error:
            first_problem = first_problem or str(error)
        if len(found) == config.frames:
            break
    if not found:
        raise UserError(f"split {config.split}: no scene has readable sensors; first problem: {first_problem}")
    return found


def _subject(runtime: Runtime, cut: bool) -> Subject:
    program = getattr(runtime.backend, "program", None)
    return Subject(runtime, program if cut and isinstance(program, _CUT) else None)
