"""A table of results with what it says in words: shown on the terminal, kept as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from navsim_eval.files import atomic_write

WIDTH = 130  # characters; narrower terminals would fold the numbers


def gain_text(found: Mapping[str, Any]) -> str:
    """A difference with its interval, both as `RowDifference.as_dict` has them, for a cell."""
    low, high = found["interval"]
    return f"{found['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


@dataclass(frozen=True)
class Sheet:
    """heads: of the columns, the first one names the row;  rows: cells, as many each;  lines: below the table"""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    lines: Sequence[str] = ()

    def show(self) -> None:
        table = Table(self.heads[0], title=self.title)
        for head in self.heads[1:]:
            table.add_column(head, justify="right")
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        console.width = max(console.width, WIDTH)
        console.print(table)
        for line in self.lines:
            print(line)

    def keep(self, output: Path, result: Mapping[str, Any]) -> None:
        """Write the numbers (JSON) to `output` and this table (.md) beside them, and show it."""
        atomic_write(output, json.dumps(result, indent=1) + "\n")
        atomic_write(output.with_suffix(".md"), self.markdown())
        self.show()
        print(f"written: {output}, and the table beside it")

    def markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.heads) - 1)]
        table = ["| " + " | ".join(cells) + " |" for cells in (self.heads, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *table, "", *(f"- {line}" for line in self.lines)]).rstrip() + "\n"
