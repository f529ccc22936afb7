"""A split in six panels: speed, way, curvature, commands, agents, and where the drives go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from navsim_eval.data_tools.statistics import Statistics
from navsim_eval.files import atomic_write
from navsim_eval.scene import AGENT_CLASSES, COMMANDS

_COLOR, _SECOND = "#3b6ea5", "#c8793b"


def write_figure(statistics: Statistics, path: Path | str) -> Path:
    """Draw the panels as PNG. Returns the path."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _histogram(axes[0, 0], statistics.values["speed"], "speed now [m/s]")
    _histogram(axes[0, 1], statistics.values["distance"], "way driven in the next 4 s [m]")
    _histogram(axes[0, 2], statistics.values["curvature"], "largest |curvature| of the next 4 s [1/m]", log=True)
    _commands(axes[1, 0], statistics)
    _agents(axes[1, 1], statistics)
    _ends(axes[1, 2], statistics)
    figure.suptitle(f"split {statistics.split}: {statistics.scenes} scenes of {statistics.logs} logs")
    return atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _histogram(axes: Axes, values: np.ndarray, label: str, log: bool = False) -> None:
    known = values[np.isfinite(values)]
    if len(known):
        axes.hist(known, bins=30, color=_COLOR)
        axes.axvline(float(np.median(known)), color=_SECOND, linewidth=1.5, label=f"median {np.median(known):.3g}")
        axes.legend(framealpha=0.9)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("scenes")


def _commands(axes: Axes, statistics: Statistics) -> None:
    numbers = [statistics.counts["command"][name] for name in COMMANDS]
    bars = axes.bar(COMMANDS, numbers, color=_COLOR)
    axes.bar_label(bars, [f"{100 * number / statistics.scenes:.0f} %" for number in numbers])
    axes.set_xlabel("driving command")
    axes.set_ylabel("scenes")
    axes.margins(y=0.12)


def _agents(axes: Axes, statistics: Statistics) -> None:
    objects = {name: n for name, n in statistics.counts["object"].items() if n}
    order = sorted(objects, key=objects.get)
    means = [objects[name] / statistics.scenes for name in order]
    colors = [_COLOR if name in AGENT_CLASSES else _SECOND for name in order]
    bars = axes.barh([name.replace("_", " ") for name in order], means, color=colors)
    axes.bar_label(bars, [f" {mean:.2g}" for mean in means])
    axes.set_xlabel("objects within 50 m, a scene (blue: agents)")
    axes.margins(x=0.15)


def _ends(axes: Axes, statistics: Statistics) -> None:
    way, lateral = statistics.values["distance"], statistics.values["lateral"]
    points = axes.scatter(lateral, way, c=np.abs(statistics.values["turn"]), s=9, cmap="viridis")
    axes.figure.colorbar(points, ax=axes, label="|turn| in 4 s [deg]")
    axes.invert_xaxis()  # left is left
    axes.set_xlabel("lateral displacement after 4 s [m], left positive")
    axes.set_ylabel("way driven in 4 s [m]")
