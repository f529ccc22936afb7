"""Two ONNX graphs of a planner: the encoder, run once a scene, and the denoiser, which makes the plan.

    encoder.onnx    camera_feature, lidar_feature, status_feature -> map, agent_keys, agent_values, ego [, auxiliary]
    denoiser.onnx   those four, noise, anchors, labels -> trajectory, candidates, logits, mode
    defaults.npz    noise, anchors and labels of the planner: what to feed where nothing else is wanted
    graphs.json     shapes, schedule and versions, as also stored in the graphs' metadata

All shapes are fixed. The denoiser holds every pass of the planner's schedule. Look-ups are index gathers and matrix
products (denoiser.py): no GridSample operator, whose support differs between runtimes, is in either graph.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusiondrive.planner import DiffusionDrive, choose
from diffusiondrive.runtime.denoiser import Denoiser
from diffusiondrive.runtime.encoder import EncodedScene
from diffusiondrive.runtime.program import PlanProgram
from diffusiondrive.runtime.torch_backends import example_inputs
from navsim_eval.environment import package_version
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write

OPSET = 18
ENCODER_FILE, DENOISER_FILE, DEFAULTS_FILE, GRAPHS_FILE = "encoder.onnx", "denoiser.onnx", "defaults.npz", "graphs.json"
FEATURES = ("camera_feature", "lidar_feature", "status_feature")
SCENE = EncodedScene._fields
AUXILIARY = ("agent_states", "agent_logits", "bev_semantic_map")
CHAIN = ("noise", "anchors", "labels")
PLAN = ("trajectory", "candidates", "logits", "mode")


@dataclass(frozen=True)
class ExportedPlanner:
    """The folder of an export and what graphs.json says."""

    folder: Path
    description: dict[str, Any]

    @property
    def encoder(self) -> Path:
        return self.folder / ENCODER_FILE

    @property
    def denoiser(self) -> Path:
        return self.folder / DENOISER_FILE

    def defaults(self) -> dict[str, np.ndarray]:
        """noise (B, M, T, 2), anchors (M, T, 2), labels (K,) of the planner."""
        with np.load(self.folder / DEFAULTS_FILE) as stored:
            return dict(stored)

    @classmethod
    def read(cls, folder: Path) -> ExportedPlanner | None:
        """A finished export, or None."""
        file = folder / GRAPHS_FILE  # written last
        return cls(folder, json.loads(file.read_text())) if file.is_file() else None


class EncoderGraph(nn.Module):
    """The encoder with named outputs."""

    def __init__(self, program: PlanProgram):
        super().__init__()
        self.program = program

    def forward(self, camera_feature: Tensor, lidar_feature: Tensor, status_feature: Tensor) -> tuple[Tensor, ...]:
        scene, queries, neck = self.program.encoder(camera_feature, lidar_feature, status_feature)
        if self.program.agent_head is None:
            return tuple(scene)
        agents = self.program.agent_head(queries)
        return (*scene, agents.states, agents.logits, self.program.semantic_head(neck))


class DenoiserGraph(nn.Module):
    """All passes and the choice."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        map: Tensor,
        agent_keys: Tensor,
        agent_values: Tensor,
        ego: Tensor,
        noise: Tensor,
        anchors: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        poses, logits = self.denoiser(EncodedScene(map, agent_keys, agent_values, ego), noise, anchors, labels)
        mode = self.denoiser.selector.select(poses, logits)
        return choose(poses, mode), poses, logits, mode


def require(package: str, purpose: str) -> Any:
    """Import an optional package. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{purpose} needs {package}, which is not installed; pip install -e '.[export]'") from error


@torch.inference_mode()
def export_planner(
    planner: DiffusionDrive,
    folder: Path | str,
    batch: int = 1,
    auxiliary: bool = False,
    dtype: torch.dtype = torch.float32,
) -> ExportedPlanner:
    """Write both graphs for `batch` scenes a call. Raises UserError without the packages of the extra `export`.

    dtype: of the backbone inside the encoder; inputs and outputs are float32 in any case.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "export to ONNX")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    program = PlanProgram(planner, auxiliary, dtype).cpu().eval()
    *features, noise = example_inputs(planner, batch)
    scene = program.encoder(*features)[0]
    defaults = {
        "noise": planner.default_noise.detach().cpu().expand(noise.shape).contiguous(),
        "anchors": program.denoiser.anchors,
        "labels": torch.tensor(planner.schedule.labels),
    }
    outputs = SCENE + (AUXILIARY if auxiliary else ())
    description = describe(planner, batch, dtype)
    encoder = _graph(EncoderGraph(program), dict(zip(FEATURES, features, strict=True)), outputs, description)
    inputs = dict(zip(SCENE, scene, strict=True)) | defaults
    denoiser = _graph(DenoiserGraph(program.denoiser), inputs, PLAN, description)
    description |= {"encoder": shapes(encoder), "denoiser": shapes(denoiser)}
    for name, graph in ((ENCODER_FILE, encoder), (DENOISER_FILE, denoiser)):
        atomic_write(folder / name, lambda path, graph=graph: graph.save(str(path), external_data=False))
    arrays = {name: tensor.numpy() for name, tensor in defaults.items()}
    atomic_write(folder / DEFAULTS_FILE, lambda path: _save_npz(path, arrays))
    atomic_write(folder / GRAPHS_FILE, json.dumps(description, indent=1) + "\n")
    return ExportedPlanner(folder, description)


def describe(planner: DiffusionDrive, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """What somebody must know who only has the graphs."""
    schedule = planner.schedule
    return {
        "planner": planner.config.name,
        "batch": batch,
        "backbone": str(dtype).removeprefix("torch."),
        "labels": list(schedule.labels),
        "next_levels": list(schedule.next_labels),
        "start_level": schedule.start_level,
        "frame": "ego rear axle at the current time: x forward, y left [m], heading [rad]; poses at 2 Hz from 0.5 s",
        "opset": OPSET,
        "torch": package_version("torch"),
    }


def shapes(graph: Any) -> dict[str, dict[str, list[Any]]]:
    """Fixed shapes and types of a graph's inputs and outputs, by name."""
    model = graph.model.graph
    sides = {"inputs": model.inputs, "outputs": model.outputs}
    return {
        side: {value.name: [str(value.dtype), *(int(length) for length in value.shape)] for value in values}
        for side, values in sides.items()
    }


def _graph(module: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...], description: dict[str, Any]) -> Any:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it lists every operator that it does not fold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        graph = torch.onnx.export(
            module.eval(),
            tuple(tensor.clone() for tensor in inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    graph.model.metadata_props["diffusiondrive"] = json.dumps(description)
    return graph


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
