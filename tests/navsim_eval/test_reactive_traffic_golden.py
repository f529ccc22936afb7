"""Reactive traffic against the reference implementation: where vehicles go, and what plans score among them."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from navsim_eval.metrics.scene_batch import PreparedScene, SceneBatch, prepare
from navsim_eval.pdm.cache import build_metric_cache
from navsim_eval.pdm.dynamics import simulate
from navsim_eval.scoring import score
from navsim_eval.traffic.reactive_idm import drive
from navsim_eval.traffic.worlds import Tracks, vehicles_of, world_boxes
from tests.golden import needs_golden
from tests.golden.pdms import PDMS, load, scenes

pytestmark = [needs_golden, pytest.mark.golden]


@cache
def entries() -> dict[int, list[dict]]:
    """The stored (scene, candidate) pairs by scene."""
    found: dict[int, list[dict]] = {}
    for entry in json.loads((PDMS / "reactive_v2.json").read_text()):
        found.setdefault(entry["scene"], []).append(entry)
    return found


@cache
def prepared(row: int) -> PreparedScene:
    item = scenes()[row]
    return prepare(build_metric_cache(item.scene, item.road_map, "epdms_v2"))


def test_vehicles_go_where_the_reference_drives_them() -> None:
    """The file holds, for every candidate, the world of the recorded human (which the reference simulated last)."""
    for row, found in entries().items():
        scene = prepared(row)
        batch = SceneBatch.of([scene])
        states = simulate(batch.initial_state[:, None], batch.sample(batch.human_poses[:, None]))[0].numpy().copy()
        states[..., :2] += scene.origin
        driven = drive([vehicles_of(scene.cache)], np.zeros(1, int), states)
        boxes = world_boxes([Tracks.of(scene)], np.zeros(1, int), driven, scene.origin[None], "cpu")
        x, y = boxes.x[0].numpy() + scene.origin[0], boxes.y[0].numpy() + scene.origin[1]
        start = scene.cache.traffic
        tokens = np.concatenate([scene.cache.observation.tokens, start.dropped_tokens])
        for time, expected in enumerate(found[0]["vehicles"]):
            there = np.flatnonzero(np.isfinite(x[time]) & ~start.replayed)
            assert sorted(tokens[there].tolist()) == sorted(track for track, *_ in expected), (row, time)
            place = {token: k for k, token in zip(there, tokens[there].tolist(), strict=True)}
            for track, *pose, vx, vy in expected:
                k = place[track]
                heading = torch.atan2(boxes.sin[0, time, k], boxes.cos[0, time, k]).item()
                turn = np.angle(np.exp(1j * (heading - pose[2])))
                np.testing.assert_allclose([x[time, k], y[time, k], turn], [*pose[:2], 0.0], rtol=0, atol=1e-6)
                if time and k in start.vehicle:
                    speed = driven.speed[0, time - 1, start.vehicle.tolist().index(k)]
                    assert speed == pytest.approx(np.hypot(vx, vy), abs=1e-6)


def test_sub_scores_among_reactive_vehicles_equal_the_reference() -> None:
    rows = list(entries())
    chosen = [[entry["candidate_index"] for entry in entries()[row]] for row in rows]
    plans = np.stack([load("candidates")["poses"][row, picked] for row, picked in zip(rows, chosen, strict=True)])
    table = score([prepared(row) for row in rows], plans, metric="epdms_v2", traffic="reactive")
    expected = [entry for row in rows for entry in entries()[row]]
    for kind, prefix in (("filtered", ""), ("unfiltered", "unfiltered_")):
        for name in expected[0][kind]:
            column = name if name == "pdm_score" else prefix + name
            if name == "multiplicative_metrics_prod":
                continue
            wanted = [entry[kind][name] for entry in expected]
            np.testing.assert_allclose(table.columns[column], wanted, rtol=0, atol=1e-9, err_msg=column)


def test_reactive_traffic_changes_scores_of_these_scenes() -> None:
    rows = list(entries())
    plans = load("candidates")["poses"][rows][:, [0, 2, 8]]
    tables = [
        score([prepared(row) for row in rows], plans, metric="epdms_v2", traffic=traffic)
        for traffic in ("non_reactive", "reactive")
    ]
    name = "unfiltered_time_to_collision_within_bound"
    assert (tables[0].columns[name] != tables[1].columns[name]).any()
