"""The evaluator as a teacher: PDMS of the modes that a training batch proposes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusiondrive.training.validation import METRIC
from navsim_eval import score
from navsim_eval.executor.standing import StandingWorkers
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.metrics.scene_batch import PreparedScene, prepare


class ModeJudge:
    """PDMS of every mode of training scenes, for labels (see `LossConfig.judged`).

    Scenes are prepared for scoring when they are first met and then kept (about 1 MB each).

    workers: processes that share the scenes of a batch, each scene always with the same one; 0: none but this one
    """

    def __init__(self, caches: MetricCaches, workers: int = 0):
        self.caches = caches
        self._prepared: dict[str, PreparedScene] = {}
        self._home: dict[str, int] = {}  # number of the worker that has prepared a scene
        self._crew = StandingWorkers(ModeJudge(caches), workers) if workers else None

    def scores(self, tokens: Sequence[str], poses: np.ndarray) -> np.ndarray:
        """tokens (B,), poses (B, M, T, 3) in the ego frame → (B, M) in [0, 1]; 0 where a mode cannot be scored."""
        if self._crew is None:
            table = score([self._scene(token) for token in tokens], poses, metric=METRIC)
            return np.nan_to_num(table.columns["score"]).reshape(poses.shape[:2])
        homes = np.array([self._home.setdefault(token, len(self._home) % self._crew.count) for token in tokens])
        rows = {int(number): np.flatnonzero(homes == number) for number in np.unique(homes)}
        found = self._crew({k: ([tokens[row] for row in mine], poses[mine]) for k, mine in rows.items()})
        scores = np.empty(poses.shape[:2])
        for number, mine in rows.items():
            scores[mine] = found[number]
        return scores

    def __call__(self, part: tuple[Sequence[str], np.ndarray]) -> np.ndarray:
        return self.scores(*part)

    def close(self) -> None:
        """End the worker processes."""
        if self._crew is not None:
            self._crew.close()

    def _scene(self, token: str) -> PreparedScene:
        if token not in self._prepared:
            self._prepared[token] = prepare(self.caches[token])
        return self._prepared[token]
