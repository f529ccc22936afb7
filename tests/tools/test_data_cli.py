"""tools/data.py as a shell sees it: words, tables, files, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds import World, write_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"train": 1}, num_frames=16)


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/data.py", *words], cwd=ROOT, capture_output=True, text=True)


def test_plan_needs_no_data_and_names_sources(tmp_path: Path) -> None:
    done = run("plan", "split=navtest", f"data.root={tmp_path}/none", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "12,146" in done.stdout and "docs/splits.md" in done.stdout and "openscene_sensor_test_camera" in done.stdout
    saved = json.loads((tmp_path / "plan_navtest.json").read_text())
    assert saved["splits"][0]["scenes"] == {"value": 12146, "source": "b"} and saved["free_gb"] > 0


def test_verify_fails_in_one_line_and_lists_everything(world: World, tmp_path: Path) -> None:
    keys = [*world.overrides, f"output_dir={tmp_path}", "workers=1", "split=train"]
    assert run("verify", *keys).returncode == 0
    image = next(path for path in world.sensor_files("train") if "CAM_L0" in str(path) and "3.jpg" in path.name)
    content = image.read_bytes()
    image.unlink()
    done = run("do=verify", *keys)
    image.write_bytes(content)
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "images (1)" in lines[0]
    checks = {check["subject"]: check for check in json.loads((tmp_path / "verify_train.json").read_text())["checks"]}
    assert image.name in checks["images"]["problems"][0]


def test_normalisation_sets_published_beside_recomputed(world: World, tmp_path: Path) -> None:
    done = run("normalisation", *world.overrides, f"output_dir={tmp_path}", "split=train", "samples=2")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "normalisation_train.json").read_text())
    x = saved["trajectory"]["x"]
    assert x["published"] == {"origin": -1.2, "span": 56.9} and x["scenes_outside"] == 0
    assert x["here"]["origin"] == pytest.approx(4) and x["here"]["span"] == pytest.approx(28)
    assert saved["pictures"] == 2 and all(0 < mean < 1 for mean in saved["camera"]["mean"])


@pytest.mark.parametrize(("words", "fact"), [(["dance"], "'dance' is none of"), (["statistics"], "needs one")])
def test_bad_words_are_refused_in_one_line(words: list[str], fact: str) -> None:
    done = run(*words)
    assert done.returncode == 2 and fact in done.stderr and len(done.stderr.splitlines()) == 1
