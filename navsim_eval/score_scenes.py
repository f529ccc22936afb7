"""Scenes and trajectories → sub-scores, in parallel: jobs of neighbouring scenes of one log.

tokens, trajectories ─► jobs ─► metric cache, score ─► columns in input order
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from navsim_eval.dataset import SceneDataset
from navsim_eval.executor import Workers, describe_error, run_jobs
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.metrics.aggregate import table_columns
from navsim_eval.pdm.types import SIMULATION_STEPS
from navsim_eval.scoring import prepare, score
from navsim_eval.traffic import NON_REACTIVE
from navsim_eval.two_stage_dataset import TwoStageDataset

_TRAJECTORIES_PER_JOB = 2048
_SCENES_PER_JOB = 32

# What the aggregation of two stages needs of every trajectory beyond its sub-scores, and the shape of it.
STAGE_DETAILS = {"motion": (2, SIMULATION_STEPS + 1), "start_pose": (3,), "start_time": ()}


@dataclass(frozen=True)
class Judging:
    """How scenes are scored; arguments of `scoring.score`."""

    metric: str
    traffic: str = NON_REACTIVE
    pair_scenes: bool = True


@dataclass(frozen=True)
class _Job:
    """Neighbouring scenes of one log; the first `context` of them only serve metrics that pair neighbours."""

    tokens: list[str]
    trajectories: np.ndarray
    context: int


@dataclass(frozen=True)
class _Scorer:
    """What a worker does with a job: (tokens of the scenes scored, {name: (n, N)}, failures {token: reason})."""

    caches: MetricCaches
    judging: Judging

    def __call__(self, job: _Job) -> tuple[list[str], dict[str, np.ndarray], dict[str, str]]:
        failures, rows, prepared = {}, [], []
        try:
            made = self.caches.made_together(job.tokens)
        except Exception:  # some scene is odd: each by itself below, which tells who
            made = {}
        for row, token in enumerate(job.tokens):
            try:
                prepared.append(prepare(made[token] if token in made else self.caches[token]))
                rows.append(row)
            except Exception as error:  # one odd scene must not take its neighbours along; it is counted and named
                failures[token] = describe_error(error)
        if not rows:
            return [], {}, failures
        table = score(prepared, job.trajectories[rows], **asdict(self.judging))
        columns = {name: values.reshape(len(rows), -1) for name, values in table.columns.items()}
        if not self.judging.pair_scenes:
            shape = job.trajectories[rows].shape[:2]
            columns |= {name: table.details[name].reshape(*shape, *STAGE_DETAILS[name]) for name in STAGE_DETAILS}
        return [job.tokens[row] for row in rows], columns, failures


def score_scenes(
    caches: MetricCaches,
    tokens: list[str],
    trajectories: np.ndarray,
    workers: int | Workers = 0,
    progress: Callable[[int], None] | None = None,
    judging: Judging | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Score trajectories (S, N, T, 3) of scenes given by token, in parallel.

    judging: metric, traffic, and whether neighbouring scenes are paired; default: the metric of the caches, replayed
    Returns columns {name: (S, N)} in input order, NaN for scenes that failed or that the data set does not hold, and
    the reasons of failures by token. Without pairing, columns also hold `STAGE_DETAILS`, (S, N, …). `progress` is told
    how many scenes are newly finished.
    """
    judging = judging or Judging(caches.metric)
    row_of = {token: row for row, token in enumerate(tokens)}
    known = [token for token in caches.dataset.tokens if token in row_of]
    count = trajectories.shape[1]
    columns = {name: np.full((len(tokens), count), np.nan) for name in table_columns(judging.metric)}
    if not judging.pair_scenes:
        columns |= {name: np.full((len(tokens), count, *shape), np.nan) for name, shape in STAGE_DETAILS.items()}
    failures: dict[str, str] = {}
    jobs = list(_job_tokens(caches.dataset, known, count, judging.pair_scenes and caches.metric == "epdms_v2"))
    items = (_Job(names, trajectories[[row_of[name] for name in names]], context) for names, context in jobs)
    for (names, context), outcome in zip(jobs, run_jobs(_Scorer(caches, judging), items, workers=workers), strict=True):
        mine = names[context:]
        if outcome.ok:
            scored, values, failed = outcome.value
            failures |= {token: failed[token] for token in mine if token in failed}
            kept = [index for index, token in enumerate(scored) if token not in names[:context]]
            for name in values:
                columns[name][[row_of[scored[index]] for index in kept]] = values[name][kept]
        else:
            failures |= dict.fromkeys(mine, outcome.error)
        if progress:
            progress(len(mine))
    return columns, failures


def _job_tokens(
    dataset: SceneDataset | TwoStageDataset, tokens: list[str], count: int, pairs: bool
) -> Iterator[tuple[list[str], int]]:
    """Runs of scenes of one log; where neighbours are paired, those that may precede the first come along."""
    at_most = int(np.clip(_TRAJECTORIES_PER_JOB // count, 1, _SCENES_PER_JOB))
    start = 0
    while start < len(tokens):
        log, stop = dataset.log_of(tokens[start]), start + 1
        while stop < len(tokens) and stop - start < at_most and dataset.log_of(tokens[stop]) == log:
            stop += 1
        context = int(pairs and start > 0 and dataset.log_of(tokens[start - 1]) == log)
        yield tokens[start - context : stop], context
        start = stop
