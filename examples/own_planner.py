"""Your own planner, judged beside the baselines: PDMS, worth of its candidates, report with pictures.

    python tools/make_city.py                     # once, unless you have NAVSIM's data
    python examples/own_planner.py data/city outputs/own_planner

The planner here drives on with the present speed and yaw rate, and offers to brake as well. A learned planner looks the
same: `plan` gets a batch of scenes, with histories, paths of their sensor files and nothing that it may not know.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.config import DataConfig
from navsim_eval.evaluate import CacheOf, EvaluateConfig, evaluate
from navsim_eval.planners import NUM_POSES, Planner, Plans, make_baseline
from navsim_eval.scene import FRAME_INTERVAL_S, Scene

BRAKING = (0.0, 1.0, 3.0)  # m/s², one candidate each
TIMES = FRAME_INTERVAL_S * np.arange(1, NUM_POSES + 1)


class ConstantTurn:
    """Candidates that keep the yaw rate of the last half second and brake as `BRAKING` says; the first is driven."""

    name = "constant_turn"

    def plan(self, scenes: Sequence[Scene]) -> Plans:
        candidates = np.stack([[arc(scene, braking) for braking in BRAKING] for scene in scenes])  # (B, M, 8, 3)
        logits = np.tile(-np.arange(len(BRAKING), dtype=np.float64), (len(scenes), 1))
        return Plans(candidates[:, 0], candidates, logits)

    def describe(self) -> dict[str, Any]:
        return {"kind": "example", "braking": BRAKING}


def arc(scene: Scene, braking: float) -> np.ndarray:
    """(8, 3) poses x, y [m], heading [rad] in the ego's frame, along a circle and slower until it stands."""
    speed = float(np.linalg.norm(scene.current.ego_velocity))
    turned = -scene.history_trajectory()[-2, 2]  # the past is seen from the present pose
    curvature = turned / max(FRAME_INTERVAL_S * speed, 1.0)
    driving = TIMES if braking == 0.0 else np.minimum(TIMES, speed / braking)
    length = speed * driving - 0.5 * braking * driving**2
    heading = curvature * length
    along = length * np.sinc(heading / (2 * np.pi))  # the chord of a circle's arc
    return np.column_stack([along * np.cos(heading / 2), along * np.sin(heading / 2), heading])


def make_planner(name: str, config: EvaluateConfig, cache_of: CacheOf) -> Planner:
    return ConstantTurn() if name == ConstantTurn.name else make_baseline(name, cache_of)


def main(city: Path, output: Path) -> None:
    config = EvaluateConfig(
        data=DataConfig(str(city), str(city / "maps")),
        planner=[ConstantTurn.name, "constant_velocity", "human"],
        split="test",
        modes=True,
        output_dir=str(output),
    )
    for run in evaluate(config, make_planner):
        modes = run.summary.get("modes")
        candidates = f", best of {modes['modes']} candidates {100 * modes['best']:.1f}" if modes else ""
        print(f"{run.planner}: PDMS {100 * run.summary['pdms']:.1f}{candidates}")
    print(f"written: {output}/report.html")


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    main(*folders, *[Path("data/city"), Path("outputs/own_planner")][len(folders) :])
