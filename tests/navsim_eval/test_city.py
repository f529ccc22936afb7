"""The synthetic city holds what its formats promise: a connected map, plausible drives, scenes that pass the filter."""

from __future__ import annotations

import json
import shutil
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import shapely

pytest.importorskip("sumo", reason="the synthetic city needs Eclipse SUMO")

from navsim_eval.city import make as make_module
from navsim_eval.city.district import DistrictJob, make_district
from navsim_eval.city.ego import ego_motion
from navsim_eval.city.furniture import furnish
from navsim_eval.city.make import CityConfig, make_city
from navsim_eval.city.network import LOCATIONS, STYLES, build_network, district_seed
from navsim_eval.city.recorder import command_on
from navsim_eval.city.rig import intrinsics, viewing_rotation
from navsim_eval.city.road_map import assign_ids, district_layers
from navsim_eval.city.selection import passes, stretches
from navsim_eval.city.sensors import RenderLog, braking_tracks
from navsim_eval.city.sumo_net import read_network
from navsim_eval.city.traffic import KINDS, STEP_S, Track
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.files import sha256
from navsim_eval.formats.logs import read_log
from navsim_eval.formats.map_store import MapStore, write_map
from navsim_eval.formats.maps import RoadMap
from navsim_eval.formats.sensors import read_image, read_point_cloud
from navsim_eval.geometry import Vehicle, box_corners, to_global
from navsim_eval.metrics.comfort import comfort_checks_v1
from navsim_eval.pdm.path import with_headings
from navsim_eval.scene import AGENT_CLASSES, CAMERAS, COMMANDS, STATIC_CLASSES, Annotations

TINY = CityConfig(scenes=4, val_scenes=2, test_scenes=5, seed=5, sensors="none")


@pytest.fixture(scope="module")
def city(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("city")
    report = make_city(TINY, root, workers=1)
    assert report.scenes == {"train": 4, "val": 2, "test": 5}
    return root


@pytest.fixture(scope="module", params=sorted(STYLES))
def district_map(request, tmp_path_factory) -> RoadMap:
    """The map of a district of each style, through the file."""
    folder = tmp_path_factory.mktemp(request.param)
    network = read_network(build_network(STYLES[request.param], 12, folder))
    _, car_parks = furnish(network, 12)
    layers = district_layers(network, assign_ids(network, 3), 3, LOCATIONS["val"].offset(3), car_parks)
    write_map(folder, "us-nv-las-vegas-strip", "9.15.1915", layers, 32611)
    return MapStore(folder).get("us-nv-las-vegas-strip")


def scenes_of(root: Path, split: str) -> list:
    return list(SceneDataset.from_config(DataConfig(root=str(root)), split))


# --- map -------------------------------------------------------------------------------------------------------------


def test_relations_of_the_map_hold(district_map: RoadMap):
    lanes, connectors = district_map.layer("lanes_polygons"), district_map.layer("lane_connectors")
    groups, group_connectors = district_map.layer("lane_groups_polygons"), district_map.layer("lane_group_connectors")
    assert len(connectors) > 50
    assert not set(lanes.ids) & set(connectors.ids)
    assert not set(groups.ids) & set(group_connectors.ids)
    intersections = district_map.layer("intersections")
    for connector in connectors.ids:
        (before,), (after,) = district_map.incoming(connector), district_map.outgoing(connector)
        line = district_map.baseline(connector)
        assert np.hypot(*(district_map.baseline(before)[-1] - line[0])) < 0.1
        assert np.hypot(*(district_map.baseline(after)[0] - line[-1])) < 0.1
        block = district_map.block_of(connector)
        assert district_map.roadblock_incoming(block) == (district_map.block_of(before),)
        assert district_map.roadblock_outgoing(block) == (district_map.block_of(after),)
        row = connectors.row[connector]
        under = intersections.geometries[intersections.row[str(connectors.columns["intersection_fid"][row])]]
        assert shapely.covers(under.buffer(1e-6), district_map.polygon(connector))
        assert 0.5 < district_map.speed_limit(connector) < 15.0


def test_the_ego_stays_on_drivable_ground_along_every_baseline(district_map: RoadMap):
    layers = ("lane_groups_polygons", "intersections", "carpark_areas")
    tree = shapely.STRtree(np.concatenate([district_map.layer(name).geometries for name in layers]))
    for layer in ("lanes_polygons", "lane_connectors"):
        for edge in district_map.layer(layer).ids:
            path = with_headings(district_map.baseline(edge))
            arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path[:, :2], axis=0).T))])
            # where a street leaves the district there is no road ahead of the front or behind the rear
            keep = np.ones(len(path), bool)
            if not district_map.outgoing(edge):
                keep &= arc < arc[-1] - Vehicle.FRONT_LENGTH - 0.1
            if not district_map.incoming(edge):
                keep &= arc > Vehicle.REAR_LENGTH + 0.1
            middle = to_global(path[keep], np.array([Vehicle.REAR_AXLE_TO_CENTER, 0.0, 0.0]))
            corners = box_corners(middle, Vehicle.LENGTH, Vehicle.WIDTH).reshape(-1, 2)
            on_road = np.unique(tree.query(shapely.points(corners), predicate="within")[0])
            assert len(on_road) == len(corners), f"{layer} {edge}"


def test_signals_have_stop_lines_and_lights_off_the_road(district_map: RoadMap):
    connectors, stops = district_map.layer("lane_connectors"), district_map.layer("stop_polygons")
    lights = district_map.layer("traffic_lights")
    controlled = [text for text in connectors.columns["traffic_light_stop_line_fids"] if text]
    assert controlled
    for text in set(controlled):
        row = stops.row[text]
        assert stops.columns["stop_polygon_type_fid"][row] == 2
        light = lights.geometries[lights.row[stops.columns["traffic_light_fids"][row]]]
        assert 5.0 < light.distance(stops.geometries[row]) < 90.0
        for layer in ("lane_groups_polygons", "intersections", "carpark_areas"):
            assert not len(district_map.layer(layer).tree.query(light, predicate="within"))


def test_lanes_have_borders_and_neighbours(district_map: RoadMap):
    lanes, borders = district_map.layer("lanes_polygons"), district_map.layer("boundaries")
    by_group: dict[str, list[int]] = {}
    for row, group in enumerate(lanes.columns["lane_group_fid"]):
        by_group.setdefault(group, []).append(row)
    for rows in by_group.values():
        rows.sort(key=lambda row: lanes.columns["lane_index"][row])
        assert [lanes.columns["lane_index"][row] for row in rows] == list(range(len(rows)))
        for left, right in pairwise(rows):
            shared = lanes.columns["right_boundary_fid"][left]
            assert shared == lanes.columns["left_boundary_fid"][right]
            assert borders.columns["boundary_type_fid"][borders.row[str(shared)]] == 0  # dashed
        outer = lanes.columns["left_boundary_fid"][rows[0]]
        assert borders.columns["boundary_type_fid"][borders.row[str(outer)]] == 2  # solid


# --- logs ------------------------------------------------------------------------------------------------------------


def test_every_window_of_every_log_is_a_scene_that_passes_the_filter(city: Path):
    for split, count in (("train", 4), ("test", 5)):
        scenes = scenes_of(city, split)
        assert len(scenes) == count == len({scene.token for scene in scenes})
        road_map = MapStore(city / "maps").get(scenes[0].map_name)
        assert scenes[0].map_name == LOCATIONS[split].name
        assert all(passes(scenes, road_map))


def test_frames_are_complete(city: Path):
    for scene in scenes_of(city, "train"):
        times = np.diff([frame.timestamp_us for frame in scene.frames])
        assert (times == 500_000).all()
        for frame in scene.frames:
            assert set(frame.cameras) == set(CAMERAS)
            assert frame.annotations is not None and len(frame.annotations)
            assert set(frame.annotations.names) <= set(AGENT_CLASSES) | set(STATIC_CLASSES)
            assert {len(t) for t in frame.annotations.track_tokens} == {16} and len(frame.token) == 16
            assert frame.driving_command.sum() == 1 and frame.driving_command[COMMANDS.index("unknown")] == 0


def test_recorded_speed_is_the_derivative_of_the_pose(city: Path):
    for scene in scenes_of(city, "test"):
        poses = np.stack([frame.ego_pose for frame in scene.frames])
        speed = np.array([frame.ego_velocity[0] for frame in scene.frames])
        driven = np.hypot(*np.diff(poses[:, :2], axis=0).T)
        assert np.allclose(driven, 0.5 * (speed[1:] + speed[:-1]) / 2.0, atol=0.12)
        gained = np.array([frame.ego_acceleration[0] for frame in scene.frames])
        assert (np.abs(gained) < 3.7).all()


def test_tracks_move_as_their_velocity_says(city: Path):
    """Between two frames a moving car's displacement over ground equals its speed times half a second."""
    checked = 0
    for scene in scenes_of(city, "train"):
        for before, after in zip(scene.frames[:-1], scene.frames[1:], strict=True):
            was, now = before.annotations, after.annotations
            where = {t: k for k, t in enumerate(was.track_tokens)}
            old = to_global(before.ego_pose, was.boxes[:, [0, 1, 6]])
            new = to_global(after.ego_pose, now.boxes[:, [0, 1, 6]])
            for k, track in enumerate(now.track_tokens):
                if now.names[k] == "vehicle" and track in where:
                    shift = np.hypot(*(new[k] - old[where[track]])[:2])
                    speeds = np.hypot(*was.velocity[where[track]]), np.hypot(*now.velocity[k])
                    assert min(speeds) * 0.5 - 0.6 < shift < max(speeds) * 0.5 + 0.6
                    checked += 1
    assert checked > 100


def test_routes_start_under_the_ego_and_are_connected(city: Path):
    for split in ("train", "test"):
        for scene in scenes_of(city, split):
            road_map, route = MapStore(city / "maps").get(scene.map_name), scene.current.roadblock_ids
            here = shapely.Point(scene.current.ego_pose[:2])
            assert road_map.block_polygon(route[0]).buffer(1.0).contains(here)
            for block, following in pairwise(route):
                assert following in road_map.roadblock_outgoing(block)
            length = sum(
                np.hypot(*np.diff(road_map.baseline(road_map.interior_edges(block)[0]), axis=0).T).sum()
                for block in route[1:]
            )
            assert length > 60.0


def test_current_frames_are_what_a_scene_folder_promises(city: Path):
    """Each log holds exactly the frames that its scenes need."""
    manifest = json.loads((city / "city.json").read_text())
    for split, entry in manifest["splits"].items():
        paths = sorted((city / "navsim_logs" / split).glob("*.pkl"))
        assert [path.stem for path in paths] == sorted(entry["logs"])
        for path in paths:
            assert len(path.stem) == 38 and sha256(path) == entry["logs"][path.stem]["sha256"]
            assert len(read_log(path)) == entry["logs"][path.stem]["scenes"] + 13


# --- determinism, resuming, bad input --------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_to_the_same_bytes(city: Path, tmp_path, monkeypatch):
    made: list[str] = []

    def interrupted(job: DistrictJob):
        if made:
            raise KeyboardInterrupt
        made.append(job.district.split)
        return make_district(job)

    config = CityConfig(**{**vars(TINY), "splits": ["val", "test"]})
    monkeypatch.setattr(make_module, "make_district", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_city(config, tmp_path, workers=1)
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    assert made == ["val"] and len(marks) == 1

    remade: list[str] = []
    monkeypatch.setattr(make_module, "make_district", lambda job: (remade.append(job.folder), make_district(job))[1])
    make_city(config, tmp_path, workers=1)
    assert len(remade) == 2
    for split in ("val", "test"):
        where = LOCATIONS[split]
        files = sorted((city / "navsim_logs" / split).glob("*.pkl"))
        files.append(city / "maps" / where.name / where.version / "map.gpkg")
        for path in files:
            assert sha256(path) == sha256(tmp_path / path.relative_to(city)), path.name

    monkeypatch.setattr(make_module, "make_district", interrupted)
    assert make_city(config, tmp_path, workers=1).scenes == {"val": 2, "test": 5}  # nothing is made anew


def test_another_city_or_foreign_logs_are_not_overwritten(city: Path, tmp_path):
    with pytest.raises(UserError, match=r"another city .*seed 5 ≠ 6"):
        make_city(CityConfig(**{**vars(TINY), "seed": 6}), city, workers=1)
    (tmp_path / "navsim_logs" / "trainval").mkdir(parents=True)
    with pytest.raises(UserError, match="no synthetic city"):
        make_city(TINY, tmp_path, workers=1)


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ({"sensors": "lidar"}, "none, front, all"),
        ({"splits": ["mini"]}, "train, val, test"),
        ({"scenes": 0}, "scenes ≥ 1"),
    ],
)
def test_bad_settings_are_refused(values, fact):
    with pytest.raises(UserError, match=fact):
        CityConfig(**values)


def test_missing_packages_are_named_with_the_remedy(tmp_path, monkeypatch):
    modules = __import__("sys").modules
    with monkeypatch.context() as patch:
        patch.setitem(modules, "sumo", None)
        with pytest.raises(UserError, match=r"Eclipse SUMO: pip install -e '\.\[city\]'"):
            make_city(TINY, tmp_path, workers=1)
    monkeypatch.setitem(modules, "navsim_eval.city.render", None)
    with pytest.raises(UserError, match=r"\[city\].*city\.sensors=none"):
        make_city(CityConfig(**{**vars(TINY), "sensors": "all"}), tmp_path, workers=1)


def test_districts_differ_between_splits_and_seeds():
    seeds = {district_seed(s, split, k) for s in range(3) for split in LOCATIONS for k in range(4)}
    assert len(seeds) == 3 * 3 * 4


# --- sensors ---------------------------------------------------------------------------------------------------------


class _FlatRenderer:
    """Stands in for the ray caster: plain images."""

    calls = 0

    def __init__(self, road_map, seed=0):
        pass

    def render(self, frame, cameras, size, braking=frozenset()):
        type(self).calls += 1
        return {camera: np.full((*size, 3), 90, np.uint8) for camera in cameras}

    def point_cloud(self, frame, braking=frozenset()):
        return np.ones((6, 5), np.float32)


def test_only_current_frames_get_sensors_and_only_once(city: Path, tmp_path: Path, monkeypatch):
    module = types.ModuleType("navsim_eval.city.render")
    module.Renderer = _FlatRenderer
    monkeypatch.setitem(__import__("sys").modules, "navsim_eval.city.render", module)
    config = CityConfig(**{**vars(TINY), "sensors": "front", "splits": ["val"]})
    assert make_city(config, city, workers=1).rendered == {"val": 2}
    assert make_city(config, city, workers=1).rendered == {"val": 0} and _FlatRenderer.calls == 2
    folder = city / "sensor_blobs" / "val"
    assert len(list(folder.rglob("*.jpg"))) == 2 * 3 and len(list(folder.rglob("*.pcd"))) == 2
    scene = scenes_of(city, "val")[0]
    assert read_image(folder / scene.current.cameras["CAM_F0"].path).shape == (540, 960, 3)
    assert read_point_cloud(folder / scene.current.lidar_path).shape == (6, 5)
    next(folder.rglob("*.jpg")).unlink()
    assert make_city(config, city, workers=1).rendered == {"val": 1}
    # To replay a drive, all of its frames; here into a copy, because the city is shared.
    shutil.copytree(city / "navsim_logs" / "val", tmp_path / "navsim_logs" / "val")
    log = sorted((tmp_path / "navsim_logs" / "val").glob("*.pkl"))[0]
    job = RenderLog(tmp_path, city / "maps", "front", (54, 96), seed=0, whole_logs=True)
    assert job(("val", log.stem)) == len(read_log(log)) == len(list((tmp_path / "sensor_blobs").rglob("*.pcd")))


def test_the_real_renderer_fills_a_log(city: Path, tmp_path):
    """Small images, so that this checks the joint between the two rooms and not the pictures."""
    pytest.importorskip("embreex", reason="rendering needs Embree")
    shutil.copytree(city / "navsim_logs" / "val", tmp_path / "navsim_logs" / "val")
    log = sorted((tmp_path / "navsim_logs" / "val").glob("*.pkl"))[0]
    assert RenderLog(tmp_path, city / "maps", "front", (90, 160), seed=0)(("val", log.stem)) >= 1
    frame = read_log(log)[3]
    image = read_image(tmp_path / "sensor_blobs" / "val" / frame.cameras["CAM_F0"].path)
    assert image.shape == (90, 160, 3) and image.std() > 10.0
    cloud = read_point_cloud(tmp_path / "sensor_blobs" / "val" / frame.lidar_path)
    assert cloud.shape[1] > 10_000 and np.isfinite(cloud).all()


def test_brake_lights_of_slowing_and_waiting_vehicles(city: Path):
    """A car that loses speed and one that waits in a lane brake; one at speed and a parked one do not."""
    scene = scenes_of(city, "train")[0]
    road_map = MapStore(city / "maps").get(scene.map_name)
    frame = scene.current
    parking = road_map.layer("carpark_areas").geometries[0].representative_point()
    c, s = np.cos(frame.ego_pose[2]), np.sin(frame.ego_pose[2])
    dx, dy = parking.x - frame.ego_pose[0], parking.y - frame.ego_pose[1]
    places = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [c * dx + s * dy, -s * dx + c * dy]])

    def annotations(speeds):
        boxes = np.zeros((4, 7))
        boxes[:, :2], boxes[:, 3:6] = places, (4.5, 1.8, 1.5)
        velocity = np.column_stack([speeds, np.zeros(4)])
        return Annotations(boxes, np.array(["vehicle"] * 4), velocity, np.array(["slows", "waits", "rolls", "parks"]))

    before = types.SimpleNamespace(annotations=annotations([9.0, 0.0, 9.0, 0.0]))
    now = types.SimpleNamespace(annotations=annotations([7.5, 0.0, 9.0, 0.0]), ego_pose=frame.ego_pose)
    assert braking_tracks(before, now, road_map) == {"slows", "waits"}


def test_calibration_is_the_published_one_and_scales_with_the_image():
    full, half = intrinsics(1080, 1920), intrinsics(540, 960)
    assert full.tolist() == [[1545.0, 0.0, 960.0], [0.0, 1545.0, 560.0], [0.0, 0.0, 1.0]]
    assert np.allclose(half[:2], full[:2] / 2)
    forward, left = viewing_rotation(0.0) @ [0, 0, 1], viewing_rotation(np.pi / 2) @ [0, 0, 1]
    assert np.allclose(forward, [1, 0, 0]) and np.allclose(left, [0, 1, 0])
    assert np.allclose(viewing_rotation(0.3) @ viewing_rotation(0.3).T, np.eye(3))
    assert np.allclose(viewing_rotation(0.0) @ [1, 0, 0], [0, -1, 0])  # image right is the ego's right


# --- parts -----------------------------------------------------------------------------------------------------------


def _track(positions: np.ndarray, heading: np.ndarray) -> Track:
    poses = np.column_stack([positions, heading])
    lanes = ("s0f_1",) * len(poses)
    return Track("v1", KINDS["ego_car"], 0, poses, np.zeros(len(poses)), lanes, ("s0f",))


def test_the_rear_axle_follows_the_bumper_along_a_straight_street():
    x = 8.0 * STEP_S * np.arange(120)
    motion = ego_motion(_track(np.column_stack([x, 0 * x]), 0 * x))
    bumper = x[motion.first :]
    assert np.allclose(motion.poses[:, 0], bumper - Vehicle.FRONT_LENGTH, atol=1e-6)
    assert np.allclose(motion.velocity, 8.0, atol=1e-6) and np.allclose(motion.acceleration, 0.0, atol=1e-6)
    assert motion.comfortable.all()


def test_abrupt_driving_becomes_comfortable_and_sharp_turns_do_not():
    """SUMO brakes and accelerates from one step to the next; the smoothed drive is within nuPlan's bounds."""
    acceleration = np.concatenate([np.zeros(30), np.full(33, -3.0), np.zeros(30), np.full(45, 2.0), np.zeros(30)])
    speed = np.maximum(10.0 + np.cumsum(acceleration) * STEP_S, 0.0)
    x = np.cumsum(speed) * STEP_S
    motion = ego_motion(_track(np.column_stack([x, 0 * x]), 0 * x))
    assert motion.comfortable.all() and motion.velocity.min() > -1e-6
    states = np.zeros((1, 41, 11))
    start = 10
    part = slice(start, start + 41)
    states[0, :, :3], states[0, :, 3] = motion.poses[part], motion.velocity[part]
    states[0, :, 5] = motion.acceleration[part, 0]
    assert np.asarray(comfort_checks_v1(__import__("torch").from_numpy(states))).all()

    angle = np.minimum(np.arange(120) * STEP_S * 8.0 / 5.0, np.pi)  # 8 m/s around a radius of 5 m: 12.8 m/s²
    circle = 5.0 * np.column_stack([np.sin(angle), 1 - np.cos(angle)])
    circle[angle >= np.pi, 0] -= 0.8 * np.arange((angle >= np.pi).sum())
    assert not ego_motion(_track(circle, angle)).comfortable.all()


@pytest.mark.parametrize(
    ("curvature", "command"), [(1 / 60.0, "left"), (0.0, "straight"), (1 / 200.0, "straight"), (-1 / 60.0, "right")]
)
def test_command_is_the_offset_of_the_centre_line_20_m_ahead(curvature, command):
    """A circle of radius R deviates by about 20²/2R after 20 m: 3.3 m at 60 m, 1 m at 200 m; the limit is 2 m."""
    s = np.arange(0.0, 60.0, 1.0)
    heading = curvature * s
    line = np.column_stack([np.cumsum(np.cos(heading)), np.cumsum(np.sin(heading)), heading])
    assert COMMANDS[int(np.argmax(command_on(line, np.array([5.0, 0.3, 0.0]))))] == command


def test_stretches_of_kept_scenes():
    assert stretches([True, True, False, True]) == [(0, 2), (3, 1)]
    assert stretches([False]) == [] and stretches([]) == []
