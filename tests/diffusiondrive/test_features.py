"""Features: byte for byte what the reference builder gives, and the rules behind it one by one."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiondrive.features import (
    FeatureConfig,
    build_features,
    camera_feature,
    compact_features,
    lidar_feature,
    status_feature,
    to_float,
)
from diffusiondrive.variants import VARIANTS
from navsim_eval.config import load_config
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.sensors import write_image
from tests.golden import GOLDEN, needs_golden
from tests.worlds import drive, write_world

PUBLISHED = FeatureConfig()


# --- against the reference -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_inputs():
    """The synthetic images and cloud of golden/features, from its published recipe."""
    rng = np.random.default_rng(4101)
    images = [rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8) for _ in range(3)]
    u = rng.random((6, 60000))
    v = 2 * u - 1
    cloud = np.vstack([45 * v[0] * np.abs(v[0]), 45 * v[1] * np.abs(v[1]), -1 + 4 * u[2], u[3:]])
    edge = [
        *[(32, 0, 1), (-32, 0, 1), (0, 32, 1), (0, -32, 1), (32, 32, 1), (-32, -32, 1), (32.0001, 5, 1)],
        *[(5, -32.0001, 1), (10.25, -7.5, 1), (10.25, -7.5, 1), (10.249999, -7.500001, 1), (3, 3, 0.2)],
        *[(3, 3, 0.2000001), (3, 3, 0.20001), (4, 4, 99.99), (4, 4, 100), (4, 4, 150), (-20.125, 11.625, 0.5)],
        *[(15.1, 15.1, 2)] * 9,
    ]
    points = np.vstack([np.array(edge, float).T, np.zeros((3, len(edge)))])
    return images, np.hstack([cloud, points]).astype(np.float32)


@pytest.fixture(scope="module")
def golden():
    folder = GOLDEN / "features"
    return json.loads((folder / "features_meta.json").read_text()), np.load(folder / "features.npz")


@needs_golden
def test_inputs_are_those_of_the_reference(golden_inputs, golden):
    images, cloud = golden_inputs
    for name, array in zip(("cam_l0", "cam_f0", "cam_r0", "lidar_pc"), (*images, cloud), strict=True):
        assert zlib.crc32(array.tobytes()) == golden[0]["inputs_crc32"][name]


@needs_golden
def test_camera_equals_the_reference(golden_inputs, golden):
    meta, arrays = golden
    image = camera_feature(*golden_inputs[0], PUBLISHED)
    as_published = np.ascontiguousarray(image.transpose(1, 2, 0))
    np.testing.assert_array_equal(as_published[arrays["camera_rows"]], arrays["camera_row_values_u8"])
    np.testing.assert_array_equal(as_published[:, arrays["camera_cols"]], arrays["camera_col_values_u8"])
    assert zlib.crc32(as_published.tobytes()) == meta["camera_u8_crc32"]

    scaled = to_float({"camera_feature": image, "lidar_feature": np.zeros((1, 1, 1), np.uint8)}, PUBLISHED)
    assert zlib.crc32(scaled["camera_feature"].tobytes()) == meta["camera_f32_crc32"]
    means = scaled["camera_feature"].reshape(3, 8, 32, 32, 32).mean(axis=(2, 4))
    np.testing.assert_allclose(means, arrays["camera_grid_mean"], atol=3e-6)


@needs_golden
def test_lidar_equals_the_reference(golden_inputs, golden):
    meta, arrays = golden
    counts = lidar_feature(golden_inputs[1], PUBLISHED)
    np.testing.assert_array_equal(counts, arrays["lidar_counts_u8"])
    scaled = to_float({"camera_feature": np.zeros((3, 1, 1), np.uint8), "lidar_feature": counts}, PUBLISHED)
    assert zlib.crc32(scaled["lidar_feature"].tobytes()) == meta["lidar_f32_crc32"]


@needs_golden
def test_status_equals_the_reference(golden):
    frame = replace(
        drive("log", 1)[0],
        driving_command=np.array([0, 0, 1, 0]),
        ego_velocity=np.array([6.25, -0.125]),
        ego_acceleration=np.array([0.5, -0.75]),
    )
    status = status_feature(frame)
    assert status.dtype == np.float32
    np.testing.assert_array_equal(status, golden[1]["status_feature"])


# --- camera ----------------------------------------------------------------------------------------------------------


def test_left_front_right_stand_side_by_side():
    left, front, right = (np.full((1080, 1920, 3), colour, np.uint8) for colour in (10, 20, 30))
    row = camera_feature(left, front, right, PUBLISHED)[0, 100]
    np.testing.assert_array_equal(row, [10] * 272 + [20] * 480 + [30] * 272)


def test_at_the_published_factor_the_resize_is_the_mean_of_the_four_central_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 1080, 1920, 3), dtype=np.uint8)
    left, front, right = images[:, 28:1052]
    p = np.concatenate([left[:, 416:1504], front, right[:, 416:1504]], axis=1).astype(int)
    expected = (p[1::4, 1::4] + p[1::4, 2::4] + p[2::4, 1::4] + p[2::4, 2::4] + 2) >> 2
    np.testing.assert_array_equal(camera_feature(*images, PUBLISHED), expected.transpose(2, 0, 1))


def test_crops_scale_with_the_resolution():
    """A half-size image shows the same street as a full-size one."""
    rows, columns = np.mgrid[0:1080, 0:1920]
    full = np.stack([rows * 255 / 1080, columns * 255 / 1920, (rows + columns) * 255 / 3000], axis=-1)
    half = full.reshape(540, 2, 960, 2, 3).mean(axis=(1, 3))
    strips = [camera_feature(*[image.astype(np.uint8)] * 3, PUBLISHED).astype(int) for image in (full, half)]
    assert np.abs(strips[0] - strips[1]).max() <= 1


def test_area_averages_all_pixels_where_linear_looks_at_few():
    stripes = np.zeros((1080, 1920, 3), np.uint8)
    stripes[:, 4::8] = 255
    small = {"camera_height": 64, "camera_width": 256}
    area = camera_feature(stripes, stripes, stripes, FeatureConfig(**small, camera_resize="area"))
    linear = camera_feature(stripes, stripes, stripes, FeatureConfig(**small))
    assert abs(area[:, :, 80:170].mean() - 255 / 8) < 1
    assert linear[:, :, 80:170].mean() == 0


# --- lidar -----------------------------------------------------------------------------------------------------------


def reference_histogram(cloud: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """The definition, with numpy's own histogram."""
    kept = cloud[:, (cloud[2] < np.float32(config.lidar_ceiling)) & (cloud[2] > np.float32(config.lidar_split))]
    edges = np.linspace(-config.lidar_range, config.lidar_range, config.lidar_cells + 1)
    counts = np.histogramdd(kept[:2].T, bins=(edges, edges))[0]
    return np.minimum(counts, config.lidar_clip)[None].astype(np.uint8)


CONFIGS = st.builds(
    FeatureConfig,
    lidar_cells=st.sampled_from([1, 4, 7, 128, 256]),
    lidar_range=st.sampled_from([1.0, 10.1, 32.0, 33.3]),
)


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.data())
def test_counts_equal_numpys_histogram(config, data):
    """Arbitrary points, most of them on edges or one rounding step beside them."""
    edges = np.linspace(-config.lidar_range, config.lidar_range, config.lidar_cells + 1).astype(np.float32)
    at_edge = st.sampled_from(edges.tolist())
    beside = st.builds(np.nextafter, at_edge.map(np.float32), st.sampled_from([np.float32(-99), np.float32(99)]))
    anywhere = st.floats(-40, 40, width=32) | st.sampled_from([np.nan, np.inf, -np.inf])
    points = st.tuples(
        at_edge | beside | anywhere, at_edge | beside | anywhere, st.sampled_from([0.0, 0.2, 0.21, 1, 100])
    )
    rows = np.array(data.draw(st.lists(points, max_size=30)), np.float32).reshape(-1, 3)
    np.testing.assert_array_equal(lidar_feature(rows.T, config), reference_histogram(rows.T, config))


@pytest.mark.parametrize(
    ("point", "cell"),
    [
        ((32.0, 0.0, 1.0), (255, 128)),
        ((-32.0, -32.0, 1.0), (0, 0)),
        ((10.25, -7.5, 1.0), (169, 98)),
        ((10.249999, -7.500001, 1.0), (168, 97)),
        ((0.1, 0.1, 99.99), (128, 128)),
    ],
)
def test_a_point_lands_in_its_cell(point, cell):
    counts = lidar_feature(np.array(point, np.float32)[:, None], PUBLISHED)
    assert counts.sum() == 1 and counts[0][cell] == 1


@pytest.mark.parametrize("point", [(32.0001, 0, 1), (0, 0, 0.2), (0, 0, 100), (np.nan, 0, 1), (0, 0, np.nan)])
def test_a_point_that_does_not_count(point):
    assert lidar_feature(np.array(point, np.float32)[:, None], PUBLISHED).sum() == 0


def test_counts_saturate():
    cloud = np.tile(np.array([[1.0], [1.0], [1.0]], np.float32), 300)
    assert lidar_feature(cloud, PUBLISHED).max() == 5
    assert lidar_feature(cloud, FeatureConfig(lidar_clip=255)).max() == 255


# --- scenes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    world = write_world(tmp_path_factory.mktemp("world"), {"train": 1}, num_frames=14)
    return SceneDataset.from_config(world.data, "train")[0]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_features_have_the_sizes_that_the_planner_takes(scene, name):
    backbone = VARIANTS[name]().backbone
    config = FeatureConfig.for_sizes(backbone.image_size, backbone.lidar_size)
    features = build_features(scene, config)
    assert features["camera_feature"].shape == (3, *backbone.image_size)
    assert features["lidar_feature"].shape == (1, *backbone.lidar_size)
    assert features["status_feature"].shape == (8,)
    assert {array.dtype for array in features.values()} == {np.dtype(np.float32)}
    for image in ("camera_feature", "lidar_feature"):
        assert 0 <= features[image].min() < features[image].max() <= 1


@pytest.mark.parametrize("name", ["diffusiondrive", "city_nano"])
def test_the_configuration_group_of_a_planner_gives_its_sizes(name):
    from diffusiondrive.caches import CacheConfig

    backbone = VARIANTS[name]().backbone
    expected = FeatureConfig.for_sizes(backbone.image_size, backbone.lidar_size)
    assert load_config(CacheConfig, "cache", [f"features={name}"]).features == expected


def test_lidar_shows_what_stands_around(scene):
    counts = compact_features(scene, PUBLISHED)["lidar_feature"][0]
    ahead = scene.current.annotations.boxes[0]
    row, column = int((ahead[0] + 32) / 0.25), int((ahead[1] + 32) / 0.25)
    assert counts[row - 6 : row + 6, column - 4 : column + 4].sum() > 5


# --- what may be wrong -----------------------------------------------------------------------------------------------


def test_a_missing_camera_is_named(scene):
    cameras = {name: camera for name, camera in scene.current.cameras.items() if name != "CAM_L0"}
    frames = list(scene.frames)
    frames[3] = replace(frames[3], cameras=cameras)
    with pytest.raises(DataError, match="CAM_L0"):
        build_features(replace(scene, frames=tuple(frames)))


def test_cameras_of_different_sizes_are_refused(tmp_path):
    world = write_world(tmp_path, {"train": 1}, num_frames=14)
    scene = SceneDataset.from_config(world.data, "train")[0]
    path = scene.sensor_root / scene.current.cameras["CAM_R0"].path
    write_image(path, np.zeros((54, 96, 3), np.uint8))
    with pytest.raises(DataError, match=rf"{path.name}.*\(54, 96\)"):
        build_features(scene)


def test_other_sensor_faults_name_the_file(tmp_path):
    world = write_world(tmp_path, {"train": 1}, num_frames=14)
    scene = SceneDataset.from_config(world.data, "train")[0]
    sweep = scene.sensor_root / scene.current.lidar_path
    sweep.write_bytes(sweep.read_bytes()[:-40])
    with pytest.raises(DataError, match=sweep.name):
        build_features(scene)
    sweep.unlink()
    with pytest.raises(DataError, match=sweep.name):
        build_features(scene)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"camera_resize": "cubic"}, "camera_resize.*linear, area"),
        ({"lidar_cells": 0}, "lidar_cells: 0"),
        ({"lidar_clip": 300}, "300"),
    ],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        FeatureConfig(**values)


def test_a_crop_larger_than_the_image_is_refused():
    image = np.zeros((108, 192, 3), np.uint8)
    with pytest.raises(UserError, match="leave nothing"):
        camera_feature(image, image, image, FeatureConfig(crop_rows=600))


def test_a_lidar_image_must_be_square():
    with pytest.raises(UserError, match="64×128"):
        FeatureConfig.for_sizes((64, 256), (64, 128))
