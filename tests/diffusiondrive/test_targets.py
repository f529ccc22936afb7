"""Targets: what the reference builder gives, and every rule on a scene that can be checked by eye."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import shapely

from diffusiondrive.targets import (
    BEV_CLASSES,
    TargetConfig,
    agent_targets,
    bev_semantic_map,
    build_targets,
)
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.map_layers import Layer
from navsim_eval.formats.map_store import MapStore
from navsim_eval.geometry import to_global
from navsim_eval.scene import Annotations, Scene
from tests.golden import GOLDEN, needs_golden
from tests.worlds import LOCATION, drive, write_world

CONFIG = TargetConfig()


class PaperMap:
    """A map of given layers; every query finds every object, as the golden scene assumes."""

    def __init__(self, polygons: dict[str, list] | None = None, lines: dict[str, list] | None = None):
        self.polygons, self.lines = polygons or {}, lines or {}

    def layer(self, name: str):
        shapes = self.polygons.get(name) or self.lines.get(name) or []
        geometries = np.empty(len(shapes), object)
        geometries[:] = shapes
        layer = Layer(name, np.array([f"{name}:{i}" for i in range(len(shapes))], np.str_), geometries, {})
        object.__setattr__(layer, "in_square", lambda *_: np.arange(len(shapes)))
        return layer

    def baseline(self, edge: str) -> np.ndarray:
        name, row = edge.split(":")
        return shapely.get_coordinates(self.lines[name][int(row)])


def annotations(*boxes: tuple) -> Annotations:
    """From (class, x, y, length, width, heading)."""
    rows = [[x, y, 0.5, length, width, 1.6, heading] for _, x, y, length, width, heading in boxes]
    names = np.array([name for name, *_ in boxes], np.str_)
    values = np.array(rows, float).reshape(-1, 7)
    return Annotations(values, names, np.zeros((len(rows), 2)), np.arange(len(rows)).astype(str))


# --- against the reference -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    folder = GOLDEN / "features"
    given, arrays = json.loads((folder / "targets_input.json").read_text()), np.load(folder / "targets.npz")
    tables = {"LANE": "lanes_polygons", "INTERSECTION": "intersections", "WALKWAYS": "walkways"}
    shapes = {table: [shapely.Polygon(o["polygon"]) for o in given["map"][name]] for name, table in tables.items()}
    tables = {"LANE": "lanes_polygons", "LANE_CONNECTOR": "lane_connectors"}
    lines = {table: [shapely.LineString(o["line"]) for o in given["map"][name]] for name, table in tables.items()}
    boxes = np.array(given["boxes"], np.float32).astype(float)
    names = np.array(given["box_names"])
    around = Annotations(boxes, names, np.zeros((len(boxes), 2)), np.arange(len(boxes)).astype(str))
    template = drive("log", 1)[0]
    poses = np.array(given["global_poses"])
    now = replace(template, token="now", ego_pose=poses[0], annotations=around)
    future = [replace(template, ego_pose=pose, annotations=None) for pose in poses[1:]]
    scene = Scene((template, template, template, now, *future))
    return build_targets(scene, PaperMap(shapes, lines)), arrays


@needs_golden
def test_trajectory_equals_the_reference(golden):
    targets, arrays = golden
    assert targets["trajectory"].dtype == np.float64
    np.testing.assert_allclose(targets["trajectory"], arrays["trajectory"], rtol=0, atol=1e-9)


@needs_golden
def test_agents_equal_the_reference(golden):
    targets, arrays = golden
    np.testing.assert_array_equal(targets["agent_states"], arrays["agent_states"])
    np.testing.assert_array_equal(targets["agent_labels"], arrays["agent_labels"])
    assert targets["agent_states"].dtype == np.float32 and targets["agent_labels"].dtype == bool


@needs_golden
def test_semantic_map_equals_the_reference_of_this_opencv(golden):
    targets, arrays = golden
    by_version = {"4": arrays["bev_semantic_map"], "5": arrays["bev_semantic_map_opencv5"]}
    painted, major = targets["bev_semantic_map"], cv2.__version__.split(".")[0]
    np.testing.assert_array_equal(painted, by_version[major])
    for reference in by_version.values():
        assert (painted != reference).mean() <= 0.006


# --- agents ----------------------------------------------------------------------------------------------------------


def test_nearest_vehicles_come_first_and_the_rest_is_empty():
    around = annotations(
        ("vehicle", 20, 0, 4, 2, 7.0),
        ("vehicle", -5, 1, 5, 2, 0.1),
        ("pedestrian", 1, 1, 1, 1, 0),
        ("bicycle", 2, 2, 2, 1, 0),
    )
    states, labels = agent_targets(around, CONFIG)
    np.testing.assert_array_equal(states[:2], np.float32([[-5, 1, 0.1, 5, 2], [20, 0, 7.0, 4, 2]]))
    assert labels.tolist() == [True] * 2 + [False] * 28 and not states[2:].any()


@pytest.mark.parametrize(("x", "y", "counts"), [(32, -32, True), (32.001, 0, False), (0, -32.001, False)])
def test_vehicles_count_up_to_the_edge_of_the_square(x, y, counts):
    assert agent_targets(annotations(("vehicle", x, y, 4, 2, 0)), CONFIG)[1][0] == counts


def test_more_vehicles_than_slots_drop_the_furthest():
    around = annotations(*(("vehicle", 0.5 * i, 0, 4, 2, 0) for i in range(40)))
    states, labels = agent_targets(around, CONFIG)
    assert labels.all() and states[:, 0].max() == 14.5


def test_no_objects_at_all():
    states, labels = agent_targets(annotations(), CONFIG)
    assert not states.any() and not labels.any()
    assert not bev_semantic_map(annotations(), PaperMap(), np.zeros(3), CONFIG).any()


# --- semantic map ----------------------------------------------------------------------------------------------------


def test_rows_run_ahead_and_columns_run_left():
    painted = bev_semantic_map(annotations(("vehicle", 10, 8, 4, 2, 0)), PaperMap(), np.zeros(3), CONFIG)
    rows, columns = np.nonzero(painted == 5)
    assert (rows.min(), rows.max()) == (32, 48)  # x 8 … 12 m
    assert (columns.min(), columns.max()) == (128 + 28, 128 + 36)  # y 7 … 9 m


def test_what_is_behind_is_not_drawn():
    painted = bev_semantic_map(annotations(("vehicle", -10, 0, 4, 2, 0)), PaperMap(), np.zeros(3), CONFIG)
    assert not painted.any()


def test_later_classes_cover_earlier_ones_and_bicycles_are_nowhere():
    square = shapely.box(0, -10, 20, 10)
    road_map = PaperMap({"lanes_polygons": [square], "walkways": [shapely.box(0, -2, 20, 2)]}, {})
    around = annotations(
        ("pedestrian", 8, 0, 1, 1, 0),
        ("vehicle", 8, 0, 4, 4, 0),
        ("barrier", 8, 0, 8, 8, 0),
        ("bicycle", 4, 8, 2, 1, 0),
    )
    road_map.lines = {"lanes_polygons": [shapely.LineString([(0, 0), (20, 0)])]}
    painted = bev_semantic_map(around, road_map, np.zeros(3), CONFIG)
    at = lambda x, y: BEV_CLASSES[painted[int(x / 0.25), int(y / 0.25 + 128)]]  # noqa: E731
    assert [at(8, 0), at(9.5, 0), at(11.5, 0), at(16, 0), at(16, 1.5), at(16, 5), at(25, 0), at(4, 8)] == [
        *("pedestrian", "vehicle", "static object", "centerline", "walkway", "road", "empty", "road"),
    ]


def test_holes_are_filled_and_parts_are_all_drawn():
    ring = shapely.Polygon(shapely.box(2, -5, 12, 5).exterior, [shapely.box(5, -2, 9, 2).exterior])
    parts = shapely.MultiPolygon([ring, shapely.box(20, 0, 25, 5)])
    painted = bev_semantic_map(annotations(), PaperMap({"intersections": [parts]}), np.zeros(3), CONFIG)
    assert painted[7 * 4, 128] == 1 and painted[22 * 4, 128 + 10] == 1


def test_the_map_turns_with_the_ego():
    """The same street, seen after the whole world was turned and shifted, looks the same up to rounding at edges."""
    ring = np.array([[2.1, -3.2], [28.3, -3.2], [28.3, 4.4], [2.1, 4.4]])
    here = bev_semantic_map(annotations(), PaperMap({"walkways": [shapely.Polygon(ring)]}), np.zeros(3), CONFIG)
    ego = np.array([1000.0, -2000.0, 2.3])
    moved = to_global(ego, np.column_stack([ring, np.zeros(4)]))[:, :2]
    there = bev_semantic_map(annotations(), PaperMap({"walkways": [shapely.Polygon(moved)]}), ego, CONFIG)
    assert here.any() and (here != there).mean() < 0.002


# --- scenes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), {"train": 1}, sensors=False)


@pytest.fixture(scope="module")
def scene(world):
    return SceneDataset.from_config(world.data, "train")[0]


def test_a_scene_from_disk(world, scene):
    road_map = MapStore(world.data.maps, world.data.map_version).get(LOCATION)
    targets = build_targets(scene, road_map)
    np.testing.assert_allclose(targets["trajectory"][:, 0], np.arange(1, 9) * 4.0, atol=1e-6)
    assert targets["agent_labels"].sum() == 3
    painted = targets["bev_semantic_map"]
    assert painted.dtype == np.uint8 and painted.shape == (128, 256)
    assert set(np.unique(painted)) == set(range(7)), "the world holds something of every class"
    lane_12, shoulder = painted[40, 128 + 4], painted[40, 128 + 60]
    assert (lane_12, shoulder) == (1, 0)


def test_scenes_without_labels_or_future_say_so(scene):
    frames = list(scene.frames)
    frames[3] = replace(frames[3], annotations=None)
    with pytest.raises(DataError, match=r"anns.*no annotations"):
        build_targets(replace(scene, frames=tuple(frames)), PaperMap())
    with pytest.raises(DataError, match="followed by 2 frames, 8 are needed"):
        build_targets(replace(scene, frames=scene.frames[:6]), PaperMap())


def test_an_impossible_configuration_is_refused():
    with pytest.raises(UserError, match="bev_cell: 0"):
        TargetConfig(bev_cell=0.0)
