"""Pseudo-simulation: EPDMS in two stages (NAVSIM v2).

A first-stage scene is recorded; 4 s later, second-stage scenes continue it from several places where the ego could be
by then. A planner is scored in all of them, and the second stage counts more where it starts near to where the planner
had led in the first. Every decision comes twice, 0.5 s apart, so that extended comfort is defined in both stages.

    group: (now, previous) ──4 s──► ((now 2, previous 2), …)

Source: NAVSIM v2.2's scene aggregator; Cao et al., "Pseudo-simulation for autonomous driving", CoRL 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from navsim_eval.errors import UserError
from navsim_eval.metrics.aggregate import final_score
from navsim_eval.metrics.extended_comfort import MAX_GAP, extended_comfort

KERNEL_VARIANCE = 0.1  # m², of the distance between where the first stage ended and the second starts
EXTENDED_COMFORT = "two_frame_extended_comfort"

# (now, previous, ((second-stage now, second-stage previous), …)), as split files list them
Group = tuple[str, str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class StageRows:
    """What one planner did in R scenes of both stages.

    tokens:      (R,) str
    columns:     sub-scores before extended comfort (as of `metrics.aggregate.COLUMNS`), each (R,) float64
    motion:      (R, 2, 41) simulated acceleration and heading, see `metrics.extended_comfort.motion`
    start_time:  (R,) s;  start_point, end_point: (R, 2) global rear axle now, and where the planned trajectory ends
    """

    tokens: np.ndarray
    columns: Mapping[str, np.ndarray]
    motion: np.ndarray
    start_time: np.ndarray
    start_point: np.ndarray
    end_point: np.ndarray


@dataclass(frozen=True)
class TwoStageScores:
    """columns: those of the rows, extended comfort and `score` among them;  weights: (R,) within the own stage
    stage_one, stage_two, combined: means over groups by column; NaN where a row that is needed has no score
    """

    columns: dict[str, np.ndarray]
    weights: np.ndarray
    stage_one: dict[str, float]
    stage_two: dict[str, float]
    combined: dict[str, float]

    def as_dict(self) -> dict[str, dict[str, float | None]]:
        """The three means for files; None where undefined."""
        parts = {"stage_one": self.stage_one, "stage_two": self.stage_two, "combined": self.combined}
        return {
            part: {name: value if np.isfinite(value) else None for name, value in means.items()}
            for part, means in parts.items()
        }


def second_stage_weights(end_point: np.ndarray, start_points: np.ndarray) -> np.ndarray:
    """Weights (K,), summing to 1, of second-stage scenes that start at (K, 2), for a first stage that led to (2,).

    A Gaussian kernel of the distance; the same weight for all where none is near.
    """
    squared = ((np.asarray(start_points) - np.asarray(end_point)) ** 2).sum(axis=-1)
    weights = np.exp(-squared / (2.0 * KERNEL_VARIANCE))
    total = weights.sum()
    if np.isnan(total) or np.isclose(total, 0.0):
        return np.full(len(weights), 1.0 / len(weights))
    return weights / total


def check_groups(groups: Sequence[Group], tokens: Sequence[str]) -> None:
    """Raise UserError for groups that are empty, repeat a token or name one without a row."""
    if not groups:
        raise UserError("two stages need groups of scenes; the split lists none (reactive_all_mapping)")
    listed = [token for group in groups for token in _members(group)]
    repeated = sorted({token for token in listed if listed.count(token) > 1}) if len(set(listed)) < len(listed) else []
    if repeated:
        raise UserError(f"two-stage mapping: {repeated[0]} belongs to more than one group or place")
    if empty := [group[0] for group in groups if not group[2]]:
        raise UserError(f"two-stage mapping: the group of {empty[0]} has no second-stage scenes")
    known = set(tokens)
    if missing := [token for token in listed if token not in known]:
        raise UserError(f"two-stage mapping: {len(missing)} scenes have no row (first: {missing[0]})")


def aggregate_two_stages(rows: StageRows, groups: Sequence[Group], metric: str = "epdms_v2") -> TwoStageScores:
    """Extended comfort, weights and scores of all rows, and the means of both stages and of their product.

    Within a group, the scenes of *now* and those of *previous* each give first stage × weighted mean of the second,
    column by column; the group's value is the mean of the two products, the result the mean over groups.
    """
    check_groups(groups, rows.tokens.tolist())
    place = {token: row for row, token in enumerate(rows.tokens.tolist())}
    comfort, weights = np.full(len(place), np.nan), np.full(len(place), np.nan)
    for now, previous, pairs in groups:
        weights[[place[now], place[previous]]] = 1.0
        for first, seconds in ((now, [a for a, _ in pairs]), (previous, [b for _, b in pairs])):
            chosen = [place[token] for token in seconds]
            weights[chosen] = second_stage_weights(rows.end_point[place[first]], rows.start_point[chosen])
        for current, before in ((now, previous), *pairs):
            pair = [place[current], place[before]]
            comfort[pair] = _comfort(rows, *pair)
    columns = {name: np.asarray(values, np.float64) for name, values in rows.columns.items()}
    columns[EXTENDED_COMFORT] = comfort
    columns["score"] = _scores(columns, metric)
    parts = [_group_means(columns, weights, [place[t] for t in half[:1]], [place[t] for t in half[1:]])
             for group in groups for half in _halves(group)]  # fmt: skip

    def mean(pick: int) -> dict[str, float]:
        return {name: float(np.mean([part[pick][name] for part in parts])) for name in columns}

    return TwoStageScores(columns, weights, mean(0), mean(1), mean(2))


def _members(group: Group) -> list[str]:
    now, previous, pairs = group
    return [now, previous, *(token for pair in pairs for token in pair)]


def _halves(group: Group) -> tuple[list[str], list[str]]:
    """The first-stage token and its second-stage tokens, for now and for previous."""
    now, previous, pairs = group
    return [now, *(a for a, _ in pairs)], [previous, *(b for _, b in pairs)]


def _comfort(rows: StageRows, current: int, before: int) -> float:
    motion = torch.from_numpy(rows.motion[[current, before]])
    if not bool(torch.isfinite(motion).all()):
        return float("nan")
    gap = float(rows.start_time[current] - rows.start_time[before])
    if not 0.0 < gap < MAX_GAP:
        names = f"{rows.tokens[before]} and {rows.tokens[current]}"
        raise UserError(f"two-stage mapping: {names} are {gap:.3f} s apart, expected 0 to {MAX_GAP} s")
    return float(extended_comfort(motion[0], motion[1], gap))


def _scores(columns: Mapping[str, np.ndarray], metric: str) -> np.ndarray:
    """Final scores; NaN where extended comfort, which every row must have here, or anything else is missing."""
    scores = final_score({name: torch.from_numpy(values) for name, values in columns.items()}, metric).numpy()
    return np.where(np.isnan(columns[EXTENDED_COMFORT]), np.nan, scores)


def _group_means(
    columns: Mapping[str, np.ndarray], weights: np.ndarray, first: list[int], second: list[int]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Weighted means of the first and of the second stage, and their product, by column."""
    one, two = (
        {name: float(values[chosen] @ weights[chosen] / weights[chosen].sum()) for name, values in columns.items()}
        for chosen in (first, second)
    )
    return one, two, {name: one[name] * two[name] for name in columns}
