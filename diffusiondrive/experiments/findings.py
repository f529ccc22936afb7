"""What trainings under several seeds say about each other: means, paired differences, verdicts.

A row's score in a scene is the mean over its seeds. Differences of rows are paired by scene, with 95 % intervals from a
bootstrap over logs (scenes of one log share road, weather and traffic); how far seeds scatter is given beside, because
the interval holds for these seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.comparison.bootstrap import paired_interval
from navsim_eval.comparison.read import read_scores
from navsim_eval.errors import DataError


@dataclass(frozen=True)
class RowScores:
    """PDMS of one row.

    tokens, logs: (S,) scenes;  scores: (K, S) fractions, a line a seed
    modes: what its candidates are worth, means over seeds of the numbers in `summary.json` under "modes" (see
           `navsim_eval.modes`), empty where they were not judged
    """

    name: str
    tokens: np.ndarray
    logs: np.ndarray
    scores: np.ndarray
    modes: Mapping[str, float]

    @property
    def mean(self) -> float:
        return float(self.scores.mean())

    def as_dict(self) -> dict[str, Any]:
        """For JSON; points."""
        by_seed = 100.0 * self.scores.mean(axis=1)
        low, high = paired_interval(self.scores.mean(axis=0)[:, None], self.logs)
        return {
            "pdms": 100.0 * self.mean,
            "interval": [100.0 * float(low[0]), 100.0 * float(high[0])],
            "by_seed": by_seed.tolist(),
            "seed_deviation": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
            "modes": dict(self.modes),
        }


def read_row(name: str, folders: Sequence[Path]) -> RowScores:
    """Scores of a row, one folder of `tools/evaluate.py` a seed.

    Raises DataError where scenes are missing or differ between the seeds: half an evaluation is none.
    """
    tables = [read_scores(folder) for folder in folders]
    order = np.argsort(tables[0].tokens)
    tokens, logs = tables[0].tokens[order], tables[0].logs[order]
    scores = []
    for table, folder in zip(tables, folders, strict=True):
        mine = np.argsort(table.tokens)
        if not np.array_equal(table.tokens[mine], tokens):
            raise DataError(folder, f"holds other scenes than {folders[0]}", remedy="evaluate both again")
        scores.append(table.columns["score"][mine])
    if not np.isfinite(scores).all():
        raise DataError(folders[0], "has scenes without a score", remedy="see its summary.json for the reasons")
    return RowScores(name, tokens, logs, np.array(scores), _mean_modes(folders))


def _mean_modes(folders: Sequence[Path]) -> dict[str, float]:
    found = []
    for folder in folders:
        modes = json.loads((folder / "summary.json").read_text()).get("modes") or {}
        numbers = {**modes, "ece_nearest": (modes.get("calibration") or {}).get("ece_nearest")}
        found.append({name: value for name, value in numbers.items() if isinstance(value, (int, float))})
    shared = [name for name in found[0] if all(name in numbers for numbers in found)]
    return {name: float(np.mean([numbers[name] for numbers in found])) for name in shared}


def read_environments(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What trainings ran on: versions, hardware and source state (`navsim_eval.environment`), an entry for each kind of
    machine, with the names of its trainings. Raises DataError for a folder that does not say."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = folder / "environment.json"
        try:
            environment = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(path, f"cannot be read ({error})", remedy="train this one again") from error
        environment.pop("time", None)
        kind = json.dumps(environment, sort_keys=True)
        found.setdefault(kind, {"trainings": [], **environment})["trainings"].append(folder.name)
    return list(found.values())


@dataclass(frozen=True)
class RowDifference:
    """Row a − row b in points, paired by scene; by_seed: the same for each pair of seeds of equal rank."""

    a: str
    b: str
    difference: float
    interval: tuple[float, float]
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """In words, for the claim that a is better than b."""
        low, high = self.interval
        return "holds" if low > 0.0 else "reversed" if high < 0.0 else "undecided"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def difference(a: RowScores, b: RowScores) -> RowDifference:
    """Of two rows on the same scenes. Raises DataError where the scenes differ."""
    if not np.array_equal(a.tokens, b.tokens):
        raise DataError(a.name, f"and {b.name} were scored on different scenes")
    gained = a.scores.mean(axis=0) - b.scores.mean(axis=0)
    low, high = paired_interval(gained[:, None], a.logs)
    pairs = zip(a.scores.mean(axis=1), b.scores.mean(axis=1), strict=False)
    return RowDifference(
        a.name, b.name, 100.0 * float(gained.mean()), (100.0 * float(low[0]), 100.0 * float(high[0])),
        tuple(100.0 * float(x - y) for x, y in pairs),
    )  # fmt: skip


@dataclass(frozen=True)
class RatioClaim:
    """A claim that a ratio reaches a bound: value ≥ bound, or ≤ bound."""

    text: str
    value: float
    bound: float
    at_least: bool

    @property
    def verdict(self) -> str:
        reached = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "holds" if reached else "missed"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}
