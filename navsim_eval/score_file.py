"""Score trajectories that anybody made: one npz in, one table out, work spread over processes.

tokens, trajectories ─► jobs (neighbouring scenes of a log) ─► metric cache, score ─► one table in input order
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from navsim_eval import selfcheck
from navsim_eval.agreement import TOLERANCE, Agreement, hold_against
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import Workers
from navsim_eval.files import read_npz
from navsim_eval.metric_caches import MetricCaches, store_folder
from navsim_eval.metrics.aggregate import METRICS, table_columns
from navsim_eval.metrics.two_stage import TwoStageScores
from navsim_eval.pseudo_simulation import Protocol, choose_protocol, score_two_stages, split_of
from navsim_eval.results import save_json
from navsim_eval.score_scenes import score_scenes
from navsim_eval.score_table import ScoreTable, check_writable
from navsim_eval.two_stage_dataset import TwoStageDataset

_LISTED = 10

# Opens a progress display for so many scenes: a context manager that gives a function to be told how many are done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class ScoreConfig:
    """What to score, and where the table goes.

    trajectories: npz with tokens (S,) str and trajectories (S, N, T, 3): x, y [m], heading [rad] in the ego frame now,
                  0.5 s apart, the first one at 0.5 s (NAVSIM: T = 8)
    split:        a published split, or a folder under navsim_logs/; its logs have to hold every token
    metric:       pdms_v1, epdms_v2, or epdms_v2_unfixed_filter (EPDMS as published before its human filter was mended)
    stages:       1, 2, or 0: two under EPDMS where the split lists second-stage scenes; the file then holds the
                  trajectories of both stages, and two_stage.json beside the table the aggregate of each proposal
    traffic:      non_reactive (replayed), reactive (EPDMS only), or empty: reactive in two stages, else replayed
    expected:     scores that ours are held against, value by value (see `navsim_eval.agreement`): .npz, .csv, .parquet;
                  the verdict goes to agreement.json beside the table
    tolerance:    largest absolute difference that still counts as equal
    output:       .csv or .parquet; empty: <output_dir>/scores.csv
    output_dir:   empty: $NAVSIM_EXP_ROOT/score, else outputs/score
    metric_cache: folder of metric caches (made by tools/cache.py or tools/evaluate.py), one sub-folder a metric; empty:
                  computed here
    workers:      processes (0: one per core)
    executor:     local, or ray for several machines;  ray_address: see `navsim_eval.executor.Workers`
    """

    data: DataConfig = field(default_factory=DataConfig)
    trajectories: str = ""
    split: str = "test"
    metric: str = "pdms_v1"
    stages: int = 0
    traffic: str = ""
    expected: str = ""
    tolerance: float = TOLERANCE
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
        if self.expected and not Path(self.expected).is_file():
            raise UserError(f"expected={self.expected}: there is no such file")


@dataclass(frozen=True)
class FileScores:
    """The table of all S × N rows in the order of the file, and why scenes (tokens) have no scores in it.

    two_stage: the aggregate of each of the N proposals, where there are two stages
    agreement: with the expected scores, where some were given
    """

    table: ScoreTable
    scenes: int
    failures: dict[str, str]
    protocol: Protocol
    two_stage: list[TwoStageScores] = field(default_factory=list)
    agreement: Agreement | None = None

    @property
    def verdict(self) -> str:
        scored = self.scenes - len(self.failures)
        return "complete" if not self.failures else f"partial: {scored} of {self.scenes}"


def score_file(config: ScoreConfig, progress: Progress | None = None) -> FileScores:
    """Score a file of trajectories and write the table. `progress(total)` opens a display (see `Progress`).

    Raises UserError for a wrong configuration or file and for tokens that the split's logs do not hold. A scene that
    cannot be read or scored does not raise: its rows are invalid and NaN, and it is named in `failures`.
    """
    protocol = choose_protocol(config.metric, split_of(config.data, config.split), config.stages, config.traffic)
    workers = Workers.of(config)
    selfcheck.require_sound()
    tokens, trajectories = read_trajectories(config.trajectories)
    folder = store_folder(config.metric_cache, config.metric) if config.metric_cache else None
    dataset, unreadable = _dataset_of(config, tokens, protocol)
    caches = MetricCaches(config.data, dataset, config.metric, folder)
    two_stage: list[TwoStageScores] = []
    with (progress or _silent)(len(dataset)) as advance:
        if protocol.stages == 2:
            row_of = {token: row for row, token in enumerate(tokens)}
            rows = [row_of[token] for token in dataset.tokens]
            found, failures, two_stage = score_two_stages(caches, trajectories[rows], protocol, workers, advance)
            columns = {name: np.full(trajectories.shape[:2], np.nan) for name in table_columns(config.metric)}
            for name in columns:
                columns[name][rows] = found[name]
        else:
            columns, failures = score_scenes(caches, tokens, trajectories, workers, advance, protocol.judging)
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
    if two_stage:
        proposals = [scored.as_dict() for scored in two_stage]
        content = {"metric": config.metric, "split": config.split, "traffic": protocol.traffic, "proposals": proposals}
        save_json(Path(config.output).with_name("two_stage.json"), content)
    agreement = hold_against(table, config.expected, config.tolerance) if config.expected else None
    if agreement:
        save_json(Path(config.output).with_name("agreement.json"), agreement.as_dict())
    return FileScores(table, len(tokens), {**unreadable, **failures}, protocol, two_stage, agreement)


def _silent(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def read_trajectories(path: Path | str) -> tuple[list[str], np.ndarray]:
    """Tokens (S,) and trajectories (S, N, T, 3) of an npz. Raises DataError for anything else."""
    remedy = "an npz holds tokens (S,) str and trajectories (S, N, 8, 3) float"
    try:
        arrays = read_npz(path, remedy, ("tokens", "trajectories"))
    except FileNotFoundError as error:
        raise DataError(path, "there is no such file", remedy="check trajectories=") from error
    if absent := [name for name in ("tokens", "trajectories") if name not in arrays]:
        raise DataError(path, "missing", field=absent[0], remedy=remedy)
    tokens, trajectories = arrays["tokens"], arrays["trajectories"]
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


def _dataset_of(
    config: ScoreConfig, tokens: list[str], protocol: Protocol
) -> tuple[SceneDataset | TwoStageDataset, dict[str, str]]:
    """The scenes of the tokens, and the tokens that may lie in logs that cannot be read, with the reason."""
    try:
        if protocol.stages == 2:
            dataset = TwoStageDataset.from_config(config.data, config.split, tokens=tokens)
        else:
            dataset = SceneDataset.from_config(config.data, config.split, tokens=tokens)
    except UserError as error:
        raise UserError(f"{config.trajectories}: none of its scenes is there ({_listed(tokens)}): {error}") from error
    if protocol.stages == 2:
        absent = [token for token in dataset.tokens if token not in set(tokens)]
        if absent:
            problem = f"two stages need all scenes of a group; {len(absent)} are not in the file: {_listed(absent)}"
            raise UserError(f"{config.trajectories}: {problem}")
    missing, broken = [token for token in tokens if token not in dataset], dataset.coverage.logs_broken
    if missing and not broken:
        where = f"the logs of split {config.split} under {config.data.root} do not hold"
        raise UserError(f"{config.trajectories}: {where} {len(missing)} of {len(tokens)} tokens: {_listed(missing)}")
    return dataset, dict.fromkeys(missing, f"in no readable log; {broken[0][1]}" if broken else "")


def _listed(tokens: list[str] | tuple[str, ...]) -> str:
    more = f", … ({len(tokens) - _LISTED} more)" if len(tokens) > _LISTED else ""
    return ", ".join(tokens[:_LISTED]) + more
