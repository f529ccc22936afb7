"""Building metric caches, and what becomes of them as plain arrays."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import shapely

from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.maps import RoadMap
from navsim_eval.metric_caches import DEFLATED
from navsim_eval.pdm.cache import build_metric_cache, from_arrays, history_states, initial_state, to_arrays
from navsim_eval.pdm.types import DrivableMap, MetricCache, Observation
from navsim_eval.scene import Annotations, Frame, Scene
from navsim_eval.shards import pack
from tests.golden import needs_golden
from tests.golden.pdms import debug_scenes, scenes
from tests.navsim_eval.tiny_map import CONNECTOR, LANE, ORIGIN, write_tiny_map

START_US = 1_600_000_000_000_000
EDGE = str(CONNECTOR + 12)


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
    """Equal bit for bit, polygons by their vertices."""
    for part in (MetricCache, DrivableMap, Observation):
        left, right = (
            x if part is MetricCache else x.drivable_map if part is DrivableMap else x.observation for x in (a, b)
        )
        for field in fields(part):
            one, other = getattr(left, field.name), getattr(right, field.name)
            if isinstance(one, DrivableMap | Observation):
                continue
            if isinstance(one, np.ndarray) and one.dtype == object:
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
