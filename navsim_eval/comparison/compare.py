"""What changed from result A to result B: paired by token, every difference with two intervals.

    read A, read B ─► pair by token ─► mean differences, intervals over tokens and over logs ─► flips, biggest changes

Differences are B − A throughout; scores are fractions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from navsim_eval.comparison.bootstrap import paired_interval
from navsim_eval.comparison.read import STAGES, TWO_STAGE, TokenScores, read_scores
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.metrics.aggregate import MULTIPLIERS

_FEWEST_RESAMPLES = 200


@dataclass
class CompareConfig:
    """Two results of the same scenes; differences are B − A.

    a, b:      result files or their folders (tools/evaluate.py, tools/score.py, NAVSIM's CSV)
    metric:    where a folder holds results under several: which one
    a_proposal, b_proposal: which trajectory of each scene, for tables that hold several (-1: there is one)
    split:     reads the names of the logs from data.root, where neither file tells them (NAVSIM's CSV does not)
    resamples, level, seed: of the bootstrap
    listed:    how many of the biggest losses and gains
    output_dir: comparison.json and comparison.html (empty: $NAVSIM_EXP_ROOT/compare, else outputs/compare)
    """

    data: DataConfig = field(default_factory=DataConfig)
    a: str = ""
    b: str = ""
    metric: str = ""
    a_proposal: int = -1
    b_proposal: int = -1
    split: str = ""
    resamples: int = 10_000
    level: float = 0.95
    seed: int = 0
    listed: int = 10
    output_dir: str = ""

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or os.environ.get("NAVSIM_EXP_ROOT", "outputs") + "/compare"
        if not self.a or not self.b:
            raise UserError("two results are needed: a=PATH b=PATH")
        if self.resamples < _FEWEST_RESAMPLES:
            raise UserError(f"resamples={self.resamples}: the least is {_FEWEST_RESAMPLES}")
        if not 0.5 <= self.level < 1.0:
            raise UserError(f"level={self.level}: a share in [0.5, 1), for example 0.95")


@dataclass(frozen=True)
class Difference:
    """One column: means over the `pairs` scenes where both sides have it, B − A, bounds over tokens and over logs."""

    name: str
    pairs: int
    mean_a: float
    mean_b: float
    difference: float
    by_token: tuple[float, float]
    by_log: tuple[float, float] | None

    @property
    def interval(self) -> tuple[float, float]:
        """The more honest of the two: over logs where they are known."""
        return self.by_log or self.by_token

    @property
    def verdict(self) -> int:
        """1: B is higher, -1: lower, 0: the interval holds zero or is not defined."""
        low, high = self.interval
        return int(low > 0.0) - int(high < 0.0)


@dataclass(frozen=True)
class Flip:
    """Scenes in which a factor of the score went to zero, or came back from it."""

    name: str
    to_zero: tuple[str, ...]
    from_zero: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A scene whose score changed; `columns`: sub-scores that differ, (A, B)."""

    token: str
    log: str
    a: float
    b: float
    columns: dict[str, tuple[float, float]]

    @property
    def difference(self) -> float:
        return self.b - self.a


@dataclass(frozen=True)
class Comparison:
    """The whole answer.

    pairs:    scenes that both sides scored;  logs: number of their logs, None where some are unknown
    only_a, only_b: tokens of one side alone;  unscored_a, unscored_b: tokens of both, without a score on that side
    closing:  NAVSIM's own totals that both files hold: name → (A, B)
    """

    a: TokenScores
    b: TokenScores
    pairs: int
    logs: int | None
    level: float
    resamples: int
    seed: int
    differences: tuple[Difference, ...]
    flips: tuple[Flip, ...]
    losses: tuple[Change, ...]
    gains: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    unscored_a: tuple[str, ...]
    unscored_b: tuple[str, ...]
    closing: dict[str, tuple[float, float]]
    notes: tuple[str, ...]


def compare_files(config: CompareConfig) -> Comparison:
    """Read both sides, find out the logs, compare. Raises UserError as `read_scores` and `compare` do."""
    a = read_scores(config.a, config.metric, config.a_proposal)
    b = read_scores(config.b, config.metric, config.b_proposal)
    logs = None
    if config.split:
        dataset = SceneDataset.from_config(config.data, config.split, tokens=sorted({*a.tokens, *b.tokens}))
        logs = {token: dataset.log_of(token) for token in dataset.tokens}
    return compare(a, b, logs, resamples=config.resamples, level=config.level, seed=config.seed, listed=config.listed)


def compare(
    a: TokenScores,
    b: TokenScores,
    log_of: dict[str, str] | None = None,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    listed: int = 10,
) -> Comparison:
    """Compare two results of the same scenes.

    log_of: token → log, for scenes whose log neither side knows

    Raises UserError for different metrics or splits, and where no scene was scored by both.
    """
    _refuse_strangers(a, b)
    row_a, row_b = ({token: row for row, token in enumerate(side.tokens.tolist())} for side in (a, b))
    shared = [token for token in row_a if token in row_b]
    if not shared:
        raise UserError(f"no token is in both {a.source} and {b.source}: these are results of different scenes")
    rows_a, rows_b = [row_a[token] for token in shared], [row_b[token] for token in shared]
    names = [name for name in a.columns if name in b.columns]
    values_a, values_b = (
        np.column_stack([side.columns[name][rows] for name in names]) for side, rows in ((a, rows_a), (b, rows_b))
    )
    is_score = np.array([name.startswith("score") for name in names])
    scored_a, scored_b = (np.isfinite(values[:, is_score]).any(axis=1) for values in (values_a, values_b))
    both = scored_a & scored_b
    if not both.any():
        raise UserError(f"of {len(shared)} shared tokens none was scored on both sides")

    tokens = np.array(shared, str)[both]
    logs = _pair_logs(a.logs[rows_a][both], b.logs[rows_b][both], tokens, log_of or {})
    values_a, values_b = values_a[both], values_b[both]
    losses, gains = _changes(tokens, logs, values_a, values_b, names, listed)
    return Comparison(
        a=a, b=b, pairs=len(tokens), logs=None if logs is None else len(np.unique(logs)),
        level=level, resamples=resamples, seed=seed,
        differences=_differences(values_a, values_b, names, logs, resamples, level, seed),
        flips=_flips(tokens, values_a, values_b, names, a.metric),
        losses=losses,
        gains=gains,
        only_a=tuple(token for token in row_a if token not in row_b),
        only_b=tuple(token for token in row_b if token not in row_a),
        unscored_a=tuple(np.array(shared, str)[~scored_a].tolist()),
        unscored_b=tuple(np.array(shared, str)[~scored_b].tolist()),
        closing={name: (value, b.closing[name]) for name, value in a.closing.items() if name in b.closing},
        notes=_notes(a, b, logs),
    )  # fmt: skip


def _refuse_strangers(a: TokenScores, b: TokenScores) -> None:
    if a.metric != b.metric:
        raise UserError(
            f"{a.source} holds {a.metric}, {b.source} holds {b.metric}: "
            "scores under different metrics cannot be compared"
        )
    if a.split and b.split and a.split != b.split:
        raise UserError(f"{a.source} is of split '{a.split}', {b.source} of split '{b.split}': not the same scenes")


def _pair_logs(logs_a: np.ndarray, logs_b: np.ndarray, tokens: np.ndarray, log_of: dict[str, str]) -> np.ndarray | None:
    """(P,) logs of the pairs, from whichever side knows; None unless all are known."""
    given = np.array([log_of.get(token, "") for token in tokens.tolist()], str)
    logs = np.where(logs_a != "", logs_a, np.where(logs_b != "", logs_b, given))
    return logs if (logs != "").all() else None


def _differences(
    values_a: np.ndarray, values_b: np.ndarray, names: Sequence[str], logs: np.ndarray | None, resamples: int,
    level: float, seed: int,
) -> tuple[Difference, ...]:  # fmt: skip
    differences = values_b - values_a
    known = np.isfinite(differences)
    by_token = paired_interval(differences, None, resamples, level, seed)
    by_log = None if logs is None else paired_interval(differences, logs, resamples, level, seed)
    found = []
    for column, name in enumerate(names):
        rows = known[:, column]
        means = [float(v[rows, column].mean()) if rows.any() else float("nan") for v in (values_a, values_b)]
        mean = float(differences[rows, column].mean()) if rows.any() else float("nan")
        bounds = [
            None if side is None else (float(side[0][column]), float(side[1][column])) for side in (by_token, by_log)
        ]
        found.append(Difference(name, int(rows.sum()), *means, mean, *bounds))
    return tuple(sorted(found, key=lambda item: not item.name.startswith("score")))


def _flips(
    tokens: np.ndarray, values_a: np.ndarray, values_b: np.ndarray, names: Sequence[str], metric: str
) -> tuple[Flip, ...]:
    """Factors of the score (0 there means 0 overall) that reached or left zero."""
    factors = MULTIPLIERS["pdms_v1" if metric.startswith("pdms") else "epdms_v2"]
    wanted = [name + stage for stage in STAGES for name in factors] if metric.endswith(TWO_STAGE) else factors
    flips = []
    for name in wanted:
        if name in names:
            a, b = (values[:, names.index(name)] for values in (values_a, values_b))
            known = np.isfinite(a) & np.isfinite(b)
            flips.append(
                Flip(
                    name,
                    tuple(tokens[known & (a != 0) & (b == 0)].tolist()),
                    tuple(tokens[known & (a == 0) & (b != 0)].tolist()),
                )
            )
    return tuple(flips)


def _changes(
    tokens: np.ndarray, logs: np.ndarray | None, values_a: np.ndarray, values_b: np.ndarray, names: Sequence[str],
    listed: int,
) -> tuple[tuple[Change, ...], tuple[Change, ...]]:  # fmt: skip
    """The biggest losses and the biggest gains of the score, ties in the order of the file."""
    scores = [column for column, name in enumerate(names) if name.startswith("score")]
    score_a, score_b = (np.nanmax(values[:, scores], axis=1) for values in (values_a, values_b))

    def change(row: int) -> Change:
        both = [(float(values_a[row, column]), float(values_b[row, column])) for column in range(len(names))]
        changed = {
            name: (x, y)
            for column, (name, (x, y)) in enumerate(zip(names, both, strict=True))
            if column not in scores and np.isfinite(x + y) and x != y
        }
        log = "" if logs is None else str(logs[row])
        return Change(str(tokens[row]), log, float(score_a[row]), float(score_b[row]), changed)

    def biggest(loss: np.ndarray) -> tuple[Change, ...]:
        return tuple(change(row) for row in np.argsort(-loss, kind="stable")[:listed] if loss[row] > 0)

    return biggest(score_a - score_b), biggest(score_b - score_a)


def _notes(a: TokenScores, b: TokenScores, logs: np.ndarray | None) -> tuple[str, ...]:
    notes = []
    if logs is None:
        notes.append("logs are unknown: intervals over tokens only, which may be too narrow; name split= (and data)")
    elif len(np.unique(logs)) < 10:
        notes.append(f"only {len(np.unique(logs))} logs: intervals over logs are rough")
    silent = [side.source for side in (a, b) if side.split is None]
    if silent:
        notes.append(f"split not stated in {' and '.join(silent)}: paired by token alone")
    if a.metric.endswith(TWO_STAGE):
        notes.append("two-stage files: rows are compared per stage, unweighted; NAVSIM's combined score weights them")
    return tuple(notes)
