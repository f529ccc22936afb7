"""The renderer on a small made-up street: what stands where, in pictures and in the point cloud."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.city.approaches import find_approaches
from navsim_eval.city.backdrop import make_backdrop
from navsim_eval.city.camera import distort, make_view, undistort
from navsim_eval.city.ground import LEVELS, TEXEL_M, WINDOW, GroundPainter
from navsim_eval.city.objects import object_mesh
from navsim_eval.city.render import Renderer
from navsim_eval.city.solid import make_solid, visible_faces
from navsim_eval.city.templates import templates
from navsim_eval.city.world import SQUARE_M
from navsim_eval.errors import UserError
from navsim_eval.formats.geopackage import FeatureTable
from navsim_eval.formats.map_store import MapStore, write_map
from navsim_eval.formats.maps import RoadMap
from navsim_eval.geometry import box_corners, to_global
from navsim_eval.scene import Annotations, Camera, Frame

ORIGIN = np.array([330_000.0, 4_690_000.0])
SIZE = (270, 480)
LENS = np.array([-0.356, 0.173, -0.002, 0.0, -0.052])


def _table(geometries: list, first: int = 1, **columns: list) -> FeatureTable:
    """Features with fids first, first + 1, …; coordinates relative to ORIGIN."""
    moved = np.empty(len(geometries), object)
    moved[:] = [shapely.transform(g, lambda xy: xy + ORIGIN) for g in geometries]
    arrays = {}
    for name, values in columns.items():
        kind = object if isinstance(values[0], str) else np.float64 if any(v is None for v in values) else None
        arrays[name] = np.array([np.nan if v is None and kind is np.float64 else v for v in values], kind)
    return FeatureTable(np.arange(first, first + len(geometries)), moved, arrays)


def _at(x: float, y: float) -> np.ndarray:
    """(2,) global position of a point of the street."""
    return ORIGIN + np.array([x, y])


def _line(*points: tuple[float, float]) -> shapely.LineString:
    return shapely.LineString(points)


@pytest.fixture(scope="module")
def road_map(tmp_path_factory: pytest.TempPathFactory) -> RoadMap:
    """A street along x with one lane each way, a signalised junction at x = 100 … 120 and a crosswalk before it."""
    lanes = [shapely.box(-60, -3.5, 100, 0), shapely.box(120, -3.5, 240, 0), shapely.box(120, 0, 240, 3.5),
             shapely.box(-60, 0, 100, 3.5)]  # fmt: skip
    east, west = [(-60, 100), (120, 240), (100, 120)], [(240, 120), (100, -60), (120, 100)]
    lanes_and_links = [(*east[0], -1.75), (*east[1], -1.75), (*west[0], 1.75), (*west[1], 1.75)]
    ends = [*lanes_and_links, (*east[2], -1.75), (*west[2], 1.75)]
    centres = [_line((start, y), (stop, y)) for start, stop, y in ends]
    junction = shapely.box(100, -3.5, 120, 3.5)
    borders = [_line((start, y), (stop, y)) for start, stop in ((-60, 100), (120, 240)) for y in (-3.5, 0.0, 3.5)]
    layers = {
        "lanes_polygons": _table(
            lanes, 1, lane_group_fid=[11, 12, 13, 14], speed_limit_mps=[13.9] * 4,
            left_boundary_fid=[52, 55, 55, 52], right_boundary_fid=[51, 54, 56, 53],
        ),
        "lane_groups_polygons": _table(lanes, 11),
        "lane_connectors": _table(
            centres[4:], 21, exit_lane_fid=[1, 3], entry_lane_fid=[2, 4], lane_group_connector_fid=[31, 32],
            speed_limit_mps=[13.9] * 2, traffic_light_stop_line_fids=["41", "42"],
        ),
        "gen_lane_connectors_scaled_width_polygons": _table(
            [shapely.box(100, -3.5, 120, 0), shapely.box(100, 0, 120, 3.5)], 61, lane_connector_fid=[21, 22],
        ),
        "lane_group_connectors": _table(
            [shapely.box(100, -3.5, 120, 0), shapely.box(100, 0, 120, 3.5)], 31,
            from_lane_group_fid=[11, 13], to_lane_group_fid=[12, 14], intersection_fid=[71, 71],
        ),
        "baseline_paths": _table(
            centres, 81, lane_fid=[1, 2, 3, 4, None, None], lane_connector_fid=[None, None, None, None, 21, 22],
        ),
        "intersections": _table([junction], 71),
        "carpark_areas": _table([shapely.box(20, 12, 40, 30)], 91, heading=[0.0]),
        "boundaries": _table(borders, 51, boundary_type_fid=[2, 2, 2, 2, 2, 2]),
        "crosswalks": _table([shapely.box(90, -3.5, 94, 3.5)], 95),
        "walkways": _table([shapely.box(-60, -6.5, 240, -3.5), shapely.box(-60, 3.5, 240, 6.5)], 97),
    }  # fmt: skip
    root = tmp_path_factory.mktemp("maps")
    write_map(root, "us-ma-boston", "1", layers, 32619)
    return MapStore(root).get("us-ma-boston")


@pytest.fixture(scope="module")
def renderer(road_map: RoadMap) -> Renderer:
    return Renderer(road_map)


def _camera(yaw_deg: float = 0.0, distortion: np.ndarray | None = None) -> Camera:
    focal = 1545.0 * SIZE[1] / 1920
    intrinsics = np.array([[focal, 0, SIZE[1] / 2], [0, focal, 560.0 * SIZE[1] / 1920], [0, 0, 1.0]])
    c, s = np.cos(np.deg2rad(yaw_deg)), np.sin(np.deg2rad(yaw_deg))
    rotation = np.array([[s, 0, c], [-c, 0, s], [0, -1, 0]])
    lens = np.zeros(5) if distortion is None else distortion
    return Camera(Path("x"), rotation, np.array([1.66, 0, 1.51]), intrinsics, lens)


def _frame(boxes: list = (), names: list = (), x: float = 40.0, y: float = -1.75, **changes) -> Frame:
    """Ego at (x, y) on the street, heading along it, with objects given in its frame."""
    noted = Annotations(
        np.array(boxes, np.float64).reshape(-1, 7),
        np.array(names, np.str_),
        np.zeros((len(boxes), 2)),
        np.array([f"track{i}" for i in range(len(boxes))], np.str_),
    )
    base = Frame(
        token="00000000000000ab", log_name="log", scene_token="s", map_name="us-ma-boston", timestamp_us=0,
        ego_pose=np.array([*_at(x, y), 0.0]), ego_velocity=np.zeros(2), ego_acceleration=np.zeros(2),
        driving_command=np.array([0, 1, 0, 0]), annotations=noted,
        cameras={"CAM_F0": _camera(), "CAM_L0": _camera(55.0), "CAM_R0": _camera(-55.0)},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


CAR = [15.0, 0.0, 0.75, 4.6, 1.9, 1.5, 0.0]


def test_same_frame_same_bytes_whatever_came_before(road_map: RoadMap, renderer: Renderer) -> None:
    frame = _frame([CAR], ["vehicle"], traffic_lights=(("21", True),))
    renderer.render(_frame(x=-20.0), ("CAM_R0",), SIZE)
    renderer.point_cloud(_frame(x=200.0))
    one, cloud = renderer.render(frame, size=SIZE), renderer.point_cloud(frame)
    fresh = Renderer(road_map)
    other_cloud = fresh.point_cloud(frame)
    other = fresh.render(frame, ("CAM_R0", "CAM_F0", "CAM_L0"), SIZE)
    assert list(one) == ["CAM_L0", "CAM_F0", "CAM_R0"]
    for name, image in one.items():
        assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, other[name])
    np.testing.assert_array_equal(cloud, other_cloud)


def test_seed_and_token_matter(road_map: RoadMap, renderer: Renderer) -> None:
    frame = _frame()
    again = dataclasses.replace(frame, token="00000000000000ac")
    assert not np.array_equal(renderer.point_cloud(frame), renderer.point_cloud(again))
    image = renderer.render(frame, ("CAM_L0",), SIZE)["CAM_L0"]
    other = Renderer(road_map, seed=1).render(frame, ("CAM_L0",), SIZE)["CAM_L0"]
    assert (image != other).any(-1).mean() > 0.1


@pytest.mark.parametrize("heading", [0.0, 0.6, np.pi])
def test_point_cloud_lies_on_the_box(renderer: Renderer, heading: float) -> None:
    car = [*CAR[:6], heading]
    points = renderer.point_cloud(_frame([car], ["vehicle"]))
    assert points.dtype == np.float32 and points.shape[0] == 6
    relative = points[:2] - np.array(car[:2])[:, None]
    c, s = np.cos(heading), np.sin(heading)
    along, across = c * relative[0] + s * relative[1], -s * relative[0] + c * relative[1]
    above = points[2] > 0.2
    hit = above & (np.abs(along) < 2.3 + 0.05) & (np.abs(across) < 0.95 + 0.05) & (points[2] < 1.5 + 0.05)
    assert hit.sum() > 150
    # Nothing floats around the car: whatever is close to it is on it.
    close = above & (np.hypot(*relative) < 2.9) & (points[2] < 3.0)
    assert (hit[close]).all()
    if heading == 0.0:
        assert abs(points[0][hit].min() - (15.0 - 2.3)) < 0.05


def test_point_cloud_has_ground_and_no_ego(renderer: Renderer) -> None:
    points = renderer.point_cloud(_frame())
    assert 30_000 < points.shape[1] < 120_000
    assert np.linalg.norm(points[:3], axis=0).max() < 100.1
    road = (np.abs(points[1] - 1.75) < 3.1) & (np.abs(points[0]) < 30) & (points[2] < 1.0)
    assert road.sum() > 3000 and np.abs(points[2][road]).max() < 0.04
    walkway = (points[1] < -2.2) & (points[1] > -4.4) & (np.abs(points[0]) < 20) & (points[2] < 0.6)
    assert abs(np.median(points[2][walkway]) - 0.13) < 0.03
    inside = (points[0] > -1.1) & (points[0] < 4.0) & (np.abs(points[1]) < 1.1)
    assert not inside.any()
    assert set(np.unique(points[5])) <= {0, 1, 2, 3, 4} and points[3].min() >= 0 and points[3].max() <= 255


def _hull_mask(view, boxes: np.ndarray) -> np.ndarray:
    """(H, W) bool inside the projected corners of one box."""
    x, y, z, length, width, height, heading = boxes
    corners = box_corners(np.array([x, y, heading]), np.array(length), np.array(width))
    points = np.concatenate([np.c_[corners, np.full(4, z + side * height / 2)] for side in (-1, 1)])
    pixels, depth = view.project(points)
    assert (depth > 0).all()
    hull = shapely.convex_hull(shapely.multipoints(pixels))
    u, v = np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[0]))
    return shapely.contains_xy(hull, u, v)


@pytest.mark.parametrize("name, box, share", [
    ("vehicle", [12.0, 1.0, 0.8, 4.6, 1.9, 1.6, 0.4], 0.75),
    ("vehicle", [24.0, -1.0, 1.6, 11.0, 2.5, 3.2, 0.1], 0.85),
    ("pedestrian", [9.0, 2.0, 0.9, 0.7, 0.7, 1.8, 1.0], 0.25),
    ("bicycle", [9.0, 1.0, 0.85, 1.8, 0.7, 1.7, 1.2], 0.25),
    ("traffic_cone", [7.0, -1.0, 0.4, 0.4, 0.4, 0.8, 0.0], 0.2),
    ("barrier", [9.0, 0.0, 0.5, 0.5, 2.0, 1.0, 0.0], 0.4),
    ("czone_sign", [9.0, 0.0, 0.75, 0.2, 0.8, 1.5, 0.0], 0.2),
    ("generic_object", [9.0, 0.0, 0.5, 0.8, 0.8, 1.0, 0.0], 0.5),
])  # fmt: skip
def test_objects_appear_where_their_boxes_project(renderer: Renderer, name: str, box: list, share: float) -> None:
    lens = {"CAM_F0": _camera(distortion=LENS)}
    empty = renderer.render(_frame(cameras=lens), ("CAM_F0",), SIZE)["CAM_F0"].astype(int)
    image = renderer.render(_frame([box], [name], cameras=lens), ("CAM_F0",), SIZE)["CAM_F0"].astype(int)
    hull = _hull_mask(make_view(lens["CAM_F0"], SIZE), np.array(box))
    changed = np.abs(image - empty).max(-1) > 12
    assert changed[hull].mean() > share
    # Off the object only its shadow on the ground may differ, and the softened rim.
    rim = shapely.buffer(shapely.multipoints(np.argwhere(hull)[:, ::-1]).convex_hull, 3.0)
    u, v = np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[0]))
    outside = changed & ~shapely.contains_xy(rim, u, v)
    darker = (image <= empty + 2).all(-1)
    assert darker[outside].all()
    horizon = int(560 * SIZE[1] / 1920) - 2
    assert not outside[:horizon].any()


def test_far_and_thin_things_are_not_lost(renderer: Renderer) -> None:
    """A pedestrian 60 m away is two pixels wide, less than the coarse grid of rays."""
    walker = [60.0, 0.0, 0.9, 0.6, 0.6, 1.8, 0.0]
    empty = renderer.render(_frame(), ("CAM_F0",), SIZE)["CAM_F0"].astype(int)
    image = renderer.render(_frame([walker], ["pedestrian"]), ("CAM_F0",), SIZE)["CAM_F0"].astype(int)
    assert (np.abs(image - empty).max(-1) > 8).sum() >= 8


def test_brake_lamps_shine(renderer: Renderer) -> None:
    frame = _frame([[9.0, 0.0, 0.75, 4.6, 1.9, 1.5, 0.0]], ["vehicle"])
    off = renderer.render(frame, ("CAM_F0",), SIZE)["CAM_F0"].astype(int)
    on = renderer.render(frame, ("CAM_F0",), SIZE, braking={"track0"})["CAM_F0"].astype(int)
    changed = np.abs(on - off).max(-1) > 30
    assert changed.sum() > 20
    assert (on[changed][:, 0] > off[changed][:, 0]).mean() > 0.9 and on[changed][:, 0].max() > 230


@pytest.mark.parametrize("state, channel", [(True, 0), (False, 1), (None, None)])
def test_traffic_light_shows_the_state_of_its_connector(
    renderer: Renderer, state: bool | None, channel: int | None
) -> None:
    listed = () if state is None else (("21", state),)
    frame = _frame(x=85.0, traffic_lights=listed)
    x, y, _ = frame.ego_pose
    (signal,) = [s for s in renderer.signals.near(x, y, 60.0) if s.connector == "21"]
    view = make_view(frame.cameras["CAM_F0"], SIZE)
    head = np.array([[*(signal.head[:2] - frame.ego_pose[:2]), signal.head[2]]])
    (pixel,), (depth,) = view.project(head)
    image = renderer.render(frame, ("CAM_F0",), SIZE)["CAM_F0"].astype(int)
    u, v = np.round(pixel).astype(int)
    assert 20 < depth < 60 and 10 < u < SIZE[1] - 10 and 10 < v < SIZE[0] - 10
    patch = image[v - 6 : v + 7, u - 4 : u + 5].reshape(-1, 3)
    red = (patch[:, 0] > 170) & (patch[:, 1] < 110)
    green = (patch[:, 1] > 170) & (patch[:, 0] < 120)
    assert red.any() == (channel == 0) and green.any() == (channel == 1)


def test_signals_stand_beyond_the_junction_and_posts_beside_the_road(road_map: RoadMap, renderer: Renderer) -> None:
    signals = renderer.signals.near(*_at(110.0, 0.0), 60.0)
    assert [s.connector for s in signals] == ["21", "22"]
    eastbound = signals[0]
    assert 119.0 < eastbound.head[0] - ORIGIN[0] < 123.0 and abs(eastbound.head[1] - ORIGIN[1] + 1.75) < 0.1
    assert eastbound.post[1] - ORIGIN[1] < -3.5


def _ground_color(renderer: Renderer, frame: Frame, x: float, y: float) -> np.ndarray:
    """Mean colour around a point of the street (relative to ORIGIN) in the front camera."""
    image = renderer.render(frame, ("CAM_F0",), SIZE)["CAM_F0"].astype(float)
    local = np.array([[*(_at(x, y) - frame.ego_pose[:2]), 0.0]])
    (pixel,), _ = make_view(frame.cameras["CAM_F0"], SIZE).project(local)
    u, v = np.round(pixel).astype(int)
    return image[v : v + 1, u - 1 : u + 2].reshape(-1, 3).mean(0)


def test_ground_shows_the_map(renderer: Renderer) -> None:
    frame = _frame(x=83.0)
    # Bars of half a metre, one a metre, from 0.3 m on either side of the crossing.
    stations = np.arange(-3.0, 3.1, 0.1)
    bright = np.array([_ground_color(renderer, frame, 92.0, y).mean() for y in stations[::5]])
    assert bright.max() > 170 and bright.min() < 130
    asphalt = _ground_color(renderer, frame, 95.5, -1.75)
    assert asphalt.max() < 130 and np.ptp(asphalt) < 15
    center = _ground_color(renderer, _frame(x=60.0), 72.0, 0.12)
    assert center[0] > 1.4 * center[2]  # yellow between directions, be it in the shade
    stop = _ground_color(renderer, _frame(x=88.0), 99.6, -1.75)
    assert stop.mean() > 150


@pytest.mark.parametrize("yaw_deg", [0.0, 55.0, 180.0])
def test_no_pixel_looks_beyond_its_window(yaw_deg: float) -> None:
    view = make_view(_camera(yaw_deg), SIZE)
    for zone in make_backdrop(view, 0.0).zones:
        for level, band, mask in zone.levels:
            farthest = np.hypot(*zone.points[band][mask > 0].T).max()
            assert level == LEVELS - 1 or farthest < (WINDOW / 2 - 1) * TEXEL_M * 2**level


def test_window_texels_follow_from_place_alone(road_map: RoadMap) -> None:
    first, second = (GroundPainter(road_map, find_approaches(road_map)) for _ in range(2))
    x, y = _at(60.0, 0.0)
    for level in (0, 2):
        step = TEXEL_M * 2**level * 100
        second.window(level, x + 5 * step, y)
        a, b = first.window(level, x, y), second.window(level, x + step, y - step)
        shift = np.round((b.origin - a.origin) / a.texel).astype(int)
        assert tuple(shift) == (100, -100)
        np.testing.assert_array_equal(a.pixels[: WINDOW - 100, 100:], b.pixels[100:, : WINDOW - 100])


def test_nothing_is_built_on_roads(road_map: RoadMap, renderer: Renderer) -> None:
    roads = shapely.union_all([g for n in ("lanes_polygons", "intersections", "carpark_areas")
                               for g in road_map.layer(n).geometries])  # fmt: skip
    paved = shapely.union(roads, shapely.union_all(road_map.layer("walkways").geometries))
    corner = np.floor(ORIGIN / SQUARE_M).astype(int)
    vertices = 0
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            square = renderer.scenery.square(corner[0] + dx, corner[1] + dy)
            low = square.near.vertices[square.near.vertices[:, 2] < 0.05]
            feet = low[:, :2].astype(float) + square.origin
            vertices += len(feet)
            assert not shapely.contains_xy(roads, feet[:, 0], feet[:, 1]).any()
            # Only lamp posts may stand on the sidewalk; they are thin.
            on_walkway = feet[shapely.contains_xy(paved, feet[:, 0], feet[:, 1])]
            if len(on_walkway):
                edge = shapely.distance(shapely.points(on_walkway), roads)
                assert edge.max() < 0.9
    assert vertices > 200


def test_coarse_grid_gives_what_casting_every_pixel_gives(renderer: Renderer) -> None:
    stage = renderer._stage(_frame(), frozenset())
    view = make_view(_camera(30.0), SIZE)
    origin, rays = stage.to_local(view.origin[None])[0], stage.rotate(view.directions.reshape(-1, 3))
    solid = stage.region.solid
    blocks = np.zeros((-(-SIZE[0] // 4), -(-SIZE[1] // 4)), bool)
    coarse, full = visible_faces(solid, origin, rays, SIZE, blocks), solid.cast(origin, rays)
    group = np.append(solid.group, -1)
    assert (group[coarse] == group[full]).mean() > 0.98
    np.testing.assert_array_equal(visible_faces(solid, origin, rays, SIZE, ~blocks), full)


def test_templates_fill_their_boxes_and_face_outward() -> None:
    for name, template in templates().items():
        np.testing.assert_allclose(template.vertices.min(0), [-0.5, -0.5, 0.0], atol=1e-6, err_msg=name)
        np.testing.assert_allclose(template.vertices.max(0), [0.5, 0.5, 1.0], atol=1e-6, err_msg=name)
    car = object_mesh("vehicle", np.array([0, 0, 0.75, 4.6, 1.9, 1.5, 0]), "a")
    solid = make_solid(car)
    for direction in np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, -1]], np.float32):
        face = solid.cast((np.array([0, 0, 0.7]) - 8 * direction).astype(np.float32), direction[None])
        assert solid.plane[face[0], :3] @ direction < -0.3


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.booleans(), st.floats(-180.0, 180.0))
def test_pixel_ray_projects_back_to_the_pixel(u: float, v: float, curved: bool, yaw: float) -> None:
    view = make_view(_camera(yaw, LENS if curved else None), (54, 96))
    row, column = int(v * 54), int(u * 96)
    pixels, depth = view.project(view.origin + 20.0 * view.directions[row, column][None].astype(float))
    np.testing.assert_allclose(pixels[0], [column, row], atol=0.02)
    assert depth[0] > 0


def test_distortion_round_trip() -> None:
    points = np.stack(np.meshgrid(np.linspace(-0.62, 0.62, 9), np.linspace(-0.36, 0.36, 7)), -1)
    np.testing.assert_allclose(undistort(distort(points, LENS), LENS), points, atol=1e-5)


def test_calibration_of_twice_the_size_is_scaled() -> None:
    camera = _camera()
    double = dataclasses.replace(camera, intrinsics=camera.intrinsics * np.array([[2], [2], [1]]))
    np.testing.assert_allclose(make_view(camera, SIZE).directions, make_view(double, SIZE).directions, atol=1e-6)


def test_frame_without_objects_or_broken_boxes(renderer: Renderer) -> None:
    bare = renderer.render(_frame(annotations=None), ("CAM_F0",), SIZE)["CAM_F0"]
    broken = _frame([[np.nan, 0, 0, 4, 2, 1.5, 0], [10, 0, 0.7, 0.0, 2, 1.5, 0]], ["vehicle", "vehicle"])
    np.testing.assert_array_equal(bare, renderer.render(broken, ("CAM_F0",), SIZE)["CAM_F0"])


def test_objects_are_placed_by_the_ego_pose(renderer: Renderer) -> None:
    """The same car seen from a turned ego is hit at the same global place."""
    pose = np.array([*_at(40.0, -1.75), 0.5])
    points = renderer.point_cloud(_frame([CAR], ["vehicle"], ego_pose=pose))
    near = (np.hypot(points[0] - 15.0, points[1]) < 2.4) & (points[2] > 0.2)
    assert near.sum() > 100 and abs(points[0][near & (np.abs(points[1]) < 0.5)].min() - 12.7) < 0.05
    assert to_global(pose, np.zeros(3))[0] == pytest.approx(pose[0])


def test_missing_embree_names_the_remedy(road_map: RoadMap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embreex", None)
    with pytest.raises(UserError, match=r"pip install -e \.\[city\]"):
        Renderer(road_map)


def test_missing_calibration_is_named(renderer: Renderer) -> None:
    with pytest.raises(UserError, match="CAM_B0"):
        renderer.render(_frame(), ("CAM_B0",), SIZE)
