"""Sensors to features at run time: equal to the reference preprocessing, on the host and by tensor operations."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiondrive.features import CAMERAS, FeatureConfig, build_features, camera_feature, lidar_feature
from diffusiondrive.runtime.device_features import LidarHistogram, StripSampler
from diffusiondrive.runtime.observation import Observation, read_observation
from diffusiondrive.runtime.sensors import DeviceSensors, HostSensors, SensorConfig, make_sensors, reduction_for
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from tests.diffusiondrive.test_features import golden_inputs  # noqa: F401 (a fixture)
from tests.golden import GOLDEN, needs_golden
from tests.worlds import write_world

PUBLISHED = FeatureConfig()
NANO = FeatureConfig.for_sizes((96, 384), (128, 128))
STATUS = np.array([0, 1, 0, 0, 5.0, 0, 0.5, 0], np.float32)


def as_tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def photograph(seed: int, size: tuple[int, int] = (1080, 1920)) -> np.ndarray:
    """Smooth shapes with a little noise: what cameras see, and what JPEG is made for."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size[0] // 60, size[1] // 60, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def observation() -> Observation:
    rng = np.random.default_rng(0)
    cloud = np.vstack([rng.uniform(-40, 40, (2, 20000)), rng.uniform(-1, 3, (1, 20000))]).astype(np.float32)
    return Observation("frame", tuple(jpeg(photograph(seed)) for seed in range(3)), cloud, STATUS)


# --- against the reference -------------------------------------------------------------------------------------------


@needs_golden
def test_tensor_operations_give_the_reference_bytes(golden_inputs):  # noqa: F811
    images, cloud = golden_inputs
    meta = json.loads((GOLDEN / "features" / "features_meta.json").read_text())
    strip = StripSampler((1080, 1920), PUBLISHED)(as_tensor(images))
    assert zlib.crc32(strip.contiguous().numpy().tobytes()) == meta["camera_f32_crc32"]
    histogram = LidarHistogram(PUBLISHED)(torch.from_numpy(cloud))
    assert zlib.crc32(histogram.numpy().tobytes()) == meta["lidar_f32_crc32"]


def test_both_ways_give_the_features_of_training_bit_for_bit(tmp_path):
    world = write_world(tmp_path, {"test": 1}, num_frames=14)
    scene = SceneDataset.from_config(world.data, "test")[0]
    for seed, name in enumerate(CAMERAS):
        (scene.sensor_root / scene.current.cameras[name].path).write_bytes(jpeg(photograph(seed)))
    expected = build_features(scene, PUBLISHED)
    observation = read_observation(scene)
    for resize in ("host", "device"):
        sensors = make_sensors(PUBLISHED, SensorConfig(resize=resize), "cpu")
        features = sensors.features(sensors.decode(observation), observation.status)
        assert list(features) == list(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(features[name][0].numpy(), array, err_msg=f"{resize} {name}")


# --- the camera strip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["linear", "area"])
@pytest.mark.parametrize("size", [(256, 1024), (96, 384), (128, 512), (192, 700), (512, 2048)])
def test_bilinear_strips_are_equal_and_area_ones_nearly(mode, size):
    images = [np.random.default_rng(seed).integers(0, 256, (1080, 1920, 3), dtype=np.uint8) for seed in range(3)]
    config = FeatureConfig(camera_height=size[0], camera_width=size[1], camera_resize=mode)
    expected = camera_feature(*images, config).astype(int)
    levels = StripSampler((1080, 1920), config)(as_tensor(images)).mul(255).round().int().numpy()
    difference = np.abs(levels - expected)
    assert difference.max() <= (0 if mode == "linear" else 1)
    assert (difference > 0).mean() < 1e-4


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(0, 5), st.integers(0, 3), st.sampled_from(["linear", "area"]), st.data())
def test_a_strip_resized_image_by_image_equals_the_stitched_one(factor, crop_rows, crop_columns, mode, data):
    """At a whole factor `camera_feature` skips the stitched image; here it is written out."""
    rows, columns = 12 * factor, 8 * factor
    crop_columns *= factor
    height, width = rows + 2 * crop_rows, columns + 2 * crop_columns
    images = np.random.default_rng(data.draw(st.integers(0, 999))).integers(0, 256, (3, height, width, 3), np.uint8)
    total = 2 * columns + width
    config = FeatureConfig(
        camera_height=12, camera_width=total // factor, camera_resize=mode,
        crop_rows=round(crop_rows * 1080 / height), crop_columns=round(crop_columns * 1920 / width),
    )  # fmt: skip
    left, front, right = images[:, crop_rows : height - crop_rows]
    sides = slice(crop_columns, width - crop_columns)
    strip = np.concatenate([left[:, sides], front, right[:, sides]], axis=1)
    interpolation = cv2.INTER_LINEAR if mode == "linear" else cv2.INTER_AREA
    expected = cv2.resize(strip, (config.camera_width, 12), interpolation=interpolation).transpose(2, 0, 1)
    np.testing.assert_array_equal(camera_feature(*images, config), expected)


def test_enlarging_by_area_is_refused():
    with pytest.raises(UserError, match="enlarged"):
        StripSampler((54, 96), NANO)


# --- the histogram ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from([1, 7, 128, 256]), st.sampled_from([1.0, 10.1, 32.0]), st.data())
def test_counts_equal_those_of_the_features(cells, range_m, data):
    """Points on edges, beside them, beyond, and not numbers at all."""
    config = FeatureConfig(lidar_cells=cells, lidar_range=range_m, lidar_clip=3)
    edges = np.linspace(-range_m, range_m, cells + 1).astype(np.float32)
    at_edge = st.sampled_from(edges.tolist())
    beside = st.builds(np.nextafter, at_edge.map(np.float32), st.sampled_from([np.float32(-99), np.float32(99)]))
    anywhere = at_edge | beside | st.floats(-40, 40, width=32) | st.sampled_from([np.nan, np.inf, -np.inf])
    points = st.tuples(anywhere, anywhere, st.sampled_from([0.0, 0.2, 0.21, 1, 100, np.nan]))
    rows = np.array(data.draw(st.lists(points, max_size=30)), np.float32).reshape(-1, 3)
    expected = lidar_feature(rows.T, config).astype(np.float32) / np.float32(3)
    padded = np.vstack([rows, np.full((5, 3), np.nan, np.float32)])
    for cloud in (rows, padded):
        counted = LidarHistogram(config)(torch.from_numpy(np.ascontiguousarray(cloud.T)))
        np.testing.assert_array_equal(counted.numpy(), expected)


# --- faster decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "image_size", "reduction"),
    [
        (PUBLISHED, (1080, 1920), 4),  # the published strip is a quarter of the images
        (NANO, (1080, 1920), 4),  # 10.7 times smaller, but an eighth would cut 28 rows into halves
        (FeatureConfig(camera_height=512, camera_width=2048), (1080, 1920), 2),
        (FeatureConfig(camera_height=600, camera_width=2400), (1080, 1920), 1),
        (PUBLISHED, (108, 192), 1),
        (FeatureConfig(crop_rows=0, crop_columns=0, camera_height=64, camera_width=256), (1080, 1920), 8),
    ],
)
def test_how_far_a_decoder_may_shrink(config, image_size, reduction):
    assert reduction_for(config, image_size) == reduction


def test_reduced_decoding_is_near_the_mean_of_blocks(observation):
    """What it changes, by construction: every pixel is the mean of its block instead of the central four."""
    reduced = HostSensors(PUBLISHED, SensorConfig(decode="reduced"))
    strip = reduced.features(reduced.decode(observation), STATUS)["camera_feature"][0].numpy()
    exact = HostSensors(PUBLISHED, SensorConfig())
    images = exact.decode(observation).images
    averaged = camera_feature(*images, FeatureConfig(camera_resize="area")) / 255.0
    assert np.abs(strip - averaged).mean() < 1.0 / 255
    published = exact.features(exact.decode(observation), STATUS)["camera_feature"][0].numpy()
    assert 0 < np.abs(strip - published).mean() < 2.0 / 255


def test_threads_do_not_change_the_images(observation):
    one, three = (HostSensors(PUBLISHED, SensorConfig(threads=threads)).decode(observation) for threads in (1, 3))
    for a, b in zip(one.images, three.images, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("resize", ["host", "device"])
def test_gpu_features_equal_those_of_the_host(observation, resize):
    host = HostSensors(PUBLISHED, SensorConfig())
    device = make_sensors(PUBLISHED, SensorConfig(resize=resize), "cuda")
    expected = host.features(host.decode(observation), STATUS)
    for name, value in device.features(device.decode(observation), STATUS).items():
        torch.testing.assert_close(value.cpu(), expected[name], rtol=0, atol=0)


@pytest.mark.gpu
def test_nvjpeg_differs_by_a_few_levels(observation):
    exact, nvjpeg = (make_sensors(PUBLISHED, SensorConfig(decode=name), "cuda") for name in ("turbo", "nvjpeg"))
    a, b = (s.features(s.decode(observation), STATUS)["camera_feature"].cpu() for s in (exact, nvjpeg))
    assert (a - b).abs().mean() < 1.0 / 255 and (a - b).abs().max() < 8.0 / 255


# --- what may be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["host", "device"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": (None, b"x", b"x")}, "frame frame CAM_L0: no image came"),
        ({"cameras": (b"", b"x", b"x")}, "frame frame CAM_L0: the image file is empty"),
        ({"cloud": None}, "frame frame LiDAR: no sweep came"),
        ({"cloud": np.zeros((3, 0), np.float32)}, "a sweep of 0 points, fewer than 1"),
        ({"cloud": b"# nothing"}, "no PCD header"),
    ],
)
def test_a_fault_names_sensor_and_frame(observation, resize, change, message):
    with pytest.raises(DataError, match=message):
        make_sensors(NANO, SensorConfig(resize=resize), "cpu").decode(replace(observation, **change))


def test_a_truncated_image_and_one_of_another_size(observation):
    left, front, right = observation.cameras
    sensors = HostSensors(NANO, SensorConfig())
    with pytest.raises(DataError, match="CAM_F0: the image is truncated"):
        sensors.decode(replace(observation, cameras=(left, front[: len(front) // 2], right)))
    with pytest.raises(DataError, match=r"CAM_R0: an image of \(540, 960\) px beside one of \(1080, 1920\)"):
        sensors.decode(replace(observation, cameras=(left, front, jpeg(photograph(1, (540, 960))))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decode": "magic"}, "sensors.decode: 'magic' is none of turbo, reduced, nvjpeg"),
        ({"resize": "cloud"}, "sensors.resize"),
        ({"decode": "nvjpeg", "resize": "host"}, "leaves the images on the GPU"),
        ({"threads": -1}, "sensors.threads"),
    ],
)
def test_impossible_settings(values, message):
    with pytest.raises(UserError, match=message):
        SensorConfig(**values)


def test_nvjpeg_without_a_gpu():
    with pytest.raises(UserError, match=r"nvjpeg needs a CUDA device.*sensors.decode=turbo"):
        make_sensors(PUBLISHED, SensorConfig(decode="nvjpeg"), "cpu")


def test_device_sensors_count_the_same_points_and_pixels_for_other_images(observation):
    device, host = DeviceSensors(NANO, SensorConfig()), HostSensors(NANO, SensorConfig())
    a, b = (s.features(s.decode(observation), STATUS) for s in (device, host))
    torch.testing.assert_close(a["camera_feature"], b["camera_feature"], rtol=0, atol=1.01 / 255)
    torch.testing.assert_close(a["lidar_feature"], b["lidar_feature"], rtol=0, atol=0)
