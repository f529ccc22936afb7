"""Planners as the evaluator knows them, found by name or by checkpoint folder.

Features are read in threads (decoding images releases the interpreter lock) or taken from a feature cache; the noise
of a plan depends on (seed, token) alone, so batch size and order cannot change it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.baselines.ego_mlp import MODEL_TYPE as EGO_MLP
from diffusiondrive.baselines.ego_mlp import EgoMLPPlanner
from diffusiondrive.checkpoint import WEIGHTS_FILE
from diffusiondrive.dataset import to_model_input
from diffusiondrive.feature_cache import FeatureCache
from diffusiondrive.features import FeatureConfig, compact_features
from diffusiondrive.noise import scene_noise
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.device import resolve_device
from navsim_eval.errors import UserError
from navsim_eval.evaluate import CacheOf, EvaluateConfig
from navsim_eval.executor import usable_cores
from navsim_eval.files import sha256
from navsim_eval.planners import BASELINES, Planner, Plans, make_baseline, unknown_planner
from navsim_eval.scene import Scene

NOISES = GAUSSIAN, FIXED, ZERO = ("gaussian", "fixed", "zero")


@dataclass
class SamplingConfig:
    """How a trained planner draws its candidates; what is left empty stays as its checkpoint says.

    schedule: reference or consistent, see `ScheduleConfig.preset`;  steps: passes of the denoiser
    noise:    of the start: gaussian (drawn by seed and token), fixed (one draw for all scenes, as in real time),
              zero (none)
    modes:    candidates, see `DiffusionDrive.set_modes`
    """

    schedule: str = ""
    steps: int = 0
    noise: str = GAUSSIAN
    modes: int = 0

    def __post_init__(self) -> None:
        if self.noise not in NOISES:
            raise UserError(f"sampling.noise: '{self.noise}' is none of {', '.join(NOISES)}")
        if min(self.steps, self.modes) < 0:
            raise UserError(f"sampling.steps ({self.steps}) and sampling.modes ({self.modes}) must not be negative")

    def apply(self, planner: DiffusionDrive) -> None:
        """Change the planner accordingly. Raises UserError for what does not fit it."""
        known = planner.config.schedule
        asked = replace(known, preset=self.schedule or known.preset, steps=self.steps or known.steps)
        if asked != known:
            planner.set_schedule(asked)
        if self.modes:
            planner.set_modes(self.modes)

    def draw(self, tokens: Sequence[str], seed: int, planner: DiffusionDrive) -> Tensor:
        """Start noise (B, M, T, 2) of these scenes."""
        if self.noise == GAUSSIAN:
            return scene_noise(tokens, seed, planner.noise_shape)
        if self.noise == FIXED:
            return planner.default_noise.expand(len(tokens), *planner.noise_shape)
        return torch.zeros(len(tokens), *planner.noise_shape)


@dataclass
class EvaluatePlannerConfig(EvaluateConfig):
    """`EvaluateConfig`, and how trained planners sample."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def make_planner(name: str, config: EvaluateConfig, cache_of: CacheOf) -> Planner:
    """A baseline by name, or the planner in a checkpoint folder (any of `variants.VARIANTS`, or an ego-status MLP).

    Raises UserError for a name that is neither, with the nearest known one.
    """
    path = Path(name)
    if name in BASELINES:
        return make_baseline(name, cache_of)
    if not path.exists():
        if name == EGO_MLP:
            remedy = "name the folder of its weights (python tools/train_ego_mlp.py makes one)"
            raise UserError(f"planner 'ego_mlp' has to be trained: {remedy}")
        raise unknown_planner(name, BASELINES)
    if _model_type(path) == EGO_MLP:
        return EgoMLPPlanner(path)
    sampling = config.sampling if isinstance(config, EvaluatePlannerConfig) else None
    return DiffusionDrivePlanner(path, config.device, config.seed, config.cache, sampling=sampling)


class DiffusionDrivePlanner:
    """A trained planner, scenes in and plans out.

    path:  checkpoint folder or .safetensors file;  cache: feature cache, or empty to read the sensors
    device: auto, cpu, cuda;  seed: of the noise;  threads: that read sensors;  sampling: default as in the checkpoint
    """

    def __init__(
        self,
        path: Path | str,
        device: str = "auto",
        seed: int = 0,
        cache: str = "",
        threads: int = 0,
        sampling: SamplingConfig | None = None,
    ):
        self.path, self.seed, self.sampling = Path(path), seed, sampling or SamplingConfig()
        self.device = resolve_device(device)
        self.model = DiffusionDrive.from_pretrained(path)
        self.sampling.apply(self.model)
        self.model.to(self.device)
        folder = self.path.resolve().parent.name  # outputs/train/planner and checkpoints/city_nano differ in this
        self.name = f"{self.model.config.name} ({folder})"
        self.features = FeatureConfig.for_planner(self.model.config)
        self.cache = FeatureCache(cache, self.features) if cache else None
        self.readers = ThreadPoolExecutor(threads or usable_cores())

    @torch.inference_mode()
    def plan(self, scenes: Sequence[Scene]) -> Plans:
        """Raises DataError when a sensor file of one of the scenes is missing or damaged."""
        samples = list(self.readers.map(self._read, scenes))
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        noise = self.sampling.draw([scene.token for scene in scenes], self.seed, self.model)
        plan = self.model(to_model_input(batch, self.features), noise=noise.to(self.device), auxiliary=False)
        trajectory, candidates, logits = (
            part.float().cpu().numpy() for part in (plan.trajectory, plan.candidates, plan.logits)
        )
        return Plans(trajectory, candidates, logits if self.model.config.anchored else None)  # nothing ranks samples

    def describe(self) -> dict[str, Any]:
        file = self.path / WEIGHTS_FILE if self.path.is_dir() else self.path
        config = self.model.config
        return {
            "kind": "diffusiondrive",
            "weights_sha256": sha256(file),
            "denoiser": config.denoiser,
            "schedule": vars(config.schedule),
            "modes": config.modes,
            "noise": self.sampling.noise,
        }

    def _read(self, scene: Scene) -> dict[str, np.ndarray]:
        if self.cache is not None and scene.token in self.cache.tokens:
            return self.cache[scene.token][0]
        return compact_features(scene, self.features, self.model.config.backbone.lidar)


def _model_type(path: Path) -> str | None:
    try:
        return json.loads((path / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
