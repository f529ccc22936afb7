"""Write NAVSIM's submission file, or check one, without the devkit.

    python tools/submit.py predictions=outputs/evaluate/predictions.npz split=navtest data=navsim \\
        team_name=ours authors='A. Author' email=a@b.org institution=University country=Germany
    python tools/submit.py planner=checkpoints/diffusiondrive split=navtest data=navsim team_name=…
    python tools/submit.py predictions=first.npz second_stage=second.npz split=navhard_two_stage data=navsim team_name=…
    python tools/submit.py predictions=[seed0.npz,seed1.npz,seed2.npz] …            # several training seeds (v1)
    python tools/submit.py check=submission.pkl split=navtest data=navsim

One stage gives the layout of NAVSIM v1 (`predictions`), two stages that of v2 (`first_stage_predictions`,
`second_stage_predictions`). Nothing is written that would be refused: tokens have to be those of the split, poses
finite, team fields filled. `check` lists what it looked at and exits with an error when something is wrong.

Writes submission.pkl to output_dir. Nothing in a checked file is executed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from diffusiondrive.evaluation import make_planner
from navsim_eval.command_line import run_tool
from navsim_eval.errors import UserError
from navsim_eval.submit import Check, SubmitConfig, check_file, submit


@contextmanager
def bar(title: str, total: int) -> Iterator:
    with tqdm(total=total, desc=title, unit="scene") as shown:
        yield shown.update


def main(config: SubmitConfig) -> None:
    if not config.check:
        path = submit(config, make_planner, bar)
        print(f"written: {path}")
        config.check = str(path)
    checks = check_file(config)
    Console(width=max(Console().width, 110)).print(as_table(config.check, checks))
    if wrong := [check for check in checks if check.problem]:
        raise UserError(f"{config.check}: {len(wrong)} problems, first: {wrong[0].what}: {wrong[0].problem}")


def as_table(title: str, checks: list[Check]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for name in ("what", "found", "problem"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(*map(escape, (check.what, check.found, check.problem)), style="red" if check.problem else None)
    return table


if __name__ == "__main__":
    sys.exit(run_tool(main, SubmitConfig, "submit", __doc__))
