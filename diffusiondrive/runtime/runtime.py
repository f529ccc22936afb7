"""A planner made ready to drive: features in host memory in, a plan in host memory out.

    runtime = Runtime.from_pretrained("checkpoints/city_nano", precision="float32", backend="eager")
    runtime.warm_up()
    plan = runtime.plan(features)          # features as `diffusiondrive.features` makes them; same input, same plan

Backends, all of which compute the same plan (docs/real_time.md says which one to take):

    reference   the plain published computation, the yardstick of speed
    plain       the planner's own code, for any planner; all others want the published form (docs/baselines.md)
    eager       the rewritten planner (program.py), operation by operation
    compile     the same through torch.compile
    cudagraph   eager, captured once with its copies and replayed (NVIDIA GPU)
    compile+cudagraph   the compiled planner, captured
    onnx        the exported graphs in onnxruntime, CPU or CUDA
    tensorrt    the exported graphs as TensorRT engines
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.planner import DiffusionDrive, Plan
from diffusiondrive.runtime.backends import Backend, BackendOptions, build_backend
from diffusiondrive.runtime.device import checked_precision, resolve_device
from diffusiondrive.runtime.program import PlanLayout
from navsim_eval.errors import UserError

WARM_UP_PLANS = 5


class Runtime:
    """A planner on one device, in one precision, behind one backend.

    planner:   its configuration and anchors; the weights that run are the backend's own copy
    batch:     scenes a call; compiled and captured backends are made for exactly this number
    auxiliary: also predict agents and the semantic map (the reference backend always does)
    startup_s: seconds that building the backend took; `warm_up` adds those of the first plans
    """

    def __init__(
        self,
        planner: DiffusionDrive,
        precision: str = "float32",
        backend: str = "eager",
        device: str | torch.device = "auto",
        batch: int = 1,
        auxiliary: bool = False,
    ):
        """Raises UserError for a backend, precision or device that does not exist, is not installed or does not fit."""
        if batch < 1:
            raise UserError(f"batch: {batch} must be at least 1")
        self.device = resolve_device(str(device))
        self.precision, self.batch = checked_precision(precision), batch
        self.planner = planner.eval()
        self.config, self.noise_shape = planner.config, planner.noise_shape
        self.auxiliary = auxiliary or backend == "reference"
        self.layout = PlanLayout.of(planner.config, self.auxiliary)
        started = time.perf_counter()
        options = BackendOptions(self.device, precision, batch, auxiliary)
        self.backend: Backend = build_backend(backend, planner, options)
        self.startup_s = time.perf_counter() - started
        self._no_lidar = torch.zeros(batch, 1, 1, 1)
        self._noise = planner.default_noise.detach().cpu().float().expand(batch, *self.noise_shape).contiguous()

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        precision: str = "float32",
        backend: str = "eager",
        device: str | torch.device = "auto",
        batch: int = 1,
        auxiliary: bool = False,
    ) -> Runtime:
        """From a checkpoint folder or .safetensors file; see `checkpoint.load_planner`."""
        return cls(DiffusionDrive.from_pretrained(path), precision, backend, device, batch, auxiliary)

    @torch.inference_mode()
    def plan(self, features: Mapping[str, Tensor | np.ndarray], noise: Tensor | np.ndarray | None = None) -> Plan:
        """Plan for a batch of scenes.

        features: float32, as `DiffusionDrive` takes them, (batch, …): arrays or tensors, in host memory or on device
        noise: (batch, M, T, 2) standard normal; without it one fixed draw, the same for every scene and call
        Returns tensors in host memory that belong to the caller. Raises UserError for a feature that is missing or of
        another size.
        """
        tensors = {name: _tensor(value) for name, value in features.items()}
        camera, lidar, status = self.planner.checked_features(tensors)
        if lidar is None:  # a camera-only planner
            lidar = self._no_lidar
        if len(camera) != self.batch:
            raise UserError(f"features hold {len(camera)} scenes, but this runtime was made for batch={self.batch}")
        if noise is None:
            start = self._noise
        else:
            start = _tensor(noise)
            if tuple(start.shape) != tuple(self._noise.shape):
                raise UserError(f"noise has shape {tuple(start.shape)}, but this needs {tuple(self._noise.shape)}")
        return self.layout.unpack(self.backend((camera, lidar, status, start)))

    def warm_up(self, plans: int = WARM_UP_PLANS) -> float:
        """Plan a few times on random features, so that compilers, autotuners and allocators have done their work.

        Returns the seconds it took, which are added to `startup_s`.
        """
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        for _ in range(plans):
            self.plan(random_features(self.planner, self.batch, generator))
        spent = time.perf_counter() - started
        self.startup_s += spent
        return spent


def random_features(planner: DiffusionDrive, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Features of the right sizes: camera and LiDAR uniform in [0, 1], status standard normal."""
    backbone = planner.config.backbone
    return {
        "camera_feature": torch.rand(batch, backbone.image_channels, *backbone.image_size, generator=generator),
        "lidar_feature": torch.rand(batch, backbone.lidar_channels, *backbone.lidar_size, generator=generator),
        "status_feature": torch.randn(batch, planner.config.perception.status_size, generator=generator),
    }


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
