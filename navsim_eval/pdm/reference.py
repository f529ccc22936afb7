"""The reference plan: PDM-Closed simulates its proposals, scores them against its own forecast and takes the best.

Progress is judged against this plan, so it has to be the published evaluators' plan and no better one. The numbered
steps of `plan_references` are: roll out, simulate, score, choose, drive the choice on to 5 s. All of them work on many
scenes at once, which do not influence each other: with fifteen rows a scene, most of the time of a single one would go
into calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.geometry import Vehicle
from navsim_eval.pdm.dynamics import simulate
from navsim_eval.pdm.observation import Forecast
from navsim_eval.pdm.proposals import ProposalDriver, Proposals, Start
from navsim_eval.pdm.types import MetricCache, StateIndex
from navsim_eval.scoring import SubScores, compare_states, prepare

SCORE_RESOLUTION = 1e-10  # float64 resolves UTM northings to 1e-9 m; a share of progress below that is rounding


@dataclass(frozen=True)
class PlanningTask:
    """A scene to plan in.

    scene:       its metric cache, which lacks only the reference plan (`reference_poses` is not looked at)
    speed_limit: of the starting lane [m/s], None where the map has none
    """

    scene: MetricCache
    speed_limit: float | None
    forecast: Forecast

    @property
    def start(self) -> Start:
        """What the proposals start from."""
        state = self.scene.initial_state
        pose, speed = state[StateIndex.POSE], state[StateIndex.VX]
        return Start(self.scene.centerline, pose, speed, self.speed_limit, self.forecast)


@dataclass(frozen=True)
class ReferencePlan:
    """The chosen proposal and what it was chosen from.

    poses:     (51, 3) its open-loop poses at 10 Hz, global
    index:     of the chosen proposal (path · 5 + speed)
    proposals: all of them, of this scene;  scores: what the metric says about their simulated states
    """

    poses: np.ndarray
    index: int
    proposals: Proposals
    scores: SubScores


def plan_references(tasks: Sequence[PlanningTask]) -> list[ReferencePlan]:
    """Plan for scenes of one metric, each as if it were alone.

    The scores are those of the metric with the forecast in place of the recorded future; history comfort counts as met.
    Raises DataError where a plan is not finite (a zero speed limit, for instance).
    """
    driver = ProposalDriver([task.start for task in tasks])
    proposals = driver.drive()
    for task, progress in zip(tasks, proposals.progress, strict=True):
        if not np.isfinite(progress).all():
            problem = f"the reference plan is not finite (speed limit {task.speed_limit})"
            remedy = "check lane geometry and speed limit of the map"
            raise DataError(task.scene.token, problem, field="map", remedy=remedy)
    initial_states = np.stack([task.scene.initial_state for task in tasks])
    states = simulate(initial_states[:, None], proposals.poses)
    extents = np.abs(states.numpy() - initial_states[:, None, None])[..., :2].max(axis=(1, 2, 3)) + Vehicle.LENGTH
    imagined = [
        prepare(_imagined(task, poses[0]), extent)
        for task, poses, extent in zip(tasks, proposals.poses, extents, strict=True)
    ]
    ignored = [task.forecast.observation.tokens[task.forecast.ignored].tolist() for task in tasks]
    scores = compare_states(imagined, states, ignored)
    chosen = np.array([first_best(row) for row in scores.columns["score"].numpy()])
    plans = driver.extend(proposals, chosen)
    return [
        ReferencePlan(plan, int(index), proposals.of_scene(k), scores.select(k))
        for k, (plan, index) in enumerate(zip(plans, chosen, strict=True))
    ]


def _imagined(task: PlanningTask, poses: np.ndarray) -> MetricCache:
    """The scene as the planner expects it to go on; any poses do for its reference plan."""
    observation = task.forecast.observation
    return replace(task.scene, observation=observation, reference_poses=poses, human_poses=None, history_states=None)


def first_best(scores: np.ndarray) -> int:
    """Index of the first of the highest scores (P,), equal up to rounding: the same on every machine."""
    return int(np.argmax(scores >= scores.max() - SCORE_RESOLUTION))
