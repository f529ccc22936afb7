"""Synthetic scenes: pickles that name nuPlan classes are read without nuPlan."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from navsim_eval.errors import DataError
from navsim_eval.formats.splits import SceneFilter
from navsim_eval.formats.synthetic import list_synthetic_scenes, read_synthetic_scene, select_synthetic_scenes
from tests.nuplan_pickles import Nuplan, nuplan_classes, thing


@pytest.fixture
def nuplan() -> Iterator[Nuplan]:
    with nuplan_classes() as classes:
        yield classes


def frame(index: int) -> dict[str, Any]:
    camera = {
        "data_path": Path("log/CAM_F0/0123456789abcdef0.jpg"),
        "sensor2lidar_rotation": np.eye(3),
        "sensor2lidar_translation": np.zeros(3),
        "cam_intrinsic": np.eye(3),
        "distortion": np.zeros(5),
    }
    return {
        "token": f"{index:017x}",
        "timestamp": 500_000 * index,
        "roadblock_ids": ["1", "2"],
        "traffic_lights": [(7, True)],
        "annotations": {
            "boxes": np.zeros((1, 7)),
            "names": ["vehicle"],
            "velocity_3d": np.ones((1, 3)),
            "instance_tokens": ["i"],
            "track_tokens": ["a"],
        },
        "ego_status": {
            "ego_pose": np.array([100.0, 200.0, 0.1 * index]),
            "ego_velocity": np.array([5.1, 0.0]),
            "ego_acceleration": np.array([0.0, 0.1]),
            "driving_command": np.array([0, 1, 0, 0]),
            "in_global_frame": True,
        },
        "lidar_path": None,
        "camera_dict": {"cam_f0": camera, "cam_b0": {}},
    }


def scene_dict(n: Nuplan, **meta: Any) -> dict[str, Any]:
    objects = [
        thing(n, 0, "a", (10.0, 2.0, 0.5), (4.0, 2.0, 1.5), (3.0, 1.0)),
        thing(n, 3, "b", (20.0, 2.0, 0.5), (4.0, 2.0, 1.5), None),
    ]
    tracks = [n.detections(tracked_objects=n.tracks(tracked_objects=objects[: 2 - k])) for k in range(3)]
    light = n.light(status=n.status(2), lane_connector_id=7, timestamp=1)
    green = n.light(status=n.status(0), lane_connector_id="8", timestamp=1)
    return {
        "scene_metadata": {
            "log_name": "log",
            "scene_token": "5" * 17,
            "map_name": "us-ma-boston",
            "initial_token": f"{3:017x}",
            "num_history_frames": 4,
            "num_future_frames": 0,
            "corresponding_original_scene": "e" * 16,
            "corresponding_original_initial_token": "f" * 16,
            **meta,
        },
        "frames": [frame(index) for index in range(4)],
        "extended_detections_tracks": tracks,
        "extended_traffic_light_data": [n.lights(traffic_lights=[light, green]) for _ in range(3)],
    }


def save(path: Path, content: Any, protocol: int = 5) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def without_nuplan() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nuplan"]:
        del sys.modules[name]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_scene_is_read_without_nuplan(tmp_path: Path, nuplan: Nuplan, protocol: int) -> None:
    path = save(tmp_path / "x.pkl", scene_dict(nuplan), protocol)
    without_nuplan()
    synthetic = read_synthetic_scene(path, tmp_path / "sensors")
    scene = synthetic.scene
    assert (scene.token, synthetic.scene_token) == (f"{3:017x}", "5" * 17)
    assert (synthetic.original_token, synthetic.original_initial_token) == ("e" * 16, "f" * 16)
    assert len(scene.frames) == scene.num_history == 4 and scene.future == () and scene.log_name == "log"
    assert scene.current.ego_pose.tolist() == [100.0, 200.0, 0.1 * 3]
    assert scene.current.ego_velocity.tolist() == [float(np.float32(5.1)), 0.0]
    assert scene.current.annotations.track_tokens.tolist() == ["a"]
    assert scene.current.traffic_lights == (("7", True),) and scene.current.lidar_path is None
    assert list(scene.current.cameras) == ["CAM_F0"]
    assert scene.current.cameras["CAM_F0"].path == Path("log/CAM_F0/0123456789abcdef0.jpg")
    assert scene.sensor_root == tmp_path / "sensors"


def test_what_follows_is_global(tmp_path: Path, nuplan: Nuplan) -> None:
    path = save(tmp_path / "x.pkl", scene_dict(nuplan))
    without_nuplan()
    first, second, third = read_synthetic_scene(path).future
    assert first.names.tolist() == ["vehicle", "traffic_cone"] and first.track_tokens.tolist() == ["a", "b"]
    assert first.poses.tolist() == [[10.0, 2.0, 0.5], [20.0, 2.0, 0.5]]
    assert first.sizes.tolist() == [[4.0, 2.0, 1.5]] * 2 and first.velocity.tolist() == [[3.0, 1.0], [0.0, 0.0]]
    assert first.traffic_lights == (("7", True), ("8", False))
    assert len(second.names) == 1 and third.poses.shape == (0, 3) and third.velocity.shape == (0, 2)


def test_scenes_without_a_future(tmp_path: Path, nuplan: Nuplan) -> None:
    content = {**scene_dict(nuplan), "extended_detections_tracks": None, "extended_traffic_light_data": None}
    assert read_synthetic_scene(save(tmp_path / "x.pkl", content)).future == ()


def test_selection(tmp_path: Path, nuplan: Nuplan) -> None:
    for index in range(3):
        meta = {"initial_token": f"t{index}", "corresponding_original_scene": f"o{index}", "log_name": f"log{index}"}
        save(tmp_path / f"{index}.pkl", scene_dict(nuplan, **meta))
    without_nuplan()

    def chosen(last: list[str], **options: Any) -> list[str]:
        return list(select_synthetic_scenes(tmp_path, SceneFilter(**options), last))

    assert chosen(["o0", "o2"]) == ["t0", "t2"]
    assert chosen(["o0", "o2"], log_names=("log2",)) == ["t2"]
    assert chosen([], synthetic_scene_tokens=("t1",)) == ["t1"]
    with pytest.raises(DataError, match=r"no synthetic scenes \(\*\.pkl\) — download the two-stage split"):
        select_synthetic_scenes(tmp_path / "none", SceneFilter(), [])


def test_scenes_are_found_by_token_whatever_else_lies_there(tmp_path: Path, nuplan: Nuplan) -> None:
    for index in range(2):
        save(tmp_path / f"{index}.pkl", scene_dict(nuplan, initial_token=f"t{index}", log_name=f"log{index}"))
    (tmp_path / "cut.pkl").write_bytes((tmp_path / "0.pkl").read_bytes()[:100])
    without_nuplan()
    found, broken = list_synthetic_scenes(tmp_path, ["t1", "elsewhere"])
    assert found == {"t1": (tmp_path / "1.pkl", "log1")}
    assert list(broken) == ["cut.pkl"]


class Attack:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def test_errors(tmp_path: Path, nuplan: Nuplan) -> None:
    def error(content: Any) -> str:
        with pytest.raises(DataError) as raised:
            read_synthetic_scene(save(tmp_path / "x.pkl", content))
        return str(raised.value)

    good = scene_dict(nuplan)
    assert "[scene]: a dict is expected, this is a list" in error([1])
    assert "[scene.scene_metadata]: missing" in error({"frames": []})
    assert "[scene.frames]: empty" in error({**good, "frames": []})
    assert "[frame 0.ego_status]: missing" in error({**good, "frames": [{"token": "a"}]})
    local = {**frame(0), "ego_status": {**frame(0)["ego_status"], "in_global_frame": False}}
    assert "[frame 0.ego_status.in_global_frame]: False: the pose is not global" in error({**good, "frames": [local]})
    labels = {**frame(0), "annotations": {**frame(0)["annotations"], "names": ["tram"]}}
    assert "[frame 0.annotations.names]: unknown class 'tram'" in error({**good, "frames": [labels]})
    message = error({**good, "extended_detections_tracks": [nuplan.tracks()]})
    assert "[scene.extended_detections_tracks.0]: cannot be read" in message
    message = error({**good, "extended_traffic_light_data": [nuplan.tracks()]})
    assert "[scene.extended_traffic_light_data.0]: cannot be read" in message
    assert "is not allowed in a data file" in error({**good, "evil": Attack()})
