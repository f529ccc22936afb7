"""tools/drive_loop.py as a shell sees it: a report of every tick, and one line for what the user can mend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffusiondrive.runtime.benchmark import load
from diffusiondrive.runtime.replay import DriveLoopConfig, drive_loop, presented, recorded_frames
from navsim_eval.config import load_config
from navsim_eval.errors import UserError
from tests.worlds import World, write_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"roads": 2}, num_frames=15)


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load("random:tiny", seed=1).save_pretrained(tmp_path_factory.mktemp("planner") / "tiny")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/drive_loop.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_drive_with_every_fault_leaves_a_report_of_every_tick(world: World, planner: Path, tmp_path: Path) -> None:
    output = tmp_path / "loop.json"
    settings = ("split=roads", "rate=20", "ticks=40", "faults=[all]", "fault_share=0.5", "device=cpu", "backend=eager")
    done = run(*world.overrides, f"planner={planner}", f"output={output}", *settings)
    assert done.returncode == 0, done.stderr
    assert "dropped_frame" in done.stdout and "deadline misses" in done.stdout
    result = json.loads(output.read_text())
    assert result["ticks"] == 40 == len(result["tick_by_tick"]) == sum(result["status"].values())
    assert result["not_finite_plans"] == result["stale_plans"] == result["faults_unflagged"] == 0
    assert result["frames"] == 30 and result["frames_without_sensors"] == 0
    assert sum(sum(counts.values()) for counts in result["faults"].values()) == 40
    for tick, row in enumerate(result["tick_by_tick"]):
        assert row["tick"] == tick and (row["status"] == "fresh") == (row["reasons"] == [])
        assert not row["fault"] or row["reasons"] or row["warnings"]
        assert row["age_s"] is None or row["age_s"] <= 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("faults=[gremlins]", "faults: 'gremlins' is none of stall"),
        ("rate=0", "loop.rate_hz: 0.0 must be positive"),
        ("max_age_s=9", "exceeds the plans' horizon"),
        ("fault_share=1", "fault_share: 1.0 must lie in"),
        ("log=nowhere", "nowhere"),
    ],
)
def test_what_the_user_can_mend(world: World, planner: Path, tmp_path: Path, override: str, message: str) -> None:
    settings = (f"planner={planner}", "split=roads", "device=cpu", "ticks=2", f"output={tmp_path / 'x.json'}")
    with pytest.raises(UserError, match=message):
        drive_loop(load_config(DriveLoopConfig, "drive_loop", [*world.overrides, *settings, override]))


def test_frames_without_sensors_split_a_drive_and_are_counted(world: World, tmp_path: Path) -> None:
    other = write_world(tmp_path, {"roads": 1}, num_frames=14)
    frames, missing = recorded_frames(DriveLoopConfig(data=other.data, split="roads"))
    assert len(frames) == 14 and missing == 0 and len({frame.drive for frame in frames}) == 1
    assert sum(frame.human is not None for frame in frames) == 14 - 8
    sweeps = [path for path in other.sensor_files("roads") if path.suffix == ".pcd"]
    sweeps[5].unlink()
    frames, missing = recorded_frames(DriveLoopConfig(data=other.data, split="roads"))
    assert len(frames) == 13 and missing == 1
    assert [len([f for f in frames if f.drive.endswith(f"/{run}")]) for run in (0, 1)] == [5, 8]
    drives = [delivery.drive for delivery in presented(frames, 27)]
    assert len(drives) == 27 and len(set(drives)) == 5, "every lap is another drive"
