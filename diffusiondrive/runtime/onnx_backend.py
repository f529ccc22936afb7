"""The exported graphs in onnxruntime: what a car computer without torch runs, behind the same interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.backends import BackendOptions, Inputs
from diffusiondrive.runtime.cache import cache_folder, planner_digest
from diffusiondrive.runtime.export import AUXILIARY, FEATURES, PLAN, SCENE, ExportedPlanner, export_planner, require
from navsim_eval.errors import UserError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxPlanner:
    """Both sessions of an export. Runs on arrays; intermediate tensors stay on the session's device."""

    def __init__(
        self,
        exported: ExportedPlanner,
        device: torch.device,
        precision: str = "float32",
        threads: int = 0,
        profile: str = "",
    ):
        """threads: of a CPU (0: as torch); profile: prefix of onnxruntime's traces (see `operator_times`), or none.

        Raises UserError without onnxruntime or its provider for the device.
        """
        runtime = require("onnxruntime", "backend=onnx")
        provider = PROVIDERS[device.type]
        if provider not in runtime.get_available_providers():
            raise UserError(f"device={device}: this onnxruntime has no {provider}; pip install onnxruntime-gpu")
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_profiling = bool(profile)
        settings: dict[str, Any] = {}
        if device.type == "cuda":
            settings = {"device_id": device.index or 0, "use_tf32": int(precision == "tf32")}
        self.device = (device.type, device.index or 0)
        sessions = []
        for file in (exported.encoder, exported.denoiser):
            options.profile_file_prefix = f"{profile}-{file.stem}"
            sessions.append(runtime.InferenceSession(str(file), options, providers=[(provider, settings)]))
        self.encoder, self.denoiser = sessions
        self.defaults = exported.defaults()

    def __call__(self, features: Mapping[str, np.ndarray], **chain: np.ndarray) -> dict[str, np.ndarray]:
        """Features, and noise, anchors or labels where the planner's own are not wanted -> named outputs."""
        encode = self.encoder.io_binding()
        for name in FEATURES:
            encode.bind_cpu_input(name, np.ascontiguousarray(features[name], np.float32))
        for output in self.encoder.get_outputs():
            encode.bind_output(output.name, *(self.device if output.name in SCENE else ("cpu",)))
        self.encoder.run_with_iobinding(encode)
        encoded = dict(zip((o.name for o in self.encoder.get_outputs()), encode.get_outputs(), strict=True))
        denoise = self.denoiser.io_binding()
        for name in SCENE:
            denoise.bind_ortvalue_input(name, encoded[name])
        for name, array in (self.defaults | chain).items():
            denoise.bind_cpu_input(name, np.ascontiguousarray(array, self.defaults[name].dtype))
        for name in PLAN:
            denoise.bind_output(name, "cpu")
        self.denoiser.run_with_iobinding(denoise)
        plan = dict(zip(PLAN, denoise.copy_outputs_to_cpu(), strict=True))
        return plan | {name: value.numpy() for name, value in encoded.items() if name not in SCENE}

    def operator_times(self) -> dict[str, float]:
        """Milliseconds of each operator type since the start, from both traces; ends profiling, removes them."""
        total: dict[str, float] = {}
        for session in (self.encoder, self.denoiser):
            file = Path(session.end_profiling())
            for event in json.loads(file.read_text()):
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                    name = event["args"]["op_name"]
                    total[name] = total.get(name, 0.0) + event["dur"] / 1e3
            file.unlink()
        return total


class OnnxBackend:
    """Exports the planner, or finds the export of an earlier start, and runs it."""

    def __init__(self, planner: DiffusionDrive, options: BackendOptions):
        """Raises UserError for a precision that onnxruntime does not have on the device."""
        cpu = options.device.type == "cpu"
        allowed = ("float32",) if cpu else ("float32", "tf32", "fp16")
        if options.precision not in allowed:
            raise UserError(
                f"backend=onnx on {options.device.type}: precision {options.precision} is none of {', '.join(allowed)}"
            )
        dtype = torch.float16 if options.precision == "fp16" else torch.float32
        exported = cached_export(planner, options.batch, options.auxiliary, dtype)
        self.names = PLAN + (AUXILIARY if options.auxiliary else ())
        self.run = OnnxPlanner(exported, options.device, options.precision)

    def __call__(self, inputs: Inputs) -> Tensor:
        *features, noise = (x.cpu().numpy() for x in inputs)
        outputs = self.run(dict(zip(FEATURES, features, strict=True)), noise=noise)
        rows = [outputs[name].reshape(len(noise), -1).astype(np.float32, copy=False) for name in self.names]
        return torch.from_numpy(np.concatenate(rows, axis=1))


def cached_export(
    planner: DiffusionDrive, batch: int, auxiliary: bool, dtype: torch.dtype, root: Path | None = None
) -> ExportedPlanner:
    """The export of exactly this planner from the cache, made where it is not there yet."""
    digest = planner_digest(planner, batch, auxiliary, str(dtype))
    folder = (root or cache_folder("onnx")) / f"{planner.config.name}-{digest}"
    return ExportedPlanner.read(folder) or export_planner(planner, folder, batch, auxiliary, dtype)
