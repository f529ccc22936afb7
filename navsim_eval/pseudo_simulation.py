"""Two-stage EPDMS of whole splits: which metric and how many stages a split supports, and both stages scored together.

first and second stage, planned alike ─► scored scene by scene (reactive traffic) ─► groups ─► one number
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.executor import Workers
from navsim_eval.formats.splits import Split, find_split
from navsim_eval.geometry import to_global
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.metrics.aggregate import COLUMNS, METRICS, base_metric
from navsim_eval.metrics.two_stage import EXTENDED_COMFORT, StageRows, TwoStageScores, aggregate_two_stages
from navsim_eval.pdm.cache import FUTURE_FRAMES
from navsim_eval.score_scenes import Judging, score_scenes
from navsim_eval.traffic import NON_REACTIVE, REACTIVE, check_traffic
from navsim_eval.two_stage_dataset import TwoStageDataset

HISTORY_FRAMES = 4  # of 0.5 s, now included: what history comfort looks back on


@dataclass(frozen=True)
class Protocol:
    """How a split is scored: metric, number of stages, traffic."""

    metric: str
    stages: int
    traffic: str

    @property
    def judging(self) -> Judging:
        return Judging(self.metric, self.traffic, pair_scenes=self.stages == 1)


def choose_protocol(metric: str, split: Split, stages: int = 0, traffic: str = "") -> Protocol:
    """What is published for the split where a choice is left open, or a UserError with the reason why not.

    stages:  1, 2, or 0: two under EPDMS where the split lists second-stage scenes, else one
    traffic: "non_reactive", "reactive", or "": reactive in two stages, else replayed
    """
    if metric not in METRICS:
        raise UserError(f"metric='{metric}' is unknown; choose from {', '.join(METRICS)}")
    if stages not in (0, 1, 2):
        raise UserError(f"stages={stages}: choose 1, 2, or 0 for what the split is made for")
    base, window = base_metric(metric), split.scene_filter
    if window.num_future_frames < FUTURE_FRAMES[base]:
        raise UserError(
            f"{metric} observes {FUTURE_FRAMES[base]} future frames, scenes of split {split.name} have "
            f"{window.num_future_frames}; it cannot be scored there"
        )
    if base == "epdms_v2" and window.num_history_frames < HISTORY_FRAMES:
        raise UserError(
            f"{metric} looks back over {HISTORY_FRAMES} frames (history comfort), scenes of split {split.name} have "
            f"{window.num_history_frames}; it cannot be scored there"
        )
    if stages == 2 and base == "pdms_v1":
        raise UserError("stages=2: pdms_v1 (NAVSIM v1.1) has no second stage; use epdms_v2")
    if stages == 2 and not split.second_stage:
        raise UserError(f"stages=2: split {split.name} lists no second-stage scenes (reactive_all_mapping)")
    stages = stages or (2 if split.second_stage and base == "epdms_v2" else 1)
    traffic = traffic or (REACTIVE if stages == 2 else NON_REACTIVE)
    check_traffic(traffic, base)
    return Protocol(metric, stages, traffic)


def choose_protocols(metrics: Sequence[str], split: Split, stages: int = 0, traffic: str = "") -> dict[str, Protocol]:
    """As `choose_protocol`, for metrics that are to be scored in one run."""
    protocols = {metric: choose_protocol(metric, split, stages, traffic) for metric in metrics}
    if len({protocol.stages for protocol in protocols.values()}) > 1:
        counts = ", ".join(f"{metric}: {protocol.stages}" for metric, protocol in protocols.items())
        raise UserError(f"the metrics differ in the number of stages ({counts}); run them apart, or with stages=1")
    return protocols


def open_split(
    data: DataConfig, split: str, stages: int, *, max_scenes: int | None = None, progress: bool = False
) -> SceneDataset | TwoStageDataset:
    """The scenes of one stage or of both. Raises UserError as the data sets do."""
    if stages == 1:
        return SceneDataset.from_config(data, split, max_scenes=max_scenes, progress=progress)
    if max_scenes is not None:
        raise UserError("max_scenes cuts groups of two stages apart; leave it out, or ask for stages=1")
    return TwoStageDataset.from_config(data, split, progress=progress)


def split_of(data: DataConfig, name: str) -> Split:
    """The split of a name, which may end in :train, :val or :test."""
    return find_split(name.partition(":")[0], data.root, data.filters)


def score_two_stages(
    caches: MetricCaches,
    trajectories: np.ndarray,
    protocol: Protocol,
    workers: int | Workers = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, str], list[TwoStageScores]]:
    """Score N planners in all scenes of a `TwoStageDataset`.

    trajectories: (R, N, T, 3) for the scenes in the order of `caches.dataset.tokens`
    Returns columns {name: (R, N)} with extended comfort and score, reasons of failures by token, and for each planner
    the aggregate of both stages, NaN where a scene that it needs has no score.
    """
    dataset: TwoStageDataset = caches.dataset
    tokens = list(dataset.tokens)
    columns, failures = score_scenes(caches, tokens, trajectories, workers, progress, protocol.judging)
    ends = to_global(columns["start_pose"], trajectories[:, :, -1])[..., :2]
    absent = [token for token in dataset.split.scene_filter.tokens or () if token not in dataset]
    absent += [t for _, _, pairs in dataset.groups for pair in pairs for t in pair if t not in dataset]
    scores = []
    for planner in range(trajectories.shape[1]):
        own = {name: values[:, planner] for name, values in columns.items()}
        rows = _rows(tokens, own, ends[:, planner], absent)
        scored = aggregate_two_stages(rows, dataset.groups, protocol.metric)
        for name in (EXTENDED_COMFORT, "score"):
            columns[name][:, planner] = scored.columns[name][: len(tokens)]
        scores.append(scored)
        unpaired = np.isfinite(columns["pdm_score"][:, planner]) & ~np.isfinite(columns["score"][:, planner])
        for row in np.flatnonzero(unpaired):
            failures.setdefault(tokens[row], "no extended comfort: its neighbour, 0.5 s away, has no score")
    kept = set(columns) - {"motion", "start_pose", "start_time"}
    return {name: values for name, values in columns.items() if name in kept}, failures, scores


def _rows(tokens: list[str], columns: dict[str, np.ndarray], ends: np.ndarray, absent: list[str]) -> StageRows:
    """One planner's rows; scenes that are not on disk come last, as rows without scores."""
    names = COLUMNS["epdms_v2"]
    failed = ~np.isfinite(columns["pdm_score"])

    def padded(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.full((len(absent), *values.shape[1:]), np.nan)])

    return StageRows(
        tokens=np.array([*tokens, *absent], str),
        columns={name: padded(columns[name]) for name in (*names, *(f"unfiltered_{name}" for name in names))},
        motion=padded(np.where(failed[:, None, None], np.nan, columns["motion"])),
        start_time=padded(columns["start_time"]),
        start_point=padded(columns["start_pose"][:, :2]),
        end_point=padded(ends),
    )
