"""Training and evaluation samples as tensors, from a feature cache or straight from raw data.

Items and batches carry camera and LiDAR in 8 bits: a quarter of the bytes through worker queues and over the bus.
`to_model_input` turns a batch into the planner's float32 input wherever it then lies (on the accelerator, best), with
exactly the values that the published feature builder gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusiondrive.feature_cache import FeatureCache, RawSamples, SampleSource
from diffusiondrive.features import FeatureConfig
from navsim_eval.config import DataConfig


class Sample(NamedTuple):
    """One scene, or (with a leading axis on every tensor and a list of tokens) a batch.

    features: camera_feature (3, H, W) uint8, lidar_feature (1, N, N) uint8 counts, status_feature (8,) float32
    targets:  trajectory (8, 3) float32, agent_states (30, 5) float32, agent_labels (30,) bool,
              bev_semantic_map (128, 256) uint8; empty where the source has no labels
    token:    of the scene
    """

    features: dict[str, Tensor]
    targets: dict[str, Tensor]
    token: str | list[str]


class PlanningDataset(Dataset[Sample]):
    """The samples of a split in its order. `FeatureCache` and `RawSamples` are sources; so is anything like them."""

    def __init__(self, source: SampleSource):
        self.source = source
        self.tokens = source.tokens
        self.features = source.features

    @classmethod
    def from_cache(cls, folder: Path | str, features: FeatureConfig | None = None) -> PlanningDataset:
        """Samples of a cache; `features` is what the planner needs, and a cache of other sizes is refused."""
        return cls(FeatureCache(folder, features))

    @classmethod
    def from_raw(
        cls,
        data: DataConfig,
        split: str,
        features: FeatureConfig | None = None,
        labels: bool = True,
        lidar: bool = True,
    ) -> PlanningDataset:
        """Samples made from logs, maps and sensors on the fly; labels: targets too; lidar: read the sweeps."""
        return cls(RawSamples.from_config(data, split, features, labels=labels, lidar=lidar))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        return self.load(self.tokens[index])

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        """A whole batch; torch's loader asks for it where this method exists."""
        return self.batch([self.tokens[index] for index in indices])

    def load(self, token: str) -> Sample:
        """The sample of a scene. Raises DataError when it is damaged."""
        features, targets = self.source[token]
        return Sample(_tensors(features), _tensors(targets), token)

    def batch(self, tokens: Sequence[str]) -> Sample:
        """What `collate` makes of the samples, each byte copied once: from the mapped file into the batch."""
        samples = [self.source[token] for token in tokens]
        stacked = [
            {name: _stack([sample[part][name] for sample in samples]) for name in samples[0][part]} for part in (0, 1)
        ]
        return Sample(*stacked, list(tokens))


def collate(samples: Sequence[Sample] | Sample) -> Sample:
    """Join samples into a batch: tensors get a leading axis, `token` becomes the list of tokens.

    A batch that `PlanningDataset` has already joined passes through.
    """
    if isinstance(samples, Sample):
        return samples
    stacked = [
        {name: torch.stack([sample[part][name] for sample in samples]) for name in samples[0][part]} for part in (0, 1)
    ]
    return Sample(*stacked, [sample.token for sample in samples])


def to_model_input(features: dict[str, Tensor], config: FeatureConfig | None = None) -> dict[str, Tensor]:
    """8-bit features as the planner's float32 input: camera / 255, LiDAR counts / clip. Float features pass through."""
    scales = {"camera_feature": 255.0, "lidar_feature": float((config or FeatureConfig()).lidar_clip)}
    return {
        name: value if value.is_floating_point() else _divided(value, scales[name]) for name, value in features.items()
    }


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device; through pinned memory, so that the host need not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _divided(counts: Tensor, scale: float) -> Tensor:
    """8-bit integers / scale in float32, correctly rounded on every device."""
    if counts.device.type == "cpu" and not torch.compiler.is_compiling():
        # numpy asks for huge pages; where torch allocates a full-size batch, page faults take longer than dividing.
        return torch.from_numpy(np.divide(counts.numpy(), np.float32(scale), dtype=np.float32))
    # By a Python number, CUDA would multiply with the reciprocal and miss by one unit in the last place. Filled on the
    # device: a copy would wait for it.
    return counts.float() / torch.full((), scale, device=counts.device)


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    """Arrays with a leading axis, double precision reduced to single."""
    dtype = np.float32 if arrays[0].dtype == np.float64 else arrays[0].dtype
    batch = np.empty((len(arrays), *arrays[0].shape), dtype)
    np.stack(arrays, out=batch, casting="same_kind")
    return torch.from_numpy(batch)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Own copies (cached arrays are views into a file), double precision reduced to single."""
    reduced = {n: a.astype(np.float32) if a.dtype == np.float64 else np.array(a) for n, a in arrays.items()}
    return {name: torch.from_numpy(array) for name, array in reduced.items()}
