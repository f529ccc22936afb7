"""tools/submit.py as a person meets it: a file is written and checked, and every mistake is one line."""

from __future__ import annotations

import pytest

from navsim_eval.command_line import run_tool
from navsim_eval.submit import SubmitConfig
from tests.tools.test_evaluate_cli import tool
from tests.worlds import World, write_world

TEAM = ["team_name=ours", "authors='A, B'", "email=a@b.org", "institution=U", "country=Germany"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    splits = {"somewhere": 1, "elsewhere": 1}
    return write_world(tmp_path_factory.mktemp("world"), splits, num_frames=15, sensors=False)


def run_submit(*arguments: str) -> int:
    return run_tool(tool("submit").main, SubmitConfig, "submit", "doc", list(arguments))


def test_written_then_checked(world, tmp_path, capsys):
    planned = [*world.overrides, "planner=constant_velocity", "split=somewhere", f"output_dir={tmp_path}", *TEAM]
    assert run_submit(*planned) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "submission.pkl"
    assert f"written: {path}" in shown and "2 of 2" in shown and "A, B" in shown

    assert run_submit(f"check={path}") == 0, "a file can be checked without any data"
    assert "no split named" in capsys.readouterr().out
    assert run_submit(f"check={path}", *world.overrides, "split=elsewhere") == 2
    complaint = capsys.readouterr().err.splitlines()
    assert len(complaint) == 1 and "2 missing" in complaint[0] and "2 not in the split" in complaint[0]


def test_mistakes_are_one_line(world, tmp_path, capsys):
    (tmp_path / "other.pkl").write_bytes(b"not a pickle")
    for arguments, fact in (
        ([], "one of check=FILE"),
        (["planner=constant_velocity", "split=somewhere", *TEAM[1:]], "team_name"),
        ([f"check={tmp_path / 'other.pkl'}"], "not a readable pickle"),
        ([f"check={tmp_path / 'gone.pkl'}"], "no such file"),
        ([f"predictions={tmp_path / 'gone.npz'}", *TEAM], "no predictions here"),
        (["planner=constant_velocit", "split=somewhere", *TEAM], "did you mean 'constant_velocity'"),
    ):
        assert run_submit(*world.overrides, *arguments, f"output_dir={tmp_path}") == 2
        message = capsys.readouterr().err
        errors = [line for line in message.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and fact in errors[0], message
