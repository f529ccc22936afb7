"""From the front bumper of a SUMO vehicle to the smooth motion of the ego's rear axle.

SUMO moves the centre of the front bumper along lane centre lines with an acceleration that may jump every step. A
human driver's rear axle follows the lane and the speed changes gently. So the path is the bumper's trace, smoothed over
a few metres, on which the rear axle runs `Vehicle.FRONT_LENGTH` behind; progress along it is smoothed over time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from navsim_eval.city import lines
from navsim_eval.city.traffic import STEP_S, Track
from navsim_eval.geometry import Vehicle

PATH_STEP_M = 0.25
PATH_SMOOTHING_M = 1.5  # standard deviation of the smoothing along the path
TIME_SMOOTHING_S = 0.5  # standard deviation of the smoothing of progress over time
MAX_ACCELERATION, MIN_ACCELERATION = 2.3, -3.6  # m/s²; nuPlan's comfort bounds are 2.40 and -4.05
MAX_LATERAL_ACCELERATION, MAX_YAW_RATE, MAX_JERK = 3.2, 0.85, 3.9  # bounds 4.89 m/s², 0.95 rad/s, 4.13 m/s³
MIN_STEPS = 66  # a scene spans 6.5 s
MAX_SIDE_STEP_M = 0.4  # larger sideways jumps of the bumper in one step are artefacts of the simulation


@dataclass(frozen=True)
class EgoMotion:
    """Motion of a track as the ego, every STEP_S from step `first` on, in the district's local frame.

    poses:        (K, 3) rear axle x, y [m], heading [rad, unwrapped]
    velocity:     (K,) along the heading [m/s] (the rear axle does not slip sideways)
    acceleration: (K, 2) along and across the heading [m/s²]
    progress:     (K,) arc length of the rear axle along the bumper's raw trace [m]
    front_progress: (K,) arc length of the bumper along the same trace as SUMO drove it [m]
    comfortable:  (K,) bool, all bounds of human-plausible driving hold
    """

    first: int
    poses: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    progress: np.ndarray
    front_progress: np.ndarray
    comfortable: np.ndarray

    @property
    def last(self) -> int:
        return self.first + len(self.poses) - 1


def ego_motion(track: Track) -> EgoMotion | None:
    """Rear-axle motion of a recorded vehicle; None where it hardly moved or was recorded too briefly to matter."""
    if len(track.poses) < MIN_STEPS:
        return None
    steps = np.diff(track.poses[:, :2], axis=0)
    front = np.concatenate([[0.0], np.cumsum(np.hypot(*steps.T))])
    if front[-1] < 2 * Vehicle.LENGTH:
        return None
    path, path_step = _smooth_path(track.poses[:, :2], front)
    smooth_front = _smooth_progress(front)
    progress = smooth_front - Vehicle.FRONT_LENGTH
    driven = progress > 1.0  # before that the rear axle is behind the recorded trace
    if driven.sum() < 3:
        return None
    start = int(np.argmax(driven))
    grid = np.arange(len(path)) * path_step
    heading_on_path = np.unwrap(lines.headings(path))
    s = progress[start:]
    poses = np.stack([np.interp(s, grid, column) for column in (*path.T, heading_on_path)], axis=-1)
    velocity = np.gradient(poses[:, 0], STEP_S) * np.cos(poses[:, 2])
    velocity += np.gradient(poses[:, 1], STEP_S) * np.sin(poses[:, 2])
    forward = np.gradient(velocity, STEP_S)
    yaw_rate = np.gradient(poses[:, 2], STEP_S)
    acceleration = np.stack([forward, velocity * yaw_rate], axis=-1)
    comfortable = (
        (forward < MAX_ACCELERATION)
        & (forward > MIN_ACCELERATION)
        & (np.abs(acceleration[:, 1]) < MAX_LATERAL_ACCELERATION)
        & (np.abs(yaw_rate) < MAX_YAW_RATE)
        & (np.abs(np.gradient(forward, STEP_S)) < MAX_JERK)
        & ~_side_steps(track)[start:]
    )
    return EgoMotion(track.first + start, poses, velocity, acceleration, s, front[start:], comfortable)


def _smooth_path(points: np.ndarray, arc: np.ndarray) -> tuple[np.ndarray, float]:
    """(M, 2) trace resampled every PATH_STEP_M or a little less and smoothed, and that step; ends are kept."""
    moved = np.concatenate([[True], np.diff(arc) > 1e-3])
    count = int(np.ceil(arc[-1] / PATH_STEP_M)) + 1
    grid = np.linspace(0.0, arc[-1], count)
    path = np.stack([np.interp(grid, arc[moved], points[moved, k]) for k in range(2)], axis=-1)
    step = float(grid[1])
    return _filter_linear_ends(path, PATH_SMOOTHING_M / step), step


def _smooth_progress(arc: np.ndarray) -> np.ndarray:
    return _filter_linear_ends(arc[:, None], TIME_SMOOTHING_S / STEP_S)[:, 0]


def _filter_linear_ends(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian filter along axis 0 of a signal continued straight beyond its ends."""
    pad = int(np.ceil(4 * sigma))
    before = values[0] - np.arange(pad, 0, -1)[:, None] * (values[1] - values[0])
    after = values[-1] + np.arange(1, pad + 1)[:, None] * (values[-1] - values[-2])
    return gaussian_filter1d(np.concatenate([before, values, after]), sigma, axis=0)[pad:-pad]


def _side_steps(track: Track) -> np.ndarray:
    """(K,) bool: the bumper jumped sideways around this step, as at the end of a lane change on a short street."""
    steps = np.diff(track.poses[:, :2], axis=0, prepend=track.poses[:1, :2])
    sideways = np.abs(-np.sin(track.poses[:, 2]) * steps[:, 0] + np.cos(track.poses[:, 2]) * steps[:, 1])
    jumped = sideways > MAX_SIDE_STEP_M
    return np.convolve(jumped, np.ones(31), mode="same") > 0
