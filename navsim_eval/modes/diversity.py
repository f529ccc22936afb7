"""How different the candidates of a scene are: two published scores.

Area score (DiffusionDrive, arXiv 2411.15139, eq. 3): D = 1 - mean_i Area(τ_i ∩ U) / Area(τ_i ∪ U) with U the union of
all trajectories, which is 1 - mean_i Area(τ_i) / Area(U), as every τ_i lies within U. 0: all the same; at most 1 - 1/M.
What the area of a trajectory is was not said, and no code is published. Here: the ribbon of the ego's width along the
path from the ego's present place through all poses, exact polygons, ends rounded.

Relative spread (the follow-up's code, DiffusionDriveV2): per pose, mean distance between two candidates over their mean
distance from the origin, at most 1; mean over the poses. The two rank planners differently: say which one is meant.
"""

from __future__ import annotations

import numpy as np
import shapely

from navsim_eval.geometry import Vehicle

_SCENES_AT_ONCE = 256


def area_diversity(candidates: np.ndarray, width: float = 2 * Vehicle.HALF_WIDTH) -> np.ndarray:
    """Candidates (S, M, T, 2 or 3) x, y [m], ego frame -> (S,) in [0, 1 - 1/M]; NaN where a pose is not finite."""
    points = np.asarray(candidates, np.float64)[..., :2]
    scores = np.full(len(points), np.nan)
    rows = np.flatnonzero(np.isfinite(points).all(axis=(1, 2, 3)))
    for start in range(0, len(rows), _SCENES_AT_ONCE):
        part = rows[start : start + _SCENES_AT_ONCE]
        paths = np.concatenate([np.zeros_like(points[part, :, :1]), points[part]], axis=2)
        ribbons = shapely.buffer(shapely.linestrings(paths), width / 2)
        union = shapely.area(shapely.union_all(ribbons, axis=1))
        scores[part] = 1 - shapely.area(ribbons).mean(axis=1) / union
    return np.clip(scores, 0, None)  # a rounding error below zero where all are the same


def relative_spread(candidates: np.ndarray) -> np.ndarray:
    """Candidates (S, M, T, 2 or 3) x, y [m], ego frame -> (S,) in [0, 1]; 0 for a single candidate."""
    points = np.asarray(candidates, np.float64)[..., :2]
    first, second = np.triu_indices(points.shape[1], k=1)
    scores = np.zeros(len(points))
    if not len(first):
        return scores
    for start in range(0, len(points), _SCENES_AT_ONCE):
        part = points[start : start + _SCENES_AT_ONCE]
        between = np.linalg.norm(part[:, first] - part[:, second], axis=-1).mean(axis=1)  # (s, T)
        away = np.linalg.norm(part, axis=-1).mean(axis=1)
        scores[start : start + _SCENES_AT_ONCE] = np.minimum(between / (away + 1e-6), 1).mean(axis=1)
    return scores
