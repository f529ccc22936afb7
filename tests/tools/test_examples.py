"""The examples that docs tell people to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.worlds import write_world

ROOT = Path(__file__).resolve().parents[2]


def test_an_own_planner_is_judged_beside_the_baselines(tmp_path: Path) -> None:
    world = write_world(tmp_path / "city", {"test": 2}, sensors=False)
    command = [sys.executable, "examples/own_planner.py", str(world.root), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "constant_turn: PDMS" in done.stdout and "best of 3 candidates" in done.stdout and "human: PDMS" in done.stdout
    )
    assert (tmp_path / "out" / "report.html").is_file()
