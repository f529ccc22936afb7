"""Own recordings: what is written is what was given, and the whole stack runs on it, with a map and without."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusiondrive.feature_cache import RawSamples
from diffusiondrive.features import FeatureConfig
from diffusiondrive.losses import semantic_loss
from diffusiondrive.targets import UNLABELLED
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.formats.sensors import read_image, read_point_cloud, write_image
from navsim_eval.lane_map import Connector, Lane, write_lane_map
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.own_data import Moment, Recording, driven_command, every_half_second, motion, write_recordings
from navsim_eval.scoring import score

ROOT = Path(__file__).resolve().parents[2]
SMALL = FeatureConfig.for_sizes((64, 256), (128, 128))


@pytest.fixture(scope="module")
def example() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "own_data.py")))


@pytest.fixture(scope="module")
def recording(example) -> Recording:
    return Recording("drive_01", example.cameras(), example.drive(1, moments=15), example.LOCATION)


@pytest.fixture(scope="module")
def data(example, recording, tmp_path_factory) -> DataConfig:
    """One recording on the example's map, and the same without a map."""
    root = tmp_path_factory.mktemp("own")
    example.write_town(root / "maps")
    write_recordings(root, "mine", [recording])
    bare = [example.without_route(moment) for moment in recording.moments]
    write_recordings(root, "bare", [replace(recording, map_name="", moments=bare)])
    return DataConfig(root=str(root), maps=str(root / "maps"))


def test_frames_hold_what_was_given(data: DataConfig, recording: Recording) -> None:
    scenes = SceneDataset.from_config(data, "mine")
    assert len(scenes) == 2 and scenes.log_names == ("drive_01",)
    frame, given = scenes[0].current, recording.moments[3]
    np.testing.assert_allclose(frame.ego_pose, given.pose)
    assert frame.roadblock_ids == given.route and frame.map_name == "my-town"
    np.testing.assert_allclose(frame.annotations.boxes, given.objects.boxes)
    camera, calibration = frame.cameras["CAM_L0"], recording.cameras["CAM_L0"]
    np.testing.assert_allclose(camera.rotation, calibration.rotation)
    np.testing.assert_allclose(camera.intrinsics, calibration.intrinsics)
    image = read_image(scenes[0].sensor_root / camera.path)
    assert np.abs(image.astype(int) - given.images["CAM_L0"]).mean() < 6  # JPEG
    points = read_point_cloud(scenes[0].sensor_root / frame.lidar_path)
    np.testing.assert_allclose(points[:3].T, given.points, atol=1e-5)


def test_the_human_passes_on_the_map_made_of_lanes(data: DataConfig, tmp_path: Path) -> None:
    scenes = SceneDataset.from_config(data, "mine")
    caches = MetricCaches(data, scenes, "pdms_v1", tmp_path)
    caches.build(1)
    plans = np.stack([scene.human_trajectory(8)[None] for scene in scenes])
    table = score([caches[token] for token in scenes.tokens], plans, metric="pdms_v1")
    assert (table.columns["drivable_area_compliance"] == 1).all() and (table.columns["score"] > 0.8).all()
    aside = plans + np.array([0.0, -6.0, 0.0])  # off the road, where no surface is
    off = score([caches[token] for token in scenes.tokens], aside, metric="pdms_v1")
    assert (off.columns["drivable_area_compliance"] == 0).all()


def test_without_a_map_training_targets_leave_the_map_out(data: DataConfig) -> None:
    samples = RawSamples.from_config(data, "bare", SMALL)
    features, targets = samples[samples.tokens[0]]
    assert features["camera_feature"].any() and features["lidar_feature"].any()
    assert (targets["bev_semantic_map"] == UNLABELLED).all() and targets["agent_labels"].sum() == 1
    with_map = RawSamples.from_config(data, "mine", SMALL)[samples.tokens[0]].targets["bev_semantic_map"]
    assert with_map.max() < 7 and (with_map == 1).any()


def test_unlabelled_cells_do_not_count_in_the_loss() -> None:
    logits = torch.randn(2, 7, 4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(0, 7, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    half = labels.clone()
    half[1] = UNLABELLED
    whole, first = semantic_loss(logits, labels), semantic_loss(logits, half)
    torch.testing.assert_close(first, semantic_loss(logits[:1], labels[:1]))
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(logits, labels))
    none = semantic_loss(logits, torch.full_like(labels, UNLABELLED))
    none.backward()
    assert none == 0 and torch.isfinite(logits.grad).all()


def test_missing_sensors_are_refused_or_blank(recording: Recording, tmp_path: Path) -> None:
    front = {"CAM_F0": recording.cameras["CAM_F0"]}
    moments = [replace(m, images={"CAM_F0": m.images["CAM_F0"]}, points=None) for m in recording.moments]
    camera_only = replace(recording, cameras=front, moments=moments)
    with pytest.raises(UserError, match=r"no CAM_L0.*blank_missing=True"):
        write_recordings(tmp_path, "mine", [camera_only])
    write_recordings(tmp_path, "mine", [camera_only], blank_missing=True)
    scene = SceneDataset.from_config(DataConfig(root=str(tmp_path)), "mine")[0]
    assert not read_image(scene.sensor_root / scene.current.cameras["CAM_L0"].path).any()
    assert read_point_cloud(scene.sensor_root / scene.current.lidar_path).shape == (6, 0)


def test_four_moments_are_enough_to_plan_and_images_may_be_files(recording: Recording, tmp_path: Path) -> None:
    source = write_image(tmp_path / "picture.jpg", recording.moments[0].images["CAM_F0"])
    moments = [replace(m, images={**m.images, "CAM_F0": source}) for m in recording.moments[:4]]
    write_recordings(tmp_path, "now", [replace(recording, moments=moments)], future_frames=0)
    (scene,) = SceneDataset.from_config(DataConfig(root=str(tmp_path)), "now")
    assert not scene.future and len(scene.history) == 4
    written = scene.sensor_root / scene.current.cameras["CAM_F0"].path
    assert written.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda r: replace(r, moments=r.moments[:9]), "9 moments; one scene needs 14"),
        (lambda r: replace(r, cameras={**r.cameras, "FRONT": r.cameras["CAM_F0"]}), "camera FRONT is none of"),
        (lambda r: with_moment(r, 5, time_s=2.9), r"moment 5: 0.90 s after"),
        (lambda r: with_moment(r, 2, pose=np.array([0.0, np.nan, 0.0])), "moment 2: pose"),
        (lambda r: with_moment(r, 1, command="ahead"), "command 'ahead' is none of left"),
        (lambda r: with_moment(r, 0, images={}), "moment 0: no image of CAM_L0"),
        (lambda r: with_moment(r, 4, points=np.zeros((5, 4))), r"points have shape \(5, 4\)"),
        (lambda r: replace(r, map_name=""), "a route needs map_name"),
        (lambda r: with_camera(r, rotation=np.ones((3, 3))), "no rotation matrix"),
        (lambda r: with_camera(r, intrinsics=np.eye(4)), r"intrinsics has shape \(4, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(recording: Recording, tmp_path: Path, change, fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        write_recordings(tmp_path, "mine", [change(recording)])
    assert not (tmp_path / "navsim_logs").exists()


def with_moment(recording: Recording, index: int, **changes) -> Recording:
    moments: list[Moment] = list(recording.moments)
    moments[index] = replace(moments[index], **changes)
    return replace(recording, moments=moments)


def with_camera(recording: Recording, **changes) -> Recording:
    return replace(recording, cameras={**recording.cameras, "CAM_F0": replace(recording.cameras["CAM_F0"], **changes)})


def test_motion_and_command_follow_from_the_path() -> None:
    times, radius = np.arange(20) * 0.5, 30.0
    angles = 5.0 * times / radius  # 5 m/s on a circle to the left
    poses = np.stack([radius * np.sin(angles), radius * (1 - np.cos(angles)), angles], axis=1)
    velocity, acceleration = motion(poses, times)
    np.testing.assert_allclose(velocity[5], [5, 0], atol=0.05)
    np.testing.assert_allclose(acceleration[5], [0, 25 / radius], atol=0.05)
    assert driven_command(poses, 3) == "left" and driven_command(poses * [1, -1, -1], 3) == "right"
    straight = np.stack([5 * times, 0 * times, 0 * times], axis=1)
    assert driven_command(straight, 3) == "straight" and driven_command(straight, 16) == "unknown"


def test_every_half_second_of_a_faster_recording() -> None:
    times = 100 + np.arange(40) * 0.1
    np.testing.assert_array_equal(every_half_second(times), np.arange(0, 40, 5))
    with_gap = np.concatenate([times[:13], times[25:]])
    np.testing.assert_array_equal(every_half_second(with_gap), [0, 5, 10])


@pytest.mark.parametrize(
    ("lanes", "connectors", "fact"),
    [
        ([], [], "no lanes"),
        ([1, 1], [], "id 1 occurs twice"),
        ([1, 2], [(3, 1, 9)], "names lane 9"),
        ([1, 2], [(3, 1, 2, 10)], "block 10 is of lanes and of connectors"),
    ],
)
def test_lanes_that_make_no_map_are_refused(tmp_path: Path, lanes, connectors, fact: str) -> None:
    line = np.array([[0.0, 0.0], [10.0, 0.0]])
    some = [Lane(i, 10, line) for i in lanes]
    links = [Connector(c[0], c[3] if len(c) > 3 else 20, c[1], c[2], line) for c in connectors]
    with pytest.raises(UserError, match=fact):
        write_lane_map(tmp_path, "here", some, links, epsg=32632)
