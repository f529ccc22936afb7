"""The reference plan: PDM-Closed simulates its proposals, scores them against its own forecast and takes the best.

Progress is judged against this plan, so it has to be the published evaluators' plan and no better one. The numbered
steps of `plan_reference` are: roll out, simulate, score, choose, drive the choice on to 5 s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.pdm.dynamics import simulate
from navsim_eval.pdm.observation import Forecast
from navsim_eval.pdm.proposals import ProposalDriver, Proposals
from navsim_eval.pdm.types import MetricCache, StateIndex
from navsim_eval.scoring import SubScores, prepare, score_batch

SCORE_RESOLUTION = 1e-10  # float64 resolves UTM northings to 1e-9 m; a share of progress below that is rounding


@dataclass(frozen=True)
class ReferencePlan:
    """The chosen proposal and what it was chosen from.

    poses:     (51, 3) its open-loop poses at 10 Hz, global
    index:     of the chosen proposal (path · 5 + speed)
    proposals: all of them;  scores: what the metric says about their simulated states
    """

    poses: np.ndarray
    index: int
    proposals: Proposals
    scores: SubScores


def plan_reference(scene: MetricCache, speed_limit: float | None, forecast: Forecast) -> ReferencePlan:
    """Plan for a scene whose metric cache lacks only the reference plan (`reference_poses` is not looked at).

    speed_limit: of the starting lane [m/s], None where the map has none
    The scores are those of `scene.metric` with the forecast in place of the recorded future; history comfort counts as
    met. Raises DataError where the plan is not finite (a zero speed limit, for instance).
    """
    state = scene.initial_state
    driver = ProposalDriver(scene.centerline, state[StateIndex.POSE], state[StateIndex.VX], speed_limit, forecast)
    proposals = driver.drive()
    if not np.isfinite(proposals.progress).all():
        problem = f"the reference plan is not finite (speed limit {speed_limit})"
        raise DataError(scene.token, problem, field="map", remedy="check lane geometry and speed limit of the map")
    states = simulate(state, proposals.poses)
    imagined = replace(
        scene,
        observation=forecast.observation,
        reference_poses=proposals.poses[0],
        human_poses=None,
        history_states=None,
    )
    ignored = forecast.observation.tokens[forecast.ignored].tolist()
    scores = score_batch(prepare(imagined), states, ignored_tokens=ignored)
    index = first_best(scores.columns["score"].numpy())
    return ReferencePlan(driver.extend(proposals, index), index, proposals, scores)


def first_best(scores: np.ndarray) -> int:
    """Index of the first of the highest scores (P,), equal up to rounding: the same on every machine."""
    return int(np.argmax(scores >= scores.max() - SCORE_RESOLUTION))
