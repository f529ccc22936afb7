"""A tool that finds no data named makes the synthetic city; one that was told where to look never does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from navsim_eval import command_line
from navsim_eval.city import make
from navsim_eval.config import DataConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    for name in ("OPENSCENE_DATA_ROOT", "NUPLAN_MAPS_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    roots: list[str] = []
    monkeypatch.setattr(make, "make_city", lambda config, root, maps, progress: roots.append(root))
    return roots


def test_the_default_city_is_made_once(made: list[str], tmp_path: Path) -> None:
    command_line.make_default_city("evaluate", SimpleNamespace(data=DataConfig()))
    assert made == ["data/city"]
    (tmp_path / "data" / "city" / "navsim_logs").mkdir(parents=True)
    command_line.make_default_city("evaluate", SimpleNamespace(data=DataConfig()))
    assert made == ["data/city"]


def test_a_named_root_is_never_filled(made: list[str], tmp_path: Path) -> None:
    command_line.make_default_city("evaluate", SimpleNamespace(data=DataConfig(root=str(tmp_path / "mine"))))
    command_line.make_default_city("doctor", SimpleNamespace(data=DataConfig()))
    command_line.make_default_city("import_checkpoint", SimpleNamespace(source="x"))
    assert made == []


def test_help_may_be_cut_short_by_its_reader() -> None:
    tool = subprocess.Popen(
        [sys.executable, "tools/score.py", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    tool.stdout.close()  # before anything is written: importing takes longer than this
    assert tool.stderr.read() == b"" and tool.wait() == 0
