"""Score trajectories that anybody made: PDMS or EPDMS sub-scores for every one of them.

    python tools/score.py trajectories=plans.npz split=test
    python tools/score.py trajectories=plans.npz split=navtest data=navsim metric=epdms_v2 output=scores.parquet
    python tools/score.py trajectories=plans.npz split=navhard_two_stage data=navsim metric=epdms_v2   # both stages
    python tools/score.py trajectories=plans.npz split=test metric=epdms_v2 traffic=reactive
    python tools/score.py trajectories=plans.npz split=test expected=theirs.csv                # do we agree with them?
    python tools/score.py trajectories=plans.npz data.root=/data/navsim data.maps=/data/maps split=mini workers=8

plans.npz holds tokens (S,) str and trajectories (S, N, 8, 3): N proposals for each of S scenes, x and y in metres and
heading in radians, in the ego frame (rear axle) of the scene's current frame, at 0.5, 1.0, … 4.0 s. A predictions.npz
of tools/evaluate.py fits. Each proposal is scored for itself; under epdms_v2, proposal k of all scenes is one planner,
whose plans in neighbouring scenes are compared (extended comfort). Where the split lists second-stage scenes, the file
holds plans for both stages; their aggregate goes to two_stage.json beside the table.

Writes one row for every scene and proposal: token, log_name, proposal, valid, sub-scores, score (fractions).
A proposal with numbers that are not finite, or in a scene that cannot be scored, gets an invalid row without scores.
With expected=FILE the scores are also held against those in the file, sub-score by sub-score; the tool fails when any
differs by more than tolerance=1e-6.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from navsim_eval.command_line import run_tool
from navsim_eval.errors import UserError
from navsim_eval.score_file import ScoreConfig, score_file

STAGES = ("stage one", "stage two", "combined")


@contextmanager
def bar(total: int) -> Iterator:
    with tqdm(total=total, desc="scoring", unit="scene") as shown:
        yield shown.update


def main(config: ScoreConfig) -> None:
    scores = score_file(config, bar)
    for name, value in scores.table.mean().items():
        print(f"{name:<42} {value:.4f}")
    table = scores.table
    for proposal, scored in enumerate(scores.two_stage):
        parts = (scored.stage_one, scored.stage_two, scored.combined)
        shown = ", ".join(f"{name} {part['score']:.4f}" for name, part in zip(STAGES, parts, strict=True))
        print(f"proposal {proposal}: {shown}")
    print(f"mean over {int(table.valid.sum())} of {len(table)} trajectories; {scores.verdict} scenes")
    for token, reason in list(scores.failures.items())[:5]:
        print(f"not scored: {token}: {reason}")
    print(f"written: {config.output}")
    if scores.agreement:
        print(scores.agreement)
        if scores.agreement.differing:
            raise UserError(f"expected={config.expected}: {scores.agreement.differing} values differ")


if __name__ == "__main__":
    sys.exit(run_tool(main, ScoreConfig, "score", __doc__))
