"""Reactive traffic on a straight road: who is driven, who reacts to whom, and that worlds do not touch each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely

from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.formats.map_store import MapStore
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.pdm.cache import build_metric_cache
from navsim_eval.pdm.types import StateIndex
from navsim_eval.scoring import score
from navsim_eval.traffic.lines import Lines
from navsim_eval.traffic.rails import driven_line, lay_rails
from navsim_eval.traffic.reactive_idm import Vehicles, drive
from tests.worlds import LOCATION, ORIGIN, SPEED_LIMIT, write_road_map, write_world

STRAIGHT = np.column_stack([np.linspace(0.0, 300.0, 151), np.zeros(151), np.zeros(151)])
FAR = 1e4  # metres aside: an ego that nobody meets, but nobody may be that far away either


def vehicles(*starts: tuple[float, float], target: float = 10.0) -> Vehicles:
    """Cars (arc length, speed) on one straight line along x."""
    progress, speed = np.array(starts, float).reshape(-1, 2).T
    count = len(progress)
    return Vehicles(
        line=np.zeros(count, np.int32),
        progress=progress,
        target_speed=np.full(count, target),
        snapped=np.column_stack([progress, np.zeros((count, 2))]),
        length=np.full(count, 4.0),
        width=np.full(count, 2.0),
        speed=speed,
        lines=(STRAIGHT,),
    )


def egos(*plans: tuple[float, float, float], steps: int = 40) -> np.ndarray:
    """(W, T + 1, 11) egos that start at x, y and keep their speed."""
    states = np.zeros((len(plans), steps + 1, StateIndex.SIZE))
    for state, (x, y, speed) in zip(states, plans, strict=True):
        state[:, StateIndex.X] = x + 0.1 * speed * np.arange(steps + 1)
        state[:, StateIndex.Y], state[:, StateIndex.VX] = y, speed
    return states


def test_a_free_vehicle_keeps_its_target_speed_and_stops_at_the_end_of_its_line() -> None:
    driven = drive([vehicles((20.0, 10.0), target=10.0)], np.zeros(1, int), egos((20.0, 50.0, 5.0)))
    assert (np.diff(driven.poses[0, :, 0, 0]) > 0.9).all() and driven.speed[0, -1, 0] == pytest.approx(10.0, abs=0.2)
    assert (driven.poses[0, :, 0, 1] == 0.0).all()
    at_end = drive([vehicles((285.0, 8.0))], np.zeros(1, int), egos((285.0, 50.0, 0.0), steps=100))
    assert at_end.speed[0, -1, 0] < 0.5 and at_end.poses[0, -1, 0, 0] <= 300.0


def test_a_follower_brakes_for_the_ego_and_only_in_that_world() -> None:
    ahead, aside = (40.0, 0.0, 0.0), (40.0, 20.0, 0.0)
    driven = drive([vehicles((15.0, 7.0))], np.zeros(2, int), egos(ahead, aside))
    front = driven.poses[0, :, 0, 0] + 2.0
    assert driven.speed[0, -1, 0] < 2.0 and (front < 40.0 - 2.588).all()  # the ego's box is around its rear axle here
    assert driven.speed[1, -1, 0] > 7.0


def test_vehicles_follow_each_other() -> None:
    driven = drive([vehicles((10.0, 8.0), (45.0, 2.0), target=10.0)], np.zeros(1, int), egos((10.0, 30.0, 5.0)))
    gap = driven.poses[0, :, 1, 0] - driven.poses[0, :, 0, 0] - 4.0
    alone = drive([vehicles((10.0, 8.0), target=10.0)], np.zeros(1, int), egos((10.0, 30.0, 5.0)))
    assert (gap > 0.0).all() and driven.speed[0, -1, 0] < 7.0 and alone.speed[0, -1, 0] > 8.0


def test_a_vehicle_that_was_once_too_far_away_stays_away() -> None:
    far = egos((20.0, 0.0, 0.0))
    far[0, 5, StateIndex.Y] = FAR
    driven = drive([vehicles((60.0, 5.0))], np.zeros(1, int), far)
    assert np.isfinite(driven.poses[0, :5]).all() and np.isnan(driven.poses[0, 5:]).all()


def test_worlds_do_not_depend_on_what_is_simulated_along() -> None:
    rng = np.random.default_rng(5)
    scenes = [vehicles((10.0, 8.0), (30.0, 6.0), (33.0, 4.0)), vehicles(), vehicles((50.0, 12.0), (80.0, 0.0))]
    scene_of = np.array([0, 0, 1, 2, 0, 2])
    ego = egos(*((rng.uniform(0, 100), rng.uniform(-3, 3), rng.uniform(0, 12)) for _ in scene_of), steps=15)
    together = drive(scenes, scene_of, ego)
    for world, scene in enumerate(scene_of):
        alone = drive([scenes[scene]], np.zeros(1, int), ego[[world]])
        places = alone.poses.shape[2]
        np.testing.assert_array_equal(together.poses[world, :, :places], alone.poses[0])
        assert np.isnan(together.poses[world, :, places:]).all()


def test_ground_ahead_is_that_of_the_line() -> None:
    lines = Lines.of([STRAIGHT, STRAIGHT[:3]])
    which, start, end = np.array([0, 1, 0]), np.array([10.5, 9.0, 0.0]), np.array([20.25, 9.0, 1.0])
    half = np.full(3, 1.0)
    bounds = shapely.bounds(lines.section(which, start, end, half))
    np.testing.assert_allclose(bounds, [[10.5, -1, 20.25, 1], [2.0, -1, 4.0, 1], [0.0, -1, 1.0, 1]], atol=1e-9)
    ahead = shapely.bounds(lines.ahead(which, start, half))
    np.testing.assert_allclose(ahead[:, [0, 2]], [[10.5, 300.0], [2.0, 4.0], [0.0, 300.0]], atol=1e-9)
    np.testing.assert_allclose(lines.poses(which, np.array([3.0, 99.0, -1.0]))[:, 0], [3.0, 4.0, 0.0])


# --- rails on the tiny map -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road_map(tmp_path_factory):
    root = tmp_path_factory.mktemp("map")
    write_road_map(root)
    return MapStore(root).get(LOCATION)


def rails_of(road_map, *cars: tuple[float, float, float, float]):
    """Rails for cars (x, y, heading, speed); the ego stands at x = 10 in the right lane."""
    table = np.array(cars)
    poses = table[:, :3] + np.append(ORIGIN, 0.0)
    ego = np.array([ORIGIN[0] + 10.0, ORIGIN[1] - 1.75, 0.0])
    return lay_rails(poses, np.tile([4.0, 2.0], (len(cars), 1)), table[:, 3], ego, road_map)


def test_who_is_driven_who_stands_and_who_vanishes(road_map) -> None:
    rails = rails_of(
        road_map,
        (40.0, -1.5, 0.1, 8.0),  # on lane 12: driven, put onto its line
        (110.0, 1.75, 0.0, 3.0),  # in the intersection: on a connector, which has no speed limit
        (50.0, -11.0, 1.0, 0.0),  # parked beside the road: stands
        (50.0, -12.0, 1.0, 4.0),  # moving where no lane is: vanishes
        (11.0, -1.0, 0.0, 5.0),  # its place on the line is the ego's: vanishes
        (41.0, -2.0, 0.0, 8.0),  # its place is taken by the first: vanishes
    )
    assert rails.vehicle.tolist() == [0, 1] and rails.standing.tolist() == [2]
    np.testing.assert_allclose(rails.snapped[0], [ORIGIN[0] + 40.0, ORIGIN[1] - 1.75, 0.0], atol=1e-6)
    assert rails.progress[0] == pytest.approx(40.0) and rails.line.tolist() == [0, 1]
    assert rails.target_speed.tolist() == [SPEED_LIMIT, SPEED_LIMIT]  # the connector inherits the lane's
    alone = rails_of(road_map, (110.0, 1.75, 0.0, 3.0))
    assert alone.target_speed.tolist() == [10.0]
    first = rails.points[rails.offsets[0] : rails.offsets[1]]
    np.testing.assert_array_equal(first, road_map.baseline("12"))
    driven = driven_line(first)
    np.testing.assert_array_equal(driven[:, :2], first[:-1])  # the last vertex of a lane is left out
    assert len(driven_line(first[[0, 0, 1]])) == 2  # but a line stays a line


def test_the_edge_that_is_best_in_line_wins(road_map) -> None:
    turning = rails_of(road_map, (103.0, 2.0, 0.9, 3.0))  # connectors 31 (straight) and 33 (left turn) overlap there
    straight = rails_of(road_map, (103.0, 2.0, 0.0, 3.0))
    np.testing.assert_array_equal(turning.points, road_map.baseline("33"))
    np.testing.assert_array_equal(straight.points, road_map.baseline("31"))


def test_no_vehicles_no_rails(road_map) -> None:
    rails = lay_rails(np.zeros((0, 3)), np.zeros((0, 2)), np.zeros(0), np.append(ORIGIN, 0.0), road_map)
    assert len(rails.vehicle) == len(rails.standing) == 0 and rails.offsets.tolist() == [0]


# --- scoring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> tuple[DataConfig, SceneDataset]:
    world = write_world(tmp_path_factory.mktemp("world"), {"roads": 1}, sensors=False)
    return world.data, SceneDataset.from_config(world.data, "roads")


def test_scores_do_not_depend_on_the_batch(scenes) -> None:
    data, dataset = scenes
    caches = MetricCaches(data, dataset, "epdms_v2")
    mine = [caches[token] for token in dataset.tokens[:2]]
    plans = np.zeros((2, 2, 8, 3))
    plans[..., 0] = np.array([0.0, 4.0])[:, None] * np.arange(1, 9)
    together = score(mine, plans, metric="epdms_v2", traffic="reactive", pair_scenes=False)
    for row in range(2):
        for plan in range(2):
            one = score([mine[row]], plans[row, [plan]][None], metric="epdms_v2", traffic="reactive", pair_scenes=False)
            for name, values in one.columns.items():
                np.testing.assert_array_equal(values[0], together.columns[name][2 * row + plan], err_msg=name)


def test_a_scene_without_other_vehicles_scores_alike_under_both(scenes, road_map) -> None:
    _, dataset = scenes
    scene = dataset[dataset.tokens[0]]

    def emptied(frame):
        keep = frame.annotations.names != "vehicle"
        seen = frame.annotations
        kept = (seen.boxes[keep], seen.names[keep], seen.velocity[keep], seen.track_tokens[keep])
        return replace(frame, annotations=type(seen)(*kept))

    cache = build_metric_cache(replace(scene, frames=tuple(map(emptied, scene.frames))), road_map, "epdms_v2")
    assert len(cache.traffic.vehicle) == 0
    plans = np.zeros((1, 3, 8, 3))
    plans[..., 0] = np.array([0.0, 4.0, 9.0])[:, None] * np.arange(1, 9)
    tables = [score([cache], plans, metric="epdms_v2", traffic=traffic) for traffic in ("non_reactive", "reactive")]
    for name, values in tables[0].columns.items():
        np.testing.assert_array_equal(values, tables[1].columns[name], err_msg=name)


def test_v1_knows_no_reactive_traffic(scenes) -> None:
    data, dataset = scenes
    caches = [MetricCaches(data, dataset, "pdms_v1")[dataset.tokens[0]]]
    with pytest.raises(UserError, match=r"pdms_v1 \(NAVSIM v1\.1\) is defined on replayed traffic only"):
        score(caches, np.zeros((1, 1, 8, 3)), metric="pdms_v1", traffic="reactive")
    with pytest.raises(UserError, match="choose from non_reactive, reactive"):
        score(caches, np.zeros((1, 1, 8, 3)), metric="pdms_v1", traffic="idm")
