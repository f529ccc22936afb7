"""Scores by token, whoever wrote them: our `scores.csv`, NAVSIM's result files (v1, v2), tables of `tools/score.py`.

Which metric a file holds is told by its columns, and by the `summary.json` beside it where there is one. NAVSIM's
closing rows (averages, two-stage totals) are kept apart from the scenes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError, UserError
from navsim_eval.predictions import Predictions
from navsim_eval.results import FORMATS

TWO_STAGE = "_two_stage"  # ending of the metric of a file that holds both stages
STAGES = ("_stage_one", "_stage_two")
_CLOSING = ("average", "extended_pdm_score")  # how the tokens of closing rows begin


@dataclass(frozen=True)
class TokenScores:
    """Scores of S scenes under one metric.

    source:  file it was read from;  name: for people
    metric:  a key of `navsim_eval.results.FORMATS`; with the ending `_two_stage` for a file of both stages
    tokens:  (S,) str, each once;  logs: (S,) str, empty where the file does not say
    columns: sub-scores by NAVSIM's names, score last, (S,) fractions; NaN: failed scene, or not defined there
    split:   None where nothing says which
    closing: NAVSIM's closing rows: their token → score
    """

    source: str
    name: str
    metric: str
    tokens: np.ndarray
    logs: np.ndarray
    columns: Mapping[str, np.ndarray]
    split: str | None = None
    closing: Mapping[str, float] = field(default_factory=dict)


def read_scores(path: Path | str, metric: str = "", proposal: int = -1) -> TokenScores:
    """Read a result file, or the one in a folder of `tools/evaluate.py`.

    metric:   chooses among the sub-folders of an evaluation under several metrics
    proposal: which trajectory of each scene, for a table of `tools/score.py` that holds several

    Raises DataError for a file that is absent, not a result file, or ambiguous.
    """
    file = _result_file(Path(path), metric)
    cells = read_cells(file)
    for name in ("token", "score"):
        if name not in cells:
            raise DataError(file, "missing", field=name, remedy="a result file has the columns token, score, …")
    cells, closing = _without_closing_rows(_one_proposal(cells, proposal, file))
    tokens = np.array(cells["token"], str)
    repeated, counts = np.unique(tokens, return_counts=True)
    if (counts > 1).any():
        raise DataError(file, f"{repeated[counts > 1][0]} comes more than once", field="token")
    if not len(tokens):
        raise DataError(file, "holds no scene")

    summary = _summary_beside(file)
    columns = {name: read_numbers(cells[name], name, file) for name in _score_columns(cells, file)}
    if max(np.nanmax(values, initial=0.0) for values in columns.values()) > 1.0 + 1e-9:
        raise DataError(file, "values above 1", remedy="scores are fractions in [0, 1], not points")
    two_stage = any(name.endswith(STAGES) for name in cells)
    columns = _score_by_stage(columns) if two_stage else columns
    return TokenScores(
        source=str(file),
        name=summary.get("planner", {}).get("name") or _short_name(Path(path)),
        metric=(summary.get("metric") or _generation(cells)) + (TWO_STAGE if two_stage else ""),
        tokens=tokens,
        logs=_logs(cells, tokens, file),
        columns=columns,
        split=summary.get("split"),
        closing=closing,
    )


def _result_file(path: Path, metric: str) -> Path:
    """The result file that a path means."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(path, "there is no such file or folder", remedy="name a result file, or its folder")
    for folder in (path, path / metric):
        for name in ("scores.csv", "scores.parquet"):
            if (folder / name).is_file():
                return folder / name
    below = sorted(str(file.parent.relative_to(path)) for file in path.glob("**/scores.csv"))
    remedy = f"name one of {', '.join(below)} below it" if below else "tools/evaluate.py and tools/score.py write one"
    raise DataError(path, "no scores.csv in this folder", remedy=remedy)


# --- cells -----------------------------------------------------------------------------------------------------------

Cells = dict[str, list[Any]]


def read_cells(path: Path) -> Cells:
    """Columns of a .csv or .parquet file, cells as they are there."""
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path)
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = "give a .csv or .parquet result file"
        raise DataError(path, f"not a readable table ({error})", remedy=remedy) from error


def _read_parquet(path: Path) -> Cells:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install -e '.[parquet]')") from error
    try:
        return parquet.read_table(path).to_pydict()
    except ArrowException as error:
        raise DataError(path, f"not a parquet file ({str(error).splitlines()[0]})") from error


def _one_proposal(cells: Cells, proposal: int, path: Path) -> Cells:
    if "proposal" not in cells:
        if proposal >= 0:
            raise DataError(path, f"has no column of proposals, and proposal {proposal} is asked for")
        return cells
    numbers = [int(value) for value in cells["proposal"]]
    known = sorted(set(numbers))
    if proposal < 0 and len(known) > 1:
        remedy = "say which one: a_proposal=K or b_proposal=K"
        raise DataError(path, f"holds {len(known)} proposals a scene", field="proposal", remedy=remedy)
    if proposal >= 0 and proposal not in known:
        raise DataError(path, f"no proposal {proposal} (there are {known[0]} to {known[-1]})", field="proposal")
    wanted = proposal if proposal >= 0 else known[0]
    return {name: [v for v, n in zip(values, numbers, strict=True) if n == wanted] for name, values in cells.items()}


def _without_closing_rows(cells: Cells) -> tuple[Cells, dict[str, float]]:
    is_closing = [str(token).startswith(_CLOSING) for token in cells["token"]]
    closing = {
        str(token): float(score)
        for token, score, mark in zip(cells["token"], cells["score"], is_closing, strict=True)
        if mark and score not in ("", None)
    }
    kept = {n: [v for v, mark in zip(values, is_closing, strict=True) if not mark] for n, values in cells.items()}
    return kept, closing


def read_numbers(values: list[Any], name: str, path: Path) -> np.ndarray:
    """Cells as float64, empty ones NaN. Raises DataError for anything else."""
    try:
        return np.array([np.nan if value in ("", None) else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise DataError(path, f"not a number ({error})", field=name) from error


# --- what the cells mean ---------------------------------------------------------------------------------------------


def _generation(cells: Cells) -> str | None:
    """The metric generation that the columns belong to; None for neither."""
    if any(name.endswith(STAGES) for name in cells):
        return "epdms_v2"
    fitting = [metric for metric, form in FORMATS.items() if all(name in cells for name in form.columns)]
    return max(fitting, key=lambda metric: len(FORMATS[metric].columns), default=None)


def _score_columns(cells: Cells, path: Path) -> tuple[str, ...]:
    metric = _generation(cells)
    if any(name.endswith(STAGES) for name in cells):
        names = FORMATS[metric].columns
        return (*(n + stage for stage in STAGES for n in names if n + stage in cells), "score")
    if metric is None:
        nearest = min(FORMATS, key=lambda m: sum(name not in cells for name in FORMATS[m].columns))
        absent = [name for name in FORMATS[nearest].columns if name not in cells]
        raise DataError(path, f"neither a PDMS nor an EPDMS result file (for {nearest} it lacks {', '.join(absent)})")
    return FORMATS[metric].columns


def _score_by_stage(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Two-stage files have one column of scores for both stages; a row belongs to the stage that it has values in."""
    columns = dict(columns)
    score = columns.pop("score")
    for stage in STAGES:
        mine = [values for name, values in columns.items() if name.endswith(stage)]
        known = np.isfinite(mine).any(axis=0) if mine else np.zeros(len(score), bool)
        columns[f"score{stage}"] = np.where(known, score, np.nan)
    return columns


def _summary_beside(path: Path) -> dict[str, Any]:
    """What `summary.json` of the same folder says; it speaks for `scores.csv` only."""
    summary = path.with_name("summary.json")
    if path.name != "scores.csv" or not summary.is_file():
        return {}
    try:
        content = json.loads(summary.read_text())
    except ValueError as error:
        raise DataError(summary, f"not JSON ({error})", remedy="evaluate again") from error
    return content if isinstance(content, dict) and "metric" in content else {}


def _logs(cells: Cells, tokens: np.ndarray, path: Path) -> np.ndarray:
    """Log of each scene, from the table itself or from the predictions that were scored; empty where unknown."""
    if "log_name" in cells:
        return np.array([str(name or "") for name in cells["log_name"]], str)
    for folder in (path.parent, path.parent.parent):
        if (folder / "predictions.npz").is_file():
            predictions = Predictions.load(folder / "predictions.npz")
            if "log" in predictions.facts:
                known = dict(zip(predictions.tokens.tolist(), predictions.facts["log"].tolist(), strict=True))
                return np.array([known.get(token, "") for token in tokens.tolist()], str)
    return np.full(len(tokens), "", str)


def _short_name(path: Path) -> str:
    return "/".join(path.with_suffix("").parts[-2:])
