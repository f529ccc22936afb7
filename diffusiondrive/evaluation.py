"""Planners as the evaluator knows them, found by name or by checkpoint folder.

Features are read in threads (decoding images releases the interpreter lock) or taken from a feature cache; the noise
of a plan depends on (seed, token) alone, so batch size and order cannot change it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def make_planner(name: str, config: EvaluateConfig, cache_of: CacheOf) -> Planner:
    """A baseline by name, or the planner in a checkpoint folder (DiffusionDrive or ego-status MLP).

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
    return DiffusionDrivePlanner(path, device=config.device, seed=config.seed, cache=config.cache)


class DiffusionDrivePlanner:
    """A trained planner, scenes in and plans out.

    path:  checkpoint folder or .safetensors file;  cache: feature cache, or empty to read the sensors
    device: auto, cpu, cuda;  seed: of the noise;  threads: that read sensors
    """

    def __init__(self, path: Path | str, device: str = "auto", seed: int = 0, cache: str = "", threads: int = 0):
        self.path, self.seed = Path(path), seed
        self.device = resolve_device(device)
        self.model = DiffusionDrive.from_pretrained(path).to(self.device)
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
        noise = scene_noise([scene.token for scene in scenes], self.seed, self.model.noise_shape)
        plan = self.model(to_model_input(batch, self.features), noise=noise.to(self.device), auxiliary=False)
        return Plans(*(part.float().cpu().numpy() for part in (plan.trajectory, plan.candidates, plan.logits)))

    def describe(self) -> dict[str, Any]:
        file = self.path / WEIGHTS_FILE if self.path.is_dir() else self.path
        schedule = self.model.config.schedule
        return {"kind": "diffusiondrive", "weights_sha256": sha256(file), "schedule": vars(schedule)}

    def _read(self, scene: Scene) -> dict[str, np.ndarray]:
        if self.cache is not None and scene.token in self.cache.tokens:
            return self.cache[scene.token][0]
        return compact_features(scene, self.features)


def _model_type(path: Path) -> str | None:
    try:
        return json.loads((path / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
