"""tools/compare.py as a person meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from navsim_eval.command_line import run_tool
from navsim_eval.comparison.compare import CompareConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.results import FORMATS, Coverage, Results, make_summary, save_json
from tests.navsim_eval.test_compare import some_scores
from tests.tools.test_evaluate_cli import tool
from tests.worlds import write_world

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "compare.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def in_process(*arguments: str) -> int:
    return run_tool(tool("compare").main, CompareConfig, "compare", "doc", list(arguments), positional=("a", "b"))


def a_run(folder: Path, seed: int, split: str = "test") -> Path:
    scores = some_scores(seed)
    results = Results("pdms_v1", scores.tokens, scores.columns)
    results.save_csv(folder / "scores.csv")
    summary = make_summary(results, Coverage(40, 40, 40, 40), planner={"name": f"p{seed}"}, split=split, seed=0)
    save_json(folder / "summary.json", summary)
    return folder


def test_two_folders_by_place_or_by_name(tmp_path):
    a, b = a_run(tmp_path / "with, comma (1)", 0), a_run(tmp_path / "b", 1)
    done = run(str(a), str(b), f"output_dir={tmp_path / 'out'}", "resamples=300")
    assert done.returncode == 0, done.stderr
    for word in ("p0", "p1", "B − A", "NC", "DAC", "over tokens", "40 pairs", "Biggest losses", "logs are unknown"):
        assert word in done.stdout
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    expected = float(np.mean(some_scores(1).columns["score"] - some_scores(0).columns["score"]))
    assert abs(content["differences"]["score"]["difference"] - expected) < 1e-12
    assert (tmp_path / "out" / "comparison.html").read_text().startswith("<!doctype html>")

    named = [f"b={b}", f"a='{a}'", f"output_dir={tmp_path / 'again'}", "resamples=300"]
    assert in_process(*named) == 0
    assert json.loads((tmp_path / "again" / "comparison.json").read_text()) == content


def test_logs_come_from_the_data_where_no_file_names_them(tmp_path, capsys):
    world = write_world(tmp_path / "world", {"somewhere": 2}, num_frames=15, sensors=False)
    tokens = SceneDataset.from_config(world.data, "somewhere").tokens
    columns = {name: np.linspace(0, 1, len(tokens)) for name in FORMATS["pdms_v1"].columns}
    for name in ("a", "b"):
        Results("pdms_v1", np.array(tokens), columns).save_csv(tmp_path / f"{name}.csv")
    files = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), f"output_dir={tmp_path / 'out'}", "resamples=200"]
    assert in_process(*files, *world.overrides, "split=somewhere") == 0
    shown = capsys.readouterr().out
    assert "4 pairs of scenes (2 logs), none unpaired" in shown and "only 2 logs" in shown


def test_mistakes_are_one_line(tmp_path, capsys):
    a, other = a_run(tmp_path / "a", 0), a_run(tmp_path / "b", 1, split="val")
    for arguments, fact in (
        ([str(a)], "a=PATH b=PATH"),
        ([str(a), str(other)], "split 'test'"),
        ([str(a), str(tmp_path / "gone")], "no such file or folder"),
        ([str(a), str(a), str(a)], "is not an override"),
    ):
        assert in_process(*arguments) == 2
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1 and message.startswith("error: ") and fact in message
