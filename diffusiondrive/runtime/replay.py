"""Replay recorded drives through the real-time loop, with faults where asked for, and report every tick.

Logs hold 2 Hz frames. "At 10 Hz" means that one recorded frame is presented every 100 ms: the loop's clock runs five
times as fast as the drive. Deadlines and jitter are real; plans are shifted by the recorded clock and odometry, so the
motion between two ticks is that of 0.5 s of driving, five times more than a car that really runs at 10 Hz would see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from diffusiondrive.features import CAMERAS
from diffusiondrive.runtime.device import resolve_device
from diffusiondrive.runtime.faults import FAULTS, Delivery, fault_schedule, faulty, inject
from diffusiondrive.runtime.health import HealthConfig
from diffusiondrive.runtime.loop import FRESH, SHIFTED, STOP, DriveLoop, LoopConfig, TickReport
from diffusiondrive.runtime.observation import Observation, read_observation
from diffusiondrive.runtime.pipeline import SensorPlanner
from diffusiondrive.runtime.runtime import Runtime
from diffusiondrive.runtime.sensors import SensorConfig
from diffusiondrive.runtime.worker import ThreadWorker, WallClock
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset, missing_sensor_files
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.formats.logs import read_log
from navsim_eval.scene import Scene

ALL = "all"
FUTURE_POSES = 8


@dataclass
class DriveLoopConfig:
    """What is replayed.

    planner:  checkpoint folder or .safetensors file;  backend, precision, device: see `Runtime`
    split:    drives come from its logs, whose frames need sensor files;  log: only this one
    ticks:    0: every frame once; more than there are: around again
    max_frames: held in memory at most (about 1.5 MB each)
    rate:     frames presented a second;  deadline_ms: after the frame, 0: the whole period
    faults:   names, or [all]; fault_share of the ticks in episodes of 1 … fault_ticks, decided by seed
    """

    data: DataConfig = field(default_factory=DataConfig)
    planner: str = "checkpoints/city_nano"
    backend: str = "eager"
    precision: str = "float32"
    device: str = "auto"
    split: str = "test"
    log: str = ""
    ticks: int = 0
    max_frames: int = 500
    rate: float = 10.0
    deadline_ms: float = 0.0
    max_age_s: float = 2.0
    deceleration: float = 3.0
    faults: list[str] = field(default_factory=list)
    fault_share: float = 0.3
    fault_ticks: int = 3
    seed: int = 0
    sensors: SensorConfig = field(default_factory=SensorConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    output: str = "outputs/drive_loop.json"

    def __post_init__(self) -> None:
        if not 0 <= self.fault_share < 1:
            raise UserError(f"fault_share: {self.fault_share} must lie in [0, 1)")
        if self.fault_ticks < 1 or self.ticks < 0 or self.max_frames < 1:
            raise UserError("fault_ticks and max_frames must be at least 1, ticks not negative")

    @property
    def loop(self) -> LoopConfig:
        return LoopConfig(self.rate, self.deadline_ms, self.max_age_s, self.deceleration)


@dataclass(frozen=True)
class RecordedFrame:
    """A frame of a log with its sensors in memory; `human` (8, 3) is where the car went, None at the log's end."""

    drive: str
    observation: Observation
    human: np.ndarray | None


def drive_loop(config: DriveLoopConfig, progress: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Replay, write the report (JSON) and return it. `progress` hears of every tick.

    Raises UserError without a frame whose sensors are there, and for an unknown fault.
    """
    loop_config = config.loop
    names = sorted(FAULTS) if ALL in config.faults else config.faults
    fault_schedule(1, names, config.fault_share, config.fault_ticks, config.seed)  # refuse unknown names early
    frames, missing = recorded_frames(config)
    ticks = config.ticks or len(frames)
    schedule = fault_schedule(ticks, names, config.fault_share, config.fault_ticks, config.seed)
    runtime = Runtime.from_pretrained(
        config.planner, precision=config.precision, backend=config.backend, device=resolve_device(config.device)
    )
    planner = SensorPlanner(runtime, config.sensors)
    runtime.warm_up()
    planner.plan(frames[0].observation)

    def plan(observation: Observation) -> np.ndarray:
        return planner.plan(observation).trajectory[0].numpy()

    clock = WallClock()
    deliveries = inject(presented(frames, ticks), schedule, config.seed)
    reports = []
    with ThreadWorker(faulty(plan, loop_config.period_s), clock) as worker:
        loop = DriveLoop(worker, clock, loop_config, config.health, runtime.config.poses)
        for report in loop.run(deliveries):
            reports.append(report)
            progress(1)
    human = {frame.observation.token: frame.human for frame in frames if frame.human is not None}
    result = summarise(reports, human, config.max_age_s) | {
        "planner": config.planner, "backend": config.backend, "precision": config.precision,
        "device": str(runtime.device), "split": config.split, "rate_hz": config.rate,
        "deadline_ms": 1e3 * loop_config.deadline_s, "seed": config.seed, "frames": len(frames),
        "frames_without_sensors": missing, "environment": describe_environment(),
        "tick_by_tick": [as_row(report) for report in reports],
    }  # fmt: skip
    atomic_write(Path(config.output), json.dumps(result, indent=1) + "\n")
    return result


def recorded_frames(config: DriveLoopConfig) -> tuple[list[RecordedFrame], int]:
    """Frames with sensors, in order, and the number of frames without, which are not presented.

    A drive is a run of consecutive frames; where sensors are missing in between, another one begins.
    """
    dataset = SceneDataset.from_config(config.data, config.split)
    logs = [config.log] if config.log else list(dataset.log_names)
    frames: list[RecordedFrame] = []
    missing = 0
    for name in logs:
        recorded = read_log(dataset.logs / f"{name}.pkl")
        run = before = 0
        for number in range(len(recorded)):
            future = recorded[number : number + 1 + FUTURE_POSES]
            scene = Scene(tuple(future), num_history=1, sensor_root=dataset.sensor_root)
            if missing_sensor_files(scene, CAMERAS, lidar=True):
                missing += 1
                continue
            run += number > before + 1
            before = number
            human = scene.human_trajectory(FUTURE_POSES) if len(future) > FUTURE_POSES else None
            frames.append(RecordedFrame(f"{name}/{run}", read_observation(scene), human))
            if len(frames) == config.max_frames:
                return frames, missing
    if not frames:
        raise UserError(f"split {config.split}: no frame of its logs has the three front cameras and the LiDAR on disk")
    return frames, missing


def presented(frames: list[RecordedFrame], ticks: int) -> Iterator[Delivery]:
    """`ticks` deliveries, around the frames as often as needed; every round is another drive."""
    for tick in range(ticks):
        frame, lap = frames[tick % len(frames)], tick // len(frames)
        yield Delivery(f"{frame.drive}#{lap}", frame.observation)


# --- the report ------------------------------------------------------------------------------------------------------


def summarise(reports: list[TickReport], human: dict[str, np.ndarray], max_age_s: float) -> dict[str, Any]:
    """Counts, jitter, latency, and what became of every kind of fault.

    `human_ade_m`: mean distance of the driven trajectories from where the recorded car went, by status.
    """
    statuses = (FRESH, SHIFTED, STOP)
    latency = [r.latency_ms for r in reports if r.status == FRESH]
    run = longest = 0
    for report in reports:
        run = 0 if report.status == FRESH else run + 1
        longest = max(longest, run)
    return {
        "ticks": len(reports),
        "status": {name: sum(r.status == name for r in reports) for name in statuses},
        "deadline_misses": sum(r.missed for r in reports),
        "misses_without_fault": sum(r.missed and not r.fault for r in reports),
        "longest_run_without_fresh_plan": longest,
        "not_finite_plans": sum(not np.isfinite(r.trajectory).all() for r in reports),
        "stale_plans": sum(r.status != STOP and not r.age_s <= max_age_s + 1e-6 for r in reports),
        "faults_unflagged": sum(bool(r.fault) and not (r.reasons or r.warnings) for r in reports),
        "jitter_ms": _spread([r.jitter_ms for r in reports]),
        "fresh_latency_ms": _spread(latency),
        "human_ade_m": {name: _ade([r for r in reports if r.status == name], human) for name in statuses},
        "faults": {
            name: {status: sum(r.fault == name and r.status == status for r in reports) for status in statuses}
            for name in sorted({r.fault for r in reports})
        },
    }


def as_row(report: TickReport) -> dict[str, Any]:
    """One tick for the JSON file."""
    row = {name: value for name, value in vars(report).items() if name != "trajectory"}
    row |= {"reasons": list(report.reasons), "warnings": list(report.warnings)}
    row["age_s"] = None if report.status == STOP else round(report.age_s, 3)
    return row | {name: round(row[name], 3) for name in ("jitter_ms", "latency_ms")}


def as_table(result: dict[str, Any]) -> Table:
    """The report as people read it: one line a kind of fault."""
    title = f"{result['planner']} · {result['device']} · {result['rate_hz']:g} Hz · {result['ticks']} ticks"
    table = Table("fault", "ticks", FRESH, SHIFTED, STOP, title=title)
    for name, counts in sorted(result["faults"].items()):
        table.add_row(name or "(none)", *(str(n) for n in (sum(counts.values()), *counts.values())))
    jitter, latency = result["jitter_ms"], result["fresh_latency_ms"]
    table.caption = (
        f"{result['deadline_misses']} deadline misses ({result['misses_without_fault']} without a fault), "
        f"jitter p50 {jitter['p50']:.2f} p99 {jitter['p99']:.2f} max {jitter['max']:.2f} ms, "
        f"tick to fresh plan p50 {latency['p50']:.1f} p99 {latency['p99']:.1f} ms; "
        f"{result['not_finite_plans']} plans not finite, {result['stale_plans']} stale, "
        f"{result['faults_unflagged']} faults unflagged"
    )
    return table


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {name: float("nan") for name in ("p50", "p90", "p99", "max")}
    numbers = dict(zip(("p50", "p90", "p99", "max"), np.percentile(values, [50, 90, 99, 100]), strict=True))
    return {name: round(float(value), 3) for name, value in numbers.items()}


def _ade(reports: list[TickReport], human: dict[str, np.ndarray]) -> float | None:
    distances = [
        np.linalg.norm(r.trajectory[:, :2] - human[r.token][:, :2], axis=-1).mean()
        for r in reports
        if r.token in human and len(r.trajectory) == len(human[r.token])
    ]
    return round(float(np.mean(distances)), 3) if distances else None
