"""tools/make_city.py from the shell: help, one-line errors, a city as small as can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sumo", reason="the synthetic city needs Eclipse SUMO")

ROOT = Path(__file__).resolve().parents[2]


def make_city(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "make_city.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_help_explains():
    shown = make_city("--help")
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("city.scenes", "city.sensors", "data.root", "[city]"))


@pytest.mark.parametrize(
    ("argument", "fact"),
    [("city.scene=3", "did you mean 'city.scenes'"), ("city.sensors=some", "choose one of none, front, all")],
)
def test_a_bad_setting_is_one_line(argument, fact):
    shown = make_city(argument)
    assert shown.returncode == 2 and fact in shown.stderr and len(shown.stderr.strip().splitlines()) == 1


def test_the_smallest_city_under_a_relative_root(tmp_path):
    arguments = ("city.scenes=1", "city.splits=[val]", "city.sensors=none", "workers=1", "data.root=city")
    shown = make_city(*arguments, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert len(list((tmp_path / "city" / "navsim_logs" / "val").glob("*.pkl"))) == 1
    assert len(list((tmp_path / "city" / "maps").rglob("map.gpkg"))) == 1
    assert not (tmp_path / "city" / ".build").exists()
