"""Evaluation as a whole, on a tiny world and on recorded drives: files, coverage, failures, independence of chunks."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from navsim_eval import score_scenes, selfcheck
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.evaluate import EvaluateConfig, evaluate, score_predictions
from navsim_eval.formats.map_store import MapStore
from navsim_eval.infer import infer
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.pdm.cache import build_metric_cache
from navsim_eval.planners import Plans, make_baseline
from navsim_eval.predictions import Predictions
from navsim_eval.results import FORMATS
from navsim_eval.scoring import score
from tests.golden import GOLDEN, needs_golden
from tests.worlds import World, write_world

SPLIT = "somewhere"  # not a published name: all windows at stride 1


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {SPLIT: 2}, sensors=False)


@pytest.fixture(scope="module")
def dataset(world) -> SceneDataset:
    return SceneDataset.from_config(world.data, SPLIT)


def settings(world: World, folder: Path, **changes) -> EvaluateConfig:
    values = {"planner": "human", "split": SPLIT, "output_dir": str(folder), "workers": 1, "report": False}
    return EvaluateConfig(data=world.data, **{**values, **changes})


def test_one_planner_writes_what_the_contract_names(world, dataset, tmp_path):
    [run] = evaluate(settings(world, tmp_path))
    rows = list(csv.reader(open(tmp_path / "scores.csv", newline="")))
    assert rows[0] == ["", "token", "valid", *FORMATS["pdms_v1"].columns]
    assert [row[1] for row in rows[1:]] == [*dataset.tokens, "average"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdict"] == "complete" and summary["coverage"]["expected"] == len(dataset) == 8
    assert summary["pdms"] == pytest.approx(float(rows[-1][-1]), abs=1e-12)
    assert summary["planner"]["name"] == "human" and summary["environment"]["packages"]["numpy"]
    assert not run.results.failures

    maps = MapStore(world.data.maps)
    caches = [build_metric_cache(scene, maps.get(scene.map_name)) for scene in dataset]
    plans = np.stack([scene.human_trajectory() for scene in dataset])[:, None]
    direct = score(caches, plans)
    for name, values in run.results.columns.items():
        np.testing.assert_array_equal(values, direct.columns[name])


def test_several_planners_share_caches_and_get_folders_of_their_own(world, tmp_path):
    names = ["human", "constant_velocity", "stationary", "pdm_closed"]
    runs = evaluate(settings(world, tmp_path, planner=names))
    assert [run.planner for run in runs] == names
    scores = {run.planner: run.summary["pdms"] for run in runs}
    for name in names:
        assert (tmp_path / name / "scores.csv").is_file() and (tmp_path / name / "predictions.npz").is_file()
        [alone] = evaluate(settings(world, tmp_path / f"only_{name}", planner=name))
        assert alone.summary["pdms"] == scores[name], "a planner's score must not depend on who is scored along"
    assert scores["human"] == pytest.approx(scores["constant_velocity"], abs=1e-6)  # it does drive at constant speed
    assert scores["pdm_closed"] > scores["stationary"]
    lines = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert {line["planner"]: line["pdms"] for line in lines} == scores
    assert (tmp_path / lines[1]["folder"] / "scores.csv").is_file()


def test_both_metrics_from_the_same_predictions(world, tmp_path):
    runs = evaluate(settings(world, tmp_path, metric=["pdms_v1", "epdms_v2"]))
    assert [run.results.metric for run in runs] == ["pdms_v1", "epdms_v2"]
    assert json.loads((tmp_path / "pdms_v1/summary.json").read_text())["pdms"] is not None
    assert json.loads((tmp_path / "epdms_v2/summary.json").read_text())["epdms"] is not None
    comfort = runs[1].results.columns["two_frame_extended_comfort"]
    assert np.isnan(comfort[[0, 4]]).all() and (comfort[[1, 2, 3, 5, 6, 7]] == 1.0).all()  # first windows of the logs


def test_stages_can_be_run_apart(world, tmp_path):
    assert evaluate(settings(world, tmp_path, stage="infer")) == []
    assert (tmp_path / "predictions.npz").is_file() and not (tmp_path / "scores.csv").exists()
    [apart] = evaluate(settings(world, tmp_path, stage="score"))
    [whole] = evaluate(settings(world, tmp_path / "whole"))
    np.testing.assert_array_equal(apart.results.columns["score"], whole.results.columns["score"])
    with pytest.raises(DataError, match="stage=infer"):
        evaluate(settings(world, tmp_path / "nothing", stage="score"))


@pytest.mark.parametrize("metric", FORMATS)
def test_job_size_and_processes_do_not_change_scores(world, dataset, tmp_path, monkeypatch, metric):
    predictions = infer(make_baseline("constant_velocity"), dataset, batch_size=3, seed=0)
    caches = MetricCaches(world.data, dataset, metric, tmp_path)
    caches.build(workers=1)
    [whole] = score_predictions([predictions], caches, workers=1)
    monkeypatch.setattr(score_scenes, "_SCENES_PER_JOB", 2)
    [pieces] = score_predictions([predictions], caches, workers=2 if metric == "epdms_v2" else 1)
    for name, values in whole.columns.items():
        np.testing.assert_array_equal(values, pieces.columns[name])


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_truncated_log_is_counted_and_takes_the_headline(tmp_path):
    world = write_world(tmp_path / "world", {SPLIT: 2}, sensors=False)
    log = world.log_file(SPLIT)
    log.write_bytes(log.read_bytes()[:5000])
    [run] = evaluate(settings(world, tmp_path / "out"))
    assert run.summary["pdms"] is None
    assert run.summary["verdict"] == "partial: 4 of 4 (1 logs missing or unreadable)"
    assert str(log) in run.summary["coverage"]["first_reasons"][log.stem]


def test_a_plan_that_is_not_finite_is_invalid_and_named(world, dataset, tmp_path):
    predictions = infer(make_baseline("human"), dataset, batch_size=16, seed=0)
    predictions.trajectories[3, 2, 0] = np.nan
    predictions.save(tmp_path / "predictions.npz")
    [run] = evaluate(settings(world, tmp_path, stage="score"))
    assert run.results.valid.tolist() == [True] * 3 + [False] + [True] * 4
    assert "not finite" in run.results.failures[dataset.tokens[3]]
    assert run.summary["verdict"] == "partial: 7 of 8" and run.summary["pdms"] is None


@dataclass
class Fragile:
    """Cannot plan one scene."""

    broken: str
    name: str = "fragile"

    def plan(self, scenes) -> Plans:
        if any(scene.token == self.broken for scene in scenes):
            raise DataError("sensor_blobs/front.jpg", "truncated")
        return Plans(np.stack([scene.human_trajectory() for scene in scenes]))

    def describe(self) -> dict:
        return {}


def test_a_broken_sensor_costs_one_scene_not_its_batch(world, dataset, tmp_path):
    token = dataset.tokens[1]
    [run] = evaluate(settings(world, tmp_path, batch_size=4), lambda *_: Fragile(token))
    assert run.results.failures == {token: "sensor_blobs/front.jpg: truncated"}
    assert run.summary["coverage"]["planned"] == 7
    rows = list(csv.DictReader(open(tmp_path / "scores.csv", newline="")))
    assert rows[1]["token"] == token and rows[1]["valid"] == "False" and rows[1]["score"] == ""


def test_a_scene_off_the_map_costs_one_scene_not_its_job(tmp_path):
    world = write_world(tmp_path / "world", {SPLIT: 1}, sensors=False)
    dataset = SceneDataset.from_config(world.data, SPLIT)
    predictions = infer(make_baseline("human"), dataset, batch_size=16, seed=0)

    class Odd(MetricCaches):
        def _build(self, tokens):
            if dataset.tokens[2] in tokens:
                raise ValueError("degenerate polygon")
            return super()._build(tokens)

    [results] = score_predictions([predictions], Odd(world.data, dataset, "pdms_v1"), workers=1)
    assert results.valid.tolist() == [True, True, False, True]
    assert results.failures[dataset.tokens[2]].startswith("ValueError: degenerate polygon")


def test_metric_caches_notice_that_their_log_changed(tmp_path):
    world = write_world(tmp_path / "world", {SPLIT: 1}, sensors=False)
    evaluate(settings(world, tmp_path / "out"))
    log = world.log_file(SPLIT)
    log.write_bytes(log.read_bytes() + b" ")
    [run] = evaluate(settings(world, tmp_path / "out"))
    reason = next(iter(run.results.failures.values()))
    assert "another version of its log or map" in reason and "delete this metric cache" in reason


def test_predictions_of_another_split_are_refused(world, dataset, tmp_path):
    predictions = infer(make_baseline("human"), dataset, batch_size=16, seed=0)
    predictions.manifest["split"] = "elsewhere"
    predictions.save(tmp_path / "predictions.npz")
    with pytest.raises(DataError, match="made for split 'elsewhere'"):
        evaluate(settings(world, tmp_path, stage="score"))


def test_no_score_without_sound_arithmetic(world, tmp_path, monkeypatch):
    monkeypatch.setattr(selfcheck, "problems", lambda: ("tall float64 matrix product is off by 1",))
    with pytest.raises(UserError, match="self-check failed, no score is printed"):
        evaluate(settings(world, tmp_path))
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage": "socre"}, "stage='socre'"),
        ({"metric": "pdms"}, "metric='pdms' is unknown"),
        ({"planner": []}, "name at least one"),
        ({"planner": ["human", "human"]}, "each once"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_settings_are_named(world, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        settings(world, tmp_path, **wrong)


# --- against the reference evaluator ---------------------------------------------------------------------------------


@needs_golden
@pytest.mark.golden
@pytest.mark.parametrize(("version", "metric"), [("v1", "pdms_v1"), ("v2", "epdms_v2")])
def test_recorded_drives_score_as_with_the_reference(tmp_path, version, metric):
    """Human and constant-velocity plans through the whole evaluation, sub-scores as published (stored to 6 digits)."""
    folder = GOLDEN / "real_scenes"
    expected = json.loads((folder / f"scores_{version}.json").read_text())["scores"]
    data = DataConfig(root=str(folder), maps=str(folder / "maps"))
    tokens = list(expected)[::6] if version == "v1" else list(expected)[::2]
    dataset = SceneDataset.from_config(data, "real").subset(tokens)
    made = [infer(make_baseline(name), dataset, 16, 0) for name in ("human", "constant_velocity")]
    results = score_predictions(made, MetricCaches(data, dataset, metric), workers=1)
    for result, name in zip(results, ("human", "cv"), strict=True):
        assert result.valid.all()
        for row, token in enumerate(dataset.tokens):
            for column in FORMATS[metric].columns:
                value = expected[token][name].get(column)
                if value is not None:
                    assert result.columns[column][row] == pytest.approx(value, abs=1e-6), (token, name, column)


def test_predictions_know_their_planner_and_failures(dataset):
    predictions = infer(Fragile(dataset.tokens[0]), dataset, 4, seed=5)
    assert isinstance(predictions, Predictions) and len(predictions.tokens) == 7
    assert predictions.manifest["seed"] == 5 and list(predictions.manifest["failures"]) == [dataset.tokens[0]]
    with pytest.raises(UserError, match="no scene could be planned"):
        infer(Fragile(dataset.tokens[0]), dataset.subset([dataset.tokens[0]]), 4, seed=0)
