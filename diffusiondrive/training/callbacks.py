"""Small watchers of a training run, one job each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from diffusiondrive.dataset import Sample
from diffusiondrive.training.validation import PdmsScorer
from navsim_eval.errors import UserError


class Verdict(NamedTuple):
    """Whether the gradients of an optimiser step are finite, on its way from the device to the host."""

    finite: Tensor  # () bool on the host; to be read once `arrived`
    arrived: torch.cuda.Event | None
    step: int
    rank: int
    tokens: list[str]


class NonFiniteGuard(pl.Callback):
    """Skips optimiser steps whose gradients are not finite, and names the samples.

    The device itself skips the step: the fused optimiser reads its own flag, as it would under loss scaling. The host
    reads the flag of a GPU one step later, when it has long arrived, so that nobody waits; on the CPU at once.
    Gradients are already averaged over processes when this looks, so all ranks decide alike. Stops the run with a
    UserError after `limit` bad steps in a row. Under loss scaling (fp16) the scaler skips, and this counts.
    """

    def __init__(self, folder: Path, limit: int):
        self.path, self.limit = Path(folder) / "non_finite.jsonl", limit
        self.in_a_row, self.total = 0, 0
        self._tokens: list[str] = []
        self._pending: list[Verdict] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Sample, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._tokens = []
        self._tokens += batch.token

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.isfinite(torch.stack(torch._foreach_norm([p.grad for p in parameters]))).all()
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = (~finite).float()
        elif not finite:
            for parameter in parameters:
                parameter.grad = None
        self._settle(keep=1 if finite.is_cuda else 0)
        host, arrived = to_host(finite)
        self._pending.append(Verdict(host, arrived, trainer.global_step, trainer.global_rank, self._tokens))
        if not finite.is_cuda:
            self._settle()
        self._stop_where_hopeless()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._settle()
        self._stop_where_hopeless()

    def _settle(self, keep: int = 0) -> None:
        """Count and name what has arrived; the last `keep` verdicts may still be under way."""
        while len(self._pending) > keep:
            verdict = self._pending.pop(0)
            if verdict.arrived:
                verdict.arrived.synchronize()
            if verdict.finite:
                self.in_a_row = 0
                continue
            self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
            line = {"step": verdict.step, "rank": verdict.rank, "tokens": verdict.tokens}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            rank_zero_warn(
                f"non-finite gradients at step {verdict.step}: step skipped; samples {shown(verdict.tokens)}"
            )
            self._last = verdict.tokens

    def _stop_where_hopeless(self) -> None:
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.limit} steps in a row with non-finite gradients; last samples: {shown(self._last)}. All are "
                f"listed in {self.path}; check these samples or lower optimizer.rate"
            )

    def state_dict(self) -> dict[str, int]:
        self._settle()
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_a_row, self.total = state["in_a_row"], state["total"]


def to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A tensor's copy on the host, and what says when it has arrived (None: it is there)."""
    if not flag.is_cuda:
        return flag, None
    host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def shown(tokens: list[str]) -> str:
    return ", ".join(tokens[:4]) + (", …" if len(tokens) > 4 else "")


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
        # As a tensor of the host: a number would be copied to the device, and the host would wait for it.
        module.log("samples_per_s", torch.tensor(rate), prog_bar=True, batch_size=1)


class WeightEma(WeightAveraging):
    """Exponential moving average of weights and batch statistics, which validation and the published planner use.

    The decay grows to its value as (1 + n) / (10 + n) over the first updates n, so that a short run does not average
    over its random start.
    """

    def __init__(self, decay: float):
        super().__init__(use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after each optimiser step. torch's own update would wait for its counter on the device."""
        updates = self._latest_update_step
        if trainer.global_step <= updates:
            return
        model = self._average_model
        averaged = [*model.module.parameters(), *model.module.buffers()]
        pairs = list(zip(averaged, [*pl_module.parameters(), *pl_module.buffers()], strict=True))
        smooth = [pair for pair in pairs if updates and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not (updates and pair[0].is_floating_point())]
        if smooth:
            keep = min(self.decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_([old for old, _ in smooth], [new for _, new in smooth], 1.0 - keep)
        if copied:
            torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])
        model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Averages live where the planner will be trained.

        Lightning would put them where it still is now, on the CPU, and copy all weights there every step.
        """
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)


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
