"""Compare two results of the same scenes: paired by token, every difference with 95 % intervals.

    python tools/compare.py outputs/old outputs/new                       # folders of tools/evaluate.py
    python tools/compare.py a=2025.03.01.csv b=outputs/new                # NAVSIM's own result file (v1 or v2)
    python tools/compare.py a=scores.parquet b=scores.parquet a_proposal=0 b_proposal=3      # tools/score.py
    python tools/compare.py a=theirs.csv b=ours.csv split=navtest data=navsim     # names of the logs from the data

Differences are B − A. Intervals come from a paired bootstrap, over tokens and over logs: scenes of one log resemble
each other, so trust the second. Lists scenes in which a factor of the score went to zero or came back, and the biggest
losses and gains. Refuses results under different metrics or of different splits; says how many scenes have no partner.

Prints tables; writes comparison.json and comparison.html (with a plot) to output_dir.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from navsim_eval.command_line import run_tool
from navsim_eval.comparison import show
from navsim_eval.comparison.compare import CompareConfig, compare_files
from navsim_eval.files import atomic_write
from navsim_eval.results import save_json


def main(config: CompareConfig) -> None:
    comparison = compare_files(config)
    console = Console()
    console.width = max(console.width, 120)
    console.print(f"A: {escape(comparison.a.name)}  ({escape(comparison.a.source)})", highlight=False)
    console.print(f"B: {escape(comparison.b.name)}  ({escape(comparison.b.source)})", highlight=False)
    console.print(f"{comparison.a.metric}, {show.pairing_line(comparison)}", highlight=False)
    styles = {1: "green", -1: "red", 0: ""}
    verdicts = [styles[item.verdict] for item in comparison.differences]
    console.print(as_table("Differences, points", *show.difference_rows(comparison), verdicts))
    console.print(as_table("Flips", *show.flip_rows(comparison)))
    for title, changes in (("Biggest losses", comparison.losses), ("Biggest gains", comparison.gains)):
        if changes:
            console.print(as_table(title, *show.change_rows(changes), text=(0, 1, 5)))
    for name, (a, b) in comparison.closing.items():
        console.print(f"stated in both files: {name} {100 * a:.2f} → {100 * b:.2f}", highlight=False)
    for note in comparison.notes:
        console.print(f"note: {escape(note)}", highlight=False)

    folder = Path(config.output_dir)
    save_json(folder / "comparison.json", show.as_json(comparison))
    atomic_write(folder / "comparison.html", show.page(comparison))
    print(f"written: {folder / 'comparison.html'}, comparison.json")


def as_table(title: str, header: list[str], rows: list[list[str]], styles: list[str] | None = None, text=(0,)) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in text else "right")
    for index, row in enumerate(rows):
        table.add_row(*map(escape, row), style=styles[index] if styles else None)
    return table


if __name__ == "__main__":
    sys.exit(run_tool(main, CompareConfig, "compare", __doc__, positional=("a", "b")))
