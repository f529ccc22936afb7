"""Building metric caches, and what becomes of them as plain arrays."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from functools import cache as remember
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.logs import read_log_dicts
from navsim_eval.formats.maps import RoadMap
from navsim_eval.metric_caches import DEFLATED, MetricCaches
from navsim_eval.pdm.cache import (
    FUTURE_FRAMES,
    build_metric_cache,
    build_metric_caches,
    build_with_plans,
    from_arrays,
    history_states,
    initial_state,
    to_arrays,
)
from navsim_eval.pdm.reference import ReferencePlan
from navsim_eval.pdm.types import DrivableMap, MetricCache, Observation, TrafficStart
from navsim_eval.scene import Annotations, Frame, Scene
from navsim_eval.shards import ShardReader, pack
from tests.golden import needs_golden
from tests.golden.pdms import debug_scenes, scenes
from tests.navsim_eval.tiny_map import CONNECTOR, LANE, ORIGIN, write_tiny_map
from tests.worlds import World, write_world

START_US = 1_600_000_000_000_000
EDGE = str(CONNECTOR + 12)
UNLABELLED = 16  # a frame of the second log of `world`


@pytest.fixture(scope="module")
def road_map(tmp_path_factory: pytest.TempPathFactory) -> RoadMap:
    blocks = {1: ((0.0, 0.0), (60.0, 0.0)), 2: ((80.0, 0.0), (160.0, 0.0))}
    return write_tiny_map(tmp_path_factory.mktemp("maps"), blocks, {12: (1, 2)}, speed_limits={1: 8.0})


def frame(index: int, route: tuple[str, ...] = ("1", "12", "2"), cars: bool = True, y: float = 0.0) -> Frame:
    """Ego at 8 m/s along the first road, `index` half seconds from now; one car ahead, one that it overlaps now."""
    x = 20.0 + 4.0 * index
    boxes = np.array([[60.0 - x + 4.0 * index, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0], [22.0 - x, 0.0, 0.0, 4.0, 2.0, 1.5, 0.1]])
    count = 2 if cars else 0
    return Frame(
        token=f"now{index}",
        log_name="log",
        scene_token="scene",
        map_name="tiny",
        timestamp_us=START_US + 500_000 * index,
        ego_pose=np.array([ORIGIN[0] + x, ORIGIN[1] + y, 0.0]),
        ego_velocity=np.array([8.1, 0.1]),
        ego_acceleration=np.array([0.3, 0.0]),
        driving_command=np.array([0, 1, 0, 0]),
        roadblock_ids=route,
        traffic_lights=((EDGE, index < 2),),
        annotations=Annotations(
            boxes=boxes[:count],
            names=np.array(["vehicle", "bicycle"][:count], dtype=np.str_),
            velocity=np.array([[8.0, 0.0], [0.0, 0.0]])[:count],
            track_tokens=np.array(["ahead", "under"][:count], dtype=np.str_),
        ),
    )


def scene(**changes) -> Scene:
    return Scene(tuple(frame(index, **changes) for index in range(-3, 11)))


def assert_same(a: MetricCache, b: MetricCache) -> None:
    """Equal bit for bit, polygons by their vertices, parts field by field."""
    for field in fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, DrivableMap | Observation | TrafficStart):
            assert_same(one, other)
        elif isinstance(one, np.ndarray) and one.dtype == object:
            assert shapely.to_wkb(one).tolist() == shapely.to_wkb(other).tolist(), field.name
        elif isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other, err_msg=field.name)
        else:
            assert type(one) is type(other) and one == other, field.name


@pytest.mark.parametrize("metric, steps", [("pdms_v1", 51), ("epdms_v2", 41)])
def test_a_cache_holds_what_its_metric_asks_for(road_map: RoadMap, metric: str, steps: int) -> None:
    cache = build_metric_cache(scene(), road_map, metric)
    assert (cache.metric, cache.token, cache.map_name, cache.start_time_us) == (metric, "now0", "tiny", START_US)
    assert cache.observation.poses.shape[0] == cache.observation.red_light_active.shape[0] == steps
    assert cache.reference_poses.shape == (51, 3) and cache.human_poses.shape == (8, 3)
    np.testing.assert_allclose(cache.human_poses[:, 0], 4.0 * np.arange(1, 9), atol=1e-6)
    assert cache.drivable_map.ids[cache.drivable_map.on_route].tolist() == [str(LANE + 1), str(LANE + 2), EDGE]


def test_v2_drops_what_the_ego_overlaps_and_sees_red_lights(road_map: RoadMap) -> None:
    v1, v2 = (build_metric_cache(scene(), road_map, metric) for metric in ("pdms_v1", "epdms_v2"))
    assert v1.observation.tokens.tolist() == ["ahead", "under"]
    assert v2.observation.tokens.tolist() == ["ahead"]
    assert len(v1.observation.red_light_ids) == 0 and v1.history_states is None
    assert v2.observation.red_light_ids.tolist() == [EDGE]
    assert np.flatnonzero(v2.observation.red_light_active[:, 0]).tolist() == list(range(10))
    assert v2.history_states.shape == (14, 11)


def test_the_initial_state_keeps_float32_motion() -> None:
    state = initial_state(frame(0))
    assert state.dtype == np.float64 and state[3] == np.float64(np.float32(8.1)) != 8.1
    assert (state[7:] == 0.0).all()


@pytest.mark.parametrize("late_us, samples", [(0, 14), (1, 15), (-1, 14)])
def test_history_samples_start_at_the_first_frame_and_lack_the_last(late_us: int, samples: int) -> None:
    frames = list(scene().frames)
    frames[3] = replace(frames[3], timestamp_us=START_US + late_us)
    states = history_states(Scene(tuple(frames)))
    assert states.shape == (samples, 11)
    np.testing.assert_allclose(states[:, 0] - ORIGIN[0], 8.0 + 0.8 * np.arange(samples), atol=1e-4)


def test_no_objects_and_a_bare_map_are_fine(road_map: RoadMap) -> None:
    cache = build_metric_cache(scene(cars=False), road_map)
    assert cache.observation.poses.shape == (51, 0, 3)
    assert_same(cache, from_arrays(to_arrays(cache)))


def test_an_ego_far_off_the_map_still_gets_a_cache(road_map: RoadMap) -> None:
    cache = build_metric_cache(scene(y=3000.0), road_map)
    assert len(cache.drivable_map.ids) == 0
    assert np.isfinite(cache.reference_poses).all()
    assert_same(cache, from_arrays(to_arrays(cache)))


def test_unknown_route_ids_are_kept_as_a_warning(road_map: RoadMap) -> None:
    cache = build_metric_cache(scene(route=("1", "77", "2")), road_map)
    assert cache.unknown_route_ids.tolist() == ["77"]
    np.testing.assert_array_equal(cache.centerline, build_metric_cache(scene(), road_map).centerline)


def test_scenes_that_cannot_be_scored_say_why(road_map: RoadMap) -> None:
    with pytest.raises(DataError, match=r"now0 \[roadblock_ids\].*route is empty"):
        build_metric_cache(scene(route=()), road_map)
    with pytest.raises(DataError, match=r"now0: 7 future frames, epdms_v2 observes 8"):
        build_metric_cache(Scene(scene().frames[:11]), road_map, "epdms_v2")
    with pytest.raises(UserError, match=r"metric 'pdms' is unknown; choose one of pdms_v1, epdms_v2"):
        build_metric_cache(scene(), road_map, "pdms")


@pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
def test_arrays_bring_back_the_same_cache(road_map: RoadMap, metric: str) -> None:
    cache = build_metric_cache(scene(), road_map, metric)
    arrays = to_arrays(cache)
    assert not any(array.dtype.hasobject for array in arrays.values())
    assert int(arrays["observation.stride"]) == 5
    assert_same(cache, from_arrays(arrays))


def test_poses_that_do_not_follow_from_keyframes_are_kept_whole(road_map: RoadMap) -> None:
    cache = build_metric_cache(scene(), road_map)
    wobbling = cache.observation.poses + np.sin(np.arange(51))[:, None, None]
    cache = replace(cache, observation=replace(cache.observation, poses=wobbling))
    arrays = to_arrays(cache)
    assert int(arrays["observation.stride"]) == 1
    assert_same(cache, from_arrays(arrays))


def test_arrays_of_another_version_or_with_a_part_missing_are_refused(road_map: RoadMap) -> None:
    arrays = to_arrays(build_metric_cache(scene(), road_map))
    with pytest.raises(DataError, match=r"format version 0, this code reads 2.*cache\.py"):
        from_arrays({**arrays, "format_version": np.array(0)})
    for name in ("centerline", "observation.sizes", "drivable_map.polygons.offsets", "observation.stride"):
        with pytest.raises(DataError, match=rf"{name}"):
            from_arrays({key: array for key, array in arrays.items() if key != name})


# --- several at once -------------------------------------------------------------------------------------------------


def varied_scenes() -> list[Scene]:
    """Scenes that differ in length of the route, in objects, speed and place, one of them off the map."""
    changes = ({}, {"cars": False}, {"route": ("1",)}, {"y": 0.7}, {"y": 3000.0}, {"route": ("2", "12", "1")})
    changed = [scene(**change) for change in changes]
    return [
        *changed,
        *(replace(s, frames=tuple(replace(f, ego_velocity=np.zeros(2)) for f in s.frames)) for s in changed),
    ]


@settings(max_examples=8, deadline=None)
@given(chosen=st.lists(st.integers(0, 11), min_size=1, max_size=16), metric=st.sampled_from(["pdms_v1", "epdms_v2"]))
def test_a_cache_does_not_depend_on_its_company(road_map: RoadMap, chosen: list[int], metric: str) -> None:
    found = varied_scenes()
    together = build_metric_caches([found[k] for k in chosen], [road_map] * len(chosen), metric)
    for k, cache in zip(chosen, together, strict=True):
        assert_same(cache, build_metric_cache(found[k], road_map, metric))


@needs_golden
@settings(max_examples=4, deadline=None)
@given(chosen=st.lists(st.integers(0, 30), min_size=1, max_size=16))
def test_golden_plans_do_not_depend_on_their_company(chosen: list[int]) -> None:
    found = build_golden(*chosen)
    for row, (cache, plan) in zip(chosen, found, strict=True):
        alone, plan_alone = build_golden(row)[0]
        assert_same(cache, alone)
        assert plan.index == plan_alone.index
        np.testing.assert_array_equal(plan.proposals.poses, plan_alone.proposals.poses)
        scores = (item.scores.columns["score"] for item in (plan, plan_alone))
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-13)


@remember
def build_golden(*rows: int) -> list[tuple[MetricCache, ReferencePlan]]:
    chosen = [scenes()[row % len(scenes())] for row in rows]
    return build_with_plans([one.scene for one in chosen], [one.road_map for one in chosen], "pdms_v1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two logs; in the second one a frame that is the future of some windows has no annotations."""
    world = write_world(tmp_path_factory.mktemp("world"), {"train": 2}, num_frames=20, sensors=False)
    path = world.log_file("train", 1)
    frames = read_log_dicts(path)
    del frames[UNLABELLED]["anns"]
    path.write_bytes(pickle.dumps(frames))
    return world


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_scenes_in_a_chunk_are_left_out_alone(world: World, tmp_path: Path, workers: int) -> None:
    dataset = SceneDataset.from_config(world.data, "train")
    caches = MetricCaches(world.data, dataset, "pdms_v1", tmp_path / "store")
    report = caches.build(workers=workers)
    bad = [
        token
        for token in dataset.tokens
        if dataset.log_of(token) == world.logs["train"][1] and sees_unlabelled(dataset, token)
    ]
    assert 0 < len(bad) < len(dataset) // 2
    assert sorted(report.broken) == sorted(bad) and all("no annotations" in why for why in report.broken.values())
    assert ShardReader(caches.folder).keys == [token for token in dataset.tokens if token not in bad]
    computed = MetricCaches(world.data, dataset, "pdms_v1")
    for token in ShardReader(caches.folder).keys:
        assert_same(caches[token], computed[token])


def sees_unlabelled(dataset: SceneDataset, token: str) -> bool:
    now = dataset.start_of(token) + 3
    return now <= UNLABELLED <= now + FUTURE_FRAMES["pdms_v1"]


@needs_golden
def test_golden_caches_come_back_the_same_and_stay_small() -> None:
    for golden in scenes()[::5]:
        for metric in ("pdms_v1", "epdms_v2"):
            cache = build_metric_cache(golden.scene, golden.road_map, metric)
            arrays = to_arrays(cache)
            assert_same(cache, from_arrays(arrays))
            lanes_of_vehicles = 0 if cache.traffic is None else 10_000  # what reactive traffic needs
            assert len(pack(arrays, DEFLATED)) < 50_000 + lanes_of_vehicles, golden.name


@needs_golden
def test_ego_states_equal_the_reference() -> None:
    for golden in debug_scenes():
        window, expected = golden.scene, golden.debug
        np.testing.assert_allclose(initial_state(window.current), expected["initial_state"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(window.human_trajectory(), expected["v2_human_poses"], rtol=0, atol=1e-8)
        past = np.stack([initial_state(frame) for frame in window.history])
        np.testing.assert_allclose(past, expected["v2_history_states"], rtol=0, atol=1e-9)
        assert [frame.timestamp_us for frame in window.history] == expected["v2_history_times_us"].tolist()
