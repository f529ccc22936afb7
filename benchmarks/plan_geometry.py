"""Plans of trained planners as curves: what lies beyond their sight, and what headings that fit the path are worth.

    python benchmarks/plan_geometry.py data.root=/data/city5000 data.maps=/data/city5000/maps \\
        workdir=outputs/experiments rows=[diffusiondrive_judged,no_map]

Reads the evaluations that `paper_table.py` and `ablations.py` left in `workdir`; trains nothing. Per row: poses outside
the map that the decoder looks at and outside the range of the diffused space, PDMS of scenes whose human plan stays
inside or leaves the map, angle between heading and path, and the PDMS of the same plans with headings taken from the
path and with paths bent to the headings (paired by scene, averaged over seeds, 95 % intervals over logs).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusiondrive.experiments.findings import RowScores, difference, read_row
from diffusiondrive.experiments.geometry import (
    beyond_box,
    beyond_square,
    heading_errors,
    headings_from_paths,
    paths_from_headings,
)
from diffusiondrive.experiments.matrix import HUMAN, MatrixConfig
from diffusiondrive.experiments.paper import DIFFUSIONDRIVE, JUDGED
from diffusiondrive.experiments.sheet import Sheet, gain_text
from diffusiondrive.perception import PerceptionConfig
from diffusiondrive.space import SpaceConfig
from navsim_eval.command_line import run_tool
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.evaluate import score_predictions
from navsim_eval.metric_caches import MetricCaches, store_folder
from navsim_eval.predictions import Predictions

METRIC = "pdms_v1"
TIED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "headings_from_paths": headings_from_paths,
    "paths_from_headings": paths_from_headings,
}
HEADS = ("planner", "beyond map", "beyond range", "PDMS inside", "PDMS beyond", "angle, mean", "p95",
         "headings from paths", "paths from headings")  # fmt: skip


@dataclass
class GeometryConfig(MatrixConfig):
    """The matrix's settings, of which data, seeds, test_split and workdir count here.

    rows: evaluated rows of the table or the ablations; the first one is what the others are compared with
    output: JSON, the table (.md) beside it
    """

    rows: list[str] = field(default_factory=lambda: [JUDGED.name, DIFFUSIONDRIVE.name])
    output: str = "benchmarks/results/plan_geometry.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows:
            raise UserError("rows=[]: name at least one, as paper_table.py or ablations.py calls it")


def main(config: GeometryConfig) -> None:
    driven, human = read([config.evaluation_folder(HUMAN)], HUMAN)
    found = {name: read(config.evaluation_folders(name), name) for name in config.rows}
    dataset = SceneDataset.from_config(config.data, config.test_split)
    caches = MetricCaches(config.data, dataset, METRIC, store_folder(config.caches / config.test_split, METRIC))
    caches.build(1)
    range_m = PerceptionConfig().range_m
    beyond = beyond_square(driven[0].trajectories, range_m).any(axis=1)
    leaves = dict(zip(driven[0].tokens.tolist(), beyond, strict=True))
    rows = {HUMAN: describe(driven) | {"by_reach": by_reach(human, None, leaves)}}
    for name, (plans, row) in tqdm(found.items(), desc="rows"):
        base = None if name == config.rows[0] else found[config.rows[0]][1]
        rows[name] = describe(plans) | {"tied": judge_tied(row, plans, caches), "by_reach": by_reach(row, base, leaves)}
    result = {
        "scenes": len(dataset),
        "leave_the_map": int(sum(leaves.values())),
        "map_range_m": range_m,
        "seeds": config.seeds,
        "rows": rows,
        "environment": describe_environment(),
    }
    sheet(result).keep(Path(config.output), result)


def read(folders: list[Path], name: str) -> tuple[list[Predictions], RowScores]:
    """Plans, a folder a seed, and what they scored."""
    return [Predictions.load(folder / "predictions.npz") for folder in folders], read_row(name, folders)


def describe(plans: list[Predictions]) -> dict[str, Any]:
    """Shares and angles [degrees] over the driven plans of all seeds."""
    trajectories = np.concatenate([made.trajectories for made in plans]).astype(np.float64)
    space = SpaceConfig()
    low = (space.x_origin, space.y_origin)
    high = (space.x_origin + space.x_span, space.y_origin + space.y_span)
    angles = np.degrees(heading_errors(trajectories))
    return {
        "poses_beyond_map": float(beyond_square(trajectories, PerceptionConfig().range_m).mean()),
        "poses_beyond_range": float(beyond_box(trajectories, low, high).mean()),
        "angle_mean_deg": float(np.nanmean(angles)),
        "angle_p95_deg": float(np.nanpercentile(angles, 95)),
    }


def judge_tied(row: RowScores, plans: list[Predictions], caches: MetricCaches) -> dict[str, Any]:
    """PDMS of changed plans against the planner's own."""
    changed = [
        replace(made, trajectories=tie(made.trajectories.astype(np.float64))) for tie in TIED.values() for made in plans
    ]
    results = score_predictions(changed, caches, 1)
    judged = np.array([result.columns["score"][np.argsort(result.tokens)] for result in results])  # as read_row orders
    ways = zip(TIED, judged.reshape(len(TIED), len(plans), -1), strict=True)
    return {name: difference(replace(row, name=name, scores=scores), row).as_dict() for name, scores in ways}


def by_reach(row: RowScores, base: RowScores | None, leaves: dict[str, bool]) -> dict[str, Any]:
    """PDMS of the scenes whose human plan stays on the map, or leaves it, and there the difference from the base.

    leaves: token → whether the human plan leaves the map
    """
    beyond = np.array([leaves[token] for token in row.tokens.tolist()])
    found = {}
    for name, chosen in (("inside", ~beyond), ("beyond", beyond)):
        part = pick(row, chosen)
        against = None if base is None else difference(part, pick(base, chosen)).as_dict()
        found[name] = {"scenes": int(chosen.sum()), "pdms": 100.0 * part.mean, "against_base": against}
    return found


def pick(row: RowScores, chosen: np.ndarray) -> RowScores:
    """The row on some of its scenes."""
    return replace(row, tokens=row.tokens[chosen], logs=row.logs[chosen], scores=row.scores[:, chosen])


def sheet(result: dict[str, Any]) -> Sheet:
    rows = []
    for name, row in result["rows"].items():
        cells = [f"{100 * row[part]:.1f} %" for part in ("poses_beyond_map", "poses_beyond_range")]
        cells += [_reach(row["by_reach"][part]) for part in ("inside", "beyond")]
        cells += [f"{row[part]:.1f}°" for part in ("angle_mean_deg", "angle_p95_deg")]
        cells += [gain_text(row["tied"][part]) if "tied" in row else "" for part in TIED]
        rows.append([name, *cells])
    title = f"{result['scenes']} scenes, in {result['leave_the_map']} the human leaves ±{result['map_range_m']:.0f} m"
    return Sheet(f"{title}; seeds {result['seeds']}", HEADS, rows)


def _reach(part: dict[str, Any]) -> str:
    against = part["against_base"]
    return f"{part['pdms']:.1f}" + (f" ({gain_text(against)})" if against else "")


if __name__ == "__main__":
    sys.exit(run_tool(main, GeometryConfig, "benchmark_plan_geometry", __doc__))
