"""Recorded futures at 10 Hz, and the reference planner's forecast."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.errors import DataError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import box_corners, wrap_angle
from navsim_eval.pdm.lane_graph import lane_graph
from navsim_eval.pdm.observation import forecast, global_objects, recorded_observation, resample, split_at_ego
from navsim_eval.pdm.route import correct_route
from navsim_eval.scene import Annotations, Frame
from tests.golden import needs_golden
from tests.golden.pdms import debug_scenes
from tests.navsim_eval.tiny_map import CONNECTOR, ORIGIN, write_tiny_map

Box = tuple[str, str, tuple[float, float, float], tuple[float, float]]  # token, class, pose and velocity in ego frame


def frame(*boxes: Box, index: int = 0, red: tuple[str, ...] = (), ego=(0.0, 0.0, 0.0)) -> Frame:
    """A frame at `index` half seconds, ego at `ORIGIN` + ego, boxes 4 m long and 2 m wide."""
    pose = np.array([box[2] for box in boxes]).reshape(-1, 3)
    values = np.zeros((len(boxes), 7))
    values[:, [0, 1, 6]], values[:, 3], values[:, 4] = pose, 4.0, 2.0
    return Frame(
        token=f"frame{index}",
        log_name="log",
        scene_token="scene",
        map_name="tiny",
        timestamp_us=1_600_000_000_000_000 + 500_000 * index,
        ego_pose=np.array([*ORIGIN, 0.0]) + np.array(ego),
        ego_velocity=np.zeros(2),
        ego_acceleration=np.zeros(2),
        driving_command=np.array([0, 1, 0, 0]),
        traffic_lights=(*((edge, True) for edge in red), ("1", False)),
        annotations=Annotations(
            boxes=values,
            names=np.array([box[1] for box in boxes], dtype=np.str_),
            velocity=np.array([box[3] for box in boxes], dtype=np.float64).reshape(-1, 2),
            track_tokens=np.array([box[0] for box in boxes], dtype=np.str_),
        ),
    )


def car(token: str, x: float, y: float = 0.0, heading: float = 0.0, speed: float = 0.0) -> Box:
    return token, "vehicle", (x, y, heading), (speed * np.cos(heading), speed * np.sin(heading))


@pytest.fixture(scope="module")
def road_map(tmp_path_factory: pytest.TempPathFactory) -> RoadMap:
    blocks = {1: ((0.0, 0.0), (40.0, 0.0)), 2: ((60.0, 0.0), (90.0, 0.0))}
    return write_tiny_map(tmp_path_factory.mktemp("maps"), blocks, {12: (1, 2)})


def test_boxes_turn_with_the_ego_frame_they_are_given_in() -> None:
    objects = global_objects(frame(car("a", 10.0, 0.0, np.pi, speed=2.0), ego=(0.0, 0.0, np.pi / 2)))
    np.testing.assert_allclose(objects.poses[0, :2] - ORIGIN, [0.0, 10.0], atol=1e-9)
    assert objects.poses[0, 2] == pytest.approx(-np.pi / 2)
    np.testing.assert_allclose(objects.velocity[0], [0.0, -2.0], atol=1e-12)


def test_static_classes_have_no_speed() -> None:
    seen = recorded_observation([frame(("c", "traffic_cone", (5.0, 0.0, 0.0), (3.0, 0.0)), car("a", 20.0, speed=3.0))])
    assert seen.speed.tolist() == [0.0, 3.0]
    assert seen.is_agent.tolist() == [False, True]


def test_a_track_is_interpolated_while_it_lasts_and_absent_before_and_after() -> None:
    frames = [
        frame(index=0),
        frame(car("a", 10.0, heading=3.1), index=1),
        frame(car("a", 11.0, heading=-3.1), index=2),
        frame(index=3),
    ]
    seen = recorded_observation(frames)
    present = np.isfinite(seen.poses[:, 0, 0])
    assert np.flatnonzero(present).tolist() == list(range(5, 11))
    np.testing.assert_allclose(seen.poses[5:11, 0, 0] - ORIGIN[0], np.linspace(10.0, 11.0, 6), atol=1e-9)
    turned = wrap_angle(seen.poses[5:11, 0, 2] - 3.1)
    np.testing.assert_allclose(turned, np.linspace(0.0, 2 * np.pi - 6.2, 6), atol=1e-9)  # the short way round


def test_a_gap_inside_a_track_is_bridged() -> None:
    frames = [frame(car("a", 10.0), index=0), frame(index=1), frame(index=2), frame(car("a", 16.0), index=3)]
    seen = recorded_observation(frames)
    np.testing.assert_allclose(seen.poses[:, 0, 0] - ORIGIN[0], np.linspace(10.0, 16.0, 16), atol=1e-9)


def test_a_track_seen_once_stays_all_the_time() -> None:
    seen = recorded_observation([frame(index=0), frame(car("a", 10.0), index=1), frame(index=2)])
    np.testing.assert_allclose(seen.poses[:, 0, 0] - ORIGIN[0], np.full(11, 10.0), atol=1e-9)


def test_tracks_come_in_order_of_first_appearance_with_their_first_size_and_speed() -> None:
    frames = [
        frame(car("b", 10.0, speed=1.0)),
        frame(car("a", 0.0, 9.0, speed=5.0), car("b", 10.0, speed=7.0), index=1),
    ]
    seen = recorded_observation(frames)
    assert seen.tokens.tolist() == ["b", "a"]
    assert seen.speed.tolist() == [1.0, 5.0]


def test_a_frame_without_labels_is_refused() -> None:
    with pytest.raises(DataError, match=r"frame0 \[anns\].*no annotations"):
        recorded_observation([replace(frame(), annotations=None)])


def test_nothing_around_the_ego_is_an_empty_observation(road_map: RoadMap) -> None:
    seen = recorded_observation([frame(index=index) for index in range(11)])
    assert seen.poses.shape == (51, 0, 3)
    assert split_at_ego(seen, frame().ego_pose)[0].poses.shape == (51, 0, 3)
    assert forecast(frame(), road_map, ()).observation.poses.shape == (51, 0, 3)


def test_red_lights_hold_until_the_next_frame_and_only_on_the_given_edges(road_map: RoadMap) -> None:
    edge = str(CONNECTOR + 12)
    frames = [frame(index=0), frame(index=1, red=(edge, "7")), frame(index=2)]
    seen = recorded_observation(frames, [edge], road_map)
    assert seen.red_light_ids.tolist() == [edge]
    assert np.flatnonzero(seen.red_light_active[:, 0]).tolist() == list(range(5, 10))
    assert seen.red_light_polygons[0].equals(road_map.polygon(edge))
    assert len(recorded_observation(frames, [], road_map).red_light_ids) == 0


def test_tracks_that_overlap_the_ego_now_are_dropped() -> None:
    later = [frame(car("far", 30.0), car("late", 1.0), index=1)]
    seen = recorded_observation(
        [frame(car("far", 30.0), car("touching", 5.0)), *later, frame(car("late", 1.0), index=2)]
    )
    kept = split_at_ego(seen, frame().ego_pose)[0]
    assert kept.tokens.tolist() == ["far", "late"]  # the ego's front is at 4.05 m, a car at 5 m reaches back to 3 m
    np.testing.assert_array_equal(kept.poses, seen.poses[:, [0, 2]])


def test_the_forecast_moves_boxes_along_their_heading_every_second_step(road_map: RoadMap) -> None:
    boxes = (car("slow", 30.0, speed=1.0), ("back", "vehicle", (50.0, 0.0, 0.0), (-2.0, 0.1)))
    world = forecast(frame(*boxes), road_map, ()).observation
    x = world.poses[..., 0] - ORIGIN[0]
    np.testing.assert_allclose(x[[0, 1, 2, 3, 50], 0], [30.0, 30.0, 30.2, 30.2, 35.0], atol=1e-9)
    np.testing.assert_allclose(x[50, 1], 50.0 - 5.0 * np.hypot(2.0, 0.1), atol=1e-9)
    assert (world.poses[..., 2] == world.poses[0, :, 2]).all()


def test_the_forecast_keeps_the_nearest_of_each_class_in_its_order(road_map: RoadMap) -> None:
    people = [(f"p{k}", "pedestrian", (30.0 + k, 5.0, 0.0), (0.0, 0.0)) for k in range(30)]
    others = [car("car", 40.0), ("bike", "bicycle", (9.0, 9.0, 0.0), (0.0, 0.0)), car("gone", 102.0)]
    signs = [("sign", "czone_sign", (60.0, 0.0, 0.0), (0.0, 0.0))]
    tokens = forecast(frame(*people[::-1], *others, *signs), road_map, ()).observation.tokens.tolist()
    assert tokens == ["sign", "car", *(f"p{k}" for k in range(25)), "bike"]


def test_the_forecast_ignores_what_the_ego_already_overlaps(road_map: RoadMap) -> None:
    edge = str(CONNECTOR + 12)
    inside = frame(car("under", 2.0), car("ahead", 20.0), red=(edge,), ego=(45.0, 0.0, 0.0))
    ahead = forecast(inside, road_map, [edge])
    assert ahead.observation.tokens[ahead.ignored].tolist() == ["under"]
    assert ahead.ignored_red_lights.tolist() == [True]  # the ego lies wholly within the connector
    entering = forecast(replace(inside, ego_pose=inside.ego_pose - [6.0, 0.0, 0.0]), road_map, [edge])
    assert entering.ignored_red_lights.tolist() == [False]
    assert len(forecast(inside, road_map, ["999"]).observation.red_light_ids) == 0  # not on the route


def test_an_unknown_velocity_counts_as_standing_in_the_forecast(road_map: RoadMap) -> None:
    world = forecast(frame(("a", "vehicle", (20.0, 0.0, 0.0), (np.nan, np.nan))), road_map, ()).observation
    assert (world.poses == world.poses[0]).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 11), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_resampling_keeps_every_keyframe_bit_for_bit(frames: int, tracks: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    keyframes = random.normal(0.0, 1e3, (frames, tracks, 3))
    keyframes[random.random((frames, tracks)) < 0.3] = np.nan
    poses = resample(keyframes)
    assert poses.shape == (5 * (frames - 1) + 1, tracks, 3)
    np.testing.assert_array_equal(poses[::5], keyframes)


@needs_golden
def test_recorded_boxes_equal_the_reference() -> None:
    for golden in debug_scenes():
        seen, expected = recorded_observation(golden.scene.frames[3:]), golden.debug
        order = [seen.tokens.tolist().index(token) for token in expected["occupancy_tokens"]]
        assert sorted(order) == list(range(len(seen.tokens))), golden.name
        corners = box_corners(seen.poses, seen.sizes[:, 0], seen.sizes[:, 1])[:, order]
        np.testing.assert_allclose(
            corners, expected["occupancy_corners"], rtol=0, atol=1e-7, equal_nan=True, err_msg=golden.name
        )


@needs_golden
def test_forecasts_and_red_lights_equal_the_reference() -> None:
    for golden in debug_scenes():
        now, road_map, expected = golden.scene.current, golden.road_map, golden.debug
        route = correct_route(now.roadblock_ids, now.ego_pose, lane_graph(road_map))
        ahead = forecast(now, road_map, route.lanes)
        world = ahead.observation
        tokens = [*world.tokens, *(f"red_light_{edge}" for edge in world.red_light_ids)]
        boxes = shapely.polygons(box_corners(world.poses, world.sizes[:, 0], world.sizes[:, 1]))
        for step in (0, 10, 40):
            assert tokens == expected[f"forecast_tokens_{step}"].tolist(), golden.name
            centers = shapely.get_coordinates(shapely.centroid(boxes[step]))
            reference = expected[f"forecast_centroid_{step}"][: len(centers)]
            np.testing.assert_allclose(centers, reference, rtol=0, atol=1e-7, err_msg=golden.name)
        ignored = {
            *world.tokens[ahead.ignored],
            *(f"red_light_{e}" for e in world.red_light_ids[ahead.ignored_red_lights]),
        }
        # the reference's list still holds tokens of other scenes
        assert ignored == set(expected["planner_ignored_tokens"]) & set(tokens), golden.name

        edges = [edge for block in route.logged for edge in road_map.interior_edges(block)]
        seen = recorded_observation(golden.scene.frames[3:12], edges, road_map)
        for step in (0, 40):
            red = {f"red_light_{edge}" for edge in seen.red_light_ids[seen.red_light_active[step]]}
            assert red == set(expected[f"v2_red_light_tokens_t{step}"]), golden.name
