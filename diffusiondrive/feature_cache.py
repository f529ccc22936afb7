"""Features and targets of a split, made once and read in well under two milliseconds a sample.

A cache is a packed store (`navsim_eval.shards`) whose samples hold the compact features and the targets: camera and
LiDAR in 8 bits without loss (0.9 MB a sample at full size), or the camera as JPEG (about 0.1 MB). The manifest holds
the configuration; a reader or a resumed build that asks for another one is refused with both sides shown.

`RawSamples` (from logs and sensors) and `FeatureCache` (from a cache) give the same samples through one interface.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from diffusiondrive.features import FEATURE_NAMES, FEATURES_VERSION, FeatureConfig, compact_features
from diffusiondrive.targets import TARGET_NAMES, TARGETS_VERSION, TargetConfig, build_targets
from navsim_eval.config import DataConfig, from_mapping
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import Workers
from navsim_eval.formats.map_store import MapStore
from navsim_eval.formats.maps import RoadMap
from navsim_eval.scene import Scene
from navsim_eval.shards import BuildReport, ShardReader, build_shards

PURPOSE = "features"
CAMERA_CODECS = ("lossless", "jpeg")
_JPEG = "camera_jpeg"  # takes the place of camera_feature in a stored sample


@dataclass
class FeatureCacheConfig:
    """What a feature cache holds.

    labels:       also store the training targets (needs annotations and eight future frames)
    camera_codec: "lossless" (8 bits a channel as they are) or "jpeg" (about a tenth of the size, not exact)
    jpeg_quality: 1 … 100; colours are not subsampled, so that small lights stay visible
    """

    features: FeatureConfig = field(default_factory=FeatureConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    labels: bool = True
    camera_codec: str = "lossless"
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        if self.camera_codec not in CAMERA_CODECS:
            raise UserError(f"camera_codec: '{self.camera_codec}' is none of {', '.join(CAMERA_CODECS)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality: {self.jpeg_quality} is not in 1 … 100")


class NumpySample(NamedTuple):
    """Compact features and targets (empty without labels) of one scene, by name."""

    features: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]


class SampleSource(Protocol):
    """Where samples come from. `tokens` are in the order of the split."""

    tokens: tuple[str, ...]
    features: FeatureConfig

    def __getitem__(self, token: str) -> NumpySample: ...


class RawSamples:
    """Samples made from logs, maps and sensor files when asked for. Picklable; raises DataError for broken files.

    lidar: off, LiDAR sweeps are not read and need not exist.
    """

    def __init__(
        self,
        scenes: SceneDataset,
        maps: MapStore,
        features: FeatureConfig | None = None,
        targets: TargetConfig | None = None,
        labels: bool = True,
        lidar: bool = True,
    ):
        self.scenes, self.maps, self.labels, self.lidar = scenes, maps, labels, lidar
        self.features, self.targets = features or FeatureConfig(), targets or TargetConfig()
        self.tokens = tuple(scenes.tokens)

    @classmethod
    def from_config(
        cls,
        data: DataConfig,
        split: str,
        features: FeatureConfig | None = None,
        targets: TargetConfig | None = None,
        labels: bool = True,
        lidar: bool = True,
    ) -> RawSamples:
        """The samples of a split (a published one, or a folder of `navsim_logs/`)."""
        scenes = SceneDataset.from_config(data, split)
        return cls(scenes, MapStore(data.maps, data.map_version), features, targets, labels, lidar)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> NumpySample:
        scene = self.scenes[token]
        features = compact_features(scene, self.features, self.lidar)
        targets = build_targets(scene, self._map_of(scene), self.targets) if self.labels else {}
        return NumpySample(features, targets)

    def _map_of(self, scene: Scene) -> RoadMap | None:
        return self.maps.get(scene.map_name) if scene.map_name else None


class FeatureCache:
    """Samples of a cache that `build_feature_cache` wrote.

    features, targets: configurations that the cache must have been made with; None accepts what is there. A difference
    is a UserError that shows both sides. Arrays are read-only views into the mapped files where nothing is compressed.
    Picklable and safe to use from several processes. Reading a damaged sample raises DataError.
    """

    def __init__(self, folder: Path | str, features: FeatureConfig | None = None, targets: TargetConfig | None = None):
        expect: dict[str, Any] = {"purpose": PURPOSE}
        if features is not None:
            expect |= {"features": asdict(features), "versions": {"features": FEATURES_VERSION}}
        if targets is not None:
            expect |= {"targets": asdict(targets)}
            expect["versions"] = expect.get("versions", {}) | {"targets": TARGETS_VERSION}
        self.reader = ShardReader(folder, expect)
        self.features = from_mapping(FeatureConfig, self.reader.manifest["features"], source=f"{folder}/manifest.json")
        self.labels = self.reader.manifest["targets"] is not None
        self.tokens = tuple(self.reader.keys)

    @property
    def missing(self) -> list[str]:
        """Tokens of the split that the cache does not hold (broken or not built yet)."""
        return self.reader.missing

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> NumpySample:
        return _decode(self.reader[token])


def cache_manifest(config: FeatureCacheConfig, split: str) -> dict[str, Any]:
    """What identifies a cache: configuration of everything that shapes its samples, and a hash of all that."""
    content = {
        "purpose": PURPOSE,
        "split": split,
        "features": asdict(config.features),
        "targets": asdict(config.targets) if config.labels else None,
        "camera_codec": config.camera_codec,
        "jpeg_quality": config.jpeg_quality if config.camera_codec == "jpeg" else None,
        "versions": {
            "features": FEATURES_VERSION,
            "targets": TARGETS_VERSION,
            "opencv": cv2.__version__.split(".")[0],  # polygon filling differs between major versions
        },
    }
    text = json.dumps({key: value for key, value in content.items() if key != "split"}, sort_keys=True)
    return {**content, "preprocessing": hashlib.sha256(text.encode()).hexdigest()[:16]}


def build_feature_cache(
    folder: Path | str,
    samples: RawSamples,
    split: str,
    config: FeatureCacheConfig,
    *,
    workers: int | Workers = 0,
    progress: Callable[[int], None] | None = None,
) -> BuildReport:
    """Store the samples of a split, in parallel and resumable; broken ones are left out, counted and listed.

    samples: made with the features, targets and labels of `config`. Raises UserError when the folder holds a cache of
    another configuration, when the split is empty, or when not a single sample could be built.
    """
    if (samples.features, samples.targets, samples.labels) != (config.features, config.targets, config.labels):
        raise ValueError("samples were made with another configuration than the cache is to have")
    job = functools.partial(_encoded_sample, samples=samples, config=config)
    deflate = ("lidar_feature", "bev_semantic_map") if config.camera_codec == "jpeg" else ()
    return build_shards(
        folder,
        cache_manifest(config, split),
        samples.tokens,
        job,
        deflate=deflate,
        workers=workers,
        progress=progress,
    )


def _encoded_sample(token: str, samples: RawSamples, config: FeatureCacheConfig) -> dict[str, np.ndarray]:
    features, targets = samples[token]
    arrays = {**features, **targets}
    if config.camera_codec == "jpeg":
        arrays[_JPEG] = _encode_jpeg(arrays.pop("camera_feature"), config.jpeg_quality)
    return arrays


def _decode(arrays: Mapping[str, np.ndarray]) -> NumpySample:
    features = {name: arrays[name] for name in FEATURE_NAMES if name in arrays}
    if _JPEG in arrays:
        features = {"camera_feature": _decode_jpeg(arrays[_JPEG]), **features}
    return NumpySample(features, {name: arrays[name] for name in TARGET_NAMES if name in arrays})


def _encode_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """(3, H, W) uint8 RGB → (n,) uint8 JPEG bytes, full colour resolution."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    return cv2.imencode(".jpg", cv2.merge(image[::-1]), options)[1].ravel()


def _decode_jpeg(content: np.ndarray) -> np.ndarray:
    """(n,) uint8 JPEG bytes → (3, H, W) uint8 RGB."""
    image = cv2.imdecode(content, cv2.IMREAD_COLOR)
    if image is None:
        raise DataError("feature cache", "holds a camera image that cannot be decoded", remedy="build the cache again")
    return np.stack(cv2.split(image)[::-1])
