"""Pictures of chosen scenes: the worst, the best, and for every sub-score scenes in which it fails.

A scene is drawn once, however many galleries it stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.formats.sensors import read_image
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.report import html
from navsim_eval.report.bev import Drawing, bev_figure
from navsim_eval.report.camera import camera_figure
from navsim_eval.report.run import Run, low_mark
from navsim_eval.results import FORMATS, SHORT
from navsim_eval.scene import COMMANDS, Scene
from navsim_eval.scoring import score

FRONT_CAMERA = "CAM_F0"
WORST, BEST = "worst", "best"


def choose_scenes(run: Run, count: int) -> dict[int, list[str]]:
    """Row of a scored scene → the galleries that it stands in: "worst", "best", short names of failing sub-scores.

    count: scenes a gallery, from different logs where possible. A scene that is drawn anyway serves all galleries in
    which it belongs.
    """
    chosen: dict[int, list[str]] = {}
    for rank, row in extreme_scenes(run, count):
        chosen.setdefault(row, []).append(rank)
    failing = failing_rows(run)
    for rows in failing.values():
        mine = [row for row in rows if row in chosen][:count]
        mine += [row for row in _spread(run, rows) if row not in mine][: count - len(mine)]
        for row in mine:
            chosen.setdefault(row, [])
    for name, rows in failing.items():
        for row in set(rows) & set(chosen):
            chosen[row].append(SHORT[name])
    return chosen


def failing_rows(run: Run) -> dict[str, list[int]]:
    """Sub-score → rows of scored scenes in which it fails, the most telling first.

    Zeros before halves, then scenes that fail in nothing else, then long plans: they show most.
    """
    columns, rows = run.results.columns, np.flatnonzero(run.results.valid)
    names = [name for name in FORMATS[run.results.metric].columns if name != "score"]
    lengths = _path_lengths_by_token(run)
    length = np.array([lengths[token] for token in run.results.tokens[rows].tolist()])
    below = {name: columns[name][rows] < low_mark(name) for name in names}  # NaN is not below
    faults = np.sum(list(below.values()), axis=0)
    failing = {}
    for name in names:
        order = np.lexsort((-length, faults, columns[name][rows]))
        failing[name] = [int(rows[index]) for index in order if below[name][index]]
    return failing


def extreme_scenes(run: Run, count: int) -> list[tuple[str, int]]:
    """("worst" or "best", row) of scored scenes: `count` from each end, none twice, from different logs where possible.

    Among equal scores the longest plans come first: they show most.
    """
    scores, lengths = run.results.columns["score"], _path_lengths_by_token(run)
    rows = np.flatnonzero(run.results.valid)
    length = np.array([lengths[token] for token in run.results.tokens[rows].tolist()])
    chosen: list[tuple[str, int]] = []
    for rank, sign in ((WORST, 1.0), (BEST, -1.0)):
        order = [int(rows[index]) for index in np.lexsort((-length, sign * scores[rows]))]
        order = [row for row in order if row not in {taken for _, taken in chosen}]
        chosen += [(rank, row) for row in _spread(run, order)[:count]]
    return chosen


def _spread(run: Run, order: Sequence[int]) -> list[int]:
    """The same rows, the first of every log before all others."""
    logs = dict(zip(run.predictions.tokens.tolist(), run.predictions.facts["log"].tolist(), strict=True))
    firsts = {logs[str(run.results.tokens[row])]: row for row in reversed(order)}
    spread = [row for row in order if row in firsts.values()]
    return spread + [row for row in order if row not in spread]


def _path_lengths_by_token(run: Run) -> dict[str, float]:
    """Metres driven by the plan of each scene."""
    plans = run.predictions.trajectories
    points = np.concatenate([np.zeros((len(plans), 1, 2)), plans[..., :2]], axis=1)
    lengths = np.linalg.norm(np.diff(points, axis=1), axis=-1).sum(axis=-1)
    return dict(zip(run.predictions.tokens.tolist(), lengths.tolist(), strict=True))


# --- a scene on the page ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CardMaker:
    """Makes the piece of the page for (row, its galleries); picklable, so that processes can share the drawing.

    runs: whose sub-scores stand under the pictures;  focus: whose plans are drawn
    """

    runs: Sequence[Run]
    focus: Run
    caches: MetricCaches

    def __call__(self, item: tuple[int, Sequence[str]]) -> str:
        return scene_card(*item, self.runs, self.focus, self.caches)


def scene_card(row: int, galleries: Sequence[str], runs: Sequence[Run], focus: Run, caches: MetricCaches) -> str:
    """Score, faults and picture from above; with the front camera and all planners' sub-scores once it is opened."""
    token = str(focus.results.tokens[row])
    scene = caches.dataset[token]
    drawing = make_drawing(token, scene, focus, caches)
    bev = bev_figure(scene, caches.maps.get(scene.map_name), drawing)
    names = ("score", *(name for name in FORMATS[focus.results.metric].columns if name != "score"))
    table = []
    for run in runs:
        at = np.flatnonzero(run.results.tokens == token)
        table.append([run.planner, *(_points(run.results.columns[name][at[0]]) for name in names)])
    values = {name: float(focus.results.columns[name][row]) for name in names}
    head = f'<b>{_points(values["score"])}</b> {_facts(scene)}<a href="#{escape(token)}">{escape(token)}</a>'
    return (
        f'<article class="scene" id="{escape(token)}" data-galleries="{escape(" ".join(galleries))}">'
        f"<h3>{head}</h3><div>{_fault_chips(values)}</div>"
        f'<div class="row">{html.figure(html.webp_of(bev), "bev", f"scene {token} from above")}'
        f'<div class="more">{_camera_picture(scene, drawing)}'
        f'<p class="note">{escape(scene.map_name)}, log {escape(scene.log_name)}</p>'
        + html.table(["planner", *(SHORT[name] for name in names)], table, focus.planner) + "</div></div></article>"
    )  # fmt: skip


def _facts(scene: Scene) -> str:
    command = COMMANDS[int(np.argmax(scene.current.driving_command))]
    return f"{command} · {float(np.hypot(*scene.current.ego_velocity)):.1f} m/s"


def _fault_chips(values: dict[str, float]) -> str:
    chips = ""
    for name, value in values.items():
        if name != "score" and value < low_mark(name):
            kind = "chip" if value == 0.0 else "chip partly"
            chips += f'<span class="{kind}" title="{name.replace("_", " ")}">{SHORT[name]} {_points(value)}</span>'
    return chips


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
    picture = html.webp_of(camera_figure(image, camera, drawing, scene.current.annotations))
    return html.figure(picture, "camera", f"scene {scene.token} from the front camera")


def _points(value: float) -> str:
    return f"{100.0 * value:.0f}" if np.isfinite(value) else "—"
