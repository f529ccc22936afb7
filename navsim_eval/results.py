"""Scores of one planner on one split, on disk: NAVSIM's CSV per token and a summary that says what it is worth.

A summary carries the headline only when every expected scene was scored; otherwise the headline is null and the verdict
reads "partial: n of N". Scores are fractions in [0, 1]; tables for people print them times 100.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write


@dataclass(frozen=True)
class MetricFormat:
    """How one metric version is written down.

    title:    for people;  headline: key of the summary;  columns: of the CSV, in NAVSIM's order, `score` last
    average:  token of the closing row (of one stage)
    """

    title: str
    headline: str
    columns: tuple[str, ...]
    average: str


_EPDMS_COLUMNS = (
    "no_at_fault_collisions", "drivable_area_compliance", "driving_direction_compliance",
    "traffic_light_compliance", "ego_progress", "time_to_collision_within_bound", "lane_keeping",
    "history_comfort", "two_frame_extended_comfort", "score",
)  # fmt: skip
FORMATS = {
    "pdms_v1": MetricFormat(
        "PDMS (NAVSIM v1.1)",
        "pdms",
        ("no_at_fault_collisions", "drivable_area_compliance", "ego_progress", "time_to_collision_within_bound",
         "comfort", "driving_direction_compliance", "score"),
        "average",
    ),
    "epdms_v2": MetricFormat("EPDMS (NAVSIM v2.2)", "epdms", _EPDMS_COLUMNS, "average_all_frames"),
    "epdms_v2_unfixed_filter": MetricFormat(
        "EPDMS (NAVSIM v2, human filter before its fix)", "epdms_unfixed_filter", _EPDMS_COLUMNS, "average_all_frames"
    ),
}  # fmt: skip
TWO_STAGE_ROW = "extended_pdm_score"
STAGES = ("stage_one", "stage_two", "combined")

SHORT = {
    "no_at_fault_collisions": "NC",
    "drivable_area_compliance": "DAC",
    "driving_direction_compliance": "DDC",
    "traffic_light_compliance": "TLC",
    "ego_progress": "EP",
    "time_to_collision_within_bound": "TTC",
    "lane_keeping": "LK",
    "comfort": "C",
    "history_comfort": "HC",
    "two_frame_extended_comfort": "EC",
    "score": "score",
}


@dataclass(frozen=True)
class Results:
    """Scores of S scenes.

    metric:   key of FORMATS
    tokens:   (S,) str, every scene that was to be scored, failed ones included
    columns:  name → (S,) float64; NaN in the rows of failed scenes and where a sub-score is not defined
    failures: token → reason
    two_stage: means of STAGES by column, None where undefined; empty in one stage
    second:   (S,) bool scenes of the second stage, None in one stage
    """

    metric: str
    tokens: np.ndarray
    columns: Mapping[str, np.ndarray]
    failures: Mapping[str, str] = field(default_factory=dict)
    two_stage: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    second: np.ndarray | None = None

    @property
    def valid(self) -> np.ndarray:
        """(S,) bool: scenes with a score."""
        return np.isfinite(self.columns["score"])

    def means(self) -> dict[str, float | None]:
        """Mean of every column over the scenes where it is defined; None where it is nowhere.

        In two stages: the combined value, which no mean over scenes gives.
        """
        if self.two_stage:
            return {name: self.two_stage["combined"][name] for name in self.columns}
        defined = {name: values[np.isfinite(values)] for name, values in self.columns.items()}
        return {name: float(values.mean()) if len(values) else None for name, values in defined.items()}

    def save_csv(self, path: Path | str) -> Path:
        """Write NAVSIM's result file: unnamed index, token, valid, sub-scores, score, and the closing rows.

        In two stages, sub-scores come once with the ending `_stage_one` and once with `_stage_two`, one of them empty
        in each scene's row, and the closing rows are the means of stage one, stage two, and both combined.
        """
        if self.two_stage:
            return self._save_two_stage_csv(path)
        form, means = FORMATS[self.metric], self.means()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["", "token", "valid", *form.columns])
        rows = np.column_stack([self.columns[name] for name in form.columns])
        for index, (token, valid, row) in enumerate(zip(self.tokens, self.valid, rows, strict=True)):
            writer.writerow([index, token, bool(valid), *map(_cell, row)])
        closing = [_cell(means[name]) for name in form.columns]
        writer.writerow([len(rows), form.average, bool(self.valid.all()), *closing])
        return atomic_write(path, text.getvalue())

    def _save_two_stage_csv(self, path: Path | str) -> Path:
        names = [name for name in FORMATS[self.metric].columns if name != "score"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["", "token", "valid", *(f"{name}_{stage}" for stage in STAGES[:2] for name in names), "score"])
        empty = [""] * len(names)
        for index, (token, valid, second) in enumerate(zip(self.tokens, self.valid, self.second, strict=True)):
            own = [_cell(self.columns[name][index]) for name in names]
            halves = [*empty, *own] if second else [*own, *empty]
            writer.writerow([index, token, bool(valid), *halves, _cell(self.columns["score"][index])])
        shown = {"stage_one": (1, 0), "stage_two": (0, 1), "combined": (1, 1)}
        for offset, (stage, halves) in enumerate(shown.items()):
            cells = [
                [_cell(self.two_stage[part][name]) for name in names] if show else empty
                for part, show in zip(STAGES[:2], halves, strict=True)
            ]
            row = [len(self.tokens) + offset, f"{TWO_STAGE_ROW}_{stage}", bool(self.valid.all())]
            writer.writerow([*row, *cells[0], *cells[1], _cell(self.two_stage[stage]["score"])])
        return atomic_write(path, text.getvalue())

    @classmethod
    def load_csv(cls, path: Path | str, metric: str) -> Results:
        """Read a result file of this metric version, ours or the devkit's. Closing rows are left out."""
        form = FORMATS[metric]
        try:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise DataError(path, f"no scores here ({error.strerror})", remedy="make them with stage=score") from error
        absent = [name for name in ("token", *form.columns) if not rows or name not in rows[0]]
        if absent:
            raise DataError(path, f"not a {metric} result file", field=absent[0])
        rows = [row for row in rows if not row["token"].startswith("average")]
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in form.columns}
        return cls(metric, np.array([row["token"] for row in rows], str), columns)


@dataclass(frozen=True)
class Coverage:
    """How many scenes a score speaks for.

    expected: scenes that the split lists, or has on disk;  found: readable ones;  planned: with a plan;  scored
    lost_logs: logs that are listed but absent, or unreadable (their scenes may not be counted in `expected`)
    reasons:  token or file → why it is not scored
    """

    expected: int
    found: int
    planned: int
    scored: int
    lost_logs: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return 0 < self.expected == self.scored and not self.lost_logs

    @property
    def verdict(self) -> str:
        if self.complete:
            return "complete"
        lost = f" ({self.lost_logs} logs missing or unreadable)" if self.lost_logs else ""
        return f"partial: {self.scored} of {self.expected}{lost}"

    def as_dict(self, listed: int = 20) -> dict[str, Any]:
        counts = ("expected", "found", "planned", "scored", "lost_logs")
        reasons = dict(list(self.reasons.items())[:listed])
        return {**{name: getattr(self, name) for name in counts}, "first_reasons": reasons}


def make_summary(
    results: Results, coverage: Coverage, *, planner: Mapping[str, Any], split: str, seed: int, **more: Any
) -> dict[str, Any]:
    """What `summary.json` says. The headline (`pdms` or `epdms`) is null unless coverage is complete."""
    form, means = FORMATS[results.metric], results.means()
    stages = {"two_stage": dict(results.two_stage)} if results.two_stage else {}
    return {
        "planner": dict(planner),
        "metric": results.metric,
        "metric_title": form.title + (", two stages" if stages else ""),
        "split": split,
        "seed": seed,
        "verdict": coverage.verdict,
        form.headline: means["score"] if coverage.complete else None,
        "coverage": coverage.as_dict(),
        "means_over_scored": means,
        **stages,
        **more,
    }


def save_json(path: Path | str, content: Mapping[str, Any]) -> Path:
    """Readable JSON, written atomically."""
    return atomic_write(path, json.dumps(content, indent=2, default=_plain) + "\n")


def headline(summary: Mapping[str, Any]) -> float | None:
    """The headline score of a summary, None when coverage was partial."""
    return summary[FORMATS[summary["metric"]].headline]


def score_rows(summaries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that compares planners under one metric: points (0 to 100), headline first."""
    form = FORMATS[summaries[0]["metric"]]
    names = [name for name in form.columns if name != "score"]
    header = ["planner", form.headline.upper(), *(SHORT[name] for name in names), "scenes"]
    rows = []
    for summary in summaries:
        value, coverage = headline(summary), summary["coverage"]
        means = summary["means_over_scored"]
        shown = _points(value) if value is not None else "—"
        scenes = f"{coverage['scored']}" if summary["verdict"] == "complete" else summary["verdict"]
        rows.append([summary["planner"]["name"], shown, *(_points(means[name]) for name in names), scenes])
        for stage in STAGES[:2] if "two_stage" in summary else ():
            part = summary["two_stage"][stage]
            label = f"  {stage.replace('_', ' ')}"
            rows.append([label, _points(part["score"]), *(_points(part[name]) for name in names), ""])
    return header, rows


def _points(value: float | None) -> str:
    return "—" if value is None else f"{100.0 * value:.1f}"


def _cell(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else repr(float(value))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go into JSON")
