"""How sure a difference of means is: the paired bootstrap, over scenes or over clusters of scenes.

Scenes of one log share road, weather and traffic, so their differences are not independent: resampling single scenes
then gives intervals that are too narrow, resampling whole logs does not. Both are functions of the same kind here: a
scene alone is a cluster of one.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm, t

_DRAWS_AT_ONCE = 1 << 22


def paired_interval(
    differences: np.ndarray,
    clusters: np.ndarray | None = None,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds, each (C,), of the mean difference in each of C columns.

    differences: (S, C) of paired scenes; NaN where a column is not defined
    clusters:    (S,) labels that are resampled as wholes; None: every scene for itself

    Expanded percentile interval (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 5): bounds
    are percentiles of the resampled means, taken further out by what Student's t asks for at few clusters. Bounds are
    order statistics, so that exchanging the two sides of all pairs negates them exactly. NaN for a column with fewer
    than two clusters.
    """
    sums, counts = _by_cluster(differences, clusters)
    low, high = (np.full(differences.shape[1], np.nan) for _ in range(2))
    if len(sums) < 2:
        return low, high
    means = np.sort(_resampled_means(sums, counts, resamples, seed), axis=0)  # NaN last
    for column, defined in enumerate(np.isfinite(means).sum(axis=0)):
        groups = int((counts[:, column] > 0).sum())
        if groups >= 2 and defined:
            first = int(np.floor(_tail(groups, level) * (defined - 1)))
            low[column], high[column] = means[first, column], means[defined - 1 - first, column]
    return low, high


def _tail(groups: int, level: float) -> float:
    """Share of resamples to cut at each end."""
    return float(norm.cdf(-np.sqrt(groups / (groups - 1)) * t.ppf(0.5 + level / 2, groups - 1)))


def _by_cluster(differences: np.ndarray, clusters: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of the defined differences, (G, C) each."""
    known = np.isfinite(differences)
    values = np.where(known, differences, 0.0)
    if clusters is None:
        return values, known.astype(np.float64)
    labels, index = np.unique(clusters, return_inverse=True)
    sums, counts = (np.zeros((len(labels), differences.shape[1])) for _ in range(2))
    np.add.at(sums, index, values)
    np.add.at(counts, index, known)
    return sums, counts


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, C) means of clusters drawn with replacement; which are drawn depends on seed and G only."""
    rng = np.random.default_rng(seed)
    groups, means = len(sums), []
    at_once = max(1, _DRAWS_AT_ONCE // groups)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(groups, size=(rows, groups)) + groups * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((weights @ sums) / (weights @ counts))
    return np.concatenate(means)
