"""The part of a report that a reader can search: filters, pictures of chosen scenes, and a table of all scenes.

The page holds the scores of every scene as one JSON block in columns; `page.js` filters and sorts it. Without a script
the pictures are all there, open, and the table is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from navsim_eval.report.run import SPEED_EDGES, Run, low_mark, speed_label
from navsim_eval.results import FORMATS, SHORT

_MOST_CELLS = 600_000  # beyond, only the planner that is drawn keeps its columns: the page stays below some 4 MB


def filter_bar(data: Mapping[str, Any], galleries: Mapping[str, tuple[str, int]]) -> str:
    """Buttons and menus above pictures and table.

    galleries: key → (label, number of scenes that it stands for)
    """
    buttons = [_button("", "all pictures", None)]
    buttons += [_button(key, label, count) for key, (label, count) in galleries.items()]
    speeds = [(f"{low:g},{'Infinity' if np.isinf(high) else f'{high:g}'}", speed_label(low, high))
              for low, high in pairwise(SPEED_EDGES)]  # fmt: skip
    menus = _menu("map", "every map", [(name, name) for name in data["maps"]])
    menus += _menu("command", "every command", [(name, name) for name in data["commands"]])
    menus += _menu("speed", "every speed", speeds)
    search = '<input id="filter-text" type="search" placeholder="token or log" aria-label="token or log">'
    return f'<div id="filters" class="needs-script">{"".join(buttons)}{menus}{search}<span id="count"></span></div>'


def scene_table(data: Mapping[str, Any]) -> str:
    """The empty table that `page.js` fills, with the menu of planners."""
    runs = [(str(index), f"{run['name']}, {run['metric']}") for index, run in enumerate(data["runs"])]
    options = "".join(
        f'<option value="{value}"{" selected" if int(value) == data["focus"] else ""}>{escape(label)}</option>'
        for value, label in runs
    )
    return (
        '<div class="needs-script"><h2>All scenes</h2><p class="note">Points of '
        f'<select id="filter-run" aria-label="planner">{options}</select>; click a heading to sort, a token with ▣ for '
        "its picture. The filters above hold here, too.</p>"
        '<div class="scroll"><table id="scenes"><thead></thead><tbody></tbody></table></div>'
        '<button id="more" hidden>more rows</button></div>'
    )


def data_block(data: Mapping[str, Any]) -> str:
    """The JSON that the script reads; no text in it can end the block."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'


def scene_data(runs: Sequence[Run], focus: Run) -> dict[str, Any]:
    """Facts and scores of all scenes that the focus run planned, in columns.

    token, log, map, command, speed: facts (texts as indices into logs, maps, commands);  runs: name, metric, columns
    (short names), titles, values (fractions or null);  focus: index of the drawn run;  low: what counts as failing
    """
    predictions = focus.predictions
    row_of = {token: row for row, token in enumerate(predictions.tokens.tolist())}
    tokens = [token for token in focus.results.tokens.tolist() if token in row_of]
    rows = [row_of[token] for token in tokens]
    data: dict[str, Any] = {"token": tokens, "speed": np.round(predictions.facts["speed"][rows], 2).tolist()}
    for name in ("log", "map", "command"):
        labels, index = np.unique(predictions.facts[name][rows], return_inverse=True)
        data |= {name: index.tolist(), f"{name}s": labels.tolist()}
    cells = sum(len(FORMATS[run.results.metric].columns) for run in runs) * len(tokens)
    shown = list(runs) if cells <= _MOST_CELLS else [focus]
    data["runs"] = [_run_columns(run, tokens) for run in shown]
    data["focus"] = next(index for index, run in enumerate(shown) if run is focus)
    data["low"] = {SHORT[name]: low_mark(name) for name in FORMATS[focus.results.metric].columns}
    return data


def _run_columns(run: Run, tokens: Sequence[str]) -> dict[str, Any]:
    names = ("score", *(name for name in FORMATS[run.results.metric].columns if name != "score"))
    row_of = {token: row for row, token in enumerate(run.results.tokens.tolist())}
    rows = [row_of.get(token, -1) for token in tokens]
    known = np.array(rows) >= 0
    values = [np.where(known, run.results.columns[name][rows], np.nan) for name in names]
    return {
        "name": run.planner,
        "metric": FORMATS[run.results.metric].headline.upper(),
        "columns": [SHORT[name] for name in names],
        "titles": [name.replace("_", " ") for name in names],
        "values": [[_rounded(value) for value in column.tolist()] for column in values],
    }


def _rounded(value: float) -> float | int | None:
    """Three digits are enough for points; only an exact 0 is written as 0, and only an exact 1 as 1."""
    if not np.isfinite(value):
        return None
    if value in (0.0, 1.0):
        return int(value)
    return float(np.clip(round(value, 3), 0.001, 0.999))


def _button(key: str, label: str, count: int | None) -> str:
    number = "" if count is None else f" <small>{count}</small>"
    return f'<button data-gallery="{escape(key)}" aria-pressed="false">{escape(label)}{number}</button>'


def _menu(name: str, every: str, options: Sequence[tuple[str, str]]) -> str:
    items = f'<option value="">{every}</option>'
    items += "".join(f'<option value="{escape(value)}">{escape(label)}</option>' for value, label in options)
    needless = " hidden" if len(options) < 2 else ""
    return f'<select id="filter-{name}" aria-label="{name}"{needless}>{items}</select>'
