"""What plans look like as curves: where they leave what the planner sees, and how well headings fit the paths.

Plans are (..., 8, 3): x, y in metres and heading in radians, ego frame, 0.5 s apart; the ego starts at the origin with
heading 0. The published decoder regresses headings beside the points that it diffuses, and nothing ties the two.
"""

from __future__ import annotations

import numpy as np

from navsim_eval.geometry import wrap_angle

STANDING_M = 0.5  # shorter steps have no reliable direction


def beyond_square(plans: np.ndarray, range_m: float) -> np.ndarray:
    """(..., 8) bool: poses outside the square of ±range_m around the ego, where map look-ups read zeros."""
    return np.abs(plans[..., :2]).max(axis=-1) > range_m


def beyond_box(plans: np.ndarray, low: tuple[float, float], high: tuple[float, float]) -> np.ndarray:
    """(..., 8) bool: poses outside low … high [m] in x or y, which the sampler's clamp to [-1, 1] can't start from."""
    return ((plans[..., :2] < low) | (plans[..., :2] > high)).any(axis=-1)


def heading_errors(plans: np.ndarray) -> np.ndarray:
    """(..., 8) angle [rad] between each step's direction and the mean of the headings at its ends; NaN where it stands.

    A rear axle that rolls along a circle has none.
    """
    steps, middle = _steps(plans)
    direction = np.arctan2(steps[..., 1], steps[..., 0])
    return np.where(np.linalg.norm(steps, axis=-1) > STANDING_M, np.abs(wrap_angle(direction - middle)), np.nan)


def headings_from_paths(plans: np.ndarray) -> np.ndarray:
    """The same points, each heading that of the parabola through the pose and its neighbours; unchanged at a stand."""
    points = np.concatenate([np.zeros_like(plans[..., :1, :2]), plans[..., :2]], axis=-2)
    tangent = np.concatenate(
        [
            points[..., 2:, :] - points[..., :-2, :],
            3 * points[..., -1:, :] - 4 * points[..., -2:-1, :] + points[..., -3:-2, :],
        ],
        axis=-2,
    )  # of two steps' length
    moves = np.linalg.norm(tangent, axis=-1) > 2 * STANDING_M
    tied = plans.copy()
    tied[..., 2] = np.where(moves, np.arctan2(tangent[..., 1], tangent[..., 0]), plans[..., 2])
    return tied


def paths_from_headings(plans: np.ndarray) -> np.ndarray:
    """The same headings, each step turned to the mean of the headings at its ends and as long as it went that way."""
    steps, middle = _steps(plans)
    forward = np.stack([np.cos(middle), np.sin(middle)], axis=-1)
    length = (steps * forward).sum(axis=-1, keepdims=True)
    return np.concatenate([np.cumsum(length * forward, axis=-2), plans[..., 2:]], axis=-1)


def _steps(plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., 8, 2) steps [m] from pose to pose, the first one from the origin;  (..., 8) mean heading of their ends."""
    from_start = np.concatenate([np.zeros_like(plans[..., :1, :]), plans], axis=-2)
    return np.diff(from_start[..., :2], axis=-2), (from_start[..., 1:, 2] + from_start[..., :-1, 2]) / 2
