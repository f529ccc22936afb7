"""`tools/export.py`: write the graphs, and compare them with the planner before anybody relies on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.benchmark import load
from diffusiondrive.runtime.export import FEATURES, ExportedPlanner, export_planner
from diffusiondrive.runtime.onnx_backend import OnnxPlanner
from diffusiondrive.runtime.runtime import random_features
from navsim_eval.errors import UserError

TOLERANCE = 1e-4


@dataclass
class ExportConfig:
    """What is exported.

    planner:   folder or file of a checkpoint; "random:NAME" takes a named variant with random weights
    output:    folder to write
    batch:     scenes a call; the graphs' shapes are fixed to it
    auxiliary: also agents and semantic map
    check:     frames of random features on which the graphs, in onnxruntime on the CPU, are compared with the planner
    tolerance: largest difference allowed, in metres, radians and logits
    tensorrt:  also build engines for the GPU of this machine (backend=tensorrt reads them)
    """

    planner: str = ""
    output: str = "outputs/export"
    batch: int = 1
    auxiliary: bool = False
    check: int = 3
    tolerance: float = TOLERANCE
    seed: int = 0
    tensorrt: bool = False


def export_and_check(config: ExportConfig, progress: Callable[[str], None] = lambda line: None) -> ExportedPlanner:
    """Export, check, build. Raises UserError when a graph differs by more than the tolerance."""
    if not config.planner:
        raise UserError("planner is not set; usage: export.py planner=CHECKPOINT output=FOLDER")
    planner = load(config.planner, config.seed).eval()
    exported = export_planner(planner, config.output, config.batch, config.auxiliary)
    progress(f"written: {exported.encoder}, {exported.denoiser}")
    if config.check:
        differences = check_export(planner, exported, config.check, config.seed)
        shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        progress(f"largest difference from the planner over {config.check} frames: {shown}")
        worst = max(differences, key=lambda name: differences[name])
        if not differences[worst] <= config.tolerance:
            raise UserError(
                f"{exported.folder}: {worst} differs from the planner by {differences[worst]:.1e}, more than "
                f"tolerance={config.tolerance}; do not use these graphs"
            )
    if config.tensorrt:
        from diffusiondrive.runtime.tensorrt_backend import build_engines

        progress(f"written: {', '.join(str(path) for path in build_engines(exported))}")
    return exported


@torch.inference_mode()
def check_export(planner: DiffusionDrive, exported: ExportedPlanner, frames: int, seed: int) -> dict[str, float]:
    """Largest absolute difference of each output between the graphs in onnxruntime and `planner(features, noise)`.

    Random features, noise, anchors moved by up to a metre and the planner's labels. A frame whose mode differs counts
    as infinitely different.
    """
    graphs = OnnxPlanner(exported, torch.device("cpu"))
    batch = exported.description["batch"]
    generator = torch.Generator().manual_seed(seed)
    own = planner.initial.anchors.detach().clone()
    worst: dict[str, float] = {}
    try:
        for _ in range(frames):
            features = random_features(planner, batch, generator)
            noise = torch.randn(batch, *planner.noise_shape, generator=generator)
            anchors = own + 2 * torch.rand(own.shape, generator=generator) - 1
            planner.initial.anchors.copy_(anchors)
            plan = planner(features, noise=noise)
            arrays = {name: features[name].numpy() for name in FEATURES}
            outputs = graphs(arrays, noise=noise.numpy(), anchors=anchors.numpy())
            expected = {"candidates": plan.candidates, "logits": plan.logits, "trajectory": plan.trajectory}
            if "agent_states" in outputs:
                expected |= {"agent_states": plan.agents.states, "agent_logits": plan.agents.logits}
                expected["bev_semantic_map"] = plan.bev_semantic_map
            same = (outputs["mode"] == plan.mode.numpy()).all()
            for name, tensor in expected.items():
                difference = float(np.abs(outputs[name] - tensor.numpy()).max()) if same else float("inf")
                worst[name] = max(worst.get(name, 0.0), difference)
    finally:
        planner.initial.anchors.copy_(own)
    return worst
