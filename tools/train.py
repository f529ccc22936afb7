"""Train a planner.

    python tools/train.py                                        # city_nano on the synthetic city, any machine
    python tools/train.py experiment=navtrain_reference          # the published recipe on NAVSIM
    python tools/train.py model=diffusiondrive loss=published optimizer=gpu trainer=gpu data.root=data/large cache=CACHE
    python tools/train.py output_dir=outputs/run7                # again after a kill: goes on exactly where it was

A run leaves in output_dir: config.yaml (resolved), environment.json, metrics.jsonl, tensorboard/, last.ckpt, best.ckpt
(by validation PDMS), and planner/, the self-contained folder that tools/evaluate.py and
`DiffusionDrive.from_pretrained` load. Feature and metric caches come from tools/cache.py; without them, samples are
made from raw data on the fly.
"""

from __future__ import annotations

import sys

from diffusiondrive.training.config import TrainConfig
from diffusiondrive.training.train import train
from navsim_eval.command_line import run_tool


def main(config: TrainConfig) -> None:
    folder = train(config)
    print(f"planner: {folder}")


if __name__ == "__main__":
    sys.exit(run_tool(main, TrainConfig, "train", __doc__))
