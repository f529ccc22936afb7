"""Train the blind baseline: ego status (velocity, acceleration, command) to a trajectory, no sensor, no map.

    python tools/train_ego_mlp.py                                  # on the synthetic city's training split
    python tools/train_ego_mlp.py split=navtrain output_dir=outputs/navtrain_ego_mlp

Needs only the logs of the split; seconds on one core. Then: python tools/evaluate.py planner=outputs/ego_mlp
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from tqdm import tqdm

from diffusiondrive.baselines.ego_mlp import EgoMLPConfig, fit
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset


@dataclass
class Config:
    """What to train on, and how."""

    data: DataConfig = field(default_factory=DataConfig)
    mlp: EgoMLPConfig = field(default_factory=EgoMLPConfig)
    split: str = "train"
    output_dir: str = "outputs/ego_mlp"


def main(config: Config) -> None:
    scenes = SceneDataset.from_config(config.data, config.split)
    with tqdm(total=config.mlp.epochs, unit="epoch", delay=0.1) as bar:

        def show(_: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(l1=f"{loss:.3f}")

        model = fit(scenes, config.mlp, show)
    print(f"planner: {model.save_pretrained(config.output_dir)}")


if __name__ == "__main__":
    sys.exit(run_tool(main, Config, "train_ego_mlp", __doc__))
