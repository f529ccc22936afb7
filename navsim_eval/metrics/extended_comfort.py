"""Two-frame extended comfort (EC): does a planner change its mind between two decisions? 1 or 0, in EPDMS only."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from navsim_eval.metrics.comfort import JERK_WINDOW_V2, SMOOTHING_WINDOW, YAW_WINDOW, jerk, savgol
from navsim_eval.pdm.dynamics import unwrap_angle
from navsim_eval.pdm.types import SIMULATION_DT, StateIndex

MAX_GAP = 0.55  # seconds between the two decisions
MAX_ACCELERATION_CHANGE = 0.7  # m/s², root mean square over the common time, like all of these
MAX_JERK_CHANGE = 0.5  # m/s³
MAX_YAW_RATE_CHANGE = 0.1  # rad/s
MAX_YAW_ACCELERATION_CHANGE = 0.1  # rad/s²


def motion(states: Tensor) -> Tensor:
    """What extended comfort needs of states (..., T, 11): acceleration magnitude and heading, (..., 2, T)."""
    magnitude = torch.hypot(states[..., StateIndex.AX], states[..., StateIndex.AY])
    return torch.stack([magnitude, states[..., StateIndex.HEADING]], dim=-2)


def extended_comfort(current: Tensor, previous: Tensor, gap: float) -> Tensor:
    """Sub-score (...) of simulated plans that were made `gap` seconds apart.

    current, previous: (..., 2, 41) as given by `motion`
    Over the time that both plans cover, the differences of acceleration magnitude, jerk, yaw rate and yaw acceleration
    must each stay within a bound (root mean square).
    Source: NAVSIM v2's extended comfort metric.
    """
    steps = round(gap / SIMULATION_DT)
    changes = _features(current[..., : current.shape[-1] - steps]) - _features(previous[..., steps:])
    rms = torch.sqrt(torch.mean(changes**2, dim=-1))
    bounds = (MAX_ACCELERATION_CHANGE, MAX_JERK_CHANGE, MAX_YAW_RATE_CHANGE, MAX_YAW_ACCELERATION_CHANGE)
    within = torch.stack([rms[..., i] <= bound for i, bound in enumerate(bounds)], dim=-1).all(dim=-1)
    return within.to(torch.float64)


def _features(signals: Tensor) -> Tensor:
    """(..., 2, T) → (..., 4, T): smoothed acceleration, jerk, yaw rate, yaw acceleration."""
    magnitude, heading = signals[..., 0, :], unwrap_angle(signals[..., 1, :])
    return torch.stack(
        [
            savgol(magnitude, SMOOTHING_WINDOW, order=2),
            jerk(magnitude, JERK_WINDOW_V2),
            savgol(heading, YAW_WINDOW, order=2, derivative=1),
            savgol(heading, YAW_WINDOW, order=2, derivative=2),
        ],
        dim=-2,
    )


def preceding_scenes(log_names: list[str], start_times_us: list[int]) -> list[tuple[int, int, float]]:
    """(scene, preceding scene, gap in s) for every scene whose predecessor in its log is at most 0.55 s earlier."""
    order = sorted(range(len(log_names)), key=lambda i: (log_names[i], start_times_us[i]))
    pairs = []
    for earlier, later in pairwise(order):
        gap = (start_times_us[later] - start_times_us[earlier]) * 1e-6
        if log_names[earlier] == log_names[later] and 0.0 < gap <= MAX_GAP:
            pairs.append((later, earlier, gap))
    return pairs
