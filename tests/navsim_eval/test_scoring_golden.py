"""Scores of every public (scene, trajectory) pair against the reference implementations, both metric versions."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from navsim_eval.formats.logs import read_log
from navsim_eval.formats.map_store import MapStore
from navsim_eval.metrics.areas import area_flags, locate, straddles_lanes
from navsim_eval.metrics.extended_comfort import extended_comfort, motion
from navsim_eval.metrics.footprint import Footprints
from navsim_eval.metrics.scene_batch import PreparedScene, SceneBatch, prepare
from navsim_eval.pdm.cache import build_metric_cache
from navsim_eval.pdm.dynamics import interpolate_trajectory, simulate
from navsim_eval.scene import Scene
from navsim_eval.score_table import ScoreTable
from navsim_eval.scoring import score
from tests.golden import GOLDEN, needs_golden
from tests.golden.pdms import load, scenes

pytestmark = [needs_golden, pytest.mark.golden]

CONTINUOUS = ("ego_progress", "score")  # endings of the names of columns that are no fixed steps
TOLERANCE = 1e-6


@cache
def prepared(metric: str) -> tuple[PreparedScene, ...]:
    return tuple(prepare(build_metric_cache(item.scene, item.road_map, metric)) for item in scenes())


@cache
def table(metric: str) -> ScoreTable:
    return score(prepared(metric), load("candidates")["poses"], metric=metric)


def golden(metric: str) -> dict[str, np.ndarray]:
    return load({"pdms_v1": "scores_v1", "epdms_v2": "scores_v2"}[metric])


@pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
def test_every_sub_score_of_every_pair_equals_the_reference(metric: str) -> None:
    assert all(item.v2 for item in scenes())
    for name, values in table(metric).columns.items():
        expected = golden(metric)[name]
        tolerance = TOLERANCE if name.endswith(CONTINUOUS) else 0.0
        np.testing.assert_allclose(values.reshape(expected.shape), expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
def test_what_the_sub_scores_come_from_equals_the_reference(metric: str) -> None:
    details, expected = table(metric).details, golden(metric)
    shape = expected["score"].shape
    for name, tolerance in (
        ("raw_progress", TOLERANCE),
        ("raw_progress_reference", TOLERANCE),
        ("first_collision_index", 0.0),
        ("first_ttc_index", 0.0),
    ):
        np.testing.assert_allclose(details[name].reshape(shape), expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_comfort_checks_and_final_states_equal_the_reference() -> None:
    details, expected = table("pdms_v1").details, golden("pdms_v1")
    np.testing.assert_array_equal(details["comfort_checks"], expected["comfort_flags"].reshape(-1, 6))
    difference = details["final_state"] - expected["simulated_final_state"].reshape(-1, 11)
    difference[:, 2] = np.angle(np.exp(1j * difference[:, 2]))
    assert np.abs(difference).max() < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
def test_a_gpu_gives_every_pair_the_scores_of_the_cpu(metric: str) -> None:
    there = score(prepared(metric), load("candidates")["poses"], metric, "cuda")
    for name, values in table(metric).columns.items():
        tolerance = 1e-9 if name.endswith(CONTINUOUS) else 0.0
        np.testing.assert_allclose(there.columns[name], values, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
def test_area_flags_equal_the_reference(metric: str) -> None:
    name = "candidate_area_flags" if metric == "pdms_v1" else "v2_candidate_area_flags"
    for item in scenes():
        if not item.has_debug:
            continue
        batch = SceneBatch.of([prepared(metric)[item.row]])
        states = torch.from_numpy(item.debug["candidate_simulated"]).clone()
        states[..., :2] -= batch.origin
        ego = Footprints.of(states[None])
        flags = area_flags(locate(ego, batch.areas.polygons), batch.areas)
        everywhere = torch.nonzero(torch.ones_like(ego.x)).unbind(dim=1)
        straddles = straddles_lanes(ego.at(*everywhere), everywhere[0], batch.areas).reshape(ego.x.shape)
        found = torch.stack([straddles, flags.non_drivable, flags.oncoming], dim=-1)[0]
        np.testing.assert_array_equal(found.numpy(), item.debug[name], err_msg=item.name)


def test_mean_score_of_each_candidate_equals_the_reference() -> None:
    found = table("epdms_v2").columns["score"].reshape(len(scenes()), -1).mean(axis=0)
    np.testing.assert_allclose(found, golden("epdms_v2")["one_stage_average_per_candidate"], atol=1e-9)


def test_extended_comfort_of_mixed_candidates_equals_the_reference() -> None:
    poses = load("candidates")["poses"]
    caches = [scene.cache for scene in prepared("epdms_v2")]
    initial = np.stack([cache.initial_state for cache in caches])[:, None]
    start = torch.tensor([cache.start_time_us for cache in caches])[:, None]
    motions = motion(simulate(initial, interpolate_trajectory(initial[..., :3], start, poses)))
    pairs = golden("epdms_v2")["mixed_pairs"]
    scene, plan, earlier, earlier_plan = pairs[:, :4].astype(int).T
    found = extended_comfort(motions[scene, plan], motions[earlier, earlier_plan], 0.5)
    np.testing.assert_array_equal(found.numpy(), pairs[:, 4])


@pytest.mark.parametrize(("metric", "file"), [("pdms_v1", "scores_v1"), ("epdms_v2", "scores_v2")])
def test_recorded_human_driving_is_scored_as_by_the_reference(metric: str, file: str) -> None:
    folder = GOLDEN / "real_scenes"
    stored = json.loads((folder / f"{file}.json").read_text())
    names, expected = stored["columns"], stored["scores"]
    store, found = MapStore(folder / "maps"), []
    for path in sorted((folder / "navsim_logs" / "real").glob("*.pkl")):
        frames = read_log(path)
        windows = [Scene(tuple(frames[start : start + 14])) for start in range(len(frames) - 13)]
        found += [scene for scene in windows if scene.token in expected]
    found = found[::2] if metric == "pdms_v1" else found
    assert len(found) > 25
    caches = [build_metric_cache(scene, store.get(scene.map_name), metric) for scene in found]
    scored = score(caches, np.stack([plans_of(scene) for scene in found]), metric=metric)
    for row, scene in enumerate(found):
        entry = expected[scene.token]
        rows = [[entry[plan][name] for name in names] for plan in ("human", "cv")] + entry["anchors"]
        for column, values in zip(names, np.array(rows).T, strict=True):
            if column in scored.columns:  # the file also lists a product
                ours = scored.columns[column].reshape(len(found), -1)[row]
                np.testing.assert_allclose(ours, values, rtol=0, atol=1e-6, err_msg=f"{scene.token} {column}")


def plans_of(scene: Scene) -> np.ndarray:
    """(22, 8, 3) human, constant velocity, 20 anchors, as the reference was given them."""
    speed = np.linalg.norm(np.asarray(scene.current.ego_velocity, np.float32))
    constant = np.zeros((8, 3), np.float32)
    constant[:, 0] = 0.5 * np.arange(1, 9) * speed
    points = np.load(GOLDEN / "model" / "anchors_navsim_20.npy")
    step = np.diff(points, axis=1, prepend=0.0)
    anchors = np.concatenate([points, np.arctan2(step[..., 1:], step[..., :1])], axis=-1).astype(np.float32)
    return np.concatenate([scene.human_trajectory()[None], constant[None], anchors])
