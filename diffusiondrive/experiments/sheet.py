"""A table of results with what it says in words: shown on the terminal, kept as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

WIDTH = 130  # characters; narrower terminals would fold the numbers


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

    def markdown(self) -> str:
        ruler = ["---", *["---:"] * (len(self.heads) - 1)]
        table = ["| " + " | ".join(cells) + " |" for cells in (self.heads, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *table, "", *(f"- {line}" for line in self.lines)]).rstrip() + "\n"
