"""May this observation be planned from, and how far has the car moved since the last one? Cheap checks before decoding.

What shows only in decoding (a truncated image, an empty sweep) is found there (sensors.py); a picture that decodes but
shows nonsense is found by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusiondrive.features import CAMERAS
from diffusiondrive.runtime.observation import Observation
from navsim_eval.errors import UserError
from navsim_eval.geometry import to_local

FASTEST_M_S = 60.0  # a plan or an odometry step beyond this is no driving


@dataclass
class HealthConfig:
    """What is still believed.

    max_sensor_age_s: an image taken longer before the observation comes from a camera that hangs
    max_gap_s:        between observations; beyond it their odometry is not compared
    max_jump_m:       between the car and the end of an arc of length speed × time (ahead: plus a quarter of it)
    max_turn_rad:     between two observations
    """

    max_sensor_age_s: float = 0.25
    max_gap_s: float = 2.0
    max_jump_m: float = 1.0
    max_turn_rad: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"health.{name}: {value} must be positive")


def blocking_faults(observation: Observation, config: HealthConfig) -> list[str]:
    """Why no plan may be made from an observation; empty when nothing is known to be wrong."""
    faults = []
    for name, content, taken in zip(CAMERAS, observation.cameras, observation.camera_times_s, strict=True):
        age = observation.time_s - taken
        if content is None:
            faults.append(f"{name}: no image")
        elif not age <= config.max_sensor_age_s:
            faults.append(f"{name}: image is {age:.2f} s old")
    if observation.cloud is None:
        faults.append("LiDAR: no sweep")
    if not np.isfinite(observation.status).all():
        faults.append("status is not finite")
    if not np.isfinite(observation.ego_pose).all():
        faults.append("odometry is not finite")
    return faults


def odometry_between(
    earlier: Observation, later: Observation, config: HealthConfig
) -> tuple[np.ndarray | None, str | None]:
    """(3,) ego pose of `later` in the frame of `earlier`, or None and the reason not to believe it."""
    if not (np.isfinite(earlier.ego_pose).all() and np.isfinite(later.ego_pose).all()):
        return None, "odometry is not finite"
    elapsed = later.time_s - earlier.time_s
    if not 0 < elapsed <= config.max_gap_s:
        return None, f"odometry: {elapsed:.2f} s since the last observation"
    motion = to_local(earlier.ego_pose, later.ego_pose)
    ahead, aside, turned = motion.tolist()
    speeds = [o.speed for o in (earlier, later) if np.isfinite(o.speed)]
    expected = float(np.mean(speeds)) * elapsed if speeds else 0.0
    slack = config.max_jump_m + abs(expected) / 4 if speeds else FASTEST_M_S * elapsed
    if abs(ahead - expected) > slack:
        return None, f"odometry jumps: {ahead:.1f} m ahead where {expected:.1f} m are likely"
    if abs(turned) > config.max_turn_rad:
        return None, f"odometry jumps: turned by {turned:.2f} rad"
    if abs(aside - ahead * np.tan(turned / 2)) > config.max_jump_m:  # rear axles do not move sideways
        return None, f"odometry jumps: {aside:.1f} m to the side"
    return motion, None


def plan_fault(trajectory: np.ndarray) -> str | None:
    """Why a plan (T, 3) must not be driven, or None."""
    if not np.isfinite(trajectory).all():
        return "plan is not finite"
    steps = np.diff(trajectory[:, :2], axis=0, prepend=0.0)
    if np.abs(steps).max() > FASTEST_M_S / 2:  # 0.5 s a step
        return "plan is faster than any car"
    return None
