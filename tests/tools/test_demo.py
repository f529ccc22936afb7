"""The demo's commands are ones that the tools accept, and a finished step is not run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusiondrive import demo
from diffusiondrive.demo import BASELINES, DemoConfig, run_demo, steps
from diffusiondrive.tool_steps import Step, StepRunner
from navsim_eval.errors import UserError
from tests.steps import assert_resolves


@pytest.mark.parametrize("step", steps(DemoConfig()), ids=lambda step: step.name)
def test_every_command_resolves(step: Step, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert_resolves(step, monkeypatch, capsys)


def test_all_planners_are_compared() -> None:
    command = " ".join(next(step for step in steps(DemoConfig()) if step.name == "evaluate").command)
    assert all(name in command for name in (*BASELINES, "ego_mlp", "train/planner"))


def test_finished_steps_are_remembered_and_failures_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "step.py"
    script.write_text("import sys\nprint(sys.argv[1])\nsys.exit('broken: ' + sys.argv[1] if sys.argv[2:] else 0)\n")
    plan = [Step("one", "first", (str(script), "a")), Step("two", "second", (str(script), "b", "fail"))]
    monkeypatch.setattr(demo, "steps", lambda config: plan)
    config = DemoConfig(output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"second failed \(status 1\): broken: b; log: .*two\.log"):
        run_demo(config, lambda text: None)
    assert list(json.loads((tmp_path / "out" / "steps.json").read_text())["seconds"]) == ["one"]
    plan[1] = Step("two", "second", (str(script), "b"))
    script.write_text(script.read_text().replace("print(", "assert sys.argv[1] != 'a', 'ran again'\nprint("))
    summary = tmp_path / "out" / "evaluation" / "human" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"planner": {"name": "human"}, "pdms": 0.9, "seconds": {}}))
    assert set(run_demo(config, lambda text: None)["seconds"]) == {"one", "two"}
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["planners"] == [{"planner": {"name": "human"}, "pdms": 0.9}] and result["environment"]["python"]


def test_independent_steps_are_all_tried(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text("import sys\nsys.exit('broken' if sys.argv[1] == 'b' else 0)\n")
    runner = StepRunner(tmp_path, {}, say=lambda text: None)
    failed = runner.run_independent([Step(name, name, (str(script), name)) for name in "abc"], parallel=2)
    assert failed == ["b"]
    assert set(StepRunner(tmp_path, {}, say=lambda text: None).done["seconds"]) == {"a", "c"}
    assert StepRunner(tmp_path, {"epochs": 2}, say=lambda text: None).done["seconds"] == {}
