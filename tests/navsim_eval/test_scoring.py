"""The scorer as its callers see it: independence of rows, symmetries, odd input, tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import navsim_eval
from navsim_eval import scoring
from navsim_eval.errors import UserError
from navsim_eval.geometry import to_global
from navsim_eval.metrics.aggregate import table_columns
from navsim_eval.metrics.scene_batch import prepare
from navsim_eval.pdm.dynamics import interpolate_trajectory, simulate
from navsim_eval.pdm.types import MetricCache, StateIndex
from navsim_eval.scoring import compare_states, score
from tests.navsim_eval.street import BUMPER, ORIGIN, Car, car, light, make_street

SEEDS = st.integers(0, 10_000)
METRICS = pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])


def busy_street(seed: int, metric: str = "pdms_v1", objects: int = 8) -> MetricCache:
    rng = np.random.default_rng(seed)
    cars = [random_car(rng, f"track{index}") for index in range(objects)]
    lights = [light(*np.sort(rng.uniform(5, 60, 2)), int(rng.integers(0, 50))) for _ in range(2)]
    street = make_street(
        cars, lights, metric=metric, left_on_route=bool(rng.random() < 0.5), intersection=bool(rng.random() < 0.3)
    )
    return replace(street, token=f"street{seed}", log_name=f"log{seed}")


def random_car(rng: np.random.Generator, token: str) -> Car:
    x, y = rng.uniform(-15, 45), rng.choice([0.0, 3.5, -4.0, rng.uniform(-6, 8)])
    speed = rng.choice([0.0, rng.uniform(-3, 12)])
    heading = rng.choice([0.0, rng.uniform(-3, 3)])
    return car(token, x, y, heading=heading, speed=speed, length=rng.uniform(0.5, 6), agent=bool(rng.random() < 0.7))


def plans(seed: int, count: int) -> np.ndarray:
    """(count, 8, 3) plans of all kinds, drivable or not."""
    rng = np.random.default_rng(seed)
    time = np.arange(1, 9) * 0.5
    distance = rng.uniform(0, 12, (count, 1)) * time
    curvature = rng.normal(0, 0.02, (count, 1))
    heading = curvature * distance
    return np.stack([distance, rng.uniform(-3, 3, (count, 1)) * time / 4 + curvature * distance**2 / 2, heading], -1)


def moved(cache: MetricCache, turn: float, shift: np.ndarray) -> MetricCache:
    """The same scene after a rotation about the street's origin and a shift."""
    frame = np.array([*(ORIGIN + shift), turn])

    def poses(values: np.ndarray) -> np.ndarray:
        return to_global(frame, values - np.append(ORIGIN, 0.0))

    def shapes(polygons: np.ndarray) -> np.ndarray:
        def change(points: np.ndarray) -> np.ndarray:
            return poses(np.column_stack([points, np.zeros(len(points))]))[:, :2]

        result = np.empty(len(polygons), dtype=object)
        result[:] = [shapely.transform(polygon, change) for polygon in polygons]
        return result

    initial = cache.initial_state.copy()
    initial[StateIndex.POSE] = poses(initial[StateIndex.POSE])
    history = cache.history_states
    if history is not None:
        history = history.copy()
        history[:, StateIndex.POSE] = poses(history[:, StateIndex.POSE])
    seen = cache.observation
    return replace(
        cache,
        initial_state=initial,
        centerline=poses(cache.centerline),
        reference_poses=poses(cache.reference_poses),
        history_states=history,
        drivable_map=replace(cache.drivable_map, polygons=shapes(cache.drivable_map.polygons)),
        observation=replace(seen, poses=poses(seen.poses), red_light_polygons=shapes(seen.red_light_polygons)),
    )


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float = 1e-9) -> None:
    for name in expected:
        tolerance = atol if name.endswith(("ego_progress", "score")) else 0.0
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


# --- properties ------------------------------------------------------------------------------------------------------


@METRICS
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, turn=st.floats(-3.1, 3.1), x=st.floats(-1000, 1000), y=st.floats(-1000, 1000))
def test_turning_and_shifting_the_world_changes_no_score(metric: str, seed: int, turn: float, x: float, y: float):
    here, drives = busy_street(seed, metric), plans(seed, 6)[None]
    there = moved(here, turn, np.array([x, y]))
    assert_same(score([there], drives, metric).columns, score([here], drives, metric).columns, atol=1e-7)


@METRICS
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_proposals_and_objects_does_not_matter(metric: str, seed: int) -> None:
    rng, street, drives = np.random.default_rng(seed), busy_street(seed, metric), plans(seed, 9)
    order, tracks = rng.permutation(9), rng.permutation(8)
    seen = street.observation
    shuffled = replace(
        seen, tokens=seen.tokens[tracks], poses=seen.poses[:, tracks], sizes=seen.sizes[tracks],
        is_agent=seen.is_agent[tracks], speed=seen.speed[tracks],
    )  # fmt: skip
    expected = score([street], drives[None], metric).columns
    found = score([replace(street, observation=shuffled)], drives[None, order], metric).columns
    assert_same(found, {name: values[order] for name, values in expected.items()})


@METRICS
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, scenes=st.integers(1, 5), count=st.integers(1, 12))
def test_scores_do_not_depend_on_what_else_is_in_the_batch(metric: str, seed: int, scenes: int, count: int) -> None:
    streets = [busy_street(seed + index, metric, objects=3 * index + 1) for index in range(scenes)]
    drives = np.stack([plans(seed + index, count) for index in range(scenes)])
    together = score(streets, drives, metric).columns
    for scene in range(scenes):
        for proposal in {0, count - 1}:
            alone = score([streets[scene]], drives[scene : scene + 1, proposal : proposal + 1], metric).columns
            assert_same(alone, {name: values[scene * count + proposal][None] for name, values in together.items()})


@METRICS
def test_the_size_of_chunks_and_repeated_use_of_prepared_scenes_change_no_bit(metric: str, monkeypatch) -> None:
    """What a training loop does: prepare once, score again and again, alone or among others."""
    kept = [prepare(busy_street(seed, metric, objects=2 * seed + 1)) for seed in range(5)]
    drives = np.stack([plans(seed, 7) for seed in range(5)])
    whole = score(kept, drives, metric).columns
    rewards = whole["score"].reshape(5, 7)
    monkeypatch.setattr(scoring, "_ROWS_AT_ONCE", 10)  # one scene at a time
    assert_same(score(kept, drives, metric).columns, whole, atol=1e-12)
    again = np.stack([score(kept, drives[:, k : k + 1], metric).columns["score"] for k in range(7)], axis=1)
    np.testing.assert_allclose(again, rewards, rtol=0, atol=1e-12)


@METRICS
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_one_more_object_can_only_lower_the_collision_scores(metric: str, seed: int) -> None:
    rng, drives = np.random.default_rng(seed), plans(seed, 8)[None]
    cars = [random_car(rng, f"track{index}") for index in range(4)]
    fewer, more = (score([make_street(cars[:n], metric=metric)], drives, metric).columns for n in (3, 4))
    for name in ("no_at_fault_collisions", "time_to_collision_within_bound"):
        name = name if metric == "pdms_v1" else f"unfiltered_{name}"  # a fault of the human may forgive it
        assert (more[name] <= fewer[name]).all()


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_a_wider_road_can_only_help(seed: int) -> None:
    street, drives = busy_street(seed), plans(seed, 8)[None]
    wide = np.append(street.drivable_map.polygons, shapely.box(*(ORIGIN - 60), *(ORIGIN + 200)))
    wider = replace(
        street.drivable_map, polygons=wide, kinds=np.append(street.drivable_map.kinds, 0).astype(np.int8),
        ids=np.append(street.drivable_map.ids, "wide"), on_route=np.append(street.drivable_map.on_route, False),
    )  # fmt: skip
    before, after = (score([s], drives).columns for s in (street, replace(street, drivable_map=wider)))
    assert (after["drivable_area_compliance"] >= before["drivable_area_compliance"]).all()
    assert (after["drivable_area_compliance"] == 1.0).all()


# --- extended comfort over a log -------------------------------------------------------------------------------------


def test_a_planner_is_compared_with_itself_in_the_preceding_scene_of_its_log() -> None:
    base = make_street(metric="epdms_v2")
    log = [
        replace(base, token=f"t{k}", start_time_us=base.start_time_us + 500_000 * k, log_name=name)
        for k, name in ((1, "a"), (0, "a"), (2, "b"), (2, "a"))
    ]
    steady = np.stack([8.0 * 0.5 * np.arange(1, 9), np.zeros(8), np.zeros(8)], axis=-1)
    swerving = steady + np.stack([np.zeros(8), 3.0 * np.sin(np.arange(8)), 0.6 * np.cos(np.arange(8))], axis=-1)
    drives = np.stack([[steady, steady], [steady, swerving], [steady, steady], [steady, steady]])
    found = score(log, drives, "epdms_v2").columns["two_frame_extended_comfort"].reshape(4, 2)
    np.testing.assert_array_equal(found[0], [1.0, 0.0])  # the second planner changed its mind
    assert np.isnan(found[1]).all() and np.isnan(found[2]).all()
    np.testing.assert_array_equal(found[3], [1.0, 1.0])
    broken = drives.copy()
    broken[1, 0] = np.nan  # no plan to compare with
    found = score(log, broken, "epdms_v2").columns["two_frame_extended_comfort"].reshape(4, 2)
    assert np.isnan(found[0, 0]) and found[0, 1] == 0.0


# --- odd input -------------------------------------------------------------------------------------------------------


@METRICS
def test_plans_that_are_not_finite_are_invalid_and_leave_their_neighbours_alone(metric: str) -> None:
    street, drives = busy_street(3, metric), plans(3, 5)[None]
    expected = score([street], drives, metric).columns
    drives[0, 1, 3, 0], drives[0, 3, 0, 2] = np.nan, np.inf
    table = score([street], drives, metric)
    np.testing.assert_array_equal(table.valid, [True, False, True, False, True])
    assert_same(
        {name: values[table.valid] for name, values in table.columns.items()},
        {name: values[table.valid] for name, values in expected.items()},
    )
    assert all(np.isnan(values[~table.valid]).all() for values in table.columns.values())


@METRICS
def test_huge_plans_get_a_defined_result(metric: str) -> None:
    drives = np.ones((1, 4, 8, 3)) * np.array([1e3, 1e6, 1e30, 1e308])[None, :, None, None]
    table = score([make_street([car("car", 20.0)], metric=metric)], drives, metric)
    assert table.valid[:2].all() and not table.valid[3]
    np.testing.assert_array_equal(np.isnan(table.columns["score"]), ~table.valid)


@METRICS
@pytest.mark.parametrize("poses", [1, 4, 8, 20])
def test_plans_of_any_length_are_scored(metric: str, poses: int) -> None:
    drive = np.stack([2.0 * np.arange(1, poses + 1), np.zeros(poses), np.zeros(poses)], axis=-1)
    assert score([make_street(metric=metric)], drive[None, None], metric).valid.all()


@METRICS
def test_a_scene_without_map_route_or_traffic(metric: str) -> None:
    street = make_street(metric=metric)
    bare = replace(street.drivable_map, **{name: getattr(street.drivable_map, name)[:0] for name in (
        "ids", "kinds", "on_route", "polygons")})  # fmt: skip
    found = score([replace(street, drivable_map=bare)], plans(0, 3)[None], metric).columns
    prefix = "unfiltered_" if metric == "epdms_v2" else ""  # the human, too, is off every map here
    assert (found[f"{prefix}drivable_area_compliance"] == 0.0).all()
    assert (found[f"{prefix}no_at_fault_collisions"] == 1.0).all()


@pytest.mark.parametrize("shape", [(1, 8, 3), (2, 1, 8, 3), (1, 0, 8, 3), (1, 1, 0, 3), (1, 1, 8, 2)])
def test_trajectories_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"trajectories: shape \(.*expected \(1 scenes"):
        score([make_street()], np.zeros(shape))


def test_wrong_metrics_are_refused() -> None:
    with pytest.raises(UserError, match="'pdms' is unknown; choose one of pdms_v1, epdms_v2"):
        score([make_street()], np.zeros((1, 1, 8, 3)), metric="pdms")
    with pytest.raises(UserError, match="scene street: its metric cache was built for pdms_v1"):
        score([make_street()], np.zeros((1, 1, 8, 3)), metric="epdms_v2")
    with pytest.raises(UserError, match="needs the human's future poses"):
        score([replace(make_street(metric="epdms_v2"), human_poses=None)], np.zeros((1, 1, 8, 3)), metric="epdms_v2")


# --- callers ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_states_is_normalised_by_its_best_row() -> None:
    street = make_street([car("car", BUMPER + 25.0)])
    poses = interpolate_trajectory(street.initial_state[:3], street.start_time_us, straight(2.0, 4.0, 12.0))
    states = simulate(street.initial_state, poses)[None]
    found = compare_states([prepare(street)], states).select(0)
    raw = found.details["raw_progress"]
    assert found.columns["no_at_fault_collisions"].tolist() == [1.0, 1.0, 0.0]
    np.testing.assert_allclose(found.columns["ego_progress"], [raw[0] / raw[1], 1.0, 0.0], atol=1e-12)
    spared = compare_states([prepare(street)], states, ignored_tokens=[["car"]]).select(0)
    np.testing.assert_allclose(spared.columns["ego_progress"], raw / raw[2], atol=1e-12)


def straight(*speeds: float) -> np.ndarray:
    time = 0.5 * np.arange(1, 9)
    return np.stack([np.stack([speed * time, 0 * time, 0 * time], axis=-1) for speed in speeds])


def test_a_plan_is_compared_with_the_reference_only() -> None:
    table = score([make_street(speed=8.0)], straight(4.0, 16.0)[None])
    alone = score([make_street(speed=8.0)], straight(4.0)[None])
    assert table.columns["ego_progress"][0] == alone.columns["ego_progress"][0] < 0.7
    assert table.columns["ego_progress"][1] == 1.0


def test_the_package_exports_the_scorer() -> None:
    assert navsim_eval.score is score and navsim_eval.MetricCache is MetricCache


@METRICS
def test_tables_are_written_with_empty_cells_for_what_is_undefined(metric: str, tmp_path) -> None:
    drives = plans(1, 3)[None]
    drives[0, 2] = np.nan
    table = score([make_street(metric=metric)], drives, metric)
    lines = table.save(tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == ",".join(["token", "log_name", "proposal", "valid", *table_columns(metric)])
    assert lines[1].startswith("street,log,0,True,") and lines[3] == "street,log,2,False," + "," * (
        len(table_columns(metric)) - 1
    )
    assert table.mean()["score"] == pytest.approx(np.nanmean(table.columns["score"]))
    assert len(list(tmp_path.iterdir())) == 1


def test_parquet_and_other_endings(tmp_path) -> None:
    table = score([make_street()], plans(1, 2)[None])
    with pytest.raises(UserError, match="by the ending"):
        table.save(tmp_path / "scores.txt")
    try:
        from pyarrow import parquet
    except ImportError:
        with pytest.raises(UserError, match="pip install pyarrow"):
            table.save(tmp_path / "scores.parquet")
    else:
        read = parquet.read_table(table.save(tmp_path / "scores.parquet"))
        assert read["score"].to_pylist() == table.columns["score"].tolist()


def test_threads_of_the_caller_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    score([make_street()], plans(1, 2)[None])
    assert torch.get_num_threads() == before
