"""Faults to be survived: what may go wrong with sensors, odometry and computers, at ticks that a seed decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffusiondrive.features import CAMERAS
from diffusiondrive.runtime.observation import Observation
from navsim_eval.errors import UserError

# name: what happens during the fault
FAULTS = {
    "stall": "one camera keeps delivering its last image, with the stamp that it had",
    "missing_image": "one camera delivers nothing",
    "truncated_jpeg": "one image ends early",
    "empty_cloud": "the sweep holds no points",
    "truncated_cloud": "the sweep ends early",
    "nan_odometry": "pose, velocity and acceleration are not numbers",
    "jump_odometry": "the pose is 2 m off to the side",
    "late_frame": "the observation arrives when three quarters of the period are over",
    "dropped_frame": "no observation arrives at all",
    "slow_planner": "the computer stalls for one and a half periods",
    "nan_plan": "the planner returns numbers that are none",
}
JUMP_M = 2.0


@dataclass(frozen=True)
class Delivery:
    """What reaches the loop at one tick.

    drive:       name of the log; the car does not jump within a drive
    observation: None where nothing came;  late: share of the period by which it is late
    stall:       share of a period by which the computer is delayed;  spoil: the plan comes out as NaN
    fault:       name of the injected fault, or empty
    """

    drive: str
    observation: Observation | None
    late: float = 0.0
    stall: float = 0.0
    spoil: bool = False
    fault: str = ""


def fault_schedule(ticks: int, names: Sequence[str], share: float, longest: int, seed: int) -> list[str]:
    """For every tick the name of its fault, or "".

    Episodes of 1 … `longest` ticks, about `share` of all ticks; names take turns in an order that `seed` shuffles, so
    that each occurs about equally often. Raises UserError for a name that is no fault.
    """
    for name in names:
        if name not in FAULTS:
            raise UserError(f"faults: '{name}' is none of {', '.join(FAULTS)}")
    schedule = [""] * ticks
    if not names or share <= 0:
        return schedule
    rng = np.random.Generator(np.random.Philox(seed))
    pause = min((1 + longest) / 2 * (1 - share) / share, ticks)  # mean number of healthy ticks before an episode
    tick, episode, order = 0, 0, list(names)
    while True:
        tick += int(rng.integers(1, max(2, round(2 * pause))))
        length = int(rng.integers(1, longest + 1))
        if episode % len(order) == 0:
            rng.shuffle(order)
        for at in range(tick, min(tick + length, ticks)):
            schedule[at] = order[episode % len(order)]
        tick, episode = tick + length, episode + 1
        if tick >= ticks:
            return schedule


def inject(deliveries: Iterable[Delivery], schedule: Sequence[str], seed: int) -> Iterator[Delivery]:
    """The deliveries with the scheduled faults in them. Which camera, and where a file ends: decided by the seed."""
    rng = np.random.Generator(np.random.Philox([seed, 1]))
    before: Observation | None = None  # the last observation that was whole
    camera, previous = 0, ""
    for delivery, name in zip(deliveries, schedule, strict=False):
        if name and name != previous:
            camera = int(rng.integers(len(CAMERAS)))
        cut = float(rng.uniform(0.1, 0.9))
        previous = name
        if not name or delivery.observation is None:
            before = delivery.observation or before
            yield delivery
            continue
        yield replace(_spoiled(delivery, name, before, camera, cut), fault=name)


def _spoiled(delivery: Delivery, name: str, before: Observation | None, camera: int, cut: float) -> Delivery:
    seen = delivery.observation
    whole = {
        "late_frame": {"late": 0.75},
        "dropped_frame": {"observation": None},
        "slow_planner": {"stall": 1.5},
        "nan_plan": {"spoil": True},
    }
    if name in whole:
        return replace(delivery, **whole[name])
    if name == "stall":
        held = before or replace(seen, time_s=seen.time_s - 1.0, camera_times_s=())
        times = _with(seen.camera_times_s, camera, held.camera_times_s[camera])
        changed = replace(seen, cameras=_with(seen.cameras, camera, held.cameras[camera]), camera_times_s=times)
    elif name == "missing_image":
        changed = replace(seen, cameras=_with(seen.cameras, camera, None))
    elif name == "truncated_jpeg":
        content = seen.cameras[camera]
        changed = replace(seen, cameras=_with(seen.cameras, camera, content[: int(cut * len(content))]))
    elif name == "empty_cloud":
        changed = replace(seen, cloud=np.zeros((3, 0), np.float32))
    elif name == "truncated_cloud":
        changed = replace(seen, cloud=seen.cloud[: int(cut * len(seen.cloud))])
    elif name == "nan_odometry":
        status = np.concatenate([seen.status[:4], np.full(4, np.nan, np.float32)])
        changed = replace(seen, status=status, ego_pose=np.full(3, np.nan))
    else:
        heading = seen.ego_pose[2]
        aside = JUMP_M * np.array([-np.sin(heading), np.cos(heading), 0.0])
        changed = replace(seen, ego_pose=seen.ego_pose + aside)
    return replace(delivery, observation=changed)


def _with(values: tuple, index: int, value: object) -> tuple:
    return (*values[:index], value, *values[index + 1 :])


def faulty(
    plan: Callable[[Observation], np.ndarray], period_s: float, sleep: Callable[[float], None] = time.sleep
) -> Callable[[Delivery], np.ndarray]:
    """The planner behind its own faults: stalls, and plans that are no numbers."""

    def planned(delivery: Delivery) -> np.ndarray:
        if delivery.stall:
            sleep(delivery.stall * period_s)
        trajectory = plan(delivery.observation)
        return np.full_like(trajectory, np.nan) if delivery.spoil else trajectory

    return planned
