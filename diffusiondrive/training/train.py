"""A training run from its configuration: data, planner, Lightning trainer, and what is left on disk.

<output_dir>/config.yaml        the resolved configuration
<output_dir>/environment.json   versions, hardware, git state
<output_dir>/metrics.jsonl      one JSON line per logged step;  tensorboard/: the same as curves
<output_dir>/last.ckpt          everything needed to go on exactly (weights, optimiser, averages, position)
<output_dir>/best.ckpt          the same at the best validation PDMS
<output_dir>/planner/           self-contained planner folder: best validation PDMS, or the last weights without one
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from diffusiondrive.anchors import cluster_anchors, human_plans, read_anchors
from diffusiondrive.checkpoint import compare
from diffusiondrive.dataset import PlanningDataset
from diffusiondrive.features import FeatureConfig
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.training.callbacks import NonFiniteGuard, PdmsValidation, Throughput, WeightEma
from diffusiondrive.training.config import TrainConfig
from diffusiondrive.training.data import PlanningData
from diffusiondrive.training.judge import ModeJudge
from diffusiondrive.training.logger import JsonLinesLogger
from diffusiondrive.training.module import PlannerModule, lay_out_for
from diffusiondrive.training.sampling import BatchPlan
from diffusiondrive.training.validation import METRIC, PdmsScorer
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.metric_caches import MetricCaches


def train(config: TrainConfig, say: Callable[[str], None] = print) -> Path:
    """Run (or continue) a training; returns the planner folder. Raises UserError for what the user can mend."""
    output = Path(config.output_dir)
    resume = checkpoint_to_resume(config)
    pl.seed_everything(config.seed, verbose=False)
    features = FeatureConfig.for_planner(config.model)
    train_set = open_samples(config, config.split, config.cache, features)
    val_set = open_samples(config, config.val_split, config.val_cache, features) if config.val_split else None
    planner = build_planner(config, say)
    with quiet_lightning():
        trainer = build_trainer(config, output, pdms := validation(config, val_set, output))
    lay_out_for(planner, trainer.strategy.root_device)
    judge = mode_judge(config, output)
    plan = batch_plan(config, trainer)
    stores = [user.caches for user in (pdms and pdms.scorer, judge) if user]
    data = PlanningData(train_set, val_set, plan, config.trainer.workers, config.seed, stores)
    steps_per_epoch = len(train_set) // plan.global_batch
    total = total_steps(config, steps_per_epoch)
    module = PlannerModule(
        planner, features, config.loss, config.optimizer, total, steps_per_epoch, config.seed, config.augmentation,
        judge, config.trainer.compile,
    )  # fmt: skip
    trainer.accumulate_grad_batches = plan.accumulation
    if trainer.is_global_zero:
        write_description(config, output)
        say(f"{len(train_set)} training scenes; {plan}; {steps_per_epoch} steps an epoch, {total} in all")
        say(f"continuing {resume}" if resume else f"starting in {output}")
    try:
        with quiet_lightning():
            trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    finally:
        if judge:
            judge.close()
    if trainer.is_global_zero and not (output / "planner" / "config.json").exists():
        planner.save_pretrained(output / "planner", {"step": trainer.global_step})
    return output / "planner"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without remarks that do not hold here: our loader resumes by itself, our folders are meant to be reused."""
    remarks = ("does not have many workers", "dataloader is not resumable", "exists and is not empty", "LeafSpec")
    with warnings.catch_warnings():
        for remark in remarks:
            warnings.filterwarnings("ignore", message=f".*{remark}.*")
        logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


def open_samples(config: TrainConfig, split: str, cache: str, features: FeatureConfig) -> PlanningDataset:
    """Samples from a cache if one is named, else straight from logs and sensors."""
    if cache:
        return PlanningDataset.from_cache(cache, features)
    return PlanningDataset.from_raw(config.data, split, features, lidar=config.model.backbone.lidar)


def build_planner(config: TrainConfig, say: Callable[[str], None]) -> DiffusionDrive:
    """The planner to start from: configured sizes, anchors, then pretrained or image weights, whichever is named."""
    anchors = load_anchors(config, say)
    planner = DiffusionDrive(config.model, None if anchors is None else torch.from_numpy(anchors))
    if config.pretrained:
        weights = DiffusionDrive.from_pretrained(config.pretrained).state_dict()
        if mismatch := compare(planner.state_dict(), weights):
            raise UserError(f"pretrained: {config.pretrained} does not fit the configured planner: {mismatch}")
        planner.load_state_dict(weights)
        say(f"weights and anchors from {config.pretrained}")
    else:
        say(planner.load_image_weights())
    return planner


def load_anchors(config: TrainConfig, say: Callable[[str], None]) -> np.ndarray | None:
    """(M, T, 2) float32 anchors from the named file, or clustered from the training split; None: it has none."""
    if not config.model.anchored:
        return None
    if not config.anchors:
        say(f"no anchors named: clustering the human plans of split {config.split}")
        plans = human_plans(SceneDataset.from_config(config.data, config.split))
        return cluster_anchors(plans.trajectories, config.model.modes, config.seed)
    return read_anchors(config.anchors)


def validation(config: TrainConfig, val_set: PlanningDataset | None, output: Path) -> PdmsValidation | None:
    """Scores validation plans where there is a validation split."""
    if val_set is None:
        return None
    caches = metric_caches(config, config.val_split, config.val_metrics or output / "val_metrics")

    def publish(module: pl.LightningModule, metrics: dict[str, float]) -> None:
        module.planner.save_pretrained(output / "planner", {"split": config.val_split, **metrics})

    return PdmsValidation(PdmsScorer(caches), publish)


def mode_judge(config: TrainConfig, output: Path) -> ModeJudge | None:
    """Scores the modes of training scenes, where the loss asks for it."""
    if config.loss.judged == 0 or not config.model.anchored:
        return None
    caches = metric_caches(config, config.split, config.metrics or output / "train_metrics")
    return ModeJudge(caches, config.trainer.judge_workers)


def metric_caches(config: TrainConfig, split: str, folder: Path | str) -> MetricCaches:
    """The metric caches of a split, kept in `folder`."""
    return MetricCaches(config.data, SceneDataset.from_config(config.data, split), METRIC, folder)


def build_trainer(config: TrainConfig, output: Path, pdms: PdmsValidation | None) -> pl.Trainer:
    """Lightning's trainer with our callbacks; the order of callbacks matters and is said where it does."""
    t = config.trainer
    callbacks: list[Callback] = [NonFiniteGuard(output, t.max_bad_steps), Throughput()]
    if t.progress_bar:
        callbacks.append(TQDMProgressBar(refresh_rate=max(t.log_every_steps, 1)))
    if pdms:  # before the averaging, which gives the raw weights back when validation ends
        callbacks.append(pdms)
        callbacks.append(_checkpoints(output, "best", monitor="val/pdms", mode="max"))
    if config.optimizer.ema_decay:
        callbacks.append(WeightEma(config.optimizer.ema_decay))
    callbacks.append(_checkpoints(output, "last", every_n_train_steps=t.checkpoint_every_steps))
    epochs = t.checkpoint_every_epochs
    callbacks.append(_checkpoints(output, "last", every_n_epochs=epochs, save_on_train_epoch_end=True))
    return pl.Trainer(
        default_root_dir=output,
        accelerator=t.accelerator,
        devices=int(t.devices) if t.devices.isdigit() else t.devices,
        num_nodes=t.nodes,
        strategy=t.strategy,
        benchmark=t.compile or None,
        precision=precision(t.precision, t.accelerator),
        max_epochs=t.epochs,
        max_steps=t.max_steps,
        gradient_clip_val=config.optimizer.clip_norm or None,
        check_val_every_n_epoch=t.validate_every_epochs,
        limit_val_batches=None if pdms else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=t.log_every_steps,
        use_distributed_sampler=False,
        logger=[TensorBoardLogger(output, name="tensorboard", version=""), JsonLinesLogger(output)],
        callbacks=callbacks,
        enable_progress_bar=t.progress_bar,
        enable_model_summary=False,
    )


def _checkpoints(output: Path, name: str, **when: object) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=output,
        filename=name,
        save_top_k=1,
        enable_version_counter=False,
        auto_insert_metric_name=False,
        **when,  # type: ignore[arg-type]
    )


def precision(name: str, accelerator: str) -> str:
    """Lightning's name for the arithmetic: `auto` is bf16 where a GPU has it, else float32."""
    if name != "auto":
        return name
    gpu = accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16-mixed" if gpu else "32-true"


def batch_plan(config: TrainConfig, trainer: pl.Trainer) -> BatchPlan:
    """How the global batch is shared. Raises UserError where it cannot be."""
    t = config.trainer
    try:
        return BatchPlan.derive(t.global_batch, trainer.world_size, t.largest_per_device)
    except ValueError as error:
        raise UserError(f"trainer.global_batch: {error}") from error


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run. Raises UserError when an epoch would be empty."""
    t = config.trainer
    if steps_per_epoch < 1:
        raise UserError(
            f"trainer.global_batch: {t.global_batch} is more than the split has training scenes; lower it, or name a "
            "larger split"
        )
    total = t.epochs * steps_per_epoch if t.epochs > 0 else math.inf
    total = min(total, t.max_steps) if t.max_steps > 0 else total
    if not math.isfinite(total):
        raise UserError("trainer.epochs and trainer.max_steps are both unlimited; set one of them")
    return int(total)


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint that `resume` means, or None for a fresh start. Raises UserError rather than overwrite a run."""
    last = Path(config.output_dir) / "last.ckpt"
    if config.resume == "auto":
        return last if last.exists() else None
    if config.resume == "never":
        if last.exists():
            raise UserError(f"{last} exists; choose another output_dir, or resume=auto to go on")
        return None
    if not Path(config.resume).is_file():
        raise UserError(f"resume: {config.resume} is no file; use auto, never or the path of a checkpoint")
    return Path(config.resume)


def write_description(config: TrainConfig, output: Path) -> None:
    """Resolved configuration and environment, beside the weights."""
    atomic_write(output / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    atomic_write(output / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
