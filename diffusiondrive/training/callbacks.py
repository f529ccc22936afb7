"""Small watchers of a training run, one job each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from diffusiondrive.dataset import Sample
from diffusiondrive.training.validation import PdmsScorer
from navsim_eval.errors import UserError


class NonFiniteGuard(pl.Callback):
    """Skips optimiser steps whose gradients are not finite, and names the samples.

    Gradients are already averaged over processes when this looks, so all ranks decide alike. Stops the run with a
    UserError after `limit` bad steps in a row.
    """

    def __init__(self, folder: Path, limit: int):
        self.path, self.limit = Path(folder) / "non_finite.jsonl", limit
        self.in_a_row, self.total = 0, 0
        self._tokens: list[str] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._tokens = []
        self._tokens += batch.token

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        if bool(torch.isfinite(norms).all()):
            self.in_a_row = 0
            return
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        line = {"step": trainer.global_step, "rank": trainer.global_rank, "tokens": self._tokens}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = ", ".join(self._tokens[:4]) + (", …" if len(self._tokens) > 4 else "")
        rank_zero_warn(f"non-finite gradients at step {trainer.global_step}: step skipped; samples {shown}")
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.limit} steps in a row with non-finite gradients; last samples: {shown}. All are listed in "
                f"{self.path}; check these samples or lower optimizer.rate"
            )

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_a_row, self.total = state["in_a_row"], state["total"]


class Throughput(pl.Callback):
    """Logs samples per second over all processes, without forcing the device to synchronise."""

    def __init__(self) -> None:
        self._since, self._count = 0.0, 0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._since, self._count = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Sample, batch_idx: int
    ) -> None:
        self._count += len(batch.token) * trainer.world_size
        rate = self._count / max(time.perf_counter() - self._since, 1e-9)
        module.log("samples_per_s", rate, prog_bar=True, batch_size=1)


class WeightEma(WeightAveraging):
    """Exponential moving average of weights and batch statistics, which validation and the published planner use.

    The decay grows to its value as (1 + n) / (10 + n) over the first updates n, so that a short run does not average
    over its random start.
    """

    def __init__(self, decay: float):
        def average(averaged: list[Tensor], current: list[Tensor], _: Tensor) -> None:
            updates = self._latest_update_step
            keep = min(decay, (1 + updates) / (10 + updates))
            pairs = [(old, new.to(old.dtype)) for old, new in zip(averaged, current, strict=True)]
            if smooth := [pair for pair in pairs if pair[0].is_floating_point()]:
                torch._foreach_lerp_([old for old, _ in smooth], [new for _, new in smooth], 1.0 - keep)
            for old, new in pairs:
                if not old.is_floating_point():
                    old.copy_(new)

        super().__init__(use_buffers=True, multi_avg_fn=average)


class PdmsValidation(pl.Callback):
    """Scores the validation plans, logs `val/pdms` and its sub-scores, and publishes the best planner so far.

    Sits before the weight-averaging callback, so that what is scored and published are the averaged weights.
    """

    def __init__(self, scorer: PdmsScorer | None, publish: Callable[[pl.LightningModule, dict[str, float]], object]):
        self.scorer, self.publish = scorer, publish
        self.best = -np.inf
        self._tokens: list[str] = []
        self._plans: list[np.ndarray] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._tokens, self._plans = [], []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._tokens += list(outputs["tokens"])
        self._plans.append(outputs["plan"].trajectory.float().cpu().numpy())

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        metrics = self._scores(trainer, module) if self.scorer else {}
        for name, value in metrics.items():
            module.log(f"val/{name}", value, rank_zero_only=False, sync_dist=False, prog_bar=name == "pdms")
        value = metrics.get("pdms", -np.inf)
        if value > self.best and not trainer.sanity_checking:
            self.best = value
            if trainer.is_global_zero:
                self.publish(module, metrics | {"epoch": trainer.current_epoch, "step": trainer.global_step})

    def _scores(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Means over the scenes of all processes."""
        plans = np.concatenate(self._plans) if self._plans else np.empty((0, 8, 3))
        sums = torch.from_numpy(self.scorer.sums(self._tokens, plans)).to(module.device)
        *values, count = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return {name: value / max(count, 1.0) for name, value in zip(self.scorer.columns, values, strict=True)}

    def state_dict(self) -> dict[str, float]:
        return {"best": float(self.best)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.best = state["best"]
