"""tools/score.py as a shell sees it: a table for a file of trajectories, one line on bad input."""

from __future__ import annotations

import csv
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from navsim_eval import SceneDataset, metric_caches
from navsim_eval.agreement import hold_against
from navsim_eval.config import DataConfig
from navsim_eval.errors import DataError
from navsim_eval.formats.map_store import MapStore
from navsim_eval.metrics.aggregate import table_columns
from navsim_eval.pdm.cache import build_metric_cache
from navsim_eval.score_file import ScoreConfig, score_file
from navsim_eval.score_table import ScoreTable
from navsim_eval.scoring import score
from tests.golden import needs_golden
from tests.golden import pdms as golden
from tests.worlds import World, write_world

ROOT = Path(__file__).resolve().parents[2]
SPLIT = "roads"  # a folder: all windows at stride 1


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {SPLIT: 2}, sensors=False)


@pytest.fixture(scope="module")
def dataset(world: World) -> SceneDataset:
    return SceneDataset.from_config(world.data, SPLIT)


@pytest.fixture
def plans(dataset: SceneDataset, tmp_path: Path) -> Path:
    """Three proposals a scene, scenes in no particular order: human, human twice as fast, standing still."""
    tokens = sorted(dataset.tokens, key=lambda token: token[::-1])
    human = np.stack([dataset[token].human_trajectory() for token in tokens])
    return save(tmp_path / "plans.npz", tokens, np.stack([human, human * [2.0, 2.0, 1.0], 0.0 * human], axis=1))


def save(path: Path, tokens: list[str], trajectories: np.ndarray) -> Path:
    np.savez(path, tokens=np.array(tokens), trajectories=trajectories.astype(np.float32))
    return path


@pytest.fixture
def call(capsys, monkeypatch, world: World, tmp_path: Path):
    """The tool in this process: exit status, output, error output."""

    def call(*overrides: str) -> subprocess.CompletedProcess:
        arguments = [*world.overrides, f"output_dir={tmp_path / 'out'}", f"split={SPLIT}", "workers=1", *overrides]
        monkeypatch.setattr(sys, "argv", ["tools/score.py", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools/score.py"), run_name="__main__")
        signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess(sys.argv, end.value.code, *capsys.readouterr())

    return call


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def error_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
def test_every_row_is_what_the_library_says(metric, plans, dataset, world, call, tmp_path) -> None:
    done = call(f"trajectories={plans}", f"metric={metric}")
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "out" / "scores.csv")
    arrays = np.load(plans)
    store, found = MapStore(world.data.maps), [dataset[str(token)] for token in arrays["tokens"]]
    caches = [build_metric_cache(scene, store.get(scene.map_name), metric) for scene in found]
    expected = score(caches, arrays["trajectories"], metric)
    assert [row["token"] for row in rows] == expected.tokens.tolist()
    assert [int(row["proposal"]) for row in rows] == expected.proposals.tolist()
    for name in table_columns(metric):
        found = np.array([float(row[name] or "nan") for row in rows])
        np.testing.assert_allclose(found, expected.columns[name], rtol=0, atol=1e-9, err_msg=name)
    assert f"mean over {len(rows)} of {len(rows)} trajectories; complete" in done.stdout
    if metric == "epdms_v2":
        assert np.isfinite([float(row["two_frame_extended_comfort"] or "nan") for row in rows]).any()


def test_metric_cache_names_the_folder_above_the_stores(plans, dataset, world, call, tmp_path) -> None:
    metric_caches.MetricCaches(world.data, dataset, "pdms_v1", tmp_path / "caches" / "pdms_v1").build(workers=1)
    tables = []
    for folder in (tmp_path / "caches", tmp_path / "nothing there"):
        assert call(f"trajectories={plans}", f"metric_cache={folder}").returncode == 0
        tables.append((tmp_path / "out" / "scores.csv").read_text())
    assert tables[0] == tables[1]
    store = tmp_path / "caches" / "pdms_v1"
    line = error_line(call(f"trajectories={plans}", f"metric_cache={store}"))
    assert f"metric_cache={store} is one store; name the folder that holds pdms_v1/: {tmp_path / 'caches'}" in line


def test_processes_and_one_process_agree(plans, world, tmp_path) -> None:
    tables = []
    for workers in (1, 2):
        output = str(tmp_path / f"{workers}.csv")
        config = ScoreConfig(world.data, str(plans), SPLIT, "epdms_v2", output=output, workers=workers)
        score_file(config)
        tables.append(Path(output).read_text())
    assert tables[0] == tables[1]


def test_pairs_across_jobs_are_not_lost(plans, world, monkeypatch, tmp_path) -> None:
    config = ScoreConfig(world.data, str(plans), SPLIT, "epdms_v2", output=str(tmp_path / "a.csv"), workers=1)
    whole = score_file(config).table.columns["two_frame_extended_comfort"]
    monkeypatch.setattr("navsim_eval.score_scenes._SCENES_PER_JOB", 1)
    np.testing.assert_array_equal(score_file(config).table.columns["two_frame_extended_comfort"], whole)


def test_a_subset_of_the_scenes_is_scored_alone(plans, dataset, call, tmp_path) -> None:
    arrays = np.load(plans)
    few = save(tmp_path / "few.npz", arrays["tokens"][:2].tolist(), arrays["trajectories"][:2, :1])
    assert call(f"trajectories={few}", f"output={tmp_path / 'few.csv'}").returncode == 0
    rows = read(tmp_path / "few.csv")
    assert [row["token"] for row in rows] == arrays["tokens"][:2].tolist()


def test_a_scene_that_cannot_be_scored_is_counted_and_named(plans, world, monkeypatch, tmp_path) -> None:
    victim = str(np.load(plans)["tokens"][1])
    build = metric_caches.build_metric_caches

    def broken(scenes, road_maps, metric):
        if any(scene.token == victim for scene in scenes):
            raise DataError("map.gpkg", "a lane has no polygon")
        return build(scenes, road_maps, metric)

    monkeypatch.setattr(metric_caches, "build_metric_caches", broken)
    config = ScoreConfig(world.data, str(plans), SPLIT, output=str(tmp_path / "a.csv"), workers=1)
    scores = score_file(config)
    assert scores.failures == {victim: "map.gpkg: a lane has no polygon"}
    total = len(np.load(plans)["tokens"])
    assert scores.verdict == f"partial: {total - 1} of {total}"
    assert scores.table.valid.sum() == 3 * (total - 1) and not scores.table.valid[3:6].any()


def test_plans_that_are_not_finite_get_empty_rows(plans, call, tmp_path) -> None:
    arrays = np.load(plans)
    trajectories = arrays["trajectories"].copy()
    trajectories[0, 1, 2, 0] = np.nan
    path = save(tmp_path / "nan.npz", arrays["tokens"].tolist(), trajectories)
    assert call(f"trajectories={path}").returncode == 0
    rows = read(tmp_path / "out" / "scores.csv")
    assert [row["valid"] for row in rows[:3]] == ["True", "False", "True"] and rows[1]["score"] == ""


# --- one clear line --------------------------------------------------------------------------------------------------


def test_tokens_that_the_logs_do_not_hold_are_listed(plans, call, tmp_path) -> None:
    arrays = np.load(plans)
    tokens = arrays["tokens"].tolist()
    tokens[2:4] = ["feedfacefeedface", "deadbeefdeadbeef"]
    path = save(tmp_path / "strange.npz", tokens, arrays["trajectories"])
    line = error_line(call(f"trajectories={path}"))
    assert "feedfacefeedface" in line and "deadbeefdeadbeef" in line and f"2 of {len(tokens)} tokens" in line
    path = save(tmp_path / "all.npz", ["feedfacefeedface"], arrays["trajectories"][:1])
    assert "feedfacefeedface" in error_line(call(f"trajectories={path}"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "trajectories=FILE.npz is missing"),
        (["trajectories=/nowhere/plans.npz"], "/nowhere/plans.npz: there is no such file"),
        (["trajectories={plans}", "metric=pdms"], "metric='pdms' is unknown; choose from pdms_v1, epdms_v2"),
        (["trajectories={plans}", "output=scores.xlsx"], "scores.xlsx: scores are written as .csv or .parquet"),
        (["trajectories={plans}", "split=nowhere"], "split 'nowhere' is unknown"),
        (["trajectories={plans}", "trajectory=x"], "unknown key 'trajectory'; did you mean 'trajectories'?"),
    ],
)
def test_wrong_keys_and_paths_end_in_one_line(overrides, expected, plans, call) -> None:
    line = error_line(call(*(override.format(plans=plans) for override in overrides)))
    assert expected in line


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"tokens": np.array(["a"])}, "[trajectories]: missing"),
        ({"tokens": np.arange(1), "trajectories": np.zeros((1, 1, 8, 3))}, "[tokens]: int64 (1,)"),
        ({"tokens": np.array(["a"]), "trajectories": np.zeros((2, 1, 8, 3))}, "[trajectories]: float64 (2, 1, 8, 3)"),
        ({"tokens": np.array(["a"]), "trajectories": np.zeros((1, 8, 3))}, "[trajectories]: float64 (1, 8, 3)"),
        ({"tokens": np.array(["a", "a"]), "trajectories": np.zeros((2, 1, 8, 3))}, "a comes more than once"),
        ({"tokens": np.array(["a"], object), "trajectories": np.zeros((1, 1, 8, 3))}, "not a readable npz"),
    ],
)
def test_malformed_files_are_refused(arrays, expected, call, tmp_path) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays)
    assert expected in error_line(call(f"trajectories={path}"))


def test_a_truncated_file_is_refused(plans, call) -> None:
    plans.write_bytes(plans.read_bytes()[:200])
    assert "not a readable npz" in error_line(call(f"trajectories={plans}"))


def test_help_teaches() -> None:
    done = subprocess.run([sys.executable, "tools/score.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "trajectories (S, N, 8, 3)" in done.stdout and "metric_cache" in done.stdout


def test_a_broken_log_makes_the_result_partial(tmp_path) -> None:
    world = write_world(tmp_path, {SPLIT: 2}, sensors=False)
    dataset = SceneDataset.from_config(world.data, SPLIT)
    human = np.stack([dataset[token].human_trajectory() for token in dataset.tokens])[:, None]
    path = save(tmp_path / "plans.npz", list(dataset.tokens), human)
    world.log_file(SPLIT, 1).write_bytes(b"not a pickle")
    data = DataConfig(root=str(world.root), maps=world.data.maps)
    scores = score_file(ScoreConfig(data, str(path), SPLIT, output=str(tmp_path / "a.csv"), workers=1))
    assert scores.verdict.startswith("partial: ") and scores.table.valid.any() and not scores.table.valid.all()
    assert all("in no readable log" in reason for reason in scores.failures.values())


# --- held against expected scores ------------------------------------------------------------------------------------


def test_equal_scores_agree_and_a_changed_one_is_found(plans, dataset, call, tmp_path) -> None:
    assert call(f"trajectories={plans}", f"output={tmp_path / 'first.csv'}").returncode == 0
    done = call(f"trajectories={plans}", f"expected={tmp_path / 'first.csv'}")
    assert done.returncode == 0 and "equal (" in done.stdout
    report = json.loads((tmp_path / "out" / "agreement.json").read_text())
    rows = read(tmp_path / "first.csv")
    assert report["differing"] == 0 and {c["compared"] for c in report["columns"]} == {len(rows)}

    tokens, shape = np.load(plans)["tokens"], (len(dataset.tokens), 3)
    comfort = np.array([float(row["comfort"]) for row in rows]).reshape(shape)
    comfort[1, 2] = 1.0 - comfort[1, 2]
    theirs = tmp_path / "theirs.npz"
    np.savez(theirs, tokens=tokens[:2], comfort=comfort[:2], unknown=np.zeros((2, 3)))
    done = call(f"trajectories={plans}", f"expected={theirs}")
    assert f"expected={theirs}: 1 values differ" in error_line(done)
    assert f"{tokens[1]} proposal 2: ours {1.0 - comfort[1, 2]:.9g}, theirs {comfort[1, 2]:.9g}" in done.stdout
    assert f"{len(rows) - 6} trajectories have no counterpart" in done.stdout
    assert call(f"trajectories={plans}", f"expected={theirs}", "tolerance=1.5").returncode == 0


def test_undefined_on_one_side_only_is_a_difference(tmp_path) -> None:
    values = np.array([0.5, np.nan, np.nan])
    one = np.array(["a"] * 3)
    table = ScoreTable("pdms_v1", one, one, np.arange(3), np.ones(3, bool), {"score": values})
    np.savez(tmp_path / "x.npz", tokens=one[:1], score=np.array([[0.5, np.nan, 1.0]]))
    (column,) = hold_against(table, tmp_path / "x.npz").columns
    assert (column.compared, column.differing, column.largest) == (3, 1, np.inf)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"tokens": np.array(["a"]), "comfort": np.zeros((2, 1))}, "no arrays of one shape (1, N)"),
        ({"tokens": np.array(["a"]), "comfort": np.zeros((1, 1))}, "none of the scored trajectories"),
        ({"tokens": np.array(["a"]), "speed": np.zeros((1, 1))}, "none of the sub-scores"),
        ({"comfort": np.zeros((1, 1))}, "[tokens]"),
    ],
)
def test_expected_scores_of_another_kind_are_refused(arrays, expected, plans, call, tmp_path) -> None:
    np.savez(tmp_path / "odd.npz", **arrays)
    assert expected in error_line(call(f"trajectories={plans}", f"expected={tmp_path / 'odd.npz'}"))


@needs_golden
@pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
def test_golden_scores_from_the_command_line(metric, call, tmp_path) -> None:
    found = [scene for scene in golden.scenes() if scene.v2 or metric == "pdms_v1"]
    rows, tokens = [scene.row for scene in found], [scene.scene.token for scene in found]
    reference = {k: v for k, v in golden.load(f"scores_{metric[-2:]}").items() if v.ndim == 2 and len(v) == 76}
    np.savez(tmp_path / "theirs.npz", tokens=tokens, **{k: v[rows] for k, v in reference.items() if v.shape[1] == 69})
    plans = save(tmp_path / "plans.npz", tokens, golden.load("candidates")["poses"][rows])
    (tmp_path / "navsim_logs").mkdir()
    (tmp_path / "navsim_logs" / "golden").symlink_to(golden.PDMS / "logs")
    where = (f"data.root={tmp_path}", f"data.maps={golden.PDMS / 'maps'}", "split=golden")
    done = call(*where, f"trajectories={plans}", f"expected={tmp_path / 'theirs.npz'}", f"metric={metric}")
    assert done.returncode == 0, done.stderr
    compared = json.loads((tmp_path / "out" / "agreement.json").read_text())["columns"]
    assert [column["name"] for column in compared] == list(table_columns(metric))
    assert all(column["compared"] == 69 * len(tokens) for column in compared)
