"""The soft real-time loop: one plan at every tick, by its deadline, whatever sensors and computers do.

    tick ─ take the frame ─ checks ─ plan in a worker ─ by the deadline: fresh plan
                               └── refused, failed or late ────────────► previous plan, shifted     (flagged)
                                                                          └ none, or too old ─► stop (flagged)

The newest frame wins: while the planner is late with an old one, newer frames wait, and only the newest is planned.
Every tick leaves one report; nothing is dropped without a word. Two clocks: deadlines are kept on the loop's clock,
plans are shifted by the car's (`Observation.time_s`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from diffusiondrive.runtime.fallback import resample, shift_plan, stop_plan
from diffusiondrive.runtime.faults import Delivery
from diffusiondrive.runtime.health import HealthConfig, blocking_faults, odometry_between, plan_fault
from diffusiondrive.runtime.observation import Observation
from diffusiondrive.runtime.worker import Clock, Finished, Worker
from navsim_eval.errors import UserError
from navsim_eval.geometry import to_global, to_local
from navsim_eval.scene import FRAME_INTERVAL_S

FRESH, SHIFTED, STOP = "fresh", "shifted", "stop"


@dataclass
class LoopConfig:
    """When a plan is due, and what replaces it.

    rate_hz:       ticks a second
    deadline_ms:   after a tick, by which its plan must be there (0: the whole period)
    max_age_s:     a plan whose observation is older, on the car's clock, is not driven on: the car stops
    deceleration:  of a stop plan [m/s²]
    """

    rate_hz: float = 10.0
    deadline_ms: float = 0.0
    max_age_s: float = 2.0
    deceleration: float = 3.0

    def __post_init__(self) -> None:
        for name in ("rate_hz", "max_age_s", "deceleration"):
            if not getattr(self, name) > 0:
                raise UserError(f"loop.{name}: {getattr(self, name)} must be positive")
        if not 0 <= self.deadline_ms <= 1e3 / self.rate_hz:
            period = f"{1e3 / self.rate_hz:g} ms"
            raise UserError(f"loop.deadline_ms: {self.deadline_ms} lies outside the period of {period}")

    @property
    def period_s(self) -> float:
        return 1.0 / self.rate_hz

    @property
    def deadline_s(self) -> float:
        return self.deadline_ms * 1e-3 or self.period_s


@dataclass(frozen=True)
class TickReport:
    """What the car was given at one tick.

    status:      fresh, shifted or stop;  trajectory: (T, 3) x, y [m], heading [rad], present ego frame
    reasons:     why it is not fresh (empty if it is);  warnings: what was odd without preventing a fresh plan
    jitter_ms:   by how much the loop woke up late;  latency_ms: tick to published plan
    missed:      no fresh plan by the deadline because something was late
    age_s:       on the car's clock, of the observation behind the trajectory (NaN for a stop)
    fault:       the injected fault, or ""
    """

    tick: int
    drive: str
    token: str
    status: str
    trajectory: np.ndarray
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    jitter_ms: float
    latency_ms: float
    missed: bool
    age_s: float
    fault: str


@dataclass(frozen=True)
class _Base:
    """A good plan: made for pose `pose` of the dead-reckoned drive, at `time_s` on the car's clock."""

    trajectory: np.ndarray
    pose: np.ndarray
    time_s: float


@dataclass
class _Drive:
    """What is known of the car within one drive.

    pose, time_s, speed: at the present tick; the pose is dead-reckoned from the first tick's
    step_s:       between ticks, on the car's clock
    trusted:      the last observation whose odometry was believed, and the pose at that time
    base:         the last good plan
    """

    name: str = ""
    pose: np.ndarray = field(default_factory=lambda: np.zeros(3))
    time_s: float = 0.0
    step_s: float = FRAME_INTERVAL_S
    speed: float = 0.0
    started: bool = False
    stopping: bool = False
    trusted: tuple[Observation, np.ndarray] | None = None
    base: _Base | None = None

    def present_plan(self) -> np.ndarray:
        """The base plan, here and now."""
        return shift_plan(self.base.trajectory, self.age_s, to_local(self.base.pose, self.pose))

    @property
    def age_s(self) -> float:
        return self.time_s - self.base.time_s if self.base else float("nan")


class DriveLoop:
    """Runs over deliveries; yields one `TickReport` each.

    worker: plans `Delivery` items; its values are trajectories (T, 3), ego frame of their observation
    """

    def __init__(self, worker: Worker, clock: Clock, config: LoopConfig, health: HealthConfig, poses: int = 8):
        horizon = FRAME_INTERVAL_S * poses
        if config.max_age_s > horizon:
            raise UserError(f"loop.max_age_s: {config.max_age_s} s exceeds the plans' horizon of {horizon} s")
        self.worker, self.clock, self.config, self.health, self.poses = worker, clock, config, health, poses
        self.drive = _Drive()
        self.in_flight: tuple[int, str, np.ndarray, float] | None = None  # tick, drive, pose, time of the planned frame

    def run(self, deliveries: Iterable[Delivery]) -> Iterator[TickReport]:
        start = self.clock.now()
        for tick, delivery in enumerate(deliveries):
            due = start + tick * self.config.period_s
            self.clock.sleep_until(due)
            jitter = self.clock.now() - due
            yield self._tick(tick, delivery, due, jitter)

    def _tick(self, tick: int, delivery: Delivery, due: float, jitter: float) -> TickReport:
        deadline = due + self.config.deadline_s
        self.clock.sleep_until(min(due + delivery.late * self.config.period_s, deadline))
        observation = delivery.observation if delivery.late * self.config.period_s < self.config.deadline_s else None
        warnings = self._advance(delivery.drive, observation)
        if observation is not None and delivery.late:
            warnings.append(f"the frame came {1e3 * delivery.late * self.config.period_s:.0f} ms late")
        self._collect(self.clock.now())  # an older frame may have been finished in the meantime
        if observation is None:
            fresh, late = False, delivery.observation is not None
            reasons = ["the frame came after the deadline" if late else "no frame came"]
        elif faults := blocking_faults(observation, self.health):
            fresh, late, reasons = False, False, faults
        else:
            fresh, late, reasons = self._plan(tick, delivery, deadline)
        status, trajectory = self._published(fresh)
        self.drive.stopping = status == STOP
        return TickReport(
            tick=tick,
            drive=delivery.drive,
            token=delivery.observation.token if delivery.observation else "",
            status=status,
            trajectory=trajectory,
            reasons=tuple(reasons),
            warnings=tuple(warnings),
            jitter_ms=1e3 * jitter,
            latency_ms=1e3 * (self.clock.now() - due),
            missed=late,
            age_s=float("nan") if status == STOP else self.drive.age_s,
            fault=delivery.fault,
        )

    # --- where the car is --------------------------------------------------------------------------------------------

    def _advance(self, name: str, seen: Observation | None) -> list[str]:
        """Move pose, time and speed to the present tick. Returns warnings about the odometry."""
        if name != self.drive.name:
            self.drive = _Drive(name)  # another log: nothing of the last one applies
        drive = self.drive
        motion, warning = None, None
        if seen is not None and drive.trusted is not None:
            motion, warning = odometry_between(drive.trusted[0], seen, self.health)
        if not drive.started:
            drive.started, drive.time_s = True, seen.time_s if seen else 0.0
        else:
            if seen is not None and seen.time_s > drive.time_s:
                drive.step_s = seen.time_s - drive.time_s
            if motion is not None:
                drive.pose = to_global(drive.trusted[1], motion)
            else:
                drive.pose = to_global(drive.pose, self._assumed_motion())
            drive.time_s += drive.step_s
        self._remember(seen, motion is not None)
        return [warning] if warning else []

    def _remember(self, seen: Observation | None, believed: bool) -> None:
        """Speed, and the observation that the next odometry is compared with.

        A jump is not compared with: if the pose comes back, nothing is lost. If it does not, the comparison starts
        afresh once the last trusted observation is too old.
        """
        drive = self.drive
        if seen is not None and np.isfinite(seen.speed):
            drive.speed = seen.speed
        elif drive.stopping:
            drive.speed = max(0.0, drive.speed - self.config.deceleration * drive.step_s)
        if seen is None or not np.isfinite(seen.ego_pose).all():
            return
        if believed or drive.trusted is None or seen.time_s - drive.trusted[0].time_s > self.health.max_gap_s:
            drive.trusted = seen, drive.pose

    def _assumed_motion(self) -> np.ndarray:
        """Without odometry: as the base plan says for the next step, else straight on at the last speed."""
        drive = self.drive
        if drive.base is None or drive.age_s > self.config.max_age_s:
            return np.array([drive.speed * drive.step_s, 0.0, 0.0])
        here, there = resample(drive.base.trajectory, np.array([drive.age_s, drive.age_s + drive.step_s]))
        return to_local(here, there)

    # --- planning ----------------------------------------------------------------------------------------------------

    def _plan(self, tick: int, delivery: Delivery, deadline: float) -> tuple[bool, bool, list[str]]:
        """Have the frame planned by the deadline: (fresh, late, reasons why not)."""
        while self.worker.busy:
            if not self._collect(deadline):
                return False, True, [f"the planner was still busy with tick {self.in_flight[0]}"]
        self.in_flight = tick, delivery.drive, self.drive.pose, self.drive.time_s
        self.worker.submit(delivery)
        finished = self._collect(deadline)
        if finished is None:
            return False, True, ["the plan was not ready by the deadline"]
        problem = finished.error or plan_fault(finished.value)
        return problem is None, False, [problem] if problem else []

    def _collect(self, until: float) -> Finished | None:
        """Wait for the job under way; a good plan becomes the base, also when it comes too late for its own tick."""
        if not self.worker.busy:
            return None
        finished = self.worker.wait(until)
        if finished is not None:
            _, drive, pose, time_s = self.in_flight
            if drive == self.drive.name and finished.error is None and plan_fault(finished.value) is None:
                self.drive.base = _Base(np.asarray(finished.value, np.float64), pose, time_s)
        return finished

    def _published(self, fresh: bool) -> tuple[str, np.ndarray]:
        """The trajectory to drive now."""
        drive, config = self.drive, self.config
        if fresh:
            return FRESH, drive.base.trajectory
        if drive.base is None:
            return STOP, stop_plan(drive.speed, config.deceleration, self.poses)
        path = drive.present_plan()
        if drive.age_s <= config.max_age_s and plan_fault(path) is None:
            return SHIFTED, path
        usable = np.isfinite(path).all()
        return STOP, stop_plan(drive.speed, config.deceleration, self.poses, path if usable else None)
