"""tools/evaluate.py and tools/doctor.py as a person meets them: files, tables, and one line for every mistake."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusiondrive.baselines.ego_mlp import EgoMLPConfig, fit
from diffusiondrive.evaluation import EvaluatePlannerConfig
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.variants import tiny
from navsim_eval.command_line import run_tool
from navsim_eval.dataset import SceneDataset
from navsim_eval.doctor import DoctorConfig
from tests.diffusiondrive.test_baselines import tiny_diffusion_policy, tiny_ltf
from tests.worlds import World, write_world

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SPLIT = "somewhere"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_evaluate(*arguments: str) -> int:
    return run_tool(tool("evaluate").main, EvaluatePlannerConfig, "evaluate", "doc", list(arguments))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {SPLIT: 2}, num_frames=15)


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory) -> dict[str, Path]:
    """A randomly initialised tiny planner and an ego-status MLP."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = tiny()
    torch.manual_seed(0)
    seconds, speeds = torch.arange(1, 9) / 2, torch.linspace(2, 12, config.modes)
    anchors = torch.stack([speeds[:, None] * seconds, torch.zeros(config.modes, 8)], dim=-1)
    mlp = fit(SceneDataset.from_config(world.data, SPLIT), EgoMLPConfig(hidden=16, epochs=2))
    policy = DiffusionDrive(tiny_diffusion_policy())
    return {
        "planner": DiffusionDrive(config, anchors).save_pretrained(folder / "planner"),
        "policy": policy.save_pretrained(folder / "policy"),
        "camera": DiffusionDrive(tiny_ltf()).save_pretrained(folder / "camera"),
        "mlp": mlp.save_pretrained(folder / "mlp"),
    }


class Page(HTMLParser):
    """Tags that were opened and not closed, and everything that points elsewhere."""

    VOID = ("meta", "img", "br", "hr", "link", "input", "rect", "line")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.mismatched: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.mismatched.append(tag)

    def handle_data(self, data):
        self.text += data


def test_baselines_beside_trained_planners_with_a_report(world, checkpoints, tmp_path, capsys):
    names = f"[human,stationary,{checkpoints['mlp']},{checkpoints['planner']}]"
    status = run_evaluate(
        *world.overrides, f"split={SPLIT}", f"planner={names}", f"output_dir={tmp_path}", "workers=1", "batch_size=3",
        "report_scenes=1",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert status == 0
    for word in ("PDMS (NAVSIM v1.1)", "human", "stationary", "ego_mlp", "tiny", "TTC"):
        assert word in shown
    for name in ("human", "stationary", "mlp", "planner"):
        assert (tmp_path / name / "scores.csv").is_file()
    summary = json.loads((tmp_path / "planner" / "summary.json").read_text())
    assert summary["planner"]["kind"] == "diffusiondrive" and len(summary["planner"]["weights_sha256"]) == 64

    page = Page((tmp_path / "report.html").read_text())
    assert not page.open and not page.mismatched
    pictures = [source for source in page.sources if source.startswith("data:image/webp")]
    links = [source for source in page.sources if source.startswith("#")]
    assert len(pictures) == 2 * len(links) >= 4, "every drawn scene from above and in the front camera"
    assert len(pictures) + len(links) == len(page.sources), "nothing outside the file"
    for word in ("complete", "Distribution", "straight (4)", "worst", "best", "All scenes", "numpy"):
        assert word in page.text


def test_batches_do_not_change_plans(world, checkpoints, tmp_path):
    plans = []
    for index, batch in enumerate((1, 4)):
        folder = tmp_path / str(index)
        arguments = [f"planner={checkpoints['planner']}", f"output_dir={folder}", f"batch_size={batch}", "seed=7"]
        assert run_evaluate(*world.overrides, f"split={SPLIT}", "stage=infer", *arguments) == 0
        with np.load(folder / "predictions.npz") as file:
            plans.append({name: file[name] for name in ("tokens", "candidates", "logits")})
    assert plans[0]["tokens"].tolist() == plans[1]["tokens"].tolist()
    np.testing.assert_allclose(plans[0]["candidates"], plans[1]["candidates"], atol=1e-4)
    np.testing.assert_allclose(plans[0]["logits"], plans[1]["logits"], atol=1e-4)


def test_candidates_are_judged_and_drawn_as_asked(world, checkpoints, tmp_path, capsys):
    names = f"[{checkpoints['planner']},{checkpoints['policy']}]"
    common = [*world.overrides, f"split={SPLIT}", "workers=1", "report=false", "max_scenes=2"]
    asked = ["modes=true", "sampling.noise=zero", "sampling.modes=6"]
    assert run_evaluate(*common, f"planner={names}", f"output_dir={tmp_path}", *asked) == 0
    shown = capsys.readouterr().out
    assert "Candidates" in shown and "minADE" in shown
    planner, policy = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("planner", "policy"))
    assert planner["modes"]["modes"] == policy["modes"]["modes"] == 6
    assert planner["planner"]["noise"] == "zero" and planner["modes"]["diversity"] > 0.1
    assert policy["modes"]["diversity"] == pytest.approx(0, abs=1e-6)  # its samples differ by their noise alone
    assert planner["modes"]["calibration"] and policy["modes"]["calibration"] is None
    assert (tmp_path / "policy" / "modes.csv").is_file() and (tmp_path / "planner" / "mode_scenes.csv").is_file()

    other = ["sampling.steps=4", "sampling.schedule=consistent", "stage=infer"]
    assert run_evaluate(*common, f"planner={checkpoints['planner']}", f"output_dir={tmp_path / 'other'}", *other) == 0
    with np.load(tmp_path / "other" / "predictions.npz") as file:
        schedule = json.loads(str(file["manifest"]))["planner"]["schedule"]
    assert (schedule["preset"], schedule["steps"]) == ("consistent", 4)
    wrong = ["sampling.schedule=consistent", "stage=infer"]
    assert run_evaluate(*common, f"planner={checkpoints['policy']}", f"output_dir={tmp_path / 'wrong'}", *wrong) == 2
    assert "consistent" in capsys.readouterr().err


def test_camera_only_planners_need_no_lidar(checkpoints, tmp_path):
    world = write_world(tmp_path / "world", {SPLIT: 1}, num_frames=14)
    for path in world.sensor_files(SPLIT):
        if path.suffix == ".pcd":
            path.unlink()
    common = [*world.overrides, f"split={SPLIT}", "stage=infer"]
    assert run_evaluate(*common, f"planner={checkpoints['camera']}", f"output_dir={tmp_path / 'a'}") == 0
    assert run_evaluate(*common, f"planner={checkpoints['planner']}", f"output_dir={tmp_path / 'b'}") == 2


def test_broken_sensors_cost_their_scene_only(checkpoints, tmp_path, capsys):
    world = write_world(tmp_path / "world", {SPLIT: 1}, num_frames=16)
    current = sorted(path for path in world.sensor_files(SPLIT) if path.parent.name == "CAM_F0")[4]
    current.write_bytes(current.read_bytes()[:60])
    common = [*world.overrides, f"split={SPLIT}", "workers=1", "report=false"]
    assert run_evaluate(*common, f"planner={checkpoints['planner']}", f"output_dir={tmp_path / 'out'}") == 0
    assert "partial: 2 of 3" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pdms"] is None
    assert any(str(current) in reason for reason in summary["coverage"]["first_reasons"].values())


def mistakes(world: World, tmp_path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What was mistyped or damaged → (arguments, facts that the one line must name)."""
    good = [*world.overrides, f"split={SPLIT}"]
    maps = tmp_path / "maps"
    shutil.copytree(Path(world.root) / "maps", maps)
    with sqlite3.connect(next(maps.rglob("map.gpkg"))) as database:
        database.execute("DELETE FROM gpkg_contents WHERE table_name = 'baseline_paths'")
    truncated = tmp_path / "truncated"
    log = Path(world.log_file(SPLIT))
    (truncated / "navsim_logs" / SPLIT).mkdir(parents=True)
    (truncated / "navsim_logs" / SPLIT / log.name).write_bytes(log.read_bytes()[:1000])
    empty = tmp_path / "empty"
    (empty / "navsim_logs" / "nothing").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    return {
        "planner": ([*good, "planner=humann"], ["humann", "did you mean 'human'"]),
        "checkpoint": ([*good, f"planner={tmp_path / 'folder'}"], [str(tmp_path / "folder"), "model.safetensors"]),
        "mlp by name": ([*good, "planner=ego_mlp"], ["ego_mlp", "folder of its weights"]),
        "path": (["data.root=/does/not/exist", f"split={SPLIT}"], ["/does/not/exist"]),
        "key": ([*good, "worker=3"], ["unknown key 'worker'", "did you mean 'workers'"]),
        "type": ([*good, "batch_size=many"], ["batch_size"]),
        "split": ([f"data.root={empty}", "split=nothing"], [str(empty), "no log files"]),
        "pickle": ([f"data.root={truncated}", f"data.maps={maps}", f"split={SPLIT}"], [log.name, SPLIT]),
        "layer": ([world.overrides[0], f"data.maps={maps}", f"split={SPLIT}", "workers=1"], ["baseline_paths"]),
        "no plans": ([*good, "stage=score"], ["predictions.npz", "stage=infer"]),
    }


@pytest.mark.parametrize(
    "what",
    ["planner", "checkpoint", "mlp by name", "path", "key", "type", "split", "pickle", "layer", "no plans"],
)
def test_every_mistake_is_one_line_that_helps(world, tmp_path, capsys, what):
    arguments, facts = mistakes(world, tmp_path)[what]
    assert run_evaluate(*arguments, f"output_dir={tmp_path / 'out'}") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for fact in facts:
        assert fact in lines[0]


def test_doctor_lists_findings_and_remedies(world, tmp_path, capsys, monkeypatch):
    for name in ("OPENSCENE_DATA_ROOT", "NUPLAN_MAPS_ROOT", "NAVSIM_EXP_ROOT", "NAVSIM_DEVKIT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    main = tool("doctor").main
    assert run_tool(main, DoctorConfig, "doctor", "doc", world.overrides) == 0
    shown = capsys.readouterr().out
    for word in ("numpy", "somewhere", "5 lanes", "self-check", "expected numbers"):
        assert word in shown
    monkeypatch.setenv("OPENSCENE_DATA_ROOT", str(tmp_path / "gone"))
    assert run_tool(main, DoctorConfig, "doctor", "doc", []) == 2
    shown = capsys.readouterr()
    assert "$OPENSCENE_DATA_ROOT" in shown.err and "make_city.py" in shown.out
