"""What each part of the planner is worth on the synthetic city: one change a row, several seeds, paired with the base.

    python benchmarks/ablations.py data.root=/data/city5000 data.maps=/data/city5000/maps parallel=2
    python benchmarks/ablations.py rows=[steps_1,steps_4,consistent,noise_zero] seeds=[0,1,2]      # no further training

Rows that only sample otherwise use the base's weights. Trainings and evaluations are kept in `workdir`; the same
command resumes, and one with more rows or seeds adds them; with the settings of `paper_table.py` it goes on from that
one's caches and trainings. Written: chosen, best and mean PDMS, diversity, calibration of every row, its difference
from the base with a 95 % interval over logs, and a figure of these differences.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

from diffusiondrive.experiments.ablations import BASE, ROWS
from diffusiondrive.experiments.findings import difference, read_environments, read_row
from diffusiondrive.experiments.matrix import MatrixConfig, choose_rows, run_matrix
from diffusiondrive.experiments.sheet import Sheet, gain_text
from navsim_eval.command_line import run_tool
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot

HEADS = ("change", "PDMS", "against the base (95 %)", "best of M", "mean of M", "diversity", "ECE")


@dataclass
class AblationConfig(MatrixConfig):
    """The matrix, and which rows of it.

    rows: names (the base comes along); empty: all;  output: JSON; table (.md) and figure (.png) beside it
    """

    rows: list[str] = field(default_factory=list)
    output: str = "benchmarks/results/ablations.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.chosen = choose_rows(ROWS, [BASE, *self.rows] if self.rows else [])


def main(config: AblationConfig) -> None:
    run_matrix(config.chosen, config)
    found = {row.name: read_row(row.name, config.evaluation_folders(row.name)) for row in config.chosen}
    rows = {}
    for row in config.chosen:
        against = None if row.name == BASE else difference(found[row.name], found[BASE]).as_dict()
        rows[row.name] = {"title": row.title, **found[row.name].as_dict(), "against_base": against}
    splits = {"train": config.train_split, "test": config.test_split}
    result = {
        "scenes": {name: len(SceneDataset.from_config(config.data, split)) for name, split in splits.items()},
        "variant": config.variant or "full size",
        "seeds": config.seeds,
        "train": config.train,
        "loaded": config.planners,
        "rows": rows,
        "trained_on": read_environments(config.training_folders(config.chosen)),
        "environment": describe_environment(),
    }
    output = Path(config.output)
    sheet(result).keep(output, result)
    draw(result, output.with_suffix(".png"))


def sheet(result: dict[str, Any]) -> Sheet:
    rows = []
    for row in result["rows"].values():
        against, modes = row["against_base"], row["modes"]
        gained = gain_text(against) if against else ""
        numbers = [f"{100 * modes[name]:.1f}" for name in ("best", "mean")]
        numbers += [f"{modes[name]:.3f}" if name in modes else "" for name in ("diversity", "ece_nearest")]
        rows.append([row["title"], f"{row['pdms']:.1f}", gained, *numbers])
    title = f"{result['variant']}, seeds {result['seeds']}, {result['scenes']['train']} training scenes"
    return Sheet(title, HEADS, rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """Every row's difference from the base: interval over logs, pairs of seeds; the base's PDMS in the axis label."""
    rows = [row for row in result["rows"].values() if row["against_base"]]
    figure, axes = pyplot.subplots(figsize=(9, 0.35 * len(rows) + 1.6))
    for place, row in enumerate(reversed(rows)):
        against = row["against_base"]
        axes.plot(against["interval"], [place, place], color="tab:blue", linewidth=2)
        axes.plot(against["difference"], place, "o", color="tab:blue", label=None if place else "95 % over logs")
        seeds = against["by_seed"]
        axes.plot(seeds, [place] * len(seeds), "|", color="black", label=None if place else "single seeds")
    axes.axvline(0.0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["title"] for row in reversed(rows)], fontsize=8)
    axes.set_xlabel(f"PDMS against the base ({result['rows'][BASE]['pdms']:.1f})")
    axes.legend(fontsize=7, loc="best")
    figure.tight_layout()
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_tool(main, AblationConfig, "benchmark_ablations", __doc__))
