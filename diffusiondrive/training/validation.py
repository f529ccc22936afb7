"""The evaluator inside training: PDMS of validation plans."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from navsim_eval import score
from navsim_eval.metric_caches import MetricCaches

METRIC = "pdms_v1"


class PdmsScorer:
    """Scores the chosen plans of validation scenes against their metric caches."""

    columns = (
        "pdms",
        "no_at_fault_collisions",
        "drivable_area_compliance",
        "ego_progress",
        "time_to_collision_within_bound",
        "comfort",
    )

    def __init__(self, caches: MetricCaches):
        self.caches = caches

    def sums(self, tokens: Sequence[str], trajectories: np.ndarray) -> np.ndarray:
        """tokens (N,), trajectories (N, 8, 3) ego frame → (len(columns) + 1,): sums over valid scenes, their number."""
        if not len(tokens):
            return np.zeros(len(self.columns) + 1)
        table = score([self.caches[token] for token in tokens], trajectories[:, None], metric=METRIC)
        columns = {**table.columns, "pdms": table.columns["score"]}
        sums = [columns[name][table.valid].sum() for name in self.columns]
        return np.array([*sums, table.valid.sum()], np.float64)
