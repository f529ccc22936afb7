"""Evaluate planners on a split: PDMS or EPDMS, with NAVSIM's result file, a summary and a report with pictures.

    python tools/evaluate.py planner=constant_velocity
    python tools/evaluate.py planner=outputs/train/planner split=test workers=8
    python tools/evaluate.py planner=[human,pdm_closed,constant_velocity,stationary,outputs/train/planner]
    python tools/evaluate.py planner=checkpoints/diffusiondrive data=navsim split=navtest metric=[pdms_v1,epdms_v2]
    python tools/evaluate.py planner=human evaluator=both                  # pdms_v1 and epdms_v2
    python tools/evaluate.py planner=outputs/train/planner modes=true      # every candidate: best, mean, diversity
    python tools/evaluate.py planner=outputs/train/planner sampling.steps=4 sampling.schedule=consistent
    python tools/evaluate.py planner=outputs/train/planner stage=infer     # on the machine with the accelerator
    python tools/evaluate.py planner=outputs/train/planner stage=score     # later, anywhere

planner is human, constant_velocity, stationary, pdm_closed, or the folder of a checkpoint (a trained planner or an
ego-status MLP). Writes predictions.npz, scores.csv, summary.json and report.html to output_dir. Metric caches are kept
in metric_cache, so a second evaluation on the same split starts at once. A score is a headline only when every expected
scene was scored; otherwise the table says "partial: n of N".
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from tqdm import tqdm

from diffusiondrive.evaluation import EvaluatePlannerConfig, make_planner
from navsim_eval.command_line import run_tool
from navsim_eval.evaluate import evaluate
from navsim_eval.modes.judge import mode_rows
from navsim_eval.results import score_rows


@contextmanager
def bar(title: str, total: int) -> Iterator:
    with tqdm(total=total, desc=title, unit="scene") as shown:
        yield shown.update


def show(table: Table, header: list[str], rows: list[list[str]]) -> None:
    for index, name in enumerate(header):
        style = "bold" if index == 1 else None
        table.add_column(name, justify="right" if index else "left", style=style, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, needed)  # a cut-off number is worse than a wrapped line
    console.print(table)


def main(config: EvaluatePlannerConfig) -> None:
    runs = evaluate(config, make_planner, bar)
    for metric in dict.fromkeys(run.results.metric for run in runs):
        summaries = [run.summary for run in runs if run.results.metric == metric]
        header, rows = score_rows(summaries)
        table = Table(title=f"{summaries[0]['metric_title']}, split {config.split}, points", title_justify="left")
        show(table, header, rows)
    header, rows = mode_rows([run.summary for run in runs])
    if rows:
        show(Table(title=f"Candidates, split {config.split}", title_justify="left"), header, rows)
    print(f"written: {config.output_dir}")


if __name__ == "__main__":
    sys.exit(run_tool(main, EvaluatePlannerConfig, "evaluate", __doc__))
