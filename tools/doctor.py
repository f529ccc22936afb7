"""Examine this installation: versions, GPU, data, environment variables, and whether arithmetic is fit to score.

    python tools/doctor.py
    python tools/doctor.py data=navsim          # the real data that $OPENSCENE_DATA_ROOT names
    python tools/doctor.py data.root=/data/city

Prints what is here, what is missing, and the exact remedy; exits with an error when something needed is wrong.
"""

import sys

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from navsim_eval.command_line import run_tool
    from navsim_eval.doctor import ERROR, OK, DoctorConfig, examine
    from navsim_eval.errors import UserError
except ImportError as error:
    sys.exit(f"error: package '{error.name}' is not installed here; run make setup and use .venv/bin/python")

COLORS = {OK: "green", ERROR: "bold red"}


def main(config: DoctorConfig) -> None:
    findings = examine(config)
    table = Table(show_edge=False)
    for name in ("what", "state", "found", "remedy"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        color = COLORS.get(finding.state, "yellow")
        state = f"[{color}]{finding.state}[/]"
        table.add_row(escape(finding.subject), state, escape(finding.detail), escape(finding.remedy))
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    wrong = [finding.subject for finding in findings if finding.state == ERROR]
    if wrong:
        raise UserError(f"{len(wrong)} things need mending: {', '.join(wrong)}")


if __name__ == "__main__":
    sys.exit(run_tool(main, DoctorConfig, "doctor", __doc__))
