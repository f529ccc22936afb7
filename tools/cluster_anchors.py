"""Cluster human trajectories into the anchors of truncated diffusion, and report how well they cover human driving.

    python tools/cluster_anchors.py split=train
    python tools/cluster_anchors.py split=navtrain num=20 seed=1 output_dir=outputs/navtrain_anchors

Needs only the logs of the split. Writes anchors.npy (float32 (num, 8, 2), metres, ego frame, 0.5 … 4 s) and
coverage.json; prints the distance of human plans to their nearest anchor by command and speed.
"""

import sys
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from diffusiondrive.anchors import AnchorConfig, cluster_anchors, coverage, coverage_table, human_plans, write_anchors
from navsim_eval.command_line import run_tool
from navsim_eval.dataset import SceneDataset


def main(config: AnchorConfig) -> None:
    scenes = SceneDataset.from_config(config.data, config.split, workers=config.workers, progress=True)
    print(scenes.coverage)
    with tqdm(total=len(scenes), desc="human plans", unit=" scenes") as bar:
        plans = human_plans(scenes, bar.update)
    anchors = cluster_anchors(plans.trajectories, config.num, config.seed, config.restarts)
    rows = coverage(plans, anchors)
    path = write_anchors(Path(config.output_dir), anchors, rows, config)
    Console().print(coverage_table(rows))
    print(f"{len(anchors)} anchors from {len(plans.speeds)} plans: {path}")


if __name__ == "__main__":
    sys.exit(run_tool(main, AnchorConfig, "cluster_anchors", __doc__))
