"""Checkpoints of planners: a self-contained folder that says what it is.

    config.json          the whole PlannerConfig (sizes, schedule, normalisation) and the format version
    model.safetensors    all weights and buffers, anchors included; its header repeats config.json, so the file alone
                         is enough
    metrics.json         optional: what was measured
    README.md            model card

Loading is strict, and nothing that can run code is read: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusiondrive.planner import REGRESSION, UNET, DiffusionDrive, PlannerConfig
from navsim_eval.config import from_mapping
from navsim_eval.errors import DataError, UserError
from navsim_eval.files import atomic_write, sha256

FORMAT = "diffusiondrive-planner"
FORMAT_VERSION = 1
WEIGHTS_FILE, CONFIG_FILE, METRICS_FILE, CARD_FILE = "model.safetensors", "config.json", "metrics.json", "README.md"
ANCHORS = "initial.anchors"
SHOWN = 20  # names in an error message


@dataclass(frozen=True)
class Mismatch:
    """How a set of tensors differs from what a network holds. Empty when every entry is accounted for."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.misshaped)]
        return "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in parts if names)


def save_planner(
    planner: DiffusionDrive, folder: Path | str, metrics: Mapping[str, Any] | None = None, origin: str = ""
) -> Path:
    """Write the checkpoint folder (each file whole or not at all) and return it.

    metrics: JSON-able numbers for metrics.json and the model card; origin: a sentence on where the weights come from.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but a checkpoint is a folder; choose another name")
    save_weights(planner, folder / WEIGHTS_FILE)
    atomic_write(folder / CONFIG_FILE, config_text(planner.config))
    if metrics is not None:
        atomic_write(folder / METRICS_FILE, json.dumps(dict(metrics), indent=2) + "\n")
    atomic_write(folder / CARD_FILE, model_card(planner, sha256(folder / WEIGHTS_FILE), metrics, origin))
    return folder


def save_weights(planner: DiffusionDrive, file: Path | str) -> Path:
    """Write one .safetensors file with the weights, and the configuration in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in planner.state_dict().items()}
    header = {"format": "pt", "config": config_text(planner.config)}
    return atomic_write(file, lambda path: save_file(tensors, str(path), metadata=header))


def load_planner(path: Path | str) -> DiffusionDrive:
    """The planner of a checkpoint folder or of one of our .safetensors files, on the CPU, in evaluation mode.

    Raises UserError that names the file and every missing, unexpected or ill-shaped entry.
    """
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"holds no {WEIGHTS_FILE}" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; give a folder written by training or by tools/import_checkpoint.py")
    if file.suffix != ".safetensors":
        raise UserError(
            f"checkpoint {path} is not one of ours (.safetensors); official weights are converted by "
            f"python tools/import_checkpoint.py source={path} out=FOLDER"
        )
    tensors = read_tensors(file)
    config = _read_config(file, path / CONFIG_FILE if path.is_dir() else None)
    if config.anchored and ANCHORS not in tensors:
        raise DataError(file, "no anchors inside", field=ANCHORS, remedy="not a checkpoint of a planner")
    planner = DiffusionDrive(config, tensors.get(ANCHORS))
    if mismatch := compare(planner.state_dict(), tensors):
        raise DataError(file, f"does not fit the planner '{config.name}': {mismatch}")
    planner.load_state_dict(tensors)
    return planner.eval()


def compare(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Mismatch:
    """Account for every entry of both sides."""
    return Mismatch(
        missing=tuple(name for name in wanted if name not in given),
        unexpected=tuple(name for name in given if name not in wanted),
        misshaped=tuple(
            f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in given and given[name].shape != tensor.shape
        ),
    )


def read_tensors(file: Path | str) -> dict[str, Tensor]:
    """Named tensors of a .safetensors file, or of a torch file (its `state_dict` where it has one), without running
    anything that the file might contain. Raises DataError."""
    file = Path(file)
    if not file.is_file():
        raise DataError(file, "no such file")
    try:
        if file.suffix == ".safetensors":
            with safe_open(str(file), framework="pt") as stored:
                return {name: stored.get_tensor(name) for name in stored.keys()}
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            file,
            "is damaged, or holds more than tensors, which are not loaded for safety",
            remedy="where you trust it, save only its state dict: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise DataError(file, f"cannot be read ({error})", remedy="truncated? fetch or write it again") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError(file, "holds no dictionary of tensors", field="state_dict")
    return content


def config_text(config: PlannerConfig) -> str:
    """config.json: format, version and every field of the configuration."""
    content = {"format": FORMAT, "version": FORMAT_VERSION, "planner": dataclasses.asdict(config)}
    return json.dumps(content, indent=2) + "\n"


def model_card(planner: DiffusionDrive, digest: str, metrics: Mapping[str, Any] | None, origin: str) -> str:
    """README.md of a checkpoint folder."""
    config = planner.config
    total = sum(parameter.numel() for parameter in planner.parameters())
    camera, lidar = config.backbone.image_size, config.backbone.lidar_size
    seen = f"LiDAR histogram {lidar[0]}×{lidar[1]}" if config.backbone.lidar else "no LiDAR"
    lines = [
        f"# {config.name}",
        "",
        f"{_kind(config)}. {origin or 'Weights trained with this repository.'}",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {total:,} |",
        f"| input | camera {camera[0]}×{camera[1]} RGB in [0, 1], {seen}, status 8 |",
        f"| output | {config.modes} candidates of {config.poses} poses at 2 Hz, and a choice |",
        *_diffusion_rows(planner),
        f"| SHA-256 of {WEIGHTS_FILE} | `{digest}` |",
        "",
        "```python",
        "from diffusiondrive import DiffusionDrive",
        'planner = DiffusionDrive.from_pretrained("PATH OF THIS FOLDER")',
        "plan = planner(features)   # plan.trajectory (B, T, 3): x, y [m], heading [rad], ego frame",
        "```",
    ]
    if metrics:
        lines += ["", "## Measured", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in metrics.items())]
    return "\n".join(lines) + "\n"


def _kind(config: PlannerConfig) -> str:
    """What sort of planner it is, for people."""
    if config.denoiser == REGRESSION:
        return "Driving planner that regresses one trajectory (TransFuser, arXiv 2205.15997)"
    if not config.anchored:
        return "Diffusion-policy driving planner, a baseline of DiffusionDrive (arXiv 2411.15139)"
    if config.denoiser == UNET:
        return "Truncated-diffusion driving planner with a U-Net, a baseline of DiffusionDrive (arXiv 2411.15139)"
    return "Truncated-diffusion driving planner (DiffusionDrive, arXiv 2411.15139)"


def _diffusion_rows(planner: DiffusionDrive) -> list[str]:
    """Rows of the model card about schedule and anchors, where there are any."""
    if planner.config.denoiser == REGRESSION:
        return []
    rows = [f"| schedule | {planner.config.schedule.preset}, labels {', '.join(map(str, planner.schedule.labels))} |"]
    if planner.config.anchored:
        reach = planner.initial.anchors[:, -1].norm(dim=-1)
        rows.append(f"| anchors | end {reach.min():.1f} to {reach.max():.1f} m from the start |")
    return rows


def _read_config(file: Path, beside: Path | None) -> PlannerConfig:
    """Configuration from config.json in the folder, else from the header of the weights file."""
    if beside is not None and beside.is_file():
        source, text = beside, beside.read_text()
    else:
        with safe_open(str(file), framework="pt") as stored:
            source, text = file, (stored.metadata() or {}).get("config", "")
    try:
        content = json.loads(text)
        kind, version, planner = content["format"], content["version"], content["planner"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(source, "holds no planner configuration", remedy="not a checkpoint of a planner") from error
    if kind != FORMAT or version != FORMAT_VERSION:
        raise DataError(
            source, f"has format {kind} version {version}; this code reads {FORMAT} version {FORMAT_VERSION}"
        )
    return from_mapping(PlannerConfig, planner, source=str(source))


def _listed(names: tuple[str, ...]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
