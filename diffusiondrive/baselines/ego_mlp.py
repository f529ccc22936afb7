"""The blind baseline: a multi-layer perceptron from ego status to a trajectory (NAVSIM's ego-status MLP).

It sees velocity, acceleration and driving command, no sensor and no map: what it reaches, a split gives away for free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from navsim_eval.errors import DataError, UserError
from navsim_eval.files import atomic_write, sha256
from navsim_eval.planners import Plans
from navsim_eval.scene import Scene

MODEL_TYPE = "ego_mlp"


@dataclass
class EgoMLPConfig:
    """Size of the network and of its training (trajectory L1, Adam).

    hidden: width of the hidden layers; layers: how many;  num_poses: 8 poses at 2 Hz
    epochs, batch_size, learning_rate, seed: of `fit`
    """

    hidden: int = 512
    layers: int = 2
    num_poses: int = 8
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


class EgoStatusMLP(nn.Module):
    """status (B, 8) → trajectory (B, num_poses, 3): x, y [m], heading [rad], ego frame."""

    def __init__(self, config: EgoMLPConfig):
        super().__init__()
        self.config = config
        widths = [8, *[config.hidden] * config.layers]
        hidden = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.ReLU())]
        self.network = nn.Sequential(*hidden, nn.Linear(widths[-1], config.num_poses * 3))

    def forward(self, status: Tensor) -> Tensor:
        return self.network(status).unflatten(-1, (self.config.num_poses, 3))

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write `config.json` and `model.safetensors`; returns the folder."""
        folder = Path(folder)
        atomic_write(folder / "model.safetensors", lambda path: save_file(self.state_dict(), path))
        config = {"model_type": MODEL_TYPE, **asdict(self.config)}
        atomic_write(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> EgoStatusMLP:
        """Load strictly. Raises DataError when the folder does not hold such a model."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            if config.pop("model_type", None) != MODEL_TYPE:
                raise DataError(folder / "config.json", f"not '{MODEL_TYPE}'", field="model_type")
            model = cls(EgoMLPConfig(**config))
            model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(folder, f"not an ego-status MLP ({' '.join(str(error).split())})") from error
        return model.eval()


def ego_status(scene: Scene) -> np.ndarray:
    """(8,) float32: velocity x, y [m/s], acceleration x, y [m/s²] in the ego frame, command one-hot (4)."""
    frame = scene.current
    return np.concatenate([frame.ego_velocity, frame.ego_acceleration, frame.driving_command]).astype(np.float32)


def fit(
    scenes: Iterable[Scene], config: EgoMLPConfig | None = None, progress: Callable[[int, float], None] | None = None
) -> EgoStatusMLP:
    """Train on the human trajectories of `scenes`; sensors are never opened. Deterministic in (scenes, config).

    progress: called after every epoch with its number and mean loss. Raises UserError without any scene.
    """
    config = config or EgoMLPConfig()
    pairs = [(ego_status(scene), scene.human_trajectory(config.num_poses)) for scene in scenes]
    if not pairs:
        raise UserError("ego-status MLP: no scenes to train on")
    status = torch.from_numpy(np.stack([s for s, _ in pairs]))
    target = torch.from_numpy(np.stack([t for _, t in pairs]).astype(np.float32))

    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # initial weights
        model = EgoStatusMLP(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    steps = config.epochs * -(-len(status) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(config.epochs):
        total = 0.0
        for rows in torch.randperm(len(status), generator=generator).split(config.batch_size):
            loss = nn.functional.l1_loss(model(status[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        if progress:
            progress(epoch, total / len(status))
    return model.eval()


class EgoMLPPlanner:
    """The trained network as the evaluator knows planners."""

    def __init__(self, folder: Path | str):
        self.folder, self.name = Path(folder), MODEL_TYPE
        self.model = EgoStatusMLP.from_pretrained(folder)

    @torch.inference_mode()
    def plan(self, scenes: Sequence[Scene]) -> Plans:
        status = torch.from_numpy(np.stack([ego_status(scene) for scene in scenes]))
        return Plans(self.model(status).numpy())

    def describe(self) -> dict[str, Any]:
        return {"kind": MODEL_TYPE, "weights_sha256": sha256(self.folder / "model.safetensors")}
