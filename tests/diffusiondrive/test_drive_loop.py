"""The soft real-time loop on a clock that the test turns: deadlines, fall-backs, and every fault answered."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiondrive.runtime.faults import FAULTS, Delivery, fault_schedule, faulty, inject
from diffusiondrive.runtime.health import HealthConfig, blocking_faults, odometry_between, plan_fault
from diffusiondrive.runtime.loop import FRESH, SHIFTED, STOP, DriveLoop, LoopConfig, TickReport
from diffusiondrive.runtime.observation import Observation
from diffusiondrive.runtime.worker import Finished, ThreadWorker, WallClock
from navsim_eval.errors import DataError, UserError

SPEED, YAW_RATE = 8.0, 0.1
TIMES = 0.5 * np.arange(1, 9)


class FakeClock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


class FakeWorker:
    """Computes at once, and hands the result out when `duration(item)` has passed on the fake clock."""

    def __init__(self, function: Callable, clock: FakeClock, duration: Callable[[Delivery], float]):
        self.function, self.clock, self.duration = function, clock, duration
        self.busy, self.submitted = False, []

    def submit(self, item: Delivery) -> None:
        assert not self.busy
        self.busy, self.ready = True, self.clock.now() + self.duration(item)
        self.submitted.append(item)
        try:
            self.result = Finished(item, self.function(item))
        except DataError as error:
            self.result = Finished(item, error=str(error))

    def wait(self, until: float) -> Finished | None:
        self.clock.sleep_until(min(until, self.ready))
        if self.ready > until:
            return None
        self.busy = False
        return self.result


def arc(times: np.ndarray) -> np.ndarray:
    heading = YAW_RATE * times
    chord = SPEED * times * np.sinc(heading / 2 / np.pi)
    return np.stack([chord * np.cos(heading / 2), chord * np.sin(heading / 2), heading], axis=-1)


def drive(ticks: int, name: str = "drive") -> list[Delivery]:
    """A constant turn, one observation every 0.5 s of driving."""
    poses = arc(0.5 * np.arange(ticks))
    status = np.array([0, 1, 0, 0, SPEED, 0, 0, 0], np.float32)
    image = b"\xff\xd8" + bytes(100) + b"\xff\xd9"
    seen = [
        Observation(f"{name}-{k}", (image,) * 3, bytes(100), status, pose + np.array([5.0, 7.0, 0.0]), 10 + 0.5 * k)
        for k, pose in enumerate(poses)
    ]
    return [Delivery(name, observation) for observation in seen]


def perfect(observation: Observation) -> np.ndarray:
    """Plans the very turn that the car drives, after looking at its sensors as a decoder would."""
    if any(len(image) < 104 for image in observation.cameras):
        raise DataError("CAM", "the image is truncated")
    if not isinstance(observation.cloud, bytes) or len(observation.cloud) < 100:
        raise DataError("LiDAR", "a sweep of 0 points")
    return arc(TIMES).astype(np.float32)


def run(
    deliveries: list[Delivery], duration: float | Callable[[Delivery], float] = 0.04, **loop: float
) -> tuple[list[TickReport], FakeWorker]:
    clock, config = FakeClock(), LoopConfig(**loop)
    seconds = duration if callable(duration) else lambda item: duration + item.stall * config.period_s
    worker = FakeWorker(faulty(perfect, config.period_s, sleep=lambda _: None), clock, seconds)
    return list(DriveLoop(worker, clock, config, HealthConfig()).run(deliveries)), worker


# --- the loop --------------------------------------------------------------------------------------------------------


def test_a_quick_planner_is_always_fresh():
    reports, _ = run(drive(10))
    assert [r.status for r in reports] == [FRESH] * 10
    assert all(r.reasons == () and r.warnings == () and not r.missed and r.age_s == 0 for r in reports)
    assert [r.latency_ms for r in reports] == pytest.approx([40.0] * 10)
    assert [r.jitter_ms for r in reports] == pytest.approx([0.0] * 10, abs=1e-6)


def test_a_late_plan_costs_its_tick_and_serves_the_next_ones():
    """Planning takes 1.5 periods: every other frame is planned, in time for nobody, and shifted to whoever needs it."""
    reports, worker = run(drive(9), duration=0.15)
    assert [r.status for r in reports] == [STOP] + [SHIFTED] * 8  # nothing is there yet at the first tick
    assert all(r.missed for r in reports)
    assert "not ready by the deadline" in reports[0].reasons[0]
    for report in reports[1:]:  # the plan is perfect, so a perfect shift is the plan itself
        np.testing.assert_allclose(report.trajectory, arc(TIMES), atol=2e-3)
        assert 0 < report.age_s <= 1.0
    tokens = [item.observation.token for item in worker.submitted]
    assert tokens == sorted(set(tokens), key=tokens.index), "no frame is planned twice"


def test_an_earlier_deadline_and_a_late_frame():
    reports, _ = run(drive(4), duration=0.04, deadline_ms=30.0)
    assert all(r.missed and r.latency_ms <= 30.001 for r in reports)
    deliveries = drive(4)
    deliveries[2] = replace(deliveries[2], late=0.75)
    reports, _ = run(deliveries, duration=0.02)
    assert [r.status for r in reports] == [FRESH] * 4 and reports[2].latency_ms == pytest.approx(95.0)
    assert [r.warnings for r in reports] == [(), (), ("the frame came 75 ms late",), ()]
    reports, _ = run(deliveries, duration=0.04)
    assert [r.status for r in reports] == [FRESH, FRESH, SHIFTED, FRESH] and reports[2].missed


def test_a_fall_back_ages_into_a_stop_and_the_loop_recovers():
    deliveries = drive(12)
    for k in range(2, 9):
        deliveries[k] = replace(deliveries[k], observation=None)
    reports, _ = run(deliveries, max_age_s=2.0)
    assert [r.status for r in reports] == [FRESH] * 2 + [SHIFTED] * 4 + [STOP] * 3 + [FRESH] * 3
    assert [r.age_s for r in reports[2:6]] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    for report in reports[2:6]:
        np.testing.assert_allclose(report.trajectory, arc(TIMES), atol=0.02)  # without any odometry
    first, second = reports[6].trajectory, reports[7].trajectory
    assert np.hypot(*second[-1, :2]) < np.hypot(*first[-1, :2]), "the second stop begins at a lower speed"
    assert reports[6].reasons == ("no frame came",)


def test_another_drive_starts_from_nothing():
    deliveries = [*drive(3, "one"), *drive(3, "two")]
    deliveries[3] = replace(deliveries[3], observation=None)
    reports, _ = run(deliveries)
    assert [r.status for r in reports] == [FRESH] * 3 + [STOP] + [FRESH] * 2


def test_a_plan_that_spans_two_drives_is_thrown_away():
    deliveries = [*drive(2, "one"), *drive(3, "two")]
    deliveries[1] = replace(deliveries[1], stall=1.5)
    deliveries[2] = replace(deliveries[2], observation=None)
    reports, _ = run(deliveries)
    assert reports[1].status == SHIFTED and reports[2].status == STOP


def test_odometry_that_jumps_is_not_believed_and_comes_back():
    deliveries = drive(8)
    seen = deliveries[3].observation
    jumped = replace(seen, ego_pose=seen.ego_pose + np.array([0.0, 2.0, 0.0]))
    deliveries[3] = replace(deliveries[3], observation=jumped)
    for k in (3, 4):  # and nothing can be planned meanwhile
        deliveries[k] = replace(
            deliveries[k], observation=replace(deliveries[k].observation, cameras=(None,) * 3), fault="x"
        )
    reports, _ = run(deliveries)
    assert "odometry jumps" in reports[3].warnings[0] and reports[4].warnings == ()
    for report in reports[3:5]:
        assert report.status == SHIFTED
        np.testing.assert_allclose(report.trajectory, arc(TIMES), atol=5e-3)


def test_a_pose_that_moved_for_good_is_believed_again():
    deliveries = drive(14)
    for k in range(4, 14):
        seen = deliveries[k].observation
        jumped = replace(seen, ego_pose=seen.ego_pose + np.array([0.0, 50.0, 0.0]))
        deliveries[k] = replace(deliveries[k], observation=jumped)
    reports, _ = run(deliveries)
    assert all(r.status == FRESH for r in reports)
    assert [bool(r.warnings) for r in reports] == [False] * 4 + [True] * 5 + [False] * 5


def test_impossible_settings():
    for values in ({"rate_hz": 0.0}, {"deadline_ms": 200.0}, {"max_age_s": -1.0}):
        with pytest.raises(UserError, match="loop"):
            LoopConfig(**values)
    with pytest.raises(UserError, match=r"horizon of 4\.0 s"):
        DriveLoop(None, FakeClock(), LoopConfig(max_age_s=5.0), HealthConfig())


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_every_fault_is_flagged_and_survived(name):
    schedule = [name if 4 <= k < 6 else "" for k in range(12)]
    reports, _ = run(list(inject(drive(12), schedule, seed=3)))
    for report in reports:
        assert np.isfinite(report.trajectory).all()
        if report.fault:
            assert report.fault == name and (report.reasons or report.warnings), f"{name} passed unnoticed"
            assert report.status == FRESH if name == "jump_odometry" else report.status in (SHIFTED, STOP)
        if report.status == SHIFTED:
            np.testing.assert_allclose(report.trajectory, arc(TIMES), atol=0.02)
    assert [r.status for r in reports[:4]] == [FRESH] * 4 and [r.status for r in reports[8:]] == [FRESH] * 4


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.0, 0.9), st.integers(1, 9), st.floats(0.5, 4.0), st.floats(0.01, 0.3))
def test_no_plan_is_ever_stale_or_not_finite(seed, share, longest, max_age, duration):
    schedule = fault_schedule(40, sorted(FAULTS), share, longest, seed)
    deliveries = list(inject([*drive(25, "one"), *drive(15, "two")], schedule, seed))
    jitter = np.random.default_rng(seed)
    reports, _ = run(
        deliveries, duration=lambda item: duration * jitter.uniform(0.2, 3.0) + 0.1 * item.stall, max_age_s=max_age
    )
    assert [r.tick for r in reports] == list(range(40)) and [r.fault for r in reports] == schedule
    for report in reports:
        assert np.isfinite(report.trajectory).all() and plan_fault(report.trajectory) is None
        assert report.trajectory.shape == (8, 3)
        assert (report.status == FRESH) == (not report.reasons)
        assert report.status == STOP or report.age_s <= max_age + 1e-9
        assert report.latency_ms <= 100.001


def test_the_schedule_is_a_function_of_the_seed_and_uses_every_name():
    names = sorted(FAULTS)
    one, again, other = (fault_schedule(600, names, 0.3, 3, seed) for seed in (1, 1, 2))
    assert one == again != other
    assert 0.2 < np.mean([bool(name) for name in one]) < 0.4
    counts = [one.count(name) for name in names]
    assert min(counts) >= 5 and max(counts) <= 4 * min(counts)
    assert fault_schedule(5, [], 0.5, 3, 0) == [""] * 5
    with pytest.raises(UserError, match="faults: 'gremlins' is none of stall"):
        fault_schedule(5, ["gremlins"], 0.5, 3, 0)


def test_injection_is_a_function_of_the_seed():
    schedule = fault_schedule(30, sorted(FAULTS), 0.5, 3, 5)

    def cameras(seed: int) -> list:
        return [d.observation and d.observation.cameras for d in inject(drive(30), schedule, seed)]

    assert cameras(5) == cameras(5) != cameras(6)


# --- checks ----------------------------------------------------------------------------------------------------------


def test_what_blocks_an_observation():
    seen = drive(1)[0].observation
    assert blocking_faults(seen, HealthConfig()) == []
    old = replace(seen, camera_times_s=(seen.time_s, seen.time_s - 0.5, float("nan")))
    assert blocking_faults(old, HealthConfig()) == ["CAM_F0: image is 0.50 s old", "CAM_R0: image is nan s old"]
    blind = replace(seen, cameras=(None, b"", b""), cloud=None, status=np.full(8, np.inf), ego_pose=np.full(3, np.nan))
    assert len(blocking_faults(blind, HealthConfig())) == 4


def test_odometry_is_compared_with_the_speed():
    a, b = (d.observation for d in drive(2))
    motion, why = odometry_between(a, b, HealthConfig())
    np.testing.assert_allclose(motion, arc(np.array([0.5]))[0], atol=1e-9)
    assert why is None
    for moved, message in (
        ([9.0, 0, 0], "m ahead where 4.0 m are likely"),
        ([0, 1.5, 0], "m to the side"),
        ([0, 0, 1.0], "turned by"),
    ):
        assert message in odometry_between(a, replace(b, ego_pose=b.ego_pose + moved), HealthConfig())[1]
    assert "s since the last" in odometry_between(a, replace(b, time_s=a.time_s + 9), HealthConfig())[1]
    unknown = replace(a, status=np.full(8, np.nan)), replace(b, status=np.full(8, np.nan))
    assert odometry_between(*unknown, HealthConfig())[1] is None


# --- the thread ------------------------------------------------------------------------------------------------------


def test_the_worker_thread_waits_no_longer_than_told_and_reports_errors():
    gate, clock = threading.Event(), WallClock()

    def job(item: str) -> str:
        if item == "bad":
            raise ZeroDivisionError("oh")
        assert gate.wait(10)
        return item.upper()

    with ThreadWorker(job, clock) as worker:
        assert worker.wait(clock.now()) is None
        worker.submit("good")
        assert worker.busy and worker.wait(clock.now() + 0.01) is None and worker.busy
        with pytest.raises(RuntimeError, match="busy"):
            worker.submit("another")
        gate.set()
        assert worker.wait(clock.now() + 10) == Finished("good", "GOOD") and not worker.busy
        worker.submit("bad")
        assert worker.wait(clock.now() + 10) == Finished("bad", None, "oh")
    assert not worker.thread.is_alive()
