"""From encoded sensors in host memory to the planner's features on its device.

    host:    3 JPEG ─ decode (threads) ─ crop, stitch, resize ┐
             sweep  ─ decode ─────────── histogram ───────────┴─ bytes ─► device ─ scale      (0.85 MB a frame)
    device:  3 JPEG ─► nvJPEG ────────── crop, stitch, resize, scale in one step
             points ─► device ────────── histogram, scale

Both give the features of `diffusiondrive.features`, which are the published ones: host and turbo decoding byte for
byte; see `device_features` for the device, and `SensorConfig.decode` for what the faster decoders change.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.features import (
    CAMERAS,
    REFERENCE_IMAGE,
    FeatureConfig,
    camera_feature,
    lidar_feature,
    to_float,
)
from diffusiondrive.runtime.device_features import LidarHistogram, StripSampler
from diffusiondrive.runtime.nvjpeg import decode_on_device, require_nvjpeg
from diffusiondrive.runtime.observation import Observation
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import usable_cores
from navsim_eval.formats.sensors import decode_image, decode_point_cloud, encoded_size

TURBO, REDUCED, NVJPEG = "turbo", "reduced", "nvjpeg"
HOST, DEVICE = "host", "device"
REDUCTIONS = (8, 4, 2)


@dataclass
class SensorConfig:
    """How sensors become features.

    decode: `turbo`, libjpeg-turbo on the CPU, the pixels that the published features were made of; `reduced`, the same
        decoder at a half, a quarter or an eighth of the size where the resize shrinks at least as much and the crops
        stay whole pixels: faster, and anti-aliased, so other pixels than the reference; `nvjpeg` on the GPU, whose
        transform rounds differently by a few levels
    resize: where images are cropped, stitched and resized and points are counted: `host`, `device`, or `auto`, the
        device exactly where the decoded images already are there (nvjpeg)
    threads: that decode the three images (0: as many as are useful on this machine)
    min_points: a sweep with fewer points is an error, not an empty road
    """

    decode: str = TURBO
    resize: str = "auto"
    threads: int = 0
    min_points: int = 1

    def __post_init__(self) -> None:
        if self.decode not in (TURBO, REDUCED, NVJPEG):
            raise UserError(f"sensors.decode: '{self.decode}' is none of {TURBO}, {REDUCED}, {NVJPEG}")
        if self.resize not in ("auto", HOST, DEVICE):
            raise UserError(f"sensors.resize: '{self.resize}' is none of auto, {HOST}, {DEVICE}")
        if self.resize == HOST and self.decode == NVJPEG:
            raise UserError("sensors: decode=nvjpeg leaves the images on the GPU; use resize=device or auto")
        if self.threads < 0:
            raise UserError(f"sensors.threads: {self.threads} must not be negative")


@dataclass(frozen=True)
class Decoded:
    """images: three (H, W, 3) uint8 arrays on the host, or one (3, 3, H, W) uint8 tensor on the device (camera,
    channel, row, column), RGB, in the order of CAMERAS; cloud: (3, P) float32 x, y, z [m], ego frame, on the host."""

    images: list[np.ndarray] | Tensor
    cloud: np.ndarray


class SensorInput(Protocol):
    """The two halves of sensor processing; a caller may put a clock between them."""

    def decode(self, observation: Observation) -> Decoded:
        """Raises DataError that names the sensor and the frame when an image or the sweep is absent or damaged."""

    def features(self, decoded: Decoded, status: np.ndarray) -> dict[str, Tensor]:
        """Model input, float32, a batch of one on the device. On a GPU the work is queued on the current stream."""


def make_sensors(features: FeatureConfig, config: SensorConfig, device: torch.device | str) -> SensorInput:
    """The sensor processing that the configuration names. Raises UserError where this machine cannot do it."""
    device = torch.device(device)
    if config.decode == NVJPEG:
        require_nvjpeg(device)
    on_device = config.resize == DEVICE or config.decode == NVJPEG
    return (DeviceSensors if on_device else HostSensors)(features, config, device)


def reduction_for(features: FeatureConfig, image_size: tuple[int, int] = REFERENCE_IMAGE) -> int:
    """By how much a decoder may shrink images of this size (rows, columns): 1, 2, 4 or 8.

    Never below the size of the strip, and only where the crops stay whole pixels.
    """
    height, width = image_size
    rows = features.crop_rows * height / REFERENCE_IMAGE[0]
    columns = features.crop_columns * width / REFERENCE_IMAGE[1]
    shrink = min((height - 2 * rows) / features.camera_height, (3 * width - 4 * columns) / features.camera_width)
    for reduction in REDUCTIONS:
        whole = all(size % reduction == 0 for size in (rows, columns, height, width))
        if reduction <= shrink and whole:
            return reduction
    return 1


class HostSensors:
    """Everything on the CPU, bytes to the device, scaled there."""

    def __init__(self, features: FeatureConfig, config: SensorConfig, device: torch.device | str = "cpu"):
        self.config, self.device = features, torch.device(device)
        self.decoder = _HostDecoder(features, config)

    def decode(self, observation: Observation) -> Decoded:
        return Decoded(self.decoder.images(observation), self.decoder.cloud(observation))

    def features(self, decoded: Decoded, status: np.ndarray) -> dict[str, Tensor]:
        compact = {
            "camera_feature": camera_feature(*decoded.images, self.config),
            "lidar_feature": lidar_feature(decoded.cloud, self.config),
            "status_feature": status,
        }
        if self.device.type == "cpu":
            return {name: torch.from_numpy(array)[None] for name, array in to_float(compact, self.config).items()}
        sent = {name: to_device(array, self.device)[None] for name, array in compact.items()}
        scales = {"camera_feature": 255.0, "lidar_feature": float(self.config.lidar_clip)}
        for name, scale in scales.items():
            # A divisor on the device: CUDA turns division by a Python number into a product that rounds differently.
            sent[name] = sent[name].float() / torch.full((), scale, device=self.device)
        return sent


class DeviceSensors:
    """Pixels and points to the device, everything else there (on a CPU device: the same code, for tests)."""

    def __init__(self, features: FeatureConfig, config: SensorConfig, device: torch.device | str = "cpu"):
        self.config, self.device = features, torch.device(device)
        self.decoder = _HostDecoder(features, config)
        self.on_gpu = config.decode == NVJPEG
        self.histogram = LidarHistogram(features).to(self.device)
        self.samplers: dict[tuple[int, int], StripSampler] = {}

    def decode(self, observation: Observation) -> Decoded:
        if not self.on_gpu:
            return Decoded(self.decoder.images(observation), self.decoder.cloud(observation))
        names = [_camera_name(observation, index) for index in range(len(CAMERAS))]
        images = decode_on_device(present(observation), names, self.device)
        return Decoded(images, self.decoder.cloud(observation))

    def features(self, decoded: Decoded, status: np.ndarray) -> dict[str, Tensor]:
        images = decoded.images
        if not isinstance(images, Tensor):
            images = to_device(np.stack(images), self.device).permute(0, 3, 1, 2)
        size = tuple(images.shape[-2:])
        if size not in self.samplers:
            self.samplers[size] = StripSampler(size, self.config).to(self.device)
        return {
            "camera_feature": self.samplers[size](images)[None],
            "lidar_feature": self.histogram(to_device(decoded.cloud, self.device))[None],
            "status_feature": to_device(status, self.device)[None],
        }


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor with the array's content on the device; to a GPU through pinned memory, without waiting for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    # torch's allocator hands a pinned block out again only when the copy that read it has finished.
    return tensor.pin_memory().to(device, non_blocking=True)


def present(observation: Observation) -> list[bytes]:
    """The three encoded images. Raises DataError when one did not come."""
    for index, content in enumerate(observation.cameras):
        if content is None:
            raise DataError(_camera_name(observation, index), "no image came")
    return list(observation.cameras)


class _HostDecoder:
    """Images and sweep of an observation, decoded by the CPU."""

    def __init__(self, features: FeatureConfig, config: SensorConfig):
        self.features, self.reduced = features, config.decode == REDUCED
        self.min_points = config.min_points
        threads = config.threads or min(len(CAMERAS), usable_cores())
        self.pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None

    def images(self, observation: Observation) -> list[np.ndarray]:
        """Three (H, W, 3) uint8 RGB images of one size."""
        contents = present(observation)
        names = [_camera_name(observation, index) for index in range(len(contents))]
        reduction = reduction_for(self.features, encoded_size(contents[0], names[0])) if self.reduced else 1
        if self.pool is None:
            images = [decode_image(*item, reduction) for item in zip(contents, names, strict=True)]
        else:
            images = list(self.pool.map(decode_image, contents, names, [reduction] * len(contents)))
        for name, image in zip(names, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(name, f"an image of {image.shape[:2]} px beside one of {images[0].shape[:2]} px")
        return images

    def cloud(self, observation: Observation) -> np.ndarray:
        """(3, P) float32."""
        name, cloud = f"frame {observation.token} LiDAR", observation.cloud
        if cloud is None:
            raise DataError(name, "no sweep came")
        points = decode_point_cloud(cloud, name, ("x", "y", "z")) if isinstance(cloud, bytes) else cloud[:3]
        if points.shape[1] < self.min_points:
            raise DataError(name, f"a sweep of {points.shape[1]} points, fewer than {self.min_points}")
        return points


def _camera_name(observation: Observation, index: int) -> str:
    return f"frame {observation.token} {CAMERAS[index]}"
