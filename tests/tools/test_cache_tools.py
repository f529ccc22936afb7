"""tools/cache.py and tools/cluster_anchors.py as a shell sees them: files, exit status, one line on bad input."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffusiondrive.feature_cache import FeatureCache
from navsim_eval.shards import ShardReader
from tests.worlds import World, write_world

ROOT = Path(__file__).resolve().parents[2]


def command(tool: str, world: World, output: Path, *overrides: str) -> list[str]:
    return [f"tools/{tool}.py", *world.overrides, f"output_dir={output}", "workers=1", *overrides]


def run(*arguments) -> subprocess.CompletedProcess:
    """The tool in a process of its own."""
    line = [sys.executable, *command(*arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def call(capsys, monkeypatch):
    """The tool in this process, for the many cases that need no process of their own."""

    def call(*arguments) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", command(*arguments))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess(sys.argv, end.value.code, *capsys.readouterr())

    return call


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line that a refusal prints (progress bars aside)."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"train": 2})


def test_cache_builds_verifies_finds_damage_repairs_and_resumes(world, tmp_path, call):
    nano = "features=city_nano"
    done = run("cache", world, tmp_path, nano)
    assert done.returncode == 0, done.stderr
    assert "features: complete: 8 samples" in done.stdout and "pdms_v1: complete: 8 samples" in done.stdout
    folder = tmp_path / "train" / "features"
    whole = (folder / "00000.data").read_bytes()
    assert len(ShardReader(tmp_path / "train" / "pdms_v1")) == 8

    assert call("cache", world, tmp_path, nano, "mode=verify").returncode == 0
    (folder / "00000.data").write_bytes(whole[:-200])
    assert "mode=repair" in error_line(call("cache", world, tmp_path, nano, "mode=verify"))
    repaired = call("cache", world, tmp_path, nano, "mode=repair")
    assert repaired.returncode == 0 and "1 damaged" in repaired.stdout
    again = call("cache", world, tmp_path, nano, "kind=features")
    assert "complete: 8 samples (1 new)" in again.stdout
    assert (folder / "00000.data").read_bytes() == whole


def test_cache_survives_broken_files_and_says_so(tmp_path, call):
    world = write_world(tmp_path / "world", {"train": 1})
    for path in world.sensor_files("train"):
        if path.suffix == ".pcd" and path.stem.endswith("4"):
            path.write_bytes(b"")
    done = call("cache", world, tmp_path / "out", "kind=features")
    assert done.returncode == 0 and "features: partial: 3 of 4 samples" in done.stdout
    assert len(FeatureCache(tmp_path / "out/train/features")) == 3

    for path in world.sensor_files("train"):
        path.unlink()
    assert "none of 4 samples" in error_line(call("cache", world, tmp_path / "none", "kind=features"))


def test_cache_killed_in_the_middle_resumes(tmp_path, call):
    world = write_world(tmp_path / "world", {"train": 3}, num_frames=53)
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, *command("cache", world, output, "kind=features")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    index = output / "train/features/00000.index"
    deadline = time.monotonic() + 60
    while not (index.exists() and index.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = len(ShardReader(output / "train/features"))
    assert 0 < stored < 120, "the kill has to hit the middle of the run"

    resumed = call("cache", world, output, "kind=features")
    assert f"complete: 120 samples ({120 - stored} new)" in resumed.stdout
    call("cache", world, tmp_path / "whole", "kind=features")
    assert (output / "train/features/00000.data").read_bytes() == (
        tmp_path / "whole/train/features/00000.data"
    ).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["split=nowhere"], ["nowhere", "train"]),
        (["data.root=missing_folder"], ["missing_folder", "data.root"]),
        (["featurs.camera_height=3"], ["featurs.camera_height", "features.camera_height"]),
        (["features.camera_height=tall"], ["camera_height", "tall"]),
        (["kind=everything"], ["everything", "features, metrics, both"]),
        (["mode=verify"], ["no cache to verify", "output_dir"]),
        (["data.maps=missing_maps", "kind=features"], ["missing_maps", "data.maps"]),
    ],
)
def test_cache_refuses_bad_input_in_one_line(world, tmp_path, call, overrides, facts):
    line = error_line(call("cache", world, tmp_path, *overrides))
    assert all(fact in line for fact in facts), line


def test_cache_refuses_a_split_without_scenes(tmp_path, call):
    world = write_world(tmp_path / "world", {"train": 1}, num_frames=10)
    assert "scene" in error_line(call("cache", world, tmp_path / "out"))


def test_anchors_are_written_with_their_coverage(world, tmp_path, call):
    done = call("cluster_anchors", world, tmp_path, "num=2", "seed=7")
    assert done.returncode == 0, done.stderr
    anchors = np.load(tmp_path / "anchors.npy")
    assert anchors.dtype == np.float32 and anchors.shape == (2, 8, 2)
    np.testing.assert_allclose(anchors[:, -1, 0], [32, 34], atol=1e-4)
    report = json.loads((tmp_path / "coverage.json").read_text())
    assert report["seed"] == 7 and report["rows"][0]["count"] == 8 and report["rows"][0]["worst"] < 1e-3
    assert "straight" in done.stdout

    before = (tmp_path / "anchors.npy").read_bytes()
    call("cluster_anchors", world, tmp_path, "num=2", "seed=7")
    assert (tmp_path / "anchors.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [(["num=50"], ["50 clusters of 2"]), (["restart=3"], ["restart", "restarts"]), (["split=nowhere"], ["nowhere"])],
)
def test_anchors_refuse_bad_input_in_one_line(world, tmp_path, call, overrides, facts):
    line = error_line(call("cluster_anchors", world, tmp_path, *overrides))
    assert all(fact in line for fact in facts), line


@pytest.mark.parametrize("tool", ["cache", "cluster_anchors"])
def test_a_truncated_log_is_named(tmp_path, call, tool):
    world = write_world(tmp_path / "world", {"train": 1})
    log = world.log_file("train")
    log.write_bytes(log.read_bytes()[:500])
    assert log.name in error_line(call(tool, world, tmp_path / "out"))
