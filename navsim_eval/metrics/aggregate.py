"""From sub-scores to one number: the weights of the two metric generations.

Columns carry NAVSIM's names. All functions are elementwise on tensors of one shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from navsim_eval.metrics.progress import ego_progress_v1, ego_progress_v2

MULTIPLIERS = {
    "pdms_v1": ("no_at_fault_collisions", "drivable_area_compliance"),
    "epdms_v2": (
        "no_at_fault_collisions",
        "drivable_area_compliance",
        "driving_direction_compliance",
        "traffic_light_compliance",
    ),
}
WEIGHTS = {
    "pdms_v1": {"ego_progress": 5.0, "time_to_collision_within_bound": 5.0, "comfort": 2.0},
    "epdms_v2": {
        "ego_progress": 5.0,
        "time_to_collision_within_bound": 5.0,
        "lane_keeping": 2.0,
        "history_comfort": 2.0,
        "two_frame_extended_comfort": 2.0,
    },
}
METRICS = ("pdms_v1", "epdms_v2", "epdms_v2_unfixed_filter")

# In the order of NAVSIM's result files.
COLUMNS = {
    "pdms_v1": (
        "no_at_fault_collisions",
        "drivable_area_compliance",
        "ego_progress",
        "time_to_collision_within_bound",
        "comfort",
        "driving_direction_compliance",
    ),
    "epdms_v2": (
        "no_at_fault_collisions",
        "drivable_area_compliance",
        "driving_direction_compliance",
        "traffic_light_compliance",
        "ego_progress",
        "time_to_collision_within_bound",
        "lane_keeping",
        "history_comfort",
    ),
}

# A human who fails one of these is taken as proof that the scene asks for it. (Progress and history comfort belong to
# the published list too, but the human is scored alone and without a past, where both are 1.)
FORGIVABLE = (
    "no_at_fault_collisions",
    "drivable_area_compliance",
    "driving_direction_compliance",
    "traffic_light_compliance",
    "time_to_collision_within_bound",
    "lane_keeping",
)


def base_metric(metric: str) -> str:
    """The generation, "pdms_v1" or "epdms_v2", that a metric is a revision of; it decides about caches and sub-scores.

    `epdms_v2_unfixed_filter` is EPDMS as NAVSIM v2 computed it until its human filter was mended (issue 151 of the
    NAVSIM repository, opened in September 2025): reported sub-scores are those after the filter, but the final score is
    still made of those before it. Older published numbers are of this kind; they can only be lower, wherever the
    recorded human had a fault, and are not comparable with `epdms_v2`.
    """
    return "epdms_v2" if metric == "epdms_v2_unfixed_filter" else metric


def table_columns(metric: str) -> tuple[str, ...]:
    """Columns of a score table: sub-scores, under EPDMS also those before the human filter, `score` last."""
    base = base_metric(metric)
    if base == "pdms_v1":
        return (*COLUMNS[base], "score")
    unfiltered = (f"unfiltered_{name}" for name in COLUMNS[base])
    return (*COLUMNS[base], "two_frame_extended_comfort", *unfiltered, "pdm_score", "score")


def multiplier(columns: Mapping[str, Tensor], metric: str) -> Tensor:
    """Product of the multiplicative sub-scores."""
    first, *rest = (columns[name] for name in MULTIPLIERS[metric])
    for column in rest:
        first = first * column
    return first


def with_progress(columns: Mapping[str, Tensor], raw: Tensor, best: Tensor, metric: str) -> dict[str, Tensor]:
    """Columns with `ego_progress` added, from raw progress [m] and the best masked progress of the comparison [m]."""
    if metric == "pdms_v1":
        progress = ego_progress_v1(raw, multiplier(columns, metric), best)
    else:
        progress = ego_progress_v2(raw, best)
    return {**columns, "ego_progress": progress}


def weighted_score(columns: Mapping[str, Tensor], metric: str) -> Tensor:
    """Product of the multiplicative sub-scores times the weighted mean of the others.

    PDMS (NAVSIM v1.1): NC * DAC * (5 EP + 5 TTC + 2 C) / 12.
    EPDMS (NAVSIM v2.2): NC * DAC * DDC * TLC * (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16; a weighted sub-score that is
    NaN or absent (extended comfort without a preceding scene) is left out together with its weight.
    """
    total, weight_sum = 0.0, 0.0
    for name, weight in WEIGHTS[metric].items():
        if name in columns:
            known = ~torch.isnan(columns[name])
            total = total + torch.where(known, weight * columns[name], 0.0)
            weight_sum = weight_sum + weight * known.to(torch.float64)
    return multiplier(columns, metric) * total / weight_sum


def final_score(columns: Mapping[str, Tensor], metric: str) -> Tensor:
    """Score of a table's columns under a metric or one of its revisions (see `base_metric`)."""
    if metric == "epdms_v2_unfixed_filter":
        columns = {name: columns.get(f"unfiltered_{name}", values) for name, values in columns.items()}
    return weighted_score(columns, base_metric(metric))


def forgive_human_faults(columns: Mapping[str, Tensor], human: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EPDMS's human penalty filter: sub-scores in which the recorded human scores exactly 0 become 1.

    columns: (S, N) sub-scores of plans;  human: (S, 1) those of the human's trajectory. A human 0.5 forgives nothing.
    """
    return {
        name: torch.where(human[name] == 0.0, 1.0, values) if name in FORGIVABLE else values
        for name, values in columns.items()
    }
