"""Work that is several tools one after the other: each a command that a user could type, in a process of its own.

Output goes to a log a step and, where it is a table, to the terminal. Finished steps are remembered in `steps.json`, so
that interrupted work continues where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """One command: a script of this project and its arguments. show: its output belongs on the terminal, too."""

    name: str
    title: str
    command: tuple[str, ...]
    show: bool = False

    def __str__(self) -> str:
        return f"python {' '.join(self.command)}"


class StepRunner:
    """Runs steps and remembers the finished ones.

    folder:   holds `steps.json` and `logs/<step>.log`
    settings: what the steps depend on; work remembered under other settings is forgotten
    fresh:    forget what an earlier run finished
    """

    def __init__(self, folder: Path, settings: dict[str, Any], fresh: bool = False, say: Callable[[str], None] = print):
        self.folder, self._say = folder, say
        self._memory = folder / "steps.json"
        self._writing = threading.Lock()
        self.done: dict[str, Any] = {"settings": settings, "seconds": {}}
        if not fresh and self._memory.is_file():
            before = json.loads(self._memory.read_text())
            if before.get("settings") == settings:
                self.done = before

    def run(self, steps: Sequence[Step]) -> None:
        """One after the other, stopping at the first that fails. Raises UserError that names it and its log."""
        for number, step in enumerate(steps, 1):
            self._run(step, f"[{number}/{len(steps)}]")

    def run_independent(self, steps: Sequence[Step], parallel: int = 1) -> list[str]:
        """Steps that do not need each other, so many at a time; returns the names of those that failed."""

        def attempt(numbered: tuple[int, Step]) -> str | None:
            number, step = numbered
            try:
                self._run(step, f"[{number}/{len(steps)}]")
            except UserError as error:
                self._say(f"[{number}/{len(steps)}] {error}")
                return step.name
            return None

        with ThreadPoolExecutor(parallel) as pool:
            return [name for name in pool.map(attempt, enumerate(steps, 1)) if name]

    def total(self) -> float:
        """Seconds of all finished steps; written down as well."""
        self.done["total_seconds"] = round(sum(self.done["seconds"].values()), 1)
        self._remember()
        return self.done["total_seconds"]

    def _run(self, step: Step, number: str) -> None:
        if step.name in self.done["seconds"]:
            self._say(f"{number} {step.title}: done before")
            return
        self._say(f"{number} {step.title}\n    {step}")
        begun = time.monotonic()
        _run_command(step, self.folder / "logs" / f"{step.name}.log")
        seconds = round(time.monotonic() - begun, 1)
        with self._writing:
            self.done["seconds"][step.name] = seconds
            self._remember()
        self._say(f"{number} {step.title}: {seconds:.0f} s")

    def _remember(self) -> None:
        atomic_write(self._memory, json.dumps(self.done, indent=2) + "\n")


def _run_command(step: Step, log: Path) -> None:
    """Tables (and progress bars, on a terminal) pass through, everything else is kept in the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # One thread a process: the steps use several processes, and threads that wait for each other slow both down.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / step.command[0]), *step.command[1:]], env=environment, text=True,
            stdout=subprocess.PIPE if step.show else file, stderr=None if sys.stderr.isatty() else file,
        )  # fmt: skip
        for line in process.stdout or ():
            print("    " + line, end="", flush=True)
            file.write(line)
        status = process.wait()
    if status:
        raise UserError(f"{step.title} failed (status {status}): {_last_line(log)}; log: {log}; run it alone: {step}")


def _last_line(log: Path) -> str:
    lines: Sequence[str] = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
