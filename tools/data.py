"""Data sets: what the published splits hold and weigh, what is here and readable, and what a split looks like.

    python tools/data.py splits                                    # what each published split filters and is for
    python tools/data.py plan                                      # sizes and counts of all of them, with sources
    python tools/data.py plan split=navtest                        # what to download for one, and whether it fits
    python tools/data.py verify split=test                         # the synthetic city: logs, sensors, maps
    python tools/data.py verify split=navtest data=navsim frames=history cameras=[all] workers=16
    python tools/data.py checksums split=test                      # SHA-256 list; verify compares with it from then on
    python tools/data.py verify split=navtrain archives=downloads  # published MD5 sums of the archives in a folder
    python tools/data.py statistics split=train                    # speeds, commands, curvature, agents; with a figure
    python tools/data.py normalisation split=train                 # published constants beside recomputed ones

The first word is short for do=WORD. Actions print tables and write <output_dir>/<action>_<split>.json; statistics also
writes a figure. verify changes nothing, and exits with an error when something is missing or cannot be read.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from navsim_eval.command_line import run_tool
from navsim_eval.data_tools import plan as planning
from navsim_eval.data_tools.checksums import default_list, write_checksums
from navsim_eval.data_tools.config import DataToolConfig
from navsim_eval.data_tools.published import SOURCES
from navsim_eval.data_tools.verify import ERROR, OK, Check, listed_files, verify
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write

COLORS = {OK: "green", ERROR: "bold red"}
SHOWN = 5  # problems of a check on the terminal; the JSON file has the others


@contextmanager
def bar(title: str, total: int) -> Iterator:
    with tqdm(total=total, desc=title) as shown:
        yield shown.update


def main(config: DataToolConfig) -> None:
    actions = {
        "splits": splits,
        "plan": plan,
        "verify": verify_split,
        "checksums": checksums,
        "statistics": statistics,
        "normalisation": normalisation,
    }
    actions[config.do](config)


def splits(config: DataToolConfig) -> None:
    show(planning.splits_table(planning.plan(config.split, config.data)))
    show(planning.local_table(config.data))


def plan(config: DataToolConfig) -> None:
    plans = planning.plan(config.split, config.data)
    if config.split:
        show(planning.splits_table(plans))
        show(planning.archives_table(plans[0]))
    show(planning.sizes_table(plans))
    for key, source in SOURCES.items():
        print(f"  {key}  {source}")
    free = planning.free_gb(config.data.root)
    print(f"free on the disk of {config.data.root}: {free:,.0f} GB")
    needed = planning.needed_gb(plans[0]) if config.split else None
    if needed is not None and needed > free:
        print(f"not enough: logs and sensors of {config.split} take {needed:,.0f} GB unpacked")
    save(config, planning.as_json(plans, config.data))


def verify_split(config: DataToolConfig) -> None:
    checks = verify(config, bar)
    table = Table(title=f"Split {config.split} in {config.data.root}", title_justify="left")
    for name in ("what", "state", "found", "expected", "wrong"):
        table.add_column(name, overflow="fold")
    for check in checks:
        state = f"[{COLORS.get(check.state, 'yellow')}]{check.state}[/]"
        cells = (check.found, check.expected, str(check.wrong or ""))
        table.add_row(escape(check.subject), state, *map(escape, cells))
    show(table)
    for check in checks:
        print_problems(check, config.data.root)
    path = save(config, {"split": config.split, "root": config.data.root, "checks": [vars(check) for check in checks]})
    failed: list[Check] = [check for check in checks if check.state == ERROR]
    if failed:
        wrong = ", ".join(f"{check.subject} ({check.wrong})" for check in failed)
        raise UserError(f"split {config.split} is not whole: {wrong}; listed in {path}")


def print_problems(check: Check, root: str) -> None:
    """The first problems of a check, paths relative to the data root, and what to do."""
    if not check.wrong:
        return
    print(f"{check.subject}: {check.wrong} wrong" + (f" ({check.remedy})" if check.remedy else ""))
    for problem in check.problems[:SHOWN]:
        print("  " + problem.replace(f"{root.rstrip('/')}/", ""))
    if check.wrong > SHOWN:
        print(f"  … and {check.wrong - SHOWN} more")


def checksums(config: DataToolConfig) -> None:
    target = Path(config.checksums or default_list(config.data.root, config.split))
    count = write_checksums(target, Path(config.data.root), listed_files(config), config.workers, bar)
    print(f"{count} files listed in {target}; check them with verify, or with: sha256sum -c {target.name}")


def statistics(config: DataToolConfig) -> None:
    from navsim_eval.data_tools.figure import write_figure
    from navsim_eval.data_tools.statistics import counts_table, split_statistics, summary_table

    scenes = SceneDataset.from_config(config.data, config.split, workers=max(config.workers, 1), progress=True)
    print(scenes.coverage)
    result = split_statistics(scenes, config.workers, bar)
    show(summary_table(result))
    show(counts_table(result))
    if result.skipped:
        print(f"{len(result.skipped)} scenes left out; first: {next(iter(result.skipped.values()))}")
    save(config, result.as_json())
    figure = write_figure(result, Path(config.output_dir) / f"statistics_{file_name(config)}.png")
    print(f"written: {figure}")


def normalisation(config: DataToolConfig) -> None:
    from diffusiondrive.normalisation import constants_table
    from diffusiondrive.normalisation import normalisation as recompute

    rows, numbers = recompute(config.data, config.split, config.samples, bar)
    show(constants_table(rows, config.split))
    save(config, numbers)


def show(table: Table) -> None:
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


def save(config: DataToolConfig, content: dict) -> Path:
    path = Path(config.output_dir) / f"{config.do}_{file_name(config)}.json"
    atomic_write(path, json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")
    return path


def file_name(config: DataToolConfig) -> str:
    return (config.split or "all").replace(":", "_")


if __name__ == "__main__":
    sys.exit(run_tool(main, DataToolConfig, "data", __doc__, positional=("do",)))
