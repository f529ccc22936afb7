"""Every candidate of every scene, scored as plans are scored: best, mean and chosen, and what the planner thought."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.dataset import SceneDataset
from navsim_eval.executor import Workers
from navsim_eval.files import atomic_write
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.modes.calibration import calibration
from navsim_eval.modes.diversity import area_diversity, relative_spread
from navsim_eval.planners import NUM_POSES
from navsim_eval.predictions import Predictions
from navsim_eval.results import FORMATS
from navsim_eval.score_scenes import score_scenes

METRIC = "pdms_v1"  # EPDMS of a candidate depends on its neighbours in time, which candidates do not have


@dataclass(frozen=True)
class JudgedModes:
    """M candidates in each of S scenes.

    tokens:  (S,) str;  chosen: (S,) int, the one that is driven;  logits: (S, M), None where the planner has none
    columns: sub-scores by NAVSIM's names, `score` last, (S, M) fractions; NaN where a candidate could not be scored
    ade, fde: (S, M) mean and last distance to the human plan [m], NaN where the scene has no recorded future
    diversity, spread: (S,) see `diversity.py`
    """

    tokens: np.ndarray
    chosen: np.ndarray
    logits: np.ndarray | None
    columns: Mapping[str, np.ndarray]
    ade: np.ndarray
    fde: np.ndarray
    diversity: np.ndarray
    spread: np.ndarray

    def per_scene(self) -> dict[str, np.ndarray]:
        """(S,) numbers of each scene: PDMS of the chosen, the best and the mean candidate and of the one nearest to the
        human plan; distances of the chosen and the nearest; diversity."""
        score, rows = self.columns["score"], np.arange(len(self.tokens))
        known = np.isfinite(self.ade).all(axis=1)
        nearest = np.where(known, np.nan_to_num(self.ade, nan=np.inf).argmin(axis=1), 0)
        return {
            "chosen": score[rows, self.chosen],
            "best": _over(np.max, score),
            "mean": _over(np.mean, score),
            "nearest": np.where(known, score[rows, nearest], np.nan),
            "diversity": self.diversity,
            "relative_spread": self.spread,
            "ade": self.ade[rows, self.chosen],
            "fde": self.fde[rows, self.chosen],
            "min_ade": self.ade.min(axis=1),
            "min_fde": self.fde.min(axis=1),
        }

    def summary(self) -> dict[str, Any]:
        """Means over the scenes where a number is defined (None: nowhere), and the calibration of the logits."""
        means: dict[str, Any] = {"scenes": len(self.tokens), "modes": self.ade.shape[1]}
        for name, values in self.per_scene().items():
            known = values[np.isfinite(values)]
            means[name] = float(known.mean()) if len(known) else None
        means["calibration"] = None
        if self.logits is not None:
            means["calibration"] = calibration(self.logits, self._is_nearest(), self.columns["score"])
        return means

    def save(self, folder: Path | str) -> None:
        """Write modes.csv (a row for each candidate) and mode_scenes.csv (a row for each scene)."""
        names = [*(name for name in FORMATS[METRIC].columns if name != "score"), "score"]
        header = ["token", "mode", "chosen", "logit", "ade", "fde", *names]
        rows = []
        for row, token in enumerate(self.tokens.tolist()):
            for mode in range(self.ade.shape[1]):
                logit = None if self.logits is None else self.logits[row, mode]
                numbers = [logit, self.ade[row, mode], self.fde[row, mode]]
                numbers += [self.columns[name][row, mode] for name in names]
                rows.append([token, mode, int(mode == self.chosen[row]), *map(_cell, numbers)])
        _write(Path(folder) / "modes.csv", header, rows)
        scenes = self.per_scene()
        lines = zip(*scenes.values(), strict=True)
        rows = [[token, *map(_cell, line)] for token, line in zip(self.tokens.tolist(), lines, strict=True)]
        _write(Path(folder) / "mode_scenes.csv", ["token", *scenes], rows)

    def _is_nearest(self) -> np.ndarray:
        """(S, M) float: 1 for the candidate nearest to the human plan, NaN in scenes without one."""
        marks = (self.ade == self.ade.min(axis=1, keepdims=True)).astype(float)
        return np.where(np.isfinite(self.ade), marks, np.nan)


def judge_modes(
    predictions: Predictions,
    caches: MetricCaches,
    workers: int | Workers = 0,
    progress: Callable[[int], None] | None = None,
) -> JudgedModes:
    """Score all candidates of the scenes that were planned. A planner without candidates has one: its plan.

    caches: of `METRIC`. `progress` is told how many scenes are newly finished.
    """
    tokens = predictions.tokens.tolist()
    candidates = predictions.candidates
    if candidates is None:
        candidates = predictions.trajectories[:, None]
    candidates = np.asarray(candidates, np.float64)
    columns, _ = score_scenes(caches, tokens, candidates, workers, progress)
    human = human_plans(caches.dataset, tokens)
    distance = np.linalg.norm(candidates[..., :2] - human[:, None, :, :2], axis=-1)  # (S, M, T)
    away = np.abs(candidates - predictions.trajectories[:, None]).max(axis=(2, 3))
    return JudgedModes(
        tokens=predictions.tokens,
        chosen=np.nan_to_num(away, nan=np.inf).argmin(axis=1),
        logits=predictions.logits,
        columns={name: columns[name] for name in FORMATS[METRIC].columns},
        ade=distance.mean(axis=-1),
        fde=distance[..., -1],
        diversity=area_diversity(candidates),
        spread=relative_spread(candidates),
    )


def human_plans(dataset: SceneDataset, tokens: Sequence[str]) -> np.ndarray:
    """(S, 8, 3) recorded plans, NaN where the future is withheld."""
    plans = np.full((len(tokens), NUM_POSES, 3), np.nan)
    for row, token in enumerate(tokens):
        scene = dataset[token]
        if len(scene.future) >= NUM_POSES:
            plans[row] = scene.human_trajectory(NUM_POSES)
    return plans


def mode_rows(summaries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that compares planners by their candidates; those without `modes` are left out."""
    header = ["planner", "M", "chosen", "mean", "best", "nearest", "D %", "spread %", "minADE", "minFDE", "ECE"]
    rows = []
    for summary in summaries:
        if not (modes := summary.get("modes")):
            continue
        percent = [_shown(modes[name], 100) for name in ("chosen", "mean", "best", "nearest")]
        percent += [_shown(modes[name], 100) for name in ("diversity", "relative_spread")]
        metres = [_shown(modes[name], 1, 2) for name in ("min_ade", "min_fde")]
        error = (modes["calibration"] or {}).get("ece_nearest")
        rows.append([summary["planner"]["name"], str(modes["modes"]), *percent, *metres, _shown(error, 1, 3)])
    return header, rows


def _over(reduce: Callable[..., np.ndarray], scores: np.ndarray) -> np.ndarray:
    """Reduce (S, M) over the candidates that have a score; NaN where none has."""
    result = np.full(len(scores), np.nan)
    known = np.isfinite(scores)
    for row in np.flatnonzero(known.any(axis=1)):
        result[row] = reduce(scores[row, known[row]])
    return result


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def _cell(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else repr(float(value))


def _shown(value: float | None, scale: float, digits: int = 1) -> str:
    return "—" if value is None else f"{scale * value:.{digits}f}"
