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
METRICS = tuple(WEIGHTS)

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


def table_columns(metric: str) -> tuple[str, ...]:
    """Columns of a score table: sub-scores, under `epdms_v2` also those before the human filter, `score` last."""
    if metric == "pdms_v1":
        return (*COLUMNS[metric], "score")
    unfiltered = (f"unfiltered_{name}" for name in COLUMNS[metric])
    return (*COLUMNS[metric], "two_frame_extended_comfort", *unfiltered, "pdm_score", "score")


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


def forgive_human_faults(columns: Mapping[str, Tensor], human: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EPDMS's human penalty filter: sub-scores in which the recorded human scores exactly 0 become 1.

    columns: (S, N) sub-scores of plans;  human: (S, 1) those of the human's trajectory. A human 0.5 forgives nothing.
    """
    return {
        name: torch.where(human[name] == 0.0, 1.0, values) if name in FORGIVABLE else values
        for name, values in columns.items()
    }
