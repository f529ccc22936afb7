"""The same samples in our packed cache and in the published layout, for benchmarks that compare reading them.

Where there are fewer scenes than samples, scenes are written again under other names, so that reading takes as much
from disk and memory as that many scenes would.
"""

from __future__ import annotations

import gzip
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from diffusiondrive.dataset import PlanningDataset
from diffusiondrive.feature_cache import (
    FeatureCache,
    FeatureCacheConfig,
    NumpySample,
    SampleSource,
    build_feature_cache,
)
from diffusiondrive.features import FeatureConfig, to_float
from diffusiondrive.targets import TargetConfig


@dataclass
class Caches:
    """The same scenes three times: packed without loss, packed with JPEG cameras, pickled as published.

    scenes: how many different ones;  megabytes: a sample of each kind
    """

    packed: PlanningDataset
    jpeg: PlanningDataset | None  # for the loader only
    pickles: PickleDataset
    megabytes: dict[str, float]
    scenes: int

    @staticmethod
    def build(folder: Path, source: SampleSource, samples: int, jpeg: bool) -> Caches:
        """`samples` of each kind; jpeg: also that one."""
        raw = Repeated(source, samples)
        for name, codec in (("packed", "lossless"), ("jpeg", "jpeg")):
            kind = FeatureCacheConfig(features=source.features, camera_codec=codec)
            if codec == "lossless" or jpeg:
                print(f"building: {build_feature_cache(folder / name, raw, 'repeated', kind)}", file=sys.stderr)
        packed = FeatureCache(folder / "packed")
        pickles = PickleDataset.write(folder / "pickles", packed, raw)
        megabytes = {
            path.name: sum(file.stat().st_size for file in path.rglob("*.*")) / len(packed) / 1e6
            for path in folder.iterdir()
        }
        images = PlanningDataset(FeatureCache(folder / "jpeg")) if jpeg else None
        return Caches(PlanningDataset(packed), images, pickles, megabytes, len(set(map(raw.original, raw.tokens))))


class Repeated:
    """Samples of a source, its scenes under new names once all have had their turn, until there are `count`.

    Each scene is read and made once.
    """

    def __init__(self, source: SampleSource, count: int):
        self.source, self.features, self.targets, self.labels = source, source.features, TargetConfig(), True
        scenes = source.tokens
        names = [f"{scenes[n % len(scenes)]}-{n // len(scenes)}" for n in range(max(count, 1))]
        self.tokens = tuple(name.removesuffix("-0") for name in names)
        self._made: dict[str, NumpySample] = {}

    def original(self, token: str) -> str:
        return token.split("-")[0]

    def __getitem__(self, token: str) -> NumpySample:
        token = self.original(token)
        if token not in self._made:
            self._made[token] = self.source[token]
        return self._made[token]


class PickleDataset(Dataset):
    """The published training cache: <folder>/<token>/transfuser_{feature,target}.gz, each a gzip stream (level 1) of a
    pickled dict of tensors, camera and LiDAR as float32. Only files that this script wrote are unpickled."""

    def __init__(self, folders: list[Path]):
        self.folders = folders

    @classmethod
    def write(cls, folder: Path, cache: FeatureCache, source: Repeated) -> PickleDataset:
        """Compressed once a scene, written once a sample."""
        folders, contents = [], {}
        for token in cache.tokens:
            scene = source.original(token)
            if scene not in contents:
                contents[scene] = cls._contents(*cache[token], cache.features)
            folders.append(folder / token)
            folders[-1].mkdir(parents=True)
            for name, content in contents[scene].items():
                (folders[-1] / name).write_bytes(content)
        return cls(folders)

    @staticmethod
    def _contents(features: dict, targets: dict, config: FeatureConfig) -> dict[str, bytes]:
        tensors = {name: torch.tensor(array) for name, array in to_float(features, config).items()}
        labels = {name: torch.tensor(array) for name, array in targets.items()}
        labels["bev_semantic_map"] = labels["bev_semantic_map"].float()
        parts = {"transfuser_feature.gz": tensors, "transfuser_target.gz": labels}
        return {name: gzip.compress(pickle.dumps(part), compresslevel=1) for name, part in parts.items()}

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> tuple[dict, dict, str]:
        parts = []
        for name in ("transfuser_feature", "transfuser_target"):
            with gzip.open(self.folders[index] / f"{name}.gz", "rb") as file:
                parts.append(pickle.load(file))
        return *parts, self.folders[index].name
