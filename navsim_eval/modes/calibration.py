"""Whether a probability is one: candidates in bins of what the planner said, beside what came true.

Expected calibration error (arXiv 1706.04599): Σ over bins of (share of the bin) · |mean probability - mean outcome|.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Candidates whose probability lies in [low, high), the last bin closed; means are None in an empty bin.

    nearest: share that is the candidate nearest to the human plan;  score: mean score
    """

    low: float
    high: float
    count: int
    probability: float | None
    nearest: float | None
    score: float | None


def reliability(probability: np.ndarray, nearest: np.ndarray, score: np.ndarray, bins: int = BINS) -> list[Bin]:
    """All arrays (N,), probability in [0, 1]; an outcome that is NaN is left out of its mean."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    table = []
    for number in range(bins):
        mine = index == number
        means = [_mean(values[mine]) for values in (probability, nearest, score)]
        table.append(Bin(number / bins, (number + 1) / bins, int(mine.sum()), *means))
    return table


def expected_error(table: list[Bin], outcome: str) -> float | None:
    """Expected calibration error against `nearest` or `score`; None where the outcome is nowhere known."""
    filled = [(row.count, row.probability, getattr(row, outcome)) for row in table]
    filled = [row for row in filled if row[2] is not None]
    total = sum(count for count, *_ in filled)
    return sum(count * abs(said - was) for count, said, was in filled) / total if total else None


def calibration(logits: np.ndarray, nearest: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """Reliability table and expected errors of logits (S, M) as sigmoid probabilities, for a summary.

    nearest: (S, M) 1 for the candidate nearest to the human plan, NaN where that is unknown;  score: (S, M)
    """
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    table = reliability(probability.ravel(), nearest.ravel(), score.ravel())
    return {
        "ece_nearest": expected_error(table, "nearest"),
        "ece_score": expected_error(table, "score"),
        "bins": [asdict(row) for row in table],
    }


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
