"""Whether a step's command is one that its tool accepts."""

from __future__ import annotations

import runpy
import sys

import pytest

from diffusiondrive.tool_steps import ROOT, Step


def assert_resolves(step: Step, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The tool composes its configuration from the command and would start."""
    monkeypatch.setattr(sys, "argv", [*step.command, "--config"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / step.command[0]), run_name="__main__")
    assert stopped.value.code == 0, capsys.readouterr().err
