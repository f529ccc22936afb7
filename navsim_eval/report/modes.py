"""The part of a report about candidates: what the best, the mean and the chosen are worth, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from navsim_eval.modes.judge import mode_rows
from navsim_eval.report import html
from navsim_eval.report.run import Run

_SIZE, _EDGE = 190, 34
_READING = (
    '<p class="note">Ten bins of that probability: how often its candidates were the nearest one (●), and their mean '
    "score (○). On the dashed line, what is said comes true.</p>"
)


def modes_section(runs: Sequence[Run], focus: str) -> str:
    """Table and reliability diagrams of the runs whose candidates were judged; empty without any."""
    judged = [run for run in runs if run.summary.get("modes")]
    if not judged:
        return ""
    header, rows = mode_rows([run.summary for run in judged])
    plots = "".join(
        reliability_diagram(run.planner, run.summary["modes"]["calibration"])
        for run in judged
        if run.summary["modes"]["calibration"]
    )
    return (
        "<h3>Candidates</h3>" + html.table(header, rows, focus)
        + '<p class="note">Points of the chosen candidate, the mean and the best of all M, and the one nearest to the '
        "human plan. D: share of the union of all candidates' ribbons that a mean candidate does not cover; spread: "
        "mean distance between candidates over their distance from the start. minADE, minFDE in metres. ECE: of the "
        "sigmoid of a candidate's logit as the probability of being nearest to the human plan.</p>"
        + (f'<div class="row">{plots}</div>{_READING}' if plots else "")
    )  # fmt: skip


def reliability_diagram(title: str, calibration: Mapping[str, Any]) -> str:
    """What the planner said (across) against what came true (up): share nearest, filled; mean score, open."""
    inner = _SIZE - 2 * _EDGE

    def place(said: float, was: float) -> tuple[float, float]:
        return _EDGE + inner * said, _SIZE - _EDGE - inner * was

    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts = [
        f'<svg role="img" width="{_SIZE}" height="{_SIZE}" viewBox="0 0 {_SIZE} {_SIZE}" '
        f'font-family="system-ui,sans-serif"><title>{escape(title)}: reliability</title>',
        f'<text x="8" y="13" font-size="12" font-weight="600" fill="#1c2430">{escape(title)}</text>',
        f'<rect x="{x0}" y="{y1}" width="{inner}" height="{inner}" fill="none" stroke="#aab2bd"/>',
        f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="#aab2bd" stroke-dasharray="3 3"/>',
    ]
    for outcome, fill in (("score", "#ffffff"), ("nearest", "#0a58d0")):
        for row in calibration["bins"]:
            if row["count"] and row[outcome] is not None:
                x, y = place(row["probability"], row[outcome])
                label = f"{row['count']} candidates: said {row['probability']:.2f}, {outcome} {row[outcome]:.2f}"
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}" stroke="#0a58d0">'
                    f"<title>{label}</title></circle>"
                )
    words = 'font-size="11" fill="#5b6675" text-anchor="middle"'
    parts.append(f'<text x="{_SIZE / 2}" y="{_SIZE - 8}" {words}>probability</text>')
    parts.append(
        f'<text x="12" y="{_SIZE / 2}" {words} transform="rotate(-90 12 {_SIZE / 2})">nearest ●, score ○</text>'
    )
    return "".join([*parts, "</svg>"])
