"""Scores of many trajectories in many scenes, as columns."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from navsim_eval.files import atomic_write


@dataclass(frozen=True)
class ScoreTable:
    """Scores of R = S × N trajectories, scene after scene.

    tokens, log_names: (R,) str;  proposals: (R,) int index within the scene
    valid:   (R,) bool, False where the trajectory was not finite: its scores are NaN
    columns: sub-scores by NAVSIM's names, `score` last, (R,) float64
    details: what they come from, not written to CSV: `raw_progress`, `raw_progress_reference` [m],
             `first_collision_index`, `first_ttc_index` (0.1 s steps, inf: none), `comfort_checks` (R, 6),
             `final_state` (R, 11) simulated state after 4 s, global
    """

    metric: str
    tokens: np.ndarray
    log_names: np.ndarray
    proposals: np.ndarray
    valid: np.ndarray
    columns: dict[str, np.ndarray]
    details: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def mean(self) -> dict[str, float]:
        """Mean of every column over the rows where it is defined; NaN where it is nowhere."""
        return {
            name: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
            for name, values in self.columns.items()
        }

    def to_csv(self, path: Path | str) -> Path:
        """One row a trajectory: token, log_name, proposal, valid, sub-scores, score (fractions). Undefined: empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["token", "log_name", "proposal", "valid", *self.columns])
        numbers = np.column_stack(list(self.columns.values()))
        for row in range(len(self)):
            cells = ("" if np.isnan(value) else repr(float(value)) for value in numbers[row])
            head = self.tokens[row], self.log_names[row], int(self.proposals[row]), bool(self.valid[row])
            writer.writerow([*head, *cells])
        return atomic_write(path, text.getvalue())
