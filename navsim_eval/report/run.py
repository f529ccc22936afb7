"""One planner under one metric, as every part of a report sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.predictions import Predictions
from navsim_eval.results import Results

SPEED_EDGES = (0.0, 2.0, 5.0, 10.0, np.inf)  # m/s


@dataclass(frozen=True)
class Run:
    """What was planned, what it scored, and the folder that holds both."""

    results: Results
    summary: Mapping[str, Any]
    predictions: Predictions
    folder: Path

    @property
    def planner(self) -> str:
        return self.summary["planner"]["name"]


def focus_run(runs: Sequence[Run]) -> Run:
    """The run whose scenes are drawn: the last planner that offers several modes, else the last one."""
    metric = runs[0].results.metric
    mine = [run for run in runs if run.results.metric == metric]
    with_modes = [run for run in mine if run.predictions.candidates is not None]
    return (with_modes or mine)[-1]


def low_mark(column: str) -> float:
    """Below this a sub-score counts as failing. Most are 1 or a fault; progress is a matter of degree."""
    return 0.5 if column in ("ego_progress", "score") else 1.0


def speed_label(low: float, high: float) -> str:
    return f"over {low:g} m/s" if np.isinf(high) else f"{low:g}–{high:g} m/s"
