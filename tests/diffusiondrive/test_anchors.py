"""Anchors: known clusters are found, nothing but data and seed matters, and the coverage adds up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiondrive.anchors import (
    HumanPlans,
    anchor_distance,
    cluster_anchors,
    coverage,
    human_plans,
    read_anchors,
)
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from tests.golden import GOLDEN, needs_golden
from tests.worlds import write_world

SECONDS = np.arange(1, 9) * 0.5


def plans(speeds: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """(N, 8, 2) arcs driven at constant speed."""
    heading = curvature[:, None] * speeds[:, None] * SECONDS
    distance = speeds[:, None] * SECONDS
    return np.stack([distance * np.sinc(heading / np.pi), distance * heading / 2], axis=-1)


def crowd(count: int = 400, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return plans(rng.uniform(0, 14, count), rng.normal(0, 0.02, count))


def test_known_clusters_are_recovered():
    rng = np.random.default_rng(1)
    centres = plans(np.array([0.5, 4, 8, 12, 8, 8]), np.array([0, 0, 0, 0, 0.05, -0.05]))
    points = np.concatenate([centre + rng.normal(0, 0.05, (50, 8, 2)) for centre in centres])
    anchors = cluster_anchors(points, num=6, seed=3)
    assert anchor_distance(centres, anchors).max() < 0.05
    means = [points[50 * i : 50 * i + 50].mean(axis=0) for i in range(6)]
    np.testing.assert_allclose(anchor_distance(np.array(means), anchors), 0, atol=1e-5)


def test_shape_type_and_order():
    anchors = cluster_anchors(crowd())
    assert anchors.shape == (20, 8, 2) and anchors.dtype == np.float32
    assert (np.diff(anchors[:, -1, 0]) >= 0).all()


def test_the_seed_decides_and_nothing_else():
    points = crowd()
    np.testing.assert_array_equal(cluster_anchors(points, seed=5), cluster_anchors(points.copy(), seed=5))
    assert not np.array_equal(cluster_anchors(points, seed=5, restarts=1), cluster_anchors(points, seed=6, restarts=1))


def test_each_anchor_is_the_mean_of_the_plans_nearest_to_it():
    """A fixed point of Lloyd's iteration."""
    points = crowd()
    anchors = cluster_anchors(points, num=7).astype(float)
    owner = np.square(points[:, None] - anchors).sum(axis=(2, 3)).argmin(axis=1)
    for index, anchor in enumerate(anchors):
        np.testing.assert_allclose(points[owner == index].mean(axis=0), anchor, atol=1e-4)


def test_more_restarts_are_never_worse():
    points = crowd(600, seed=2)
    inertia = [
        np.square(points[:, None] - cluster_anchors(points, num=12, restarts=n)).sum(axis=(2, 3)).min(axis=1).mean()
        for n in (1, 10)
    ]
    assert inertia[1] <= inertia[0] * 1.02  # restarts are compared before the last refinement


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(8, 40))
def test_every_anchor_owns_a_plan(num, seed, count):
    """Also where many plans are equal: no cluster stays empty, none is not a number."""
    points = np.round(crowd(count, seed), 0)
    num = min(num, len(np.unique(points.reshape(count, -1), axis=0)))
    anchors = cluster_anchors(points, num=num, seed=seed, restarts=2)
    owner = np.square(points[:, None] - anchors).sum(axis=(2, 3)).argmin(axis=1)
    assert np.isfinite(anchors).all() and set(owner) == set(range(num))


def test_as_many_anchors_as_plans_are_the_plans():
    points = crowd(9)
    assert anchor_distance(points, cluster_anchors(points, num=9)).max() < 1e-5


@pytest.mark.parametrize(
    ("points", "arguments", "message"),
    [
        (np.zeros((50, 8, 2)), {}, "20 clusters of 1 different"),
        (np.full((50, 8, 2), np.nan), {}, "not finite"),
        (np.zeros((50, 8, 2)), {"num": 0}, "num=0"),
    ],
)
def test_what_cannot_be_clustered_is_refused(points, arguments, message):
    with pytest.raises(UserError, match=message):
        cluster_anchors(points, **arguments)


# --- coverage --------------------------------------------------------------------------------------------------------


def test_coverage_by_command_and_speed_adds_up():
    points = plans(np.array([1.0, 4.0, 4.0, 12.0]), np.zeros(4))
    people = HumanPlans(points, commands=np.array([0, 1, 1, 1]), speeds=np.array([1.0, 4.0, 4.0, 12.0]))
    rows = {(row.command, row.speed): row for row in coverage(people, points[1:2])}
    assert rows["all", "all"].count == 4 and rows["left", "all"].count == 1 and rows["straight", "all"].count == 3
    assert rows["straight", "2–5 m/s"].count == 2 and rows["straight", "2–5 m/s"].worst == 0
    assert ("right", "all") not in rows, "groups that do not occur are left out"
    away = (12.0 - 4.0) * SECONDS.mean()
    assert rows["straight", "10–15 m/s"].mean == pytest.approx(away)
    assert rows["straight", "all"].mean == pytest.approx(away / 3)


def test_human_plans_come_from_logs_alone(tmp_path):
    world = write_world(tmp_path, {"train": 2}, sensors=False)
    people = human_plans(SceneDataset.from_config(world.data, "train"))
    assert people.trajectories.shape == (8, 8, 2)
    np.testing.assert_allclose(people.trajectories[:, -1, 0], [32] * 4 + [34] * 4, atol=1e-6)
    np.testing.assert_allclose(people.speeds, [8] * 4 + [8.5] * 4)
    assert set(people.commands) == {1}


# --- files -----------------------------------------------------------------------------------------------------------


@needs_golden
def test_the_published_anchors_load():
    anchors = read_anchors(GOLDEN / "model" / "anchors_navsim_20.npy")
    assert anchors.shape == (20, 8, 2) and anchors.dtype == np.float32
    assert anchors[..., 0].max() == pytest.approx(47.66, abs=0.01)


def test_bad_anchor_files_are_named(tmp_path):
    path = tmp_path / "anchors.npy"
    with pytest.raises(DataError, match=r"anchors\.npy: no such.*cluster_anchors"):
        read_anchors(path)
    for content, message in [(np.zeros((20, 8)), r"\(20, 8\)"), (np.full((2, 8, 2), np.inf), "finite")]:
        np.save(path, content)
        with pytest.raises(DataError, match=message):
            read_anchors(path)
    path.write_bytes(b"\x93NUMPY broken")
    with pytest.raises(DataError, match=r"not a \.npy"):
        read_anchors(path)
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a \.npy"):
        read_anchors(path)
