"""Scores under what nobody would drive: mirrored and moved worlds, other traffic, odd plans, odd scenes.

The scorer's own symmetries on prepared scenes are in `test_scoring.py`; here are the rest of them, and the way from
the files on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.errors import DataError
from navsim_eval.formats.geopackage import FeatureTable
from navsim_eval.formats.logs import read_log, write_log
from navsim_eval.formats.map_layers import REQUIRED_LAYERS
from navsim_eval.formats.map_store import MapStore, write_map
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import to_global
from navsim_eval.pdm.cache import build_metric_cache
from navsim_eval.pdm.types import MetricCache, StateIndex
from navsim_eval.scene import Annotations, Frame, Scene
from navsim_eval.scoring import score
from tests.navsim_eval.street import ORIGIN, light, make_street
from tests.navsim_eval.test_scoring import METRICS, SEEDS, assert_same, busy_street, plans, random_car
from tests.worlds import EPSG, LOCATION, MAP_VERSION, drive, road_layers
from tests.worlds import ORIGIN as WORLD_ORIGIN

SIDEWAYS = [
    StateIndex.Y, StateIndex.HEADING, StateIndex.VY, StateIndex.AY,
    StateIndex.STEERING, StateIndex.STEERING_RATE, StateIndex.YAW_RATE, StateIndex.YAW_ACCELERATION,
]  # fmt: skip


def scores_of(cache: MetricCache, drives: np.ndarray) -> dict[str, np.ndarray]:
    return score([cache], drives[None], cache.metric).columns


# --- symmetries ------------------------------------------------------------------------------------------------------


def mirrored(cache: MetricCache) -> MetricCache:
    """Left and right of the street exchanged."""

    def poses(values: np.ndarray) -> np.ndarray:
        return np.stack([values[..., 0], 2 * ORIGIN[1] - values[..., 1], -values[..., 2]], axis=-1)

    def states(values: np.ndarray) -> np.ndarray:
        result = values.copy()
        result[..., SIDEWAYS] *= -1.0
        result[..., StateIndex.Y] += 2 * ORIGIN[1]
        return result

    def shapes(polygons: np.ndarray) -> np.ndarray:
        result = np.empty(len(polygons), dtype=object)
        result[:] = [shapely.transform(p, lambda xy: np.array([0.0, 2 * ORIGIN[1]]) + xy * [1, -1]) for p in polygons]
        return result

    seen = cache.observation
    return replace(
        cache,
        initial_state=states(cache.initial_state),
        centerline=poses(cache.centerline),
        reference_poses=poses(cache.reference_poses),
        human_poses=cache.human_poses * [1.0, -1.0, -1.0],
        history_states=None if cache.history_states is None else states(cache.history_states),
        drivable_map=replace(cache.drivable_map, polygons=shapes(cache.drivable_map.polygons)),
        observation=replace(seen, poses=poses(seen.poses), red_light_polygons=shapes(seen.red_light_polygons)),
    )


@METRICS
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_a_mirrored_scene_has_the_same_scores(metric: str, seed: int) -> None:
    """All but one: NAVSIM v2 adds the yaw acceleration to the longitudinal one with its sign, so its comfort judges
    a left turn and its mirror image, a right turn, differently."""
    street, drives = busy_street(seed, metric), plans(seed, 6)
    found, expected = scores_of(mirrored(street), drives * [1.0, -1.0, -1.0]), scores_of(street, drives)
    lopsided = ("history_comfort", "unfiltered_history_comfort", "score", "pdm_score") if metric == "epdms_v2" else ()
    assert_same(found, {name: values for name, values in expected.items() if name not in lopsided}, atol=1e-7)


@METRICS
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS)
def test_removing_objects_can_only_raise_the_collision_scores(metric: str, seed: int) -> None:
    rng, street, drives = np.random.default_rng(seed), busy_street(seed, metric), plans(seed, 8)
    prefix = "unfiltered_" if metric == "epdms_v2" else ""  # with the object, a fault of the human may go, too
    before, seen = scores_of(street, drives), street.observation
    for kept in (rng.random(8) < 0.5, np.zeros(8, bool)):
        fewer = replace(
            seen, tokens=seen.tokens[kept], poses=seen.poses[:, kept], sizes=seen.sizes[kept],
            is_agent=seen.is_agent[kept], speed=seen.speed[kept],
        )  # fmt: skip
        after = scores_of(replace(street, observation=fewer), drives)
        for name in ("no_at_fault_collisions", "time_to_collision_within_bound"):
            assert (after[prefix + name] >= before[prefix + name]).all()
    assert (after[f"{prefix}no_at_fault_collisions"] == 1.0).all()


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, start=st.floats(5, 40), length=st.floats(1, 30))
def test_one_more_red_light_can_only_lower_the_compliance(seed: int, start: float, length: float) -> None:
    rng, drives = np.random.default_rng(seed), plans(seed, 8)
    cars, first = [random_car(rng, "track")], light(8.0, 20.0, int(rng.integers(1, 41)))
    second = light(start, start + length, int(rng.integers(1, 41)))
    fewer, more, swapped = (
        scores_of(make_street(cars, lights, metric="epdms_v2"), drives)
        for lights in ([first], [first, second], [second, first])
    )
    name = "unfiltered_traffic_light_compliance"
    assert (more[name] <= fewer[name]).all()
    assert_same(swapped, more)


@METRICS
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, extra=st.integers(1, 200))
def test_what_a_plan_says_beyond_its_four_seconds_does_not_count(metric: str, seed: int, extra: int) -> None:
    rng, street, drives = np.random.default_rng(seed), busy_street(seed, metric), plans(seed, 3)
    longer = np.concatenate([drives, rng.normal(0, 100, (3, extra, 3))], axis=1)
    assert_same(scores_of(street, longer), scores_of(street, drives))


@METRICS
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_number_in_a_plan_gives_a_score_between_0_and_1_or_an_invalid_row(metric: str, data: st.DataObject) -> None:
    drives = plans(1, 4)
    for _ in range(data.draw(st.integers(1, 6))):
        place = tuple(data.draw(st.integers(0, size - 1)) for size in drives.shape)
        drives[place] = data.draw(st.floats(width=64))
    table = score([busy_street(1, metric)], drives[None], metric)
    assert not table.valid[~np.isfinite(drives).all(axis=(1, 2))].any()
    np.testing.assert_array_equal(np.isfinite(table.columns["score"]), table.valid)
    valid = table.columns["score"][table.valid]
    assert ((valid >= 0) & (valid <= 1)).all()


# --- from files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> RoadMap:
    root = tmp_path_factory.mktemp("maps")
    write_map(root, LOCATION, MAP_VERSION, road_layers(), EPSG)
    return MapStore(root).get(LOCATION)


def scene_of(frames: list[Frame]) -> Scene:
    return Scene(tuple(frames[:14]), 4)


def moved_world(root: Path, turn: float, shift: np.ndarray) -> tuple[RoadMap, list[Frame]]:
    """The tiny world, turned about its origin and shifted [m], written and read again."""
    frame = np.array([*(WORLD_ORIGIN + shift), turn])

    def points(xy: np.ndarray) -> np.ndarray:
        return to_global(frame, np.column_stack([xy - WORLD_ORIGIN, np.zeros(len(xy))]))[:, :2]

    layers = {
        name: FeatureTable(t.fids, shapely.transform(t.geometries, points), t.columns)
        for name, t in road_layers().items()
    }
    write_map(root, LOCATION, MAP_VERSION, layers, EPSG)
    frames = [
        replace(f, ego_pose=to_global(frame, f.ego_pose - np.append(WORLD_ORIGIN, 0.0))) for f in drive("log", 14)
    ]
    write_log(root / "log.pkl", frames)
    return MapStore(root).get(LOCATION), read_log(root / "log.pkl")


@METRICS
@pytest.mark.parametrize(
    ("turn", "shift"), [(0.0, (0.0, 0.0)), (1.1, (300.0, -700.0)), (-2.7, (0.0, 2000.0)), (np.pi / 2, (-50.0, 40.0))]
)
def test_a_world_turned_and_shifted_on_disk_is_scored_alike(metric: str, turn, shift, tmp_path: Path, road) -> None:
    drives = plans(5, 12)
    expected = build_metric_cache(scene_of(drive("log", 14)), road, metric)
    moved_map, frames = moved_world(tmp_path, turn, np.array(shift))
    found = build_metric_cache(scene_of(frames), moved_map, metric)
    assert_same(scores_of(found, drives), scores_of(expected, drives), atol=1e-6)


def with_boxes(change: Callable[[np.ndarray], None]) -> Callable[[Frame], Frame]:
    """Every frame with its boxes (N, 7) changed in place."""

    def apply(frame: Frame) -> Frame:
        boxes = frame.annotations.boxes.copy()
        change(boxes)
        return replace(frame, annotations=replace(frame.annotations, boxes=boxes))

    return apply


def without_objects(frame: Frame) -> Frame:
    a = frame.annotations
    return replace(frame, annotations=Annotations(a.boxes[:0], a.names[:0], a.velocity[:0], a.track_tokens[:0]))


def unknown_velocities(frame: Frame) -> Frame:
    return replace(frame, annotations=replace(frame.annotations, velocity=frame.annotations.velocity * np.nan))


def elsewhere(metres: float) -> Callable[[Frame], Frame]:
    return lambda frame: replace(frame, ego_pose=frame.ego_pose + np.array([metres, 0.0, 0.0]))


def same_track(frame: Frame) -> Frame:
    a = frame.annotations
    return replace(frame, annotations=replace(a, track_tokens=np.full(len(a.track_tokens), "one")))


def set_to(value: float, column: int) -> Callable[[np.ndarray], None]:
    return lambda boxes: boxes.__setitem__((slice(None), column), value)


ODD_SCENES: dict[str, Callable[[Frame], Frame]] = {
    "no objects": without_objects,
    "one track for all objects": same_track,
    "boxes that are not a number": with_boxes(set_to(np.nan, 0)),
    "boxes at infinity": with_boxes(set_to(np.inf, 1)),
    "boxes beyond the world": with_boxes(set_to(1e300, 0)),
    "boxes without size": with_boxes(set_to(0.0, 3)),
    "boxes of negative size": with_boxes(set_to(-4.0, 3)),
    "boxes as large as the city": with_boxes(set_to(1e5, 4)),
    "boxes of no known size": with_boxes(set_to(np.nan, 4)),
    "headings beyond counting": with_boxes(set_to(1e12, 6)),
    "unknown velocities": unknown_velocities,
    "no lights": lambda f: replace(f, traffic_lights=()),
    "lights that no map has": lambda f: replace(f, traffic_lights=(("987654321", True), ("-1", True))),
    "ego far from every road": elsewhere(1e6),
    "ego beyond the world": elsewhere(1e200),
    "ego at the speed of light": lambda f: replace(f, ego_velocity=np.array([3e8, 0.0])),
    "ego with an impossible acceleration": lambda f: replace(f, ego_acceleration=np.array([1e30, -1e30])),
    "time that stands still": lambda f: replace(f, timestamp_us=0),
    "time that runs backwards": lambda f: replace(f, timestamp_us=-f.timestamp_us),
    "time in years": lambda f: replace(f, timestamp_us=f.timestamp_us * 5_000),
}  # fmt: skip


@METRICS
@pytest.mark.parametrize("name", ODD_SCENES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_odd_scene_has_defined_scores_or_one_clear_error(metric: str, name: str, road: RoadMap) -> None:
    scene = scene_of([ODD_SCENES[name](frame) for frame in drive("log", 14)])
    try:
        cache = build_metric_cache(scene, road, metric)
    except DataError as error:
        assert scene.token in str(error)
        return
    table = score([cache], plans(2, 5)[None], metric)
    np.testing.assert_array_equal(np.isfinite(table.columns["score"]), table.valid)


@METRICS
def test_a_scene_without_a_route_or_with_another_citys_is_refused(metric: str, road: RoadMap) -> None:
    for route, problem in (((), "the route is empty"), (("987654321",), "none of 1 route ids is in the map")):
        scene = scene_of([replace(frame, roadblock_ids=route) for frame in drive("log", 14)])
        with pytest.raises(DataError, match=problem):
            build_metric_cache(scene, road, metric)


@pytest.mark.parametrize("layer", sorted(REQUIRED_LAYERS))
def test_a_map_without_a_layer_or_with_an_empty_one_is_a_clear_error_or_scores(layer: str, tmp_path: Path) -> None:
    for number, layers in enumerate(
        ({k: v for k, v in road_layers().items() if k != layer}, road_layers() | {layer: emptied(road_layers()[layer])})
    ):
        write_map(tmp_path / str(number), LOCATION, MAP_VERSION, layers, EPSG)
        road_map = MapStore(tmp_path / str(number)).get(LOCATION)
        try:
            cache = build_metric_cache(scene_of(drive("log", 14)), road_map)
        except DataError as error:
            assert layer in str(error) or "map" in str(error) or "route" in str(error)
        else:
            assert score([cache], plans(2, 5)[None]).valid.all()


def emptied(table: FeatureTable) -> FeatureTable:
    return FeatureTable(table.fids[:0], table.geometries[:0], {name: c[:0] for name, c in table.columns.items()})
