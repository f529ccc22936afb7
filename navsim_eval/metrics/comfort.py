"""Comfort: are accelerations, jerks and yaw motion within what passengers accept?

Signals pass Savitzky-Golay filters before they meet their bounds. A filter on a sequence of fixed length is one
constant matrix, so each check is a matrix product. Filtered values are rounded to 8 decimals, as in the reference.
"""

from __future__ import annotations

from functools import lru_cache
from math import factorial

import numpy as np
import torch
from torch import Tensor

from navsim_eval.geometry import Vehicle
from navsim_eval.pdm.dynamics import unwrap_angle
from navsim_eval.pdm.types import SIMULATION_DT, StateIndex

CHECKS = (
    "longitudinal_acceleration",
    "lateral_acceleration",
    "jerk",
    "longitudinal_jerk",
    "yaw_acceleration",
    "yaw_rate",
)

MIN_LONGITUDINAL_ACCELERATION, MAX_LONGITUDINAL_ACCELERATION = -4.05, 2.40  # m/s²
MAX_LATERAL_ACCELERATION = 4.89
MAX_JERK, MAX_LONGITUDINAL_JERK = 8.37, 4.13  # m/s³
MAX_YAW_ACCELERATION, MAX_YAW_RATE = 1.93, 0.95  # rad/s², rad/s

SMOOTHING_WINDOW = 8
YAW_WINDOW = 5
JERK_WINDOW_V2 = 15


def comfort_checks_v1(states: Tensor) -> Tensor:
    """The six checks, (..., 6) bool in the order of `CHECKS`, of simulated states (..., T, 11) at 10 Hz.

    Windows of v1: accelerations are smoothed over the whole horizon (a single parabola), and so is the derivative that
    yields the jerk. Accelerations are those of the rear axle.
    Source: NAVSIM v1.1's comfort metric, after nuPlan's.
    """
    steps = states.shape[-2]
    return _checks(states, states[..., StateIndex.AX], states[..., StateIndex.AY], window=steps, jerk_window=steps)


def comfort_checks_v2(states: Tensor) -> Tensor:
    """The six checks, (..., 6) bool in the order of `CHECKS`, of states (..., T, 11) at 10 Hz.

    Windows of v2: 8 samples for accelerations, 15 for the derivative. The acceleration checks look at the middle of the
    vehicle: longitudinal + 1.461 m * (yaw rate² + yaw acceleration), lateral unchanged (the published formula, which
    differs from the rigid-body one); the jerk magnitude stays at the rear axle.
    Source: NAVSIM v2.2's comfort metric.
    """
    turning = states[..., StateIndex.YAW_RATE] ** 2 + states[..., StateIndex.YAW_ACCELERATION]
    longitudinal = states[..., StateIndex.AX] + Vehicle.REAR_AXLE_TO_CENTER * turning
    return _checks(
        states, longitudinal, states[..., StateIndex.AY], window=SMOOTHING_WINDOW, jerk_window=JERK_WINDOW_V2
    )


def _checks(states: Tensor, longitudinal: Tensor, lateral: Tensor, window: int, jerk_window: int) -> Tensor:
    magnitude = torch.hypot(states[..., StateIndex.AX], states[..., StateIndex.AY])
    heading = unwrap_angle(states[..., StateIndex.HEADING])
    return torch.stack(
        [
            _within(
                savgol(longitudinal, window, order=2), MIN_LONGITUDINAL_ACCELERATION, MAX_LONGITUDINAL_ACCELERATION
            ),
            _within(savgol(lateral, window, order=2), -MAX_LATERAL_ACCELERATION, MAX_LATERAL_ACCELERATION),
            _within(jerk(magnitude, jerk_window), -MAX_JERK, MAX_JERK),
            _within(jerk(longitudinal, jerk_window), -MAX_LONGITUDINAL_JERK, MAX_LONGITUDINAL_JERK),
            _within(savgol(heading, YAW_WINDOW, order=3, derivative=2), -MAX_YAW_ACCELERATION, MAX_YAW_ACCELERATION),
            _within(savgol(heading, YAW_WINDOW, order=2, derivative=1), -MAX_YAW_RATE, MAX_YAW_RATE),
        ],
        dim=-1,
    )


def jerk(acceleration: Tensor, window: int) -> Tensor:
    """Time derivative [m/s³] of an acceleration (..., T) at 10 Hz: smoothed over 8 samples, then differentiated."""
    return savgol(savgol(acceleration, SMOOTHING_WINDOW, order=2), window, order=2, derivative=1)


def savgol(values: Tensor, window: int, order: int, derivative: int = 0) -> Tensor:
    """Savitzky-Golay filter of (..., T) samples at 10 Hz, rounded to 8 decimals.

    Each sample becomes the value (or derivative) of the polynomial fitted to the window around it; the first and last
    half windows are taken from the polynomial of the first and last full window. An even window reaches one sample
    further ahead than back, and its polynomial is evaluated half a sample ahead.
    """
    steps = values.shape[-1]
    operator = _savgol_operator(steps, min(window, steps), order, derivative).to(values.device)
    return torch.round(values @ operator, decimals=8)


@lru_cache(maxsize=64)
def _savgol_operator(steps: int, window: int, order: int, derivative: int) -> Tensor:
    """(T, T), to be multiplied from the right."""
    operator = np.zeros((steps, steps))
    half = window // 2
    start, middle = (-half + 1, 0.5) if window % 2 == 0 else (-half, 0.0)
    for i in range(steps):
        if half <= i < steps - half:
            first, position = i + start, middle - start
        else:
            first = 0 if i < half else steps - window
            position = float(i - first)
        operator[first : first + window, i] = _fit_weights(window, order, derivative, position)
    return torch.from_numpy(operator)


def _fit_weights(window: int, order: int, derivative: int, position: float) -> np.ndarray:
    """(window,) weights of samples 0 … window-1 for a derivative at `position` of the fitted polynomial."""
    powers = np.arange(order + 1)
    samples = (np.arange(window) - position)[:, None] ** powers
    return np.linalg.pinv(samples)[derivative] * factorial(derivative) / SIMULATION_DT**derivative


def _within(values: Tensor, low: float, high: float) -> Tensor:
    return ((values > low) & (values < high)).all(dim=-1)
