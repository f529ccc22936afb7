"""The paper's comparison, trained and measured here: truncated diffusion against what it is said to beat.

    python benchmarks/paper_table.py data.root=/data/city5000 data.maps=/data/city5000/maps parallel=2
    python benchmarks/paper_table.py data=navsim variant= features=diffusiondrive train_split=navtrain \\
        val_split=navval test_split=navtest "train=['trainer=gpu','optimizer=gpu','loss=published']"

Trains every row under every seed with the same trunk, data, steps and losses, evaluates the best epochs on a city that
no training saw, and prints the table, its figure, and the paper's claims with verdicts, whichever way they go. Human
and untrained planners stand beside. Trainings and evaluations are kept in `workdir`; the same command resumes, and with
more seeds adds them. A city of the needed size:

    python tools/make_city.py data.root=/data/city5000 data.maps=/data/city5000/maps \\
        city.scenes=5000 city.val_scenes=120 city.test_scenes=500 city.seed=11 city.width=480

Planners that exist are loaded instead of trained, one for all seeds or one each:
`"planners={diffusiondrive: checkpoints/diffusiondrive, transfuser: 'runs/transfuser_{seed}/planner'}"`.

The comparison needs enough scenes, a solvable task (human ≥ 0.93) and room above the simplest plan: asserted, or with
`small=true` noted in the result. Head latency: all denoising passes from encoded scene to poses, batch 1, one thread,
rows in turn in one process.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from diffusiondrive.dataset import to_model_input
from diffusiondrive.experiments.findings import (
    RatioClaim,
    RowDifference,
    RowScores,
    difference,
    read_environments,
    read_row,
)
from diffusiondrive.experiments.matrix import EGO_MLP, HUMAN, MatrixConfig, choose_rows, run_matrix
from diffusiondrive.experiments.paper import CLAIMS, OURS, ROWS, VANILLA
from diffusiondrive.experiments.sheet import Sheet
from diffusiondrive.feature_cache import FeatureCache
from diffusiondrive.features import FeatureConfig
from diffusiondrive.noise import scene_noise
from diffusiondrive.planner import DiffusionDrive
from navsim_eval.command_line import run_tool
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.planners import BASELINES

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass
class PaperTableConfig(MatrixConfig):
    """The matrix, and when its answer counts.

    rows: names of ROWS; empty: all;  least_train, least_test: scenes;  least_human: PDMS (fraction)
    least_room: PDMS between the human and constant velocity (fraction);  small: go on without, and say so
    latency_frames: scenes that head latency is the median of;  output: JSON; table (.md) and figure (.png) beside it
    """

    rows: list[str] = field(default_factory=list)
    least_train: int = 5000
    least_test: int = 500
    least_human: float = 0.93
    least_room: float = 0.3
    small: bool = False
    latency_frames: int = 100
    output: str = "benchmarks/results/paper_table.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen = choose_rows(ROWS, self.rows)


def main(config: PaperTableConfig) -> None:
    scenes = count_scenes(config)
    runner = run_matrix(config.chosen, config)
    untrained = {name: read_row(name, [config.evaluation_folder(name)]) for name in BASELINES}
    doubts = check(scenes, untrained, config)
    found = {row.name: read_row(row.name, config.evaluation_folders(row.name)) for row in config.chosen}
    mlp = read_row(EGO_MLP, config.evaluation_folders(EGO_MLP))
    heads = measure_heads(config)
    orderings = [difference(found[a], found[b]) for a, b in CLAIMS if a in found and b in found]
    ratios = ratio_claims(found, heads)
    result = {
        "scenes": scenes,
        "variant": config.variant or "full size",
        "seeds": config.seeds,
        "train": config.train,
        "loaded": config.planners,
        "camera_codec": config.camera_codec,
        "preconditions_not_met": doubts,
        "rows": {
            row.name: {"title": row.title, **found[row.name].as_dict(), **heads[row.name]} for row in config.chosen
        },
        "beside": {name: row.as_dict() for name, row in {**untrained, EGO_MLP: mlp}.items()},
        "orderings": [ordering.as_dict() for ordering in orderings],
        "ratios": [claim.as_dict() for claim in ratios],
        "seconds": runner.done["seconds"],
        "trained_on": read_environments(config.training_folders(config.chosen)),
        "environment": describe_environment(),
    }
    output = Path(config.output)
    sheet(result, orderings, ratios).keep(output, result)
    draw(result, output.with_suffix(".png"))


# --- may the question be asked of this data? -------------------------------------------------------------------------


def count_scenes(config: PaperTableConfig) -> dict[str, int]:
    """Scenes of the splits. Raises UserError for too few of them, before anything is trained."""
    splits = {"train": config.train_split, "val": config.val_split, "test": config.test_split}
    counts = {name: len(SceneDataset.from_config(config.data, split)) for name, split in splits.items()}
    for name, least in (("train", config.least_train), ("test", config.least_test)):
        if counts[name] < least and not config.small:
            raise UserError(f"{counts[name]} {name} scenes are fewer than {least}: make a larger city, or small=true")
    return counts


def check(scenes: dict[str, int], untrained: dict[str, RowScores], config: PaperTableConfig) -> list[str]:
    """Preconditions that do not hold, in words. Raises UserError for them unless `small`."""
    human, plain = untrained[HUMAN].mean, untrained["constant_velocity"].mean
    doubts = [
        f"{scenes[name]} {name} scenes, wanted {least}"
        for name, least in (("train", config.least_train), ("test", config.least_test))
        if scenes[name] < least
    ]
    if human < config.least_human:
        doubts.append(f"human PDMS {human:.3f}, wanted {config.least_human}")
    if human - plain < config.least_room:
        doubts.append(f"{human - plain:.3f} between human and constant velocity, wanted {config.least_room}")
    if doubts and not config.small:
        raise UserError(f"this split cannot answer the question: {'; '.join(doubts)} (small=true: go on)")
    return doubts


# --- the head --------------------------------------------------------------------------------------------------------


def measure_heads(config: PaperTableConfig) -> dict[str, dict[str, float]]:
    """Passes, parameters and median milliseconds of each row's head, on features of the test split."""
    torch.set_num_threads(1)
    first = config.seeds[0]
    planners = {row.name: DiffusionDrive.from_pretrained(config.planner_folder(row, first)) for row in config.chosen}
    features = FeatureConfig.for_planner(planners[config.chosen[0].name].config)
    cache = FeatureCache(config.test_features, features)
    tokens = sorted(cache.tokens)[: config.latency_frames]
    seconds: dict[str, list[float]] = {name: [] for name in planners}
    with torch.inference_mode():
        for token in tokens:
            sample = {name: torch.from_numpy(np.array(value))[None] for name, value in cache[token][0].items()}
            batch = to_model_input(sample, features)
            for name, planner in planners.items():
                context = planner.perceive(batch)
                noise = scene_noise([token], 0, planner.noise_shape)
                begun = time.perf_counter()
                planner.propose(context, noise)
                seconds[name].append(time.perf_counter() - begun)
    return {
        name: {
            "passes": planner.config.schedule.steps,
            "candidates": planner.config.modes,
            "parameters": sum(weight.numel() for weight in planner.parameters()),
            "head_ms": 1e3 * statistics.median(seconds[name]),
        }
        for name, planner in planners.items()
    }


# --- the answer ------------------------------------------------------------------------------------------------------


def ratio_claims(found: dict[str, RowScores], heads: dict[str, dict[str, float]]) -> list[RatioClaim]:
    """What the paper says of diversity, passes and head latency against the vanilla policy."""
    if VANILLA not in found or OURS not in found:
        return []
    ours, vanilla = heads[OURS], heads[VANILLA]
    claims = [
        RatioClaim("denoising passes", ours["passes"] / vanilla["passes"], 0.1, at_least=False),
        RatioClaim("head latency", ours["head_ms"] / vanilla["head_ms"], 0.1, at_least=False),
    ]
    if "diversity" in found[OURS].modes and found[VANILLA].modes.get("diversity"):
        spread = found[OURS].modes["diversity"] / found[VANILLA].modes["diversity"]
        claims.append(RatioClaim("mode diversity", spread, 3.0, at_least=True))
    return claims


COLUMNS = (  # heading, where it is (an entry or its "modes"), factor, digits
    ("PDMS", "pdms", 1, 1),
    ("best of M", "best", 100, 1),
    ("mean of M", "mean", 100, 1),
    ("diversity", "diversity", 1, 3),
    ("minADE", "min_ade", 1, 2),
    ("ECE", "ece_nearest", 1, 3),
    ("passes", "passes", 1, 0),
    ("head [ms]", "head_ms", 1, 2),
)


def sheet(result: dict[str, Any], orderings: Sequence[RowDifference], ratios: Sequence[RatioClaim]) -> Sheet:
    """The table and the verdicts, in words."""
    entries = {**result["beside"], **{row["title"]: row for row in result["rows"].values()}}
    rows = []
    for name, entry in entries.items():
        values = {**entry.get("modes", {}), **entry}
        cells = [f"{values[key] * factor:.{digits}f}" if key in values else "" for _, key, factor, digits in COLUMNS]
        low, high = entry["interval"]
        rows.append([name, f"{cells[0]} [{low:.1f}, {high:.1f}]", *cells[1:]])
    lines = []
    for ordering in orderings:
        low, high = ordering.interval
        gained = f"{ordering.difference:+.1f}, {low:+.1f} to {high:+.1f}"
        lines.append(f"{ordering.a} > {ordering.b}: {ordering.verdict} ({gained})")
    for claim in ratios:
        sign = "≥" if claim.at_least else "≤"
        lines.append(f"{claim.text} {sign} {claim.bound:g} × the vanilla policy's: {claim.verdict} ({claim.value:.3g})")
    lines += [f"precondition not met: {doubt}" for doubt in result["preconditions_not_met"]]
    data = f"{result['scenes']['train']} training and {result['scenes']['test']} test scenes"
    title = f"{result['variant']}, {len(result['seeds'])} seeds, {data}"
    return Sheet(title, ["planner", *(title for title, *_ in COLUMNS)], rows, lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Chosen and best PDMS of each row with interval and seeds, and PDMS over the time of the head; a colour a row."""
    rows = list(result["rows"].values())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.45 * len(rows) + 1.6), width_ratios=(3, 2))
    for number, row in enumerate(rows):
        place, color = len(rows) - 1 - number, f"C{number}"
        left.plot(row["interval"], [place, place], color=color, linewidth=2)
        left.plot(row["pdms"], place, "o", color=color)
        left.plot(row["by_seed"], [place] * len(row["by_seed"]), "|", color="black")
        if "best" in row["modes"]:
            left.plot(100 * row["modes"]["best"], place, "^", color=color)
        right.plot(row["head_ms"], row["pdms"], "o", color=color)
    marks = {"o": "chosen, 95 % over logs", "|": "single seeds", "^": "best candidate"}
    handles = [pyplot.Line2D([], [], color="black", marker=mark, linestyle="", label=marks[mark]) for mark in marks]
    for name, style in ((HUMAN, "-"), (EGO_MLP, ":")):
        handles.append(left.axvline(result["beside"][name]["pdms"], color="grey", linestyle=style, label=name))
    left.set_yticks(range(len(rows)), [row["title"] for row in reversed(rows)])
    left.set_xlabel("PDMS on the unseen test city")
    left.legend(handles=handles, fontsize=7, loc="best")
    right.set_xscale("log")
    right.margins(0.15)
    right.set_xlabel("head, batch 1, one thread [ms]")
    right.set_ylabel("PDMS")
    figure.tight_layout()
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_tool(main, PaperTableConfig, "benchmark_paper_table", __doc__))
