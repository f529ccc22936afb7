"""Five plans for one scene under both metrics: the tables and the picture of docs/metrics.md."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from navsim_eval.example.crossing import LIGHT_AT, SPEED, make_road_map, make_scene
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import Vehicle
from navsim_eval.pdm.cache import build_metric_cache
from navsim_eval.report.bev import draw_map, draw_objects
from navsim_eval.results import FORMATS, SHORT
from navsim_eval.scene import FRAME_INTERVAL_S, Scene
from navsim_eval.scoring import score

GENTLE, HARD = 1.4, 5.0  # m/s²: how the recorded driver brakes, and how plan E does
_TIMES = FRAME_INTERVAL_S * np.arange(1, 9)


@dataclass(frozen=True)
class ExamplePlan:
    """A plan with its letter, what it does in words, its colour, and poses (8, 3) in the ego frame."""

    letter: str
    words: str
    color: str
    poses: np.ndarray


def example_plans() -> tuple[ExamplePlan, ...]:
    """What the recorded driver does, and four ways to differ from it."""
    gentle = _braking(GENTLE, _TIMES)
    aside, left = 3.3 * _step(1.2, 0.3), 0.75 * _step(0.5, 0.2)
    return (
        ExamplePlan("A", "brakes gently for the red light, as the recorded driver does", "#111111", _poses(gentle)),
        ExamplePlan("B", "drives on through the red light", "#d2232f", _poses(SPEED * _TIMES)),
        ExamplePlan("C", "like A, but in the oncoming lane", "#e07b00", _poses(gentle, aside)),
        ExamplePlan("D", "like A, but 0.75 m left of the lane's centre", "#0b6b3a", _poses(gentle, left)),
        ExamplePlan("E", "brakes with 5 m/s² at once", "#8a4fa3", _poses(_braking(HARD, _TIMES))),
    )


def example_scores() -> dict[str, dict[str, np.ndarray]]:
    """metric → column → (5,) sub-scores of the plans; `forgiven`: EPDMS had the recorded driver driven plan B."""
    found = {}
    with _world() as (road_map, careful, careless):
        plans = np.stack([plan.poses for plan in example_plans()])[None]
        for name, metric, scene in (
            ("pdms_v1", "pdms_v1", careful), ("epdms_v2", "epdms_v2", careful), ("forgiven", "epdms_v2", careless)
        ):  # fmt: skip
            found[name] = score([build_metric_cache(scene, road_map, metric)], plans, metric=metric).columns
    return found


def example_tables() -> str:
    """Markdown: the plans side by side, then every sub-score of each metric, in points."""
    scores, plans = example_scores(), example_plans()
    v1, v2, forgiven = (scores[name]["score"] for name in ("pdms_v1", "epdms_v2", "forgiven"))
    rows = [
        [plan.letter, plan.words, _points(v1[i]), _points(v2[i]), _points(forgiven[i])] for i, plan in enumerate(plans)
    ]
    parts = [_markdown(["", "plan", "PDMS (v1)", "EPDMS (v2)", "EPDMS, had the driver done B"], rows)]
    for metric in ("pdms_v1", "epdms_v2"):
        names = FORMATS[metric].columns
        rows = [[plan.letter, *(_points(scores[metric][n][i]) for n in names)] for i, plan in enumerate(plans)]
        parts.append(_markdown([metric, *(SHORT[name] for name in names)], rows))
    return "\n\n".join(parts) + "\n"


def example_figure() -> Figure:
    """The scene from above with the five plans, and how far each gets in time."""
    figure = Figure(figsize=(9.2, 6.0), dpi=110, layout="constrained")
    above, ahead = figure.subplots(1, 2, width_ratios=(1.0, 1.7))
    with _world() as (road_map, scene, _):
        draw_map(above, scene.current, road_map)
        draw_objects(above, scene)
    above.plot([1.75, -1.75], [LIGHT_AT, LIGHT_AT], color="#d2232f", linewidth=3.5, zorder=6)
    above.text(2.1, LIGHT_AT, "red", color="#d2232f", fontsize=9, va="center", zorder=12)
    side, ends = np.array([-1, -1, 1, 1]) * Vehicle.HALF_WIDTH, np.array([-1, 1, 1, -1]) * Vehicle.LENGTH / 2
    above.fill(side, ends + Vehicle.REAR_AXLE_TO_CENTER, facecolor="white", edgecolor="#111111", zorder=9)
    above.set(xlim=(-14, 14), ylim=(-4, 56), aspect="equal", xticks=[], yticks=[], title="from above")
    for plan in example_plans():
        _draw(plan, above, ahead)
    stop = LIGHT_AT - Vehicle.FRONT_LENGTH
    ahead.axhline(stop, color="#d2232f", linewidth=1.2)
    ahead.text(0.06, stop + 0.5, "the front reaches the red light", color="#d2232f", fontsize=9)
    ahead.set(xlim=(0, 4.6), ylim=(0, 34), xlabel="time [s]", ylabel="rear axle, metres ahead", title="how far")
    ahead.grid(color="#e7eaee")
    return figure


def _draw(plan: ExamplePlan, above: Axes, ahead: Axes) -> None:
    path = np.concatenate([np.zeros((1, 2)), plan.poses[:, :2]])
    style = {"color": plan.color, "linewidth": 2.0, "marker": "o", "markersize": 3.5}
    above.plot(-path[:, 1], path[:, 0], zorder=10, alpha=0.9, **style)
    if plan.letter in "BCD":  # A and E lie under B
        above.text(-path[-1, 1] - 0.4, path[-1, 0] + 1.2, plan.letter, color=plan.color, fontsize=12, zorder=12)
    ahead.plot(np.concatenate([[0.0], _TIMES]), path[:, 0], alpha=0.9, **style)
    if plan.letter not in "CD":  # like A
        label = "A, C, D" if plan.letter == "A" else plan.letter
        ahead.text(4.06, path[-1, 0] - 0.4, label, color=plan.color, fontsize=11)


@contextmanager
def _world() -> Iterator[tuple[RoadMap, Scene, Scene]]:
    """The map, the scene as recorded, and the same with a driver who runs the light."""
    times = FRAME_INTERVAL_S * np.arange(1, 11)
    with tempfile.TemporaryDirectory() as folder:
        yield make_road_map(Path(folder)), make_scene(_braking(GENTLE, times)), make_scene(SPEED * times)


def _braking(deceleration: float, times: np.ndarray) -> np.ndarray:
    """Metres driven from `SPEED` to a stop."""
    moving = np.minimum(times, SPEED / deceleration)
    return SPEED * moving - 0.5 * deceleration * moving**2


def _step(middle: float, width: float) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-(_TIMES - middle) / width))


def _poses(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """(8, 3) from positions; the heading follows the path, and stays where it stands still."""
    y = np.zeros(len(x)) if y is None else y
    dx, dy = (np.gradient(np.concatenate([[0.0], values]))[1:] for values in (x, y))
    return np.column_stack([x, y, np.arctan2(dy, np.maximum(dx, 0.2))])


def _points(value: float) -> str:
    return "—" if np.isnan(value) else f"{100 * value:.1f}".removesuffix(".0")


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
