"""The report of an evaluation: one HTML file that needs nothing else.

Verdict and table, distributions, break-downs by command and speed, then the best and worst scenes of one planner in
pictures (from above, and in the front camera where its image exists).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write
from navsim_eval.formats.sensors import read_image
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.predictions import Predictions
from navsim_eval.report import html
from navsim_eval.report.bev import Drawing, bev_figure
from navsim_eval.report.camera import camera_figure
from navsim_eval.results import FORMATS, SHORT, Results, score_rows
from navsim_eval.scene import COMMANDS, Scene
from navsim_eval.scoring import score

SPEED_EDGES = (0.0, 2.0, 5.0, 10.0, np.inf)  # m/s
FRONT_CAMERA = "CAM_F0"


@dataclass(frozen=True)
class Run:
    """One planner under one metric: what was planned, what it scored, and the folder that holds both."""

    results: Results
    summary: Mapping[str, Any]
    predictions: Predictions
    folder: Path

    @property
    def planner(self) -> str:
        return self.summary["planner"]["name"]


def write_report(path: Path, runs: Sequence[Run], caches: MetricCaches, count: int = 3) -> Path:
    """Write `report.html`.

    runs:   planners to be compared, under one or more metrics
    caches: of the first run's metric; scenes and maps for the pictures come from its dataset
    count:  scenes drawn from each end of the ranking
    """
    focus = focus_run(runs)
    sections = [_head(runs)]
    for metric in dict.fromkeys(run.results.metric for run in runs):
        mine = [run for run in runs if run.results.metric == metric]
        sections += [_comparison(mine, focus.planner), _distributions(mine), _breakdown(mine, focus.planner)]
    shared = [run for run in runs if run.results.metric == focus.results.metric]
    sections += [_scenes(shared, focus, caches, count), _provenance(runs)]
    return atomic_write(path, html.page(f"Evaluation on {focus.summary['split']}", sections))


def focus_run(runs: Sequence[Run]) -> Run:
    """The run whose scenes are drawn: the last planner that offers several modes, else the last one."""
    metric = runs[0].results.metric
    mine = [run for run in runs if run.results.metric == metric]
    with_modes = [run for run in mine if run.predictions.candidates is not None]
    return (with_modes or mine)[-1]


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
    """Mean score by driving command and by initial speed."""
    facts = runs[0].predictions.facts
    row_of = {token: row for row, token in enumerate(runs[0].predictions.tokens.tolist())}
    known = [token in row_of for token in runs[0].results.tokens.tolist()]
    rows = [row_of[token] for token in runs[0].results.tokens[known].tolist()]
    command, speed = facts["command"][rows], facts["speed"][rows]
    groups = {name: command == name for name in COMMANDS}
    for low, high in pairwise(SPEED_EDGES):
        label = f"over {low:g} m/s" if np.isinf(high) else f"{low:g}–{high:g} m/s"
        groups[label] = (speed >= low) & (speed < high)
    groups = {name: members for name, members in groups.items() if members.any()}
    header = ["planner", *(f"{name} ({members.sum()})" for name, members in groups.items())]
    table = []
    for run in runs:
        values = run.results.columns["score"][known]
        table.append([run.planner, *(_mean_points(values[members]) for members in groups.values())])
    return (
        "<h3>By driving command and initial speed</h3>" + html.table(header, table, focus)
        + '<p class="note">Mean score in points; number of scenes in brackets.</p>'
    )  # fmt: skip


def _provenance(runs: Sequence[Run]) -> str:
    first = runs[0].summary
    reasons = first["coverage"]["first_reasons"]
    lost = html.table(["not scored", "reason"], [[k, v] for k, v in reasons.items()]) if reasons else ""
    about = [
        {key: run.summary[key] for key in ("planner", "metric", "verdict", "coverage", "seconds")} for run in runs
    ]
    text = json.dumps({"runs": about, "environment": first["environment"]}, indent=2, default=str)
    details = f"<details><summary>runs and environment</summary><pre>{escape(text)}</pre></details>"
    return f"<h2>Provenance</h2>{lost}{details}"


def _mean_points(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    return f"{100.0 * values.mean():.1f}" if len(values) else "—"


# --- pictures --------------------------------------------------------------------------------------------------------


def _scenes(runs: Sequence[Run], focus: Run, caches: MetricCaches, count: int) -> str:
    chosen = extreme_scenes(focus, count)
    if not chosen:
        return ""
    modes = "" if focus.predictions.candidates is None else " Its modes are coloured by the score that each would get."
    parts = [
        f"<h2>Scenes of {escape(focus.planner)}</h2>"
        f'<p class="note">The worst and the best by score.{modes} Dashed: what the recorded driver did. Dotted: where '
        "the other agents went in the next 4 s.</p>"
    ]
    for rank, row in chosen:
        parts.append(_scene(rank, row, runs, focus, caches))
    return "\n".join(parts)


def extreme_scenes(run: Run, count: int) -> list[tuple[str, int]]:
    """("worst" or "best", row) of scored scenes: `count` from each end, none twice, from different logs where possible.

    Among equal scores the longest plans come first: they show most.
    """
    scores = run.results.columns["score"]
    lengths = dict(zip(run.predictions.tokens.tolist(), _path_lengths(run.predictions.trajectories), strict=True))
    logs = dict(zip(run.predictions.tokens.tolist(), run.predictions.facts["log"].tolist(), strict=True))
    rows = np.flatnonzero(run.results.valid)
    tokens = run.results.tokens[rows].tolist()
    length = np.array([lengths[token] for token in tokens])
    chosen: list[tuple[str, int]] = []
    for rank, sign in (("worst", 1.0), ("best", -1.0)):
        order = [rows[i] for i in np.lexsort((-length, sign * scores[rows]))]
        order = [row for row in order if row not in {taken for _, taken in chosen}]
        first_of_log = {logs[str(run.results.tokens[row])]: row for row in reversed(order)}
        spread = [row for row in order if row in first_of_log.values()]
        chosen += [(rank, int(row)) for row in (spread + [row for row in order if row not in spread])[:count]]
    return chosen


def _path_lengths(trajectories: np.ndarray) -> np.ndarray:
    """(S,) metres driven by plans (S, 8, 3)."""
    start = np.zeros((len(trajectories), 1, 2))
    steps = np.diff(np.concatenate([start, trajectories[..., :2]], axis=1), axis=1)
    return np.linalg.norm(steps, axis=-1).sum(axis=-1)


def _scene(rank: str, row: int, runs: Sequence[Run], focus: Run, caches: MetricCaches) -> str:
    token = str(focus.results.tokens[row])
    scene = caches.dataset[token]
    drawing = make_drawing(token, scene, focus, caches)
    command = COMMANDS[int(np.argmax(scene.current.driving_command))]
    speed = float(np.hypot(*scene.current.ego_velocity))
    title = f"{token} · command {command} · {speed:.1f} m/s"
    bev = bev_figure(scene, caches.maps.get(scene.map_name), drawing, title)
    pictures = html.figure(html.png_of(bev), "bev", f"scene {token} from above")
    pictures += _camera_picture(scene, drawing)
    names = FORMATS[focus.results.metric].columns
    table = []
    for run in runs:
        at = np.flatnonzero(run.results.tokens == token)
        table.append([run.planner, *(_points(run.results.columns[name][at[0]]) for name in names)])
    header = ["planner", *(SHORT[name] for name in names)]
    head = f"{rank}: {scene.map_name}, log {scene.log_name}"
    return (
        f'<div class="scene" id="{escape(token)}"><h3>{escape(head)}</h3><div class="row">{pictures}</div>'
        + html.table(header, table, focus.planner) + "</div>"
    )  # fmt: skip


def make_drawing(token: str, scene: Scene, run: Run, caches: MetricCaches) -> Drawing:
    """What a run says about a scene; its modes are scored so that colours tell which ones would have been good."""
    row = int(np.flatnonzero(run.predictions.tokens == token)[0])
    candidates = None if run.predictions.candidates is None else run.predictions.candidates[row]
    values = None
    if candidates is not None:
        table = score([caches[token]], candidates[None].astype(np.float64), metric=run.results.metric)
        values = table.columns["score"]
    human = scene.human_trajectory() if len(scene.future) >= 8 else None
    name = f"{FORMATS[run.results.metric].headline.upper()} of each mode"
    return Drawing(run.predictions.trajectories[row], candidates, values, name, human=human)


def _camera_picture(scene: Scene, drawing: Drawing) -> str:
    """The front camera's view, or nothing where the split comes without images."""
    camera = scene.current.cameras.get(FRONT_CAMERA)
    if camera is None or scene.sensor_root is None or not (scene.sensor_root / camera.path).is_file():
        return ""
    try:
        image = read_image(scene.sensor_root / camera.path)
    except DataError as error:
        return f'<p class="note">{escape(str(error))}</p>'
    picture = html.jpeg_of(camera_figure(image, camera, drawing, scene.current.annotations))
    return html.figure(picture, "camera", f"scene {scene.token} from the front camera")


def _points(value: float) -> str:
    return f"{100.0 * value:.0f}" if np.isfinite(value) else "—"
