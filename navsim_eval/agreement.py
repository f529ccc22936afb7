"""Do our scores equal somebody else's? A table of scores held against a file of expected ones, value by value.

For whoever changes a metric, or doubts one: sub-scores of the official devkit, of an earlier version, or of golden data
on one side, ours on the other. (Which of two planners is better, `navsim_eval.comparison` tells.)
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.comparison.read import read_cells, read_numbers
from navsim_eval.errors import DataError
from navsim_eval.files import read_npz
from navsim_eval.score_table import ScoreTable

TOLERANCE = 1e-6
_EXAMPLES = 3
_REMEDY = (
    "an .npz with tokens (S,) and an array (S, N) a sub-score, or a .csv or .parquet with the columns token, "
    "proposal (where there are several) and the sub-scores"
)


@dataclass(frozen=True)
class ColumnAgreement:
    """One sub-score over R trajectories.

    compared:  values held against each other;  differing: those apart by more than the tolerance, or defined on one
               side only;  largest: largest absolute difference, inf where a value is defined on one side only
    examples:  the first few that differ: (token, proposal, ours, theirs)
    """

    name: str
    compared: int
    differing: int
    largest: float
    examples: tuple[tuple[str, int, float, float], ...]


@dataclass(frozen=True)
class Agreement:
    """All sub-scores that both sides have. unmatched: trajectories of ours that the file says nothing about."""

    source: str
    tolerance: float
    columns: tuple[ColumnAgreement, ...]
    unmatched: int

    @property
    def differing(self) -> int:
        """Values that differ, of all sub-scores."""
        return sum(column.differing for column in self.columns)

    @property
    def compared(self) -> int:
        return sum(column.compared for column in self.columns)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "differing": self.differing, "compared": self.compared}

    def __str__(self) -> str:
        lines = [f"{'held against ' + self.source:<54} {'values':>8} {'differ':>7} {'largest':>9}"]
        for column in self.columns:
            lines.append(f"{column.name:<54} {column.compared:>8} {column.differing:>7} {column.largest:>9.1e}")
            for token, proposal, ours, theirs in column.examples:
                lines.append(f"    {token} proposal {proposal}: ours {ours:.9g}, theirs {theirs:.9g}")
        verdict = "equal" if not self.differing else f"{self.differing} values differ"
        lines.append(f"{verdict} ({self.compared} values, tolerance {self.tolerance:g})")
        if self.unmatched:
            lines.append(f"{self.unmatched} trajectories have no counterpart")
        return "\n".join(lines)


def hold_against(table: ScoreTable, path: Path | str, tolerance: float = TOLERANCE) -> Agreement:
    """Compare a table with the expected scores in a file, trajectory by trajectory.

    path: .npz with tokens (S,) str and arrays (S, N) named as the sub-scores, or a .csv or .parquet with one row a
    trajectory, as `tools/score.py` and NAVSIM write them. Scores are fractions. NaN or an empty cell equals undefined.
    Raises DataError for another file, or one that shares no trajectory or no sub-score with the table.
    """
    keys, columns = _read_arrays(Path(path)) if Path(path).suffix == ".npz" else _read_rows(Path(path))
    shared = [name for name in table.columns if name in columns]
    if not shared:
        raise DataError(path, f"none of the sub-scores {', '.join(table.columns)}", remedy=_REMEDY)
    row_of = {key: row for row, key in enumerate(keys)}
    wanted = zip(table.tokens.tolist(), table.proposals.tolist(), strict=True)
    theirs = np.array([row_of.get(key, -1) for key in wanted])
    mine = np.flatnonzero(theirs >= 0)
    if not len(mine):
        raise DataError(path, "holds none of the scored trajectories (token, proposal)", remedy=_REMEDY)
    compared = (_compare(name, table, mine, columns[name][theirs[mine]], tolerance) for name in shared)
    return Agreement(str(path), tolerance, tuple(compared), len(table) - len(mine))


def _compare(name: str, table: ScoreTable, rows: np.ndarray, theirs: np.ndarray, tolerance: float) -> ColumnAgreement:
    ours = table.columns[name][rows]
    apart = np.where(np.isnan(ours) & np.isnan(theirs), 0.0, np.abs(ours - theirs))
    apart[np.isnan(apart)] = np.inf
    wrong = np.flatnonzero(apart > tolerance)
    examples = tuple(
        (str(table.tokens[rows[k]]), int(table.proposals[rows[k]]), float(ours[k]), float(theirs[k]))
        for k in wrong[:_EXAMPLES]
    )
    return ColumnAgreement(name, len(rows), len(wrong), float(apart.max()), examples)


Key = tuple[str, int]  # token, proposal


def _read_arrays(path: Path) -> tuple[list[Key], dict[str, np.ndarray]]:
    arrays = read_npz(path, _REMEDY)
    tokens = arrays.pop("tokens", np.zeros(0))
    if tokens.ndim != 1 or tokens.dtype.kind not in "US" or not len(tokens):
        raise DataError(path, f"{tokens.dtype} {tokens.shape}", field="tokens", remedy=_REMEDY)
    shapes = {v.shape for v in arrays.values() if v.ndim == 2 and len(v) == len(tokens) and v.dtype.kind == "f"}
    if len(shapes) != 1:
        raise DataError(path, f"no arrays of one shape ({len(tokens)}, N)", remedy=_REMEDY)
    shape = shapes.pop()
    keys = [(token, k) for token in tokens.astype(str).tolist() for k in range(shape[1])]
    return keys, {name: v.astype(np.float64).ravel() for name, v in arrays.items() if v.shape == shape}


def _read_rows(path: Path) -> tuple[list[Key], dict[str, np.ndarray]]:
    cells = read_cells(path)
    if "token" not in cells:
        raise DataError(path, "missing", field="token", remedy=_REMEDY)
    count = len(cells["token"])
    try:
        proposals = [int(value) for value in cells.get("proposal", [0] * count)]
    except ValueError as error:
        raise DataError(path, str(error), field="proposal", remedy=_REMEDY) from error
    columns = {}
    for name, values in cells.items():
        with suppress(DataError):  # texts, which are nobody's scores
            columns[name] = read_numbers(values, name, path)
    return list(zip(map(str, cells["token"]), proposals, strict=True)), columns
