"""One line of JSON per logged step, beside TensorBoard: easy to read back, diff and plot."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only


class JsonLinesLogger(Logger):
    """Appends {"step", "epoch", "time", metric: value, …} to `<folder>/metrics.jsonl`."""

    def __init__(self, folder: Path):
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is written as a file of its own; nothing to add here."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": step, "time": round(time.time(), 3), **{name: float(value) for name, value in metrics.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file; a half-written last line (killed run) is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
