"""A comparison for machines (JSON), for a terminal (rows of text), and for people who would rather look (one page)."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from navsim_eval.comparison.compare import Change, Comparison, Difference
from navsim_eval.comparison.read import STAGES
from navsim_eval.report import html
from navsim_eval.results import SHORT

_COLORS = {1: "#0b6b3a", 0: "#5b6675", -1: "#b3202c"}


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but the scores themselves, as fractions; NaN as null."""
    c = comparison
    sides = {
        key: {"name": side.name, "source": side.source, "split": side.split, "scenes": len(side.tokens)}
        for key, side in (("a", c.a), ("b", c.b))
    }
    return {
        **sides,
        "metric": c.a.metric,
        "pairs": c.pairs,
        "logs": c.logs,
        "unpaired": {n: list(getattr(c, n)) for n in ("only_a", "only_b", "unscored_a", "unscored_b")},
        "bootstrap": {"resamples": c.resamples, "level": c.level, "seed": c.seed, "interval": "expanded percentile"},
        "differences": {item.name: _difference_json(item) for item in c.differences},
        "flips": {f.name: {"to_zero": list(f.to_zero), "from_zero": list(f.from_zero)} for f in c.flips},
        "losses": [_change_json(change) for change in c.losses],
        "gains": [_change_json(change) for change in c.gains],
        "navsim_totals": {name: list(values) for name, values in c.closing.items()},
        "notes": list(c.notes),
    }


def _difference_json(item: Difference) -> dict[str, Any]:
    return {
        "pairs": item.pairs,
        "mean_a": _finite(item.mean_a),
        "mean_b": _finite(item.mean_b),
        "difference": _finite(item.difference),
        "interval_over_tokens": [_finite(bound) for bound in item.by_token],
        "interval_over_logs": None if item.by_log is None else [_finite(bound) for bound in item.by_log],
    }


def _change_json(change: Change) -> dict[str, Any]:
    columns = {name: list(values) for name, values in change.columns.items()}
    return {"token": change.token, "log": change.log, "a": change.a, "b": change.b, "sub_scores": columns}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


# --- as rows of text -------------------------------------------------------------------------------------------------


def short_name(column: str) -> str:
    """`NC`, or `NC, stage 2` for a column of a two-stage file."""
    for number, stage in enumerate(STAGES, start=1):
        if column.endswith(stage):
            return f"{SHORT[column.removesuffix(stage)]}, stage {number}"
    return SHORT[column]


def difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table, in points (0 to 100)."""
    percent = f"{100 * comparison.level:g} %"
    header = ["", "A", "B", "B − A", f"{percent} over tokens", f"{percent} over logs", "scenes"]
    rows = []
    for item in comparison.differences:
        means = [f"{100 * value:.2f}" if np.isfinite(value) else "—" for value in (item.mean_a, item.mean_b)]
        bounds = [_bounds(item.by_token), _bounds(item.by_log)]
        rows.append([short_name(item.name), *means, _signed(item.difference), *bounds, str(item.pairs)])
    return header, rows


def flip_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: scenes in which a factor of the score went to zero or came back."""
    rows = [
        [short_name(flip.name), str(len(flip.to_zero)), str(len(flip.from_zero)),
         f"{len(flip.from_zero) - len(flip.to_zero):+d}"]
        for flip in comparison.flips
    ]  # fmt: skip
    return ["factor", "B fails, A did not", "A failed, B does not", "net"], rows


def change_rows(changes: tuple[Change, ...]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the scenes whose score changed most."""
    rows = []
    for change in changes:
        why = ", ".join(f"{short_name(name)} {a:.2g} → {b:.2g}" for name, (a, b) in change.columns.items())
        scores = [f"{100 * value:.1f}" for value in (change.a, change.b)]
        rows.append([change.token, change.log, *scores, _signed(change.difference), why])
    return ["token", "log", "A", "B", "B − A", "what changed"], rows


def pairing_line(comparison: Comparison) -> str:
    """How many scenes were paired and how many were not."""
    c = comparison
    logs = "logs unknown" if c.logs is None else f"{c.logs} logs"
    parts = [f"{c.pairs} pairs of scenes ({logs})"]
    parts += [f"{len(side)} only in {name}" for side, name in ((c.only_a, "A"), (c.only_b, "B")) if side]
    parts += [f"{len(side)} not scored in {n}" for side, n in ((c.unscored_a, "A"), (c.unscored_b, "B")) if side]
    return ", ".join(parts) + ("" if len(parts) > 1 else ", none unpaired")


def _bounds(bounds: tuple[float, float] | None) -> str:
    if bounds is None or not np.isfinite(bounds).all():
        return "—"
    return f"{_signed(bounds[0])} … {_signed(bounds[1])}"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}" if np.isfinite(value) else "—"


# --- as a page -------------------------------------------------------------------------------------------------------


def page(comparison: Comparison) -> str:
    """One HTML file that needs nothing else."""
    c = comparison
    sides = [[letter, side.name, side.source] for letter, side in (("A", c.a), ("B", c.b))]
    head = (
        f"<h1>{escape(c.b.name)} against {escape(c.a.name)}</h1>"
        f'<p class="note">{escape(c.a.metric)} · {escape(pairing_line(c))} · differences are B − A</p>'
        + html.table(["", "planner", "file"], sides, words=range(3))
    )
    header, rows = difference_rows(c)
    thick = "over tokens" if c.logs is None else "over logs"
    legend = (
        f'<p class="note">Points. Dot: difference of the means; thick bar: {100 * c.level:g} % interval {thick}'
        + ("" if c.logs is None else "; thin bar: over tokens")
        + ". Green: the interval lies above zero, red: below, grey: it holds zero. "
        "Scenes of one log resemble each other, so the interval over logs is the one to trust.</p>"
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in c.notes)
    sections = [head, "<h2>Differences</h2>", intervals_svg(c.differences), legend, html.table(header, rows, "score")]
    sections += [notes, "<h2>Flips</h2>", html.table(*flip_rows(c))]
    sections.append('<p class="note">A factor of zero takes the whole score of its scene.</p>')
    for title, changes in (("Biggest losses", c.losses), ("Biggest gains", c.gains)):
        if changes:
            sections += [f"<h2>{title}</h2>", html.table(*change_rows(changes), words=(0, 1, 5))]
    return html.page(f"{c.b.name} against {c.a.name}", sections)


def intervals_svg(differences: tuple[Difference, ...]) -> str:
    """Forest plot: a row a column, points on the x axis."""
    shown = [item for item in differences if np.isfinite(item.difference)]
    ends = [100 * b for d in shown for pair in (d.by_token, d.by_log) if pair for b in pair if np.isfinite(b)]
    ends += [100 * item.difference for item in shown]
    reach = 1.08 * max([abs(end) for end in ends], default=0.0) or 1.0
    left, width, row_height = 120, 860, 30
    middle, half = left + (width - left) / 2, (width - left) / 2 - 70
    height = row_height * len(shown) + 44

    def x(value: float) -> float:
        return middle + half * value / reach

    parts = [
        f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" style="max-width:100%" '
        'font-family="system-ui,sans-serif"><title>Differences with their intervals, in points</title>'
    ]
    for tick in _ticks(reach):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="6" y2="{height - 34}" stroke="#e7eaee"/>')
        style = 'font-size="12" text-anchor="middle" fill="#5b6675"'
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 16}" {style}>{tick:+g}</text>')
    parts.append(f'<line x1="{middle}" x2="{middle}" y1="6" y2="{height - 34}" stroke="#1c2430"/>')
    for row, item in enumerate(shown):
        parts += _interval_row(item, 20 + row * row_height, x, width)
    return f'<div class="scroll">{"".join(parts)}</svg></div>'


def _interval_row(item: Difference, y: float, x: Any, width: float) -> list[str]:
    color, weight = _COLORS[item.verdict], 700 if item.name.startswith("score") else 400
    style = f'font-size="14" font-weight="{weight}" fill="#1c2430"'
    parts = [f'<text x="8" y="{y + 4}" {style}>{short_name(item.name)}</text>']
    bars = [(item.by_token, 7)] if item.by_log is None else [(item.by_log, 7), (item.by_token, 2)]
    for (low, high), thickness in bars:
        if np.isfinite(low + high):
            opacity = 0.35 if thickness > 2 else 1.0
            parts.append(
                f'<line x1="{x(100 * low):.1f}" x2="{x(100 * high):.1f}" y1="{y}" y2="{y}" stroke="{color}" '
                f'stroke-width="{thickness}" stroke-opacity="{opacity}"/>'
            )
    parts.append(f'<circle cx="{x(100 * item.difference):.1f}" cy="{y}" r="4.5" fill="{color}"/>')
    parts.append(
        f'<text x="{width - 6}" y="{y + 4}" font-size="13" text-anchor="end" fill="{color}" '
        f'font-weight="{weight}">{_signed(item.difference)}</text>'
    )
    return parts


def _ticks(reach: float) -> list[float]:
    """Round values on both sides of zero."""
    step = 10.0 ** np.floor(np.log10(reach / 2))
    step *= next(m for m in (5, 2, 1) if m * step <= reach / 2)
    count = int(reach / step)
    return [round(step * index, 10) for index in range(-count, count + 1)]
