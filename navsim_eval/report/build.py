"""The report of an evaluation: one HTML file that needs nothing else.

Verdict and table, distributions, break-downs by command, speed and map; then scenes of one planner in pictures, the
worst, the best and some in which each sub-score fails, beside a table of all scenes: both under one bar of filters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np

from navsim_eval.executor import run_jobs
from navsim_eval.files import atomic_write
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.report import browser, html
from navsim_eval.report.gallery import BEST, WORST, CardMaker, choose_scenes, failing_rows
from navsim_eval.report.modes import modes_section
from navsim_eval.report.run import SPEED_EDGES, Run, focus_run, speed_label
from navsim_eval.results import FORMATS, SHORT, score_rows
from navsim_eval.scene import COMMANDS


def silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A display that shows nothing."""
    return nullcontext(lambda done: None)


def write_report(
    path: Path,
    runs: Sequence[Run],
    caches: MetricCaches,
    count: int = 3,
    workers: int = 1,
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = silent,
) -> Path:
    """Write `report.html`.

    runs:   planners to be compared, under one or more metrics
    caches: of the first run's metric; scenes and maps for the pictures come from its dataset
    count:  scenes drawn for each gallery: the worst, the best, every sub-score that fails somewhere
    workers: processes that draw;  progress: opens a display, as in `navsim_eval.evaluate`
    """
    focus = focus_run(runs)
    sections = [_head(runs)]
    for metric in dict.fromkeys(run.results.metric for run in runs):
        mine = [run for run in runs if run.results.metric == metric]
        sections += [_comparison(mine, focus.planner), modes_section(mine, focus.planner)]
        sections += [_distributions(mine), _breakdown(mine, focus.planner)]
    shared = [run for run in runs if run.results.metric == focus.results.metric]
    chosen = choose_scenes(focus, count) if count else {}
    order = sorted(chosen, key=lambda row: focus.results.columns["score"][row])
    with progress("pictures", len(order)) as advance:
        items = [(row, chosen[row]) for row in order]
        drawn = run_jobs(CardMaker(shared, focus, caches), items, workers=workers, progress=advance)
        cards = [outcome.value if outcome.ok else html.note(f"not drawn: {outcome.error}") for outcome in drawn]
    sections += [_scenes(focus, runs, cards, count), _provenance(runs)]
    return atomic_write(path, html.page(f"Evaluation on {focus.summary['split']}", sections, script=True))


# --- text and tables -------------------------------------------------------------------------------------------------


def _head(runs: Sequence[Run]) -> str:
    summary = runs[0].summary
    titles = ", ".join(dict.fromkeys(run.summary["metric_title"] for run in runs))
    partial = [run for run in runs if run.summary["verdict"] != "complete"]
    mark = html.badge((partial[0] if partial else runs[0]).summary["verdict"], good=not partial)
    environment = summary["environment"]
    commit = environment["git"]["commit"]
    source = f" · source {commit[:10]}{' (modified)' if environment['git']['modified'] else ''}" if commit else ""
    note = f"split {summary['split']} · {titles} · seed {summary['seed']} · {environment['time']}{source}"
    why = "" if not partial else (
        '<p class="note">Not every expected scene was scored, so no headline is given; the means below are over the '
        "scored scenes only. The reasons are listed at the end.</p>"
    )  # fmt: skip
    return f'<h1>Evaluation</h1><p class="note">{mark}{escape(note)}</p>{why}'


def _comparison(runs: Sequence[Run], focus: str) -> str:
    form = FORMATS[runs[0].results.metric]
    header, rows = score_rows([run.summary for run in runs])
    legend = ", ".join(f"{SHORT[name]} {name.replace('_', ' ')}" for name in form.columns if name != "score")
    return (
        f"<h2>{escape(form.title)}</h2>" + html.table(header, rows, focus)
        + f'<p class="note">Points, 0 to 100. {escape(legend)}.</p>'
    )  # fmt: skip


def _distributions(runs: Sequence[Run]) -> str:
    plots = "".join(html.histogram(run.planner, run.results.columns["score"]) for run in runs)
    return f'<h3>Distribution of the score over scenes</h3><div class="row">{plots}</div>'


def _breakdown(runs: Sequence[Run], focus: str) -> str:
    """Mean score by driving command, initial speed and map."""
    facts = runs[0].predictions.facts
    row_of = {token: row for row, token in enumerate(runs[0].predictions.tokens.tolist())}
    known = [token in row_of for token in runs[0].results.tokens.tolist()]
    rows = [row_of[token] for token in runs[0].results.tokens[known].tolist()]
    command, speed = facts["command"][rows], facts["speed"][rows]
    groups = {name: command == name for name in COMMANDS}
    for low, high in pairwise(SPEED_EDGES):
        groups[speed_label(low, high)] = (speed >= low) & (speed < high)
    maps = facts["map"][rows]
    groups |= {str(name): maps == name for name in np.unique(maps)} if len(np.unique(maps)) > 1 else {}
    groups = {name: members for name, members in groups.items() if members.any()}
    header = ["planner", *(f"{name} ({members.sum()})" for name, members in groups.items())]
    table = []
    for run in runs:
        values = run.results.columns["score"][known]
        table.append([run.planner, *(_mean_points(values[members]) for members in groups.values())])
    return (
        "<h3>By driving command, initial speed and map</h3>" + html.table(header, table, focus)
        + '<p class="note">Mean score in points; number of scenes in brackets.</p>'
    )  # fmt: skip


def _mean_points(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    return f"{100.0 * values.mean():.1f}" if len(values) else "—"


# --- scenes ----------------------------------------------------------------------------------------------------------


def _scenes(focus: Run, runs: Sequence[Run], cards: Sequence[str], count: int) -> str:
    """Filters, pictures (one card a scene) and the table of all scenes."""
    data = browser.scene_data(runs, focus)
    scored = int(focus.results.valid.sum())
    if not scored:
        return ""
    failing = {SHORT[name]: (f"{SHORT[name]} fails", len(rows)) for name, rows in failing_rows(focus).items() if rows}
    galleries = {WORST: ("worst", min(count, scored)), BEST: ("best", min(count, scored)), **failing}
    modes = "" if focus.predictions.candidates is None else " Its modes are coloured by the score that each would get."
    return (
        f"<h2>Scenes of {escape(focus.planner)}</h2>"
        '<p class="note">The worst and the best by score, and for every sub-score scenes in which it fails (EP: below '
        f"50 points).{modes} Dashed: what the recorded driver did. Dotted: where the others went in the next 4 s. "
        "Click a picture to see the front camera and all planners.</p>"
        + browser.filter_bar(data, galleries)
        + f'<div id="gallery">{"".join(cards)}</div>'
        + browser.scene_table(data) + browser.data_block(data)
    )  # fmt: skip


def _provenance(runs: Sequence[Run]) -> str:
    first = runs[0].summary
    reasons = first["coverage"]["first_reasons"]
    lost = html.table(["not scored", "reason"], [[k, v] for k, v in reasons.items()], words=(0, 1)) if reasons else ""
    about = [{key: run.summary[key] for key in ("planner", "metric", "verdict", "coverage", "seconds")} for run in runs]
    text = json.dumps({"runs": about, "environment": first["environment"]}, indent=2, default=str)
    details = f"<details><summary>runs and environment</summary><pre>{escape(text)}</pre></details>"
    return f"<h2>Provenance</h2>{lost}{details}"
