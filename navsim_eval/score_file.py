"""Score trajectories that anybody made: one npz in, one table out, work spread over processes.

tokens, trajectories ─► jobs (neighbouring scenes of a log) ─► metric cache, score ─► one table in input order
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from navsim_eval import selfcheck
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import Workers, describe_error, run_jobs
from navsim_eval.formats.splits import find_split
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.metrics.aggregate import METRICS, table_columns
from navsim_eval.score_table import ScoreTable, check_writable
from navsim_eval.scoring import prepare, score

_TRAJECTORIES_PER_JOB = 2048
_SCENES_PER_JOB = 32
_LISTED = 10

# Opens a progress display for so many scenes: a context manager that gives a function to be told how many are done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class ScoreConfig:
    """What to score, and where the table goes.

    trajectories: npz with tokens (S,) str and trajectories (S, N, T, 3): x, y [m], heading [rad] in the ego frame now,
                  0.5 s apart, the first one at 0.5 s (NAVSIM: T = 8)
    split:        a published split, or a folder under navsim_logs/; its logs have to hold every token
    metric:       pdms_v1 or epdms_v2
    output:       .csv or .parquet; empty: <output_dir>/scores.csv
    output_dir:   empty: $NAVSIM_EXP_ROOT/score, else outputs/score
    metric_cache: folder of metric caches made by tools/cache.py; empty: computed here
    workers:      processes (0: one per core)
    executor:     local, or ray for several machines;  ray_address: see `navsim_eval.executor.Workers`
    """

    data: DataConfig = field(default_factory=DataConfig)
    trajectories: str = ""
    split: str = "test"
    metric: str = "pdms_v1"
    output: str = ""
    output_dir: str = ""
    metric_cache: str = ""
    workers: int = 0
    executor: str = "local"
    ray_address: str = ""

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or os.environ.get("NAVSIM_EXP_ROOT", "outputs") + "/score"
        self.output = self.output or str(Path(self.output_dir) / "scores.csv")
        Workers.of(self)
        if not self.trajectories:
            raise UserError("trajectories=FILE.npz is missing: the file to score (tokens, trajectories)")
        if self.metric not in METRICS:
            raise UserError(f"metric='{self.metric}' is unknown; choose from {', '.join(METRICS)}")
        check_writable(self.output)


@dataclass(frozen=True)
class FileScores:
    """The table of all S × N rows in the order of the file, and why scenes (tokens) have no scores in it."""

    table: ScoreTable
    scenes: int
    failures: dict[str, str]

    @property
    def verdict(self) -> str:
        scored = self.scenes - len(self.failures)
        return "complete" if not self.failures else f"partial: {scored} of {self.scenes}"


def score_file(config: ScoreConfig, progress: Progress | None = None) -> FileScores:
    """Score a file of trajectories and write the table. `progress(total)` opens a display (see `Progress`).

    Raises UserError for a wrong configuration or file and for tokens that the split's logs do not hold. A scene that
    cannot be read or scored does not raise: its rows are invalid and NaN, and it is named in `failures`.
    """
    selfcheck.require_sound()
    tokens, trajectories = read_trajectories(config.trajectories)
    dataset, unreadable = _dataset_of(config, tokens)
    caches = MetricCaches(config.data, dataset, config.metric, config.metric_cache or None)
    with (progress or _silent)(len(dataset)) as advance:
        columns, failures = score_scenes(caches, tokens, trajectories, Workers.of(config), advance)
    count = trajectories.shape[1]
    logs = [dataset.log_of(token) if token in dataset else "" for token in tokens]
    table = ScoreTable(
        metric=config.metric,
        tokens=np.repeat(np.array(tokens, str), count),
        log_names=np.repeat(np.array(logs, str), count),
        proposals=np.tile(np.arange(count), len(tokens)),
        valid=np.isfinite(columns["score"]).ravel(),
        columns={name: values.ravel() for name, values in columns.items()},
    )
    table.save(config.output)
    return FileScores(table, len(tokens), {**unreadable, **failures})


def _silent(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def read_trajectories(path: Path | str) -> tuple[list[str], np.ndarray]:
    """Tokens (S,) and trajectories (S, N, T, 3) of an npz. Raises DataError for anything else."""
    remedy = "an npz holds tokens (S,) str and trajectories (S, N, 8, 3) float"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            absent = [name for name in ("tokens", "trajectories") if name not in arrays]
            if absent:
                raise DataError(path, "missing", field=absent[0], remedy=remedy)
            tokens, trajectories = arrays["tokens"], arrays["trajectories"]
    except FileNotFoundError as error:
        raise DataError(path, "there is no such file", remedy="check trajectories=") from error
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(path, f"not a readable npz ({error})", remedy=remedy) from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "US" or not len(tokens):
        raise DataError(path, f"{tokens.dtype} {tokens.shape}", field="tokens", remedy=remedy)
    shape = trajectories.shape
    if trajectories.dtype.kind != "f" or len(shape) != 4 or shape[0] != len(tokens) or shape[3] != 3 or 0 in shape:
        problem = f"{trajectories.dtype} {shape} for {len(tokens)} tokens"
        raise DataError(path, problem, field="trajectories", remedy=remedy)
    names = tokens.astype(str).tolist()
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        remedy = "one row a scene; put its proposals along the second axis of trajectories"
        raise DataError(path, f"{repeated} comes more than once", field="tokens", remedy=remedy)
    return names, trajectories


def _dataset_of(config: ScoreConfig, tokens: list[str]) -> tuple[SceneDataset, dict[str, str]]:
    """The scenes of the tokens, and the tokens that may lie in logs that cannot be read, with the reason."""
    find_split(config.split, config.data.root, config.data.filters)
    try:
        dataset = SceneDataset.from_config(config.data, config.split, tokens=tokens)
    except UserError as error:
        raise UserError(f"{config.trajectories}: none of its scenes is there ({_listed(tokens)}): {error}") from error
    missing, broken = dataset.coverage.tokens_missing, dataset.coverage.logs_broken
    if missing and not broken:
        where = f"the logs of split {config.split} under {config.data.root} do not hold"
        raise UserError(f"{config.trajectories}: {where} {len(missing)} of {len(tokens)} tokens: {_listed(missing)}")
    return dataset, dict.fromkeys(missing, f"in no readable log; {broken[0][1]}" if broken else "")


def _listed(tokens: list[str] | tuple[str, ...]) -> str:
    more = f", … ({len(tokens) - _LISTED} more)" if len(tokens) > _LISTED else ""
    return ", ".join(tokens[:_LISTED]) + more


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

    def __call__(self, job: _Job) -> tuple[list[str], dict[str, np.ndarray], dict[str, str]]:
        failures, rows, prepared = {}, [], []
        for row, token in enumerate(job.tokens):
            try:
                prepared.append(prepare(self.caches[token]))
                rows.append(row)
            except Exception as error:  # one odd scene must not take its neighbours along; it is counted and named
                failures[token] = describe_error(error)
        if not rows:
            return [], {}, failures
        table = score(prepared, job.trajectories[rows], metric=self.caches.metric)
        columns = {name: values.reshape(len(rows), -1) for name, values in table.columns.items()}
        return [job.tokens[row] for row in rows], columns, failures


def score_scenes(
    caches: MetricCaches,
    tokens: list[str],
    trajectories: np.ndarray,
    workers: int | Workers = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Score trajectories (S, N, T, 3) of scenes given by token, in parallel.

    Returns columns {name: (S, N)} in input order, NaN for scenes that failed or that the data set does not hold, and
    the reasons of failures by token. `progress` is told how many scenes are newly finished.
    """
    row_of = {token: row for row, token in enumerate(tokens)}
    known = [token for token in caches.dataset.tokens if token in row_of]
    count = trajectories.shape[1]
    columns = {name: np.full((len(tokens), count), np.nan) for name in table_columns(caches.metric)}
    failures: dict[str, str] = {}
    jobs = list(_job_tokens(caches, known, count))
    items = (_Job(names, trajectories[[row_of[name] for name in names]], context) for names, context in jobs)
    for (names, context), outcome in zip(jobs, run_jobs(_Scorer(caches), items, workers=workers), strict=True):
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


def _job_tokens(caches: MetricCaches, tokens: list[str], count: int) -> Iterator[tuple[list[str], int]]:
    """Runs of scenes of one log; where neighbours are paired, those that may precede the first come along."""
    dataset, pairs = caches.dataset, caches.metric == "epdms_v2"
    at_most = int(np.clip(_TRAJECTORIES_PER_JOB // count, 1, _SCENES_PER_JOB))
    start = 0
    while start < len(tokens):
        log, stop = dataset.log_of(tokens[start]), start + 1
        while stop < len(tokens) and stop - start < at_most and dataset.log_of(tokens[stop]) == log:
            stop += 1
        context = int(pairs and start > 0 and dataset.log_of(tokens[start - 1]) == log)
        yield tokens[start - context : stop], context
        start = stop
