"""Logs: reference values, round trips, tolerance for what the published files may lack, and messages that point."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from navsim_eval.errors import DataError
from navsim_eval.formats.logs import parse_route, read_log, read_log_dicts, rotation_matrix, write_log
from navsim_eval.geometry import box_corners, to_global, wrap_angle
from navsim_eval.scene import CAMERAS, STATIC_CLASSES, Annotations, Camera, Frame
from tests.golden import GOLDEN, needs_golden
from tests.worlds import drive

GOLDEN_LOGS = sorted((*GOLDEN.glob("pdms/logs/*.pkl"), *GOLDEN.glob("real_scenes/navsim_logs/real/*.pkl")))
SAMPLE = drive("sample", 4)


def assert_same_frame(left: Frame, right: Frame, tolerance: float = 0.0) -> None:
    for name in ("token", "log_name", "scene_token", "map_name", "timestamp_us", "roadblock_ids", "traffic_lights"):
        assert getattr(left, name) == getattr(right, name), name
    np.testing.assert_array_equal(left.ego_pose[:2], right.ego_pose[:2])
    assert abs(wrap_angle(left.ego_pose[2] - right.ego_pose[2])) <= max(tolerance, 1e-15)
    for name in ("ego_velocity", "ego_acceleration", "driving_command"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    assert (left.annotations is None) == (right.annotations is None)
    if left.annotations is not None:
        for name in ("boxes", "names", "velocity", "track_tokens"):
            a, b = getattr(left.annotations, name), getattr(right.annotations, name)
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert a.shape == b.shape
    assert left.lidar_path == right.lidar_path and set(left.cameras) == set(right.cameras)
    for name, camera in left.cameras.items():
        assert camera.path == right.cameras[name].path
        for part in ("rotation", "translation", "intrinsics", "distortion"):
            np.testing.assert_array_equal(getattr(camera, part), getattr(right.cameras[name], part))


def rewrite(path: Path, **changes: Any) -> Path:
    """The sample log with keys of its frame 2 replaced (or removed: None as ...)."""
    write_log(path, SAMPLE)
    content = pickle.loads(path.read_bytes())
    for key, value in changes.items():
        if value is ...:
            del content[2][key]
        else:
            content[2][key] = value
    path.write_bytes(pickle.dumps(content))
    return path


# --- round trip ------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6)
singles = st.floats(-50, 50, width=32)


@st.composite
def annotations(draw: st.DrawFn) -> Annotations:
    n = draw(st.integers(0, 4))
    elements = st.floats(-100, 100) | st.just(float("nan"))
    names = st.sampled_from(["vehicle", "pedestrian", "bicycle", *STATIC_CLASSES])
    return Annotations(
        boxes=draw(hnp.arrays(np.float64, (n, 7), elements=elements)),
        names=np.array(draw(st.lists(names, min_size=n, max_size=n)), dtype=np.str_),
        velocity=draw(hnp.arrays(np.float64, (n, 2), elements=elements)),
        track_tokens=np.array([f"{i:016x}" for i in range(n)], dtype=np.str_),
    )


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    camera = Camera(
        path=Path("log/CAM/1.jpg"),
        rotation=draw(hnp.arrays(np.float64, (3, 3), elements=st.floats(-1, 1))),
        translation=draw(hnp.arrays(np.float64, 3, elements=st.floats(-3, 3))),
        intrinsics=np.diag([1545.0, 1545.0, 1.0]),
        distortion=draw(hnp.arrays(np.float64, 5, elements=st.floats(-1, 1))),
    )
    ids = st.integers(0, 10**6).map(str)
    return Frame(
        token=draw(st.text("0123456789abcdef", min_size=16, max_size=16)),
        log_name="log",
        scene_token="scene",
        map_name="us-ma-boston",
        timestamp_us=draw(st.integers(0, 2**53)),
        ego_pose=np.array([draw(numbers), draw(numbers), draw(st.floats(-3.14, 3.14))]),
        ego_velocity=np.array([draw(singles), draw(singles)]),
        ego_acceleration=np.array([draw(singles), draw(singles)]),
        driving_command=np.eye(4, dtype=np.int64)[draw(st.integers(0, 3))],
        roadblock_ids=tuple(draw(st.lists(ids, max_size=4))),
        traffic_lights=tuple(draw(st.lists(st.tuples(ids, st.booleans()), max_size=3))),
        annotations=draw(st.none() | annotations()),
        cameras=dict.fromkeys(draw(st.sets(st.sampled_from(CAMERAS))), camera),
        lidar_path=draw(st.none() | st.just(Path("log/MergedPointCloud/1.pcd"))),
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(frames(), max_size=3))
def test_read_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, log: list[Frame]) -> None:
    path = write_log(tmp_path_factory.mktemp("log") / "log.pkl", log)
    for before, after in zip(log, read_log(path), strict=True):
        assert_same_frame(before, after, tolerance=1e-15)


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    first, second = (write_log(tmp_path / name, drive("sample", 4)) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_layout_on_disk(tmp_path: Path) -> None:
    """Keys, types and shapes that the published logs have, readable without our code."""
    content = pickle.loads(write_log(tmp_path / "sample.pkl", SAMPLE).read_bytes())
    assert set(content[1]) == {
        *("token", "frame_idx", "timestamp", "log_name", "log_token", "scene_name", "scene_token", "map_location"),
        *("roadblock_ids", "vehicle_name", "can_bus", "lidar_path", "lidar2ego_translation", "lidar2ego_rotation"),
        *("ego2global_translation", "ego2global_rotation", "ego_dynamic_state", "traffic_lights", "driving_command"),
        *("cams", "sample_prev", "sample_next", "ego2global", "lidar2ego", "lidar2global", "anns"),
    }
    frame = content[1]
    assert [f["frame_idx"] for f in content] == [0, 1, 2, 3]
    assert (content[0]["sample_prev"], frame["sample_prev"]) == (None, SAMPLE[0].token)
    assert (content[3]["sample_next"], frame["sample_next"]) == (None, SAMPLE[2].token)
    assert frame["can_bus"].shape == (18,) and frame["can_bus"].dtype == np.float64
    np.testing.assert_array_equal(frame["can_bus"][:3], frame["ego2global_translation"])
    np.testing.assert_array_equal(frame["can_bus"][3:7], frame["ego2global_rotation"])
    assert frame["ego_dynamic_state"] == [frame["can_bus"][i] for i in (10, 11, 7, 8)]
    assert frame["driving_command"].dtype == np.int64 and isinstance(frame["roadblock_ids"], list)
    assert all(type(i) is int and type(red) is bool for i, red in frame["traffic_lights"])
    anns = frame["anns"]
    assert anns["gt_boxes"].shape == (7, 7) and anns["gt_velocity_3d"].shape == (7, 3)
    assert anns["gt_names"].dtype.kind == "U" and isinstance(anns["instance_tokens"], list)
    assert len({token for f in content for token in f["anns"]["instance_tokens"]}) == 4 * 7
    assert set(frame["cams"]) == set(CAMERAS)
    assert set(frame["cams"]["CAM_F0"]) == {
        *("data_path", "sensor2lidar_rotation", "sensor2lidar_translation", "cam_intrinsic", "distortion")
    }
    np.testing.assert_allclose(frame["ego2global"][:2, 3], SAMPLE[1].ego_pose[:2])


def test_no_objects_is_stored_as_the_published_logs_store_it(tmp_path: Path) -> None:
    none = Annotations(np.zeros((0, 7)), np.array([], np.str_), np.zeros((0, 2)), np.array([], np.str_))
    path = write_log(tmp_path / "x.pkl", [replace(SAMPLE[0], annotations=none)])
    assert pickle.loads(path.read_bytes())[0]["anns"]["gt_names"].dtype == np.float64
    back = read_log(path)[0].annotations
    assert len(back) == 0 and back.boxes.shape == (0, 7) and back.names.dtype.kind == "U"


def test_turning_rate_of_a_circle(tmp_path: Path) -> None:
    turning = [replace(f, ego_pose=np.array([0, 0, 3.0 + 0.1 * i])) for i, f in enumerate(SAMPLE)]
    content = pickle.loads(write_log(tmp_path / "x.pkl", turning).read_bytes())
    np.testing.assert_allclose([f["can_bus"][15] for f in content], 0.2)


# --- meaning ---------------------------------------------------------------------------------------------------------


def test_heading_of_a_tilted_car(tmp_path: Path) -> None:
    """NAVSIM's yaw is atan2(-R01, R00), not atan2(R10, R00)."""
    quaternion = np.array([0.9, 0.02, -0.03, 0.4])
    rotation = rotation_matrix(quaternion)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-15)
    frame = read_log(rewrite(tmp_path / "x.pkl", ego2global_rotation=(3 * quaternion).tolist()))[2]
    assert frame.ego_pose[2] == pytest.approx(np.arctan2(-rotation[0, 1], rotation[0, 0]), abs=1e-15)
    assert abs(frame.ego_pose[2] - np.arctan2(rotation[1, 0], rotation[0, 0])) > 1e-4


def test_motion_state_is_rounded_to_single_precision(tmp_path: Path) -> None:
    frame = read_log(rewrite(tmp_path / "x.pkl", ego_dynamic_state=[0.1, -0.2, 0.3, 1e-3]))[2]
    assert frame.ego_velocity.dtype == np.float64
    assert frame.ego_velocity.tolist() == [float(np.float32(0.1)), float(np.float32(-0.2))]
    assert frame.ego_acceleration.tolist() == [float(np.float32(0.3)), float(np.float32(1e-3))]


def test_camera_extrinsics_are_composed_with_a_turned_lidar(tmp_path: Path) -> None:
    quarter = [np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)]
    path = rewrite(tmp_path / "x.pkl", lidar2ego_rotation=quarter, lidar2ego_translation=[1.0, 2.0, 3.0])
    still, turned = (read_log(path)[i].cameras["CAM_F0"] for i in (1, 2))
    x, y, z = still.translation
    np.testing.assert_allclose(turned.translation, [1 - y, 2 + x, 3 + z], atol=1e-12)
    left_turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(turned.rotation, left_turn @ still.rotation, atol=1e-12)


def test_route_texts() -> None:
    assert parse_route(["12", "13", "12"]) == ("12", "13", "12")
    assert parse_route("12 13,14  ") == ("12", "13", "14")
    assert parse_route(["12, 13", "", " "]) == ("12", "13")
    assert parse_route([12, np.int64(13)]) == ("12", "13")
    assert parse_route([]) == ()


# --- tolerance -------------------------------------------------------------------------------------------------------


def test_frames_of_a_private_test_set(tmp_path: Path) -> None:
    """No labels, no route, no lights, no LiDAR, lower-case cameras of which one is unused, extra keys."""
    path = rewrite(tmp_path / "private.pkl", anns=..., roadblock_ids=..., traffic_lights=..., lidar_path=None, extra=1)
    content = pickle.loads(path.read_bytes())
    content[2]["cams"] = {"cam_f0": content[2]["cams"]["CAM_F0"], "cam_b0": {}}
    for key in ("log_name", "scene_token", "lidar2ego_translation", "lidar2ego_rotation", "can_bus", "ego2global"):
        del content[2][key]
    path.write_bytes(pickle.dumps(content, protocol=4))
    frame = read_log(path)[2]
    assert frame.annotations is None and frame.roadblock_ids == () and frame.traffic_lights == ()
    assert frame.lidar_path is None and list(frame.cameras) == ["CAM_F0"]
    assert frame.log_name == "private" and frame.scene_token == ""


def test_spellings_that_mean_the_same(tmp_path: Path) -> None:
    plain = read_log(rewrite(tmp_path / "a.pkl"))[2]
    same = read_log(
        rewrite(
            tmp_path / "b.pkl",
            map_location="las_vegas.gpkg",
            roadblock_ids=" ".join(SAMPLE[2].roadblock_ids),
            traffic_lights=np.array([[int(i), red] for i, red in SAMPLE[2].traffic_lights]),
            ego2global_translation=[*SAMPLE[2].ego_pose[:2].tolist(), 7.5],
            timestamp=np.int64(SAMPLE[2].timestamp_us),
            driving_command=[0, 1, 0, 0],
        )
    )[2]
    assert_same_frame(plain, same)
    assert isinstance(same.timestamp_us, int) and all(type(red) is bool for _, red in same.traffic_lights)


def test_nan_boxes_and_headings_beyond_pi_are_kept(tmp_path: Path) -> None:
    write_log(tmp_path / "x.pkl", SAMPLE)
    content = pickle.loads((tmp_path / "x.pkl").read_bytes())
    content[2]["anns"]["gt_boxes"][0] = np.nan
    content[2]["anns"]["gt_boxes"][1, 6] = 5.0
    content[2]["anns"]["gt_velocity_3d"][1] = np.nan
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    annotations = read_log(tmp_path / "x.pkl")[2].annotations
    assert np.isnan(annotations.boxes[0]).all() and np.isnan(annotations.velocity[1]).all()
    assert annotations.boxes[1, 6] == 5.0 and len(annotations) == 7


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"token": ...}, r"\[frame 2\.token\]: missing"),
        ({"timestamp": ...}, r"\[frame 2\.timestamp\]: missing"),
        ({"timestamp": "noon"}, r"\[frame 2\.timestamp\]: cannot be read \(invalid literal"),
        ({"ego2global_translation": ...}, r"\[frame 2\.ego2global_translation\]: missing"),
        ({"ego2global_translation": [1.0]}, r"\[frame 2\.ego2global_translation\]: shape \(1,\) where"),
        ({"ego2global_translation": [np.nan, 0, 0]}, r"\[frame 2\.ego2global_translation\]: not finite"),
        ({"ego2global_rotation": [1, 0, 0]}, r"\[frame 2\.ego2global_rotation\]: shape \(3,\) where \(4,\) is"),
        ({"ego2global_rotation": [0, 0, 0, 0]}, r"\[frame 2\.ego2global_rotation\]: zero quaternion"),
        ({"ego_dynamic_state": None}, r"\[frame 2\.ego_dynamic_state\]: missing"),
        ({"ego_dynamic_state": [1, 2, 3, "fast"]}, r"\[frame 2\.ego_dynamic_state\]: cannot be read"),
        ({"driving_command": [0, 1, 0]}, r"\[frame 2\.driving_command\]: shape \(3,\) where \(4,\) is expected"),
        ({"roadblock_ids": 12}, r"\[frame 2\.roadblock_ids\]: cannot be read"),
        ({"traffic_lights": [(1, 2, 3)]}, r"\[frame 2\.traffic_lights\]: cannot be read"),
        ({"cams": [1]}, r"\[frame 2\.cams\]: a dict is expected, this is a list"),
        ({"cams": {"CAM_F0": {"data_path": "a.jpg"}}}, r"\[frame 2\.cams\.CAM_F0\.sensor2lidar_rotation\]: missing"),
        ({"anns": [1, 2]}, r"\[frame 2\.anns\]: a dict is expected, this is a list"),
    ],
)
def test_errors_name_file_frame_and_field(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=r"bad\.pkl " + message):
        read_log(rewrite(tmp_path / "bad.pkl", **changes))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("gt_boxes", np.zeros((7, 6)), r"gt_boxes\]: shape \(7, 6\) where \(n, 7\) is expected"),
        ("gt_velocity_3d", np.zeros((6, 3)), r"gt_velocity_3d\]: 6 entries for 7 boxes"),
        ("gt_names", np.array(["vehicle"]), r"gt_names\]: 1 entries for 7 boxes"),
        ("gt_names", np.array(["tram"] * 7), r"gt_names\]: unknown class 'tram'; known: barrier, bicycle"),
        ("track_tokens", ["a"], r"track_tokens\]: 1 entries for 7 boxes"),
        ("track_tokens", None, r"track_tokens\]: missing"),
    ],
)
def test_errors_in_annotations(tmp_path: Path, key: str, value: Any, message: str) -> None:
    write_log(tmp_path / "x.pkl", SAMPLE)
    content = pickle.loads((tmp_path / "x.pkl").read_bytes())
    content[2]["anns"][key] = value
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"x\.pkl \[frame 2\.anns\." + message):
        read_log(tmp_path / "x.pkl")


@pytest.mark.parametrize("content, kind", [({"frames": []}, "a dict"), ([1, 2], "a list of something else")])
def test_other_content_is_not_a_log(tmp_path: Path, content: Any, kind: str) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"not a log: a list of frame dicts is expected, this is {kind}"):
        read_log_dicts(tmp_path / "x.pkl")


# --- reference values ------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.golden
def test_all_golden_logs_read() -> None:
    logs = [read_log(path) for path in GOLDEN_LOGS]
    assert len(logs) == 42 and sum(map(len, logs)) == 948
    assert sum(len(frame.annotations) for log in logs for frame in log) == 24321
    assert all(frame.log_name == path.stem for path, log in zip(GOLDEN_LOGS, logs, strict=True) for frame in log)


@needs_golden
@pytest.mark.golden
@pytest.mark.parametrize("path", sorted((GOLDEN / "pdms/debug").glob("*.npz")), ids=lambda p: p.stem)
def test_state_and_boxes_of_the_reference(path: Path) -> None:
    """The ego state and the box corners that the reference evaluator derives from the current frame."""
    log, start = path.stem.rsplit("_", 1)
    frame = read_log(GOLDEN / "pdms/logs" / f"{log}.pkl")[int(start) + 3]
    debug = np.load(path)
    assert frame.token == str(debug["token"])
    np.testing.assert_array_equal(debug["initial_state"][3:7], [*frame.ego_velocity, *frame.ego_acceleration])
    np.testing.assert_allclose(debug["initial_state"][:3], frame.ego_pose, rtol=0, atol=1e-12)
    boxes, tokens = frame.annotations.boxes, frame.annotations.track_tokens.tolist()
    centres = to_global(frame.ego_pose, boxes[:, [0, 1, 6]])
    corners = box_corners(centres, boxes[:, 3], boxes[:, 4])
    compared = 0
    for token, expected in zip(debug["occupancy_tokens"].tolist(), debug["occupancy_corners"][0], strict=True):
        if token in tokens and np.isfinite(expected).all():
            np.testing.assert_allclose(corners[tokens.index(token)], expected, rtol=0, atol=1e-8)
            compared += 1
    assert compared > 3


@needs_golden
@pytest.mark.golden
@pytest.mark.parametrize("path", GOLDEN_LOGS[::8], ids=lambda p: p.stem)
def test_a_golden_log_survives_rewriting(path: Path, tmp_path: Path) -> None:
    log = read_log(path)
    for before, after in zip(log, read_log(write_log(tmp_path / path.name, log)), strict=True):
        assert_same_frame(before, after, tolerance=1e-15)
