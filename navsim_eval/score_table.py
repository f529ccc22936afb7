"""Scores of many trajectories in many scenes, as columns."""

from __future__ import annotations

import csv
import importlib.util
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write


@dataclass(frozen=True)
class ScoreTable:
    """Scores of R = S × N trajectories, scene after scene.

    tokens, log_names: (R,) str;  proposals: (R,) int index within the scene
    valid:   (R,) bool, False where the trajectory was not finite: its scores are NaN
    columns: sub-scores by NAVSIM's names, `score` last, (R,) float64
    details: what they come from, not written to files: `raw_progress`, `raw_progress_reference` [m],
             `first_collision_index`, `first_ttc_index` (0.1 s steps, inf: none), under pdms_v1 `comfort_checks` (R, 6),
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

    def save(self, path: Path | str) -> Path:
        """Write a .csv or .parquet file, by its ending: token, log_name, proposal, valid, sub-scores, score.

        Scores are fractions; an undefined one is empty. Raises UserError as `check_writable` does.
        """
        check_writable(path)
        return _WRITERS[Path(path).suffix](self, Path(path))

    def to_csv(self, path: Path | str) -> Path:
        """Write a .csv file, whatever its name."""
        return _write_csv(self, Path(path))

    def _identity(self) -> dict[str, np.ndarray]:
        return {"token": self.tokens, "log_name": self.log_names, "proposal": self.proposals, "valid": self.valid}


def check_writable(path: Path | str) -> None:
    """Raise UserError unless the file's ending is one that scores can be written as here."""
    if Path(path).suffix not in _WRITERS:
        raise UserError(f"{path}: scores are written as {' or '.join(_WRITERS)}, by the ending of the name")
    if Path(path).suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: writing parquet needs pyarrow (pip install pyarrow); or choose .csv")


def _write_csv(table: ScoreTable, path: Path) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table._identity(), *table.columns])
    identity = [values.tolist() for values in table._identity().values()]
    columns = [
        ["" if value != value else repr(value) for value in values.tolist()] for values in table.columns.values()
    ]
    writer.writerows(zip(*identity, *columns, strict=True))
    return atomic_write(path, text.getvalue())


def _write_parquet(table: ScoreTable, path: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    arrays = {**table._identity(), **table.columns}
    content = pyarrow.table({name: pyarrow.array(values, from_pandas=True) for name, values in arrays.items()})
    return atomic_write(path, lambda temporary: parquet.write_table(content, temporary))


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet}
