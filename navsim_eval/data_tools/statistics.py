"""What a split looks like: speeds, commands, curvature, agents, gaps; from the logs alone, no sensor file is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from navsim_eval.data_tools.verify import tokens_by_log
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import run_jobs
from navsim_eval.scene import AGENT_CLASSES, COMMANDS, FRAME_INTERVAL_S, STATIC_CLASSES, BoxIndex, Scene

AGENT_RANGE = 50.0  # m: objects count when their centre is at most so far from the rear axle
MOVING = 0.5  # m/s
SHORTEST_ARC = 1.0  # m: curvature of a shorter stretch is noise
HORIZON = 8  # poses, 4 s

QUANTITIES: Mapping[str, str] = {  # column → what it is, with its unit
    "speed": "speed now [m/s]",
    "acceleration": "longitudinal acceleration now [m/s²]",
    "distance": "way driven in the next 4 s [m]",
    "turn": "change of heading in the next 4 s [deg]",
    "curvature": "largest |curvature| of the next 4 s [1/m], where more than 1 m is driven",
    "lateral": "lateral displacement after 4 s [m]",
    "agents": "vehicles, pedestrians and bicycles within 50 m",
    "moving": "of these, faster than 0.5 m/s",
    "static": "cones, barriers, signs and other objects within 50 m",
    "red_lights": "lane connectors with a red light",
}


@dataclass
class Statistics:
    """What was measured of a split.

    values:  quantity → (scenes,) float64, NaN where undefined;  counts: kind → name → number of scenes (objects)
    skipped: scenes that could not be read, with the reason
    """

    split: str
    scenes: int
    logs: int
    values: dict[str, np.ndarray]
    counts: dict[str, dict[str, int]]
    skipped: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean, standard deviation and quantiles of each quantity over the scenes where it is defined."""
        return {name: _summary(values) for name, values in self.values.items()}

    def as_json(self) -> dict[str, Any]:
        """Summary, counts and 20-bin histograms; plain numbers."""
        histograms = {}
        for name, values in self.values.items():
            count, edges = np.histogram(values[np.isfinite(values)], bins=20)
            histograms[name] = {"edges": edges.tolist(), "count": count.tolist()}
        return {
            "split": self.split,
            "scenes": self.scenes,
            "logs": self.logs,
            "quantities": dict(QUANTITIES),
            "summary": self.summary(),
            "counts": self.counts,
            "histograms": histograms,
            "skipped": self.skipped,
        }


def _summary(values: np.ndarray) -> dict[str, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return {"count": 0}
    low, middle, high = np.percentile(known, [5, 50, 95])
    return {
        "count": len(known),
        "mean": float(known.mean()),
        "std": float(known.std()),
        "min": float(known.min()),
        "p5": float(low),
        "p50": float(middle),
        "p95": float(high),
        "max": float(known.max()),
    }


def split_statistics(scenes: SceneDataset, workers: int, bar: Callable[[str, int], Any]) -> Statistics:
    """Measure every scene. Scenes that cannot be read are left out and listed; UserError when none is left."""
    jobs, rows, skipped = tokens_by_log(scenes), [], {}
    counts: dict[str, Counter] = {name: Counter() for name in ("command", "map", "object", "gap", "label")}
    with bar("statistics", len(jobs)) as update:
        for outcome in run_jobs(_MeasureLog(scenes), jobs, workers=workers):
            update(1)
            if not outcome.ok:
                skipped |= dict.fromkeys(jobs[outcome.index][1], outcome.error)
                continue
            measured, lost = outcome.value
            skipped |= lost
            for values, named in measured:
                rows.append(values)
                for kind, names in named.items():
                    counts[kind].update(names)
    if not rows:
        raise UserError(f"split {scenes.split.name}: no scene can be read; first: {next(iter(skipped.values()))}")
    values = {name: np.array([row[name] for row in rows]) for name in QUANTITIES}
    tables = {kind: dict(sorted(found.items())) for kind, found in counts.items()}
    tables["command"] = {name: counts["command"][name] for name in COMMANDS}
    return Statistics(scenes.split.name, len(rows), len(scenes.log_names), values, tables, skipped)


@dataclass(frozen=True)
class _MeasureLog:
    """Numbers of the scenes of one log, (log name, its tokens); sent to every worker once."""

    scenes: SceneDataset

    def __call__(self, item: tuple[str, list[str]]) -> tuple[list[tuple[dict, dict]], dict[str, str]]:
        measured, lost = [], {}
        for token in item[1]:
            try:
                scene = self.scenes[token]
            except DataError as error:
                lost[token] = str(error)
                continue
            measured.append((measure_scene(scene), named_facts(scene)))
        return measured, lost


def measure_scene(scene: Scene) -> dict[str, float]:
    """All `QUANTITIES` of a scene; NaN where a window has no future or no labels."""
    now = scene.current
    values = dict.fromkeys(QUANTITIES, np.nan)
    values["speed"] = float(np.linalg.norm(now.ego_velocity))
    values["acceleration"] = float(now.ego_acceleration[0])
    values["red_lights"] = float(sum(is_red for _, is_red in now.traffic_lights))
    if scene.future:
        values |= _future(scene)
    if now.annotations is not None:
        boxes, names = now.annotations.boxes, now.annotations.names
        near = np.hypot(boxes[:, BoxIndex.X], boxes[:, BoxIndex.Y]) <= AGENT_RANGE
        agent = near & np.isin(names, AGENT_CLASSES)
        speed = np.linalg.norm(now.annotations.velocity, axis=-1)
        values["agents"] = float(agent.sum())
        values["moving"] = float((agent & (speed > MOVING)).sum())
        values["static"] = float((near & np.isin(names, STATIC_CLASSES)).sum())
    return values


def _future(scene: Scene) -> dict[str, float]:
    poses = np.concatenate([np.zeros((1, 3)), scene.human_trajectory(min(HORIZON, len(scene.future)))])
    steps = np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=-1)
    turns = np.diff(np.unwrap(poses[:, 2]))
    long_enough = steps >= SHORTEST_ARC
    curvature = np.abs(turns[long_enough] / steps[long_enough])
    return {
        "distance": float(steps.sum()),
        "turn": float(np.degrees(turns.sum())),
        "curvature": float(curvature.max()) if len(curvature) else np.nan,
        "lateral": float(poses[-1, 1]),
    }


def named_facts(scene: Scene) -> dict[str, list[str]]:
    """What is counted by name: command, map, near objects by class, whether the window has a gap in time or labels."""
    now = scene.current
    times = np.array([frame.timestamp_us for frame in scene.frames], np.int64)
    gap = bool((np.abs(np.diff(times) * 1e-6 - FRAME_INTERVAL_S) > 0.06).any())
    objects: list[str] = []
    if now.annotations is not None:
        boxes = now.annotations.boxes
        near = np.hypot(boxes[:, BoxIndex.X], boxes[:, BoxIndex.Y]) <= AGENT_RANGE
        objects = now.annotations.names[near].tolist()
    return {
        "command": [COMMANDS[int(np.argmax(now.driving_command))]],
        "map": [now.map_name],
        "object": objects,
        "gap": ["with a gap" if gap else "without"],
        "label": ["labelled" if now.annotations is not None else "unlabelled"],
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def summary_table(statistics: Statistics) -> Table:
    """Quantiles of every quantity."""
    title = f"Split {statistics.split}: {statistics.scenes} scenes of {statistics.logs} logs"
    table = Table(title=title, title_justify="left")
    columns = ("mean", "std", "min", "p5", "p50", "p95", "max")
    for column in ("quantity", *columns):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    for name, row in statistics.summary().items():
        cells = [f"{row[column]:.3g}" for column in columns] if row["count"] else ["–"] * len(columns)
        table.add_row(escape(QUANTITIES[name]), *cells)
    return table


def counts_table(statistics: Statistics) -> Table:
    """Shares of commands, maps, windows with gaps; objects a scene."""
    table = Table(title="Counts", title_justify="left")
    for column in ("what", "name", "number", "a scene"):
        table.add_column(column, justify="right" if column in ("number", "a scene") else "left")
    for kind, found in statistics.counts.items():
        for name, number in found.items():
            table.add_row(kind, escape(name), str(number), f"{number / statistics.scenes:.3g}")
    return table
