"""The picture of a latency measurement: how latencies are distributed, and which stage takes how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from navsim_eval.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"runtime": "#1f6f8b", "reference": "#b5651d"}


def draw_latency(result: dict[str, Any], samples: dict[str, dict[str, np.ndarray]], path: Path) -> Path:
    """Write the figure (PNG). samples: subject → {"model", "end to end"} → (N,) milliseconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained")
    for subject, kinds in samples.items():
        for kind, values in kinds.items():
            share = np.arange(1, len(values) + 1) / len(values)
            line = "-" if kind == "end to end" else "--"
            label = f"{subject}, {kind}: p50 {np.median(values):.1f}, p99 {np.percentile(values, 99):.1f} ms"
            left.plot(np.sort(values), 100 * share, line, color=COLOURS[subject], label=label)
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(_plain_where_few(samples))
    left.tick_params(axis="x", which="minor", labelsize=8)
    left.set(xlabel="milliseconds a plan", ylabel="plans that took less [%]", ylim=(0, 101))
    left.grid(alpha=0.3, which="both")
    left.legend(loc="lower right", fontsize=8)
    _bars(right, result)
    how = f"{result['backend']}, {result['precision']}, {result['device']}, {result['threads']} threads"
    figure.suptitle(f"{result['planner']}: {how}, {result['iterations']} plans")
    try:
        return atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)


def _plain_where_few(samples: dict[str, dict[str, np.ndarray]]) -> Any:
    """Numbers at the small ticks of an axis that spans little more than a decade."""
    values = np.concatenate([v for kinds in samples.values() for v in kinds.values()])
    few = values.max() < 15 * max(values.min(), 1e-9)
    return (lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else "") if few else (lambda x, _: "")


def _bars(axes: Any, result: dict[str, Any]) -> None:
    """Median of every stage, stacked: the runtime, and the reference below it."""
    subjects = {"runtime": result} | ({"reference": result["reference"]} if "reference" in result else {})
    names = list(dict.fromkeys(name for one in subjects.values() for name in one["stages_ms"]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    longest = max(sum(s["p50"] for s in one["stages_ms"].values()) for one in subjects.values())
    for row, one in enumerate(subjects.values()):
        start = 0.0
        for name, numbers in one["stages_ms"].items():
            width = numbers["p50"]
            axes.barh(row, width, left=start, color=colours[name], label=name if row == 0 or name == "model" else None)
            if width > 0.06 * longest:
                axes.text(start + width / 2, row, f"{width:.1f}", ha="center", va="center", fontsize=8, color="white")
            start += width
        axes.text(start, row, f" {start:.1f}", va="center", fontsize=9)
    shown = {name: plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names}
    axes.legend(shown.values(), shown.keys(), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    axes.set_yticks(range(len(subjects)), subjects)
    axes.invert_yaxis()
    axes.set(xlabel="median milliseconds by stage", xlim=(0, 1.15 * longest))
