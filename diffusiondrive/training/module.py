"""The Lightning module: bookkeeping around a planner that has never heard of Lightning.

Chance enters through (seed, epoch, token): each sample's diffusion label and noise are functions of these, so neither
batch size, process count nor an interruption changes them. Dropout masks follow (seed, epoch, batch, rank).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from diffusiondrive.dataset import Sample, on_device, to_model_input
from diffusiondrive.features import FeatureConfig
from diffusiondrive.losses import LossConfig, planner_loss
from diffusiondrive.noise import scene_noise, training_coin, training_draw
from diffusiondrive.planner import DiffusionDrive, Plan, TrainingOutputs
from diffusiondrive.schedule import ANCHOR, MIXED
from diffusiondrive.training.augmentation import AugmentationConfig, augment
from diffusiondrive.training.config import OptimizerConfig
from diffusiondrive.training.judge import ModeJudge
from diffusiondrive.training.learning_rate import published_epoch_rate, warmup_cosine


class PlannerModule(pl.LightningModule):
    """Trains a `DiffusionDrive`.

    features:        how the 8-bit features of a batch become the planner's input
    total_steps:     optimiser steps of the whole run;  steps_per_epoch: of one epoch
    judge:           scores the modes of a batch; needed where `loss.judged` is not 0. The evaluator runs on the CPU,
                     so each step then waits for the device
    compiled:        run forward pass and loss through torch.compile. Weights and checkpoints are the same; dropout
                     draws other masks
    validation_step: returns {"tokens", "plan", "target"}, which `PdmsValidation` collects
    """

    def __init__(
        self,
        planner: DiffusionDrive,
        features: FeatureConfig,
        loss: LossConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        steps_per_epoch: int,
        seed: int = 0,
        augmentation: AugmentationConfig | None = None,
        judge: ModeJudge | None = None,
        compiled: bool = False,
    ):
        super().__init__()
        self.planner, self.features = planner, features
        self.loss_config, self.optimizer_config = loss, optimizer
        self.total_steps, self.steps_per_epoch, self.seed = total_steps, steps_per_epoch, seed
        self.augmentation = augmentation or AugmentationConfig()
        self.judge = judge
        self.compiled = compiled
        self._run: Callable[..., Any] | None = None  # made in the first step, after the averaged copy of this module

    def __getstate__(self) -> dict[str, Any]:
        """Copies (of the weight averaging) start without the compiled step, which holds on to this module's planner."""
        return {**super().__getstate__(), "_run": None}

    def on_train_epoch_start(self) -> None:
        if self.optimizer_config.freeze_batch_norm:
            for module in self.planner.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        torch.manual_seed(self._dropout_seed(batch_idx))
        terms = self.loss_terms(batch)
        for name, value in terms.items():
            self.log(f"train/{name}", value.detach(), batch_size=len(batch.token), prog_bar=name == "loss")
        return terms["loss"]

    def loss_terms(self, batch: Sample) -> dict[str, Tensor]:
        """`losses.planner_loss` of a batch on this device. Nothing in it waits for the device, but for a judge."""
        tokens, planner = batch.token, self.planner
        levels = planner.config.schedule.train_levels
        noise, levels = training_draw(tokens, self._epoch_seed, planner.noise_shape, levels)
        chance = (on_device(noise, self.device), on_device(levels, self.device), self._of_human(tokens))
        features = augment(batch.features, tokens, self._epoch_seed, self.augmentation, self.features)
        if self._run is None:
            work = planned if self.judge else planned_with_losses
            self._run = torch.compile(work, dynamic=False) if self.compiled else work
        if self.judge:
            outputs = self._run(planner, self.features, features, batch.targets, *chance)
            return planner_loss(outputs, self._targets(batch, outputs), self.loss_config)
        return self._run(self.loss_config, planner, self.features, features, batch.targets, *chance)

    def validation_step(self, batch: Sample, batch_idx: int) -> dict[str, Any]:
        tokens = batch.token
        noise = scene_noise(tokens, self.seed, self.planner.noise_shape).to(self.device)
        plan: Plan = self.planner(self._input(batch), noise=noise, auxiliary=False)
        target = batch.targets["trajectory"].to(plan.trajectory.dtype)
        error = (plan.trajectory[..., :2] - target[..., :2]).norm(dim=-1)
        best = (plan.candidates[..., :2] - target[:, None, :, :2]).norm(dim=-1).mean(-1).min(-1).values
        log = {"ade": error.mean(), "fde": error[:, -1].mean(), "min_ade": best.mean()}
        for name, value in log.items():
            self.log(f"val/{name}", value, batch_size=len(tokens), sync_dist=True)
        return {"tokens": tokens, "plan": plan, "target": target}

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            parameter_groups(self.planner, config),
            lr=config.rate,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda") or None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate_factor(self, step: int) -> float:
        config = self.optimizer_config
        if config.schedule == "published":
            epochs = max(self.total_steps // max(self.steps_per_epoch, 1), 1)
            epoch = min(step // max(self.steps_per_epoch, 1), epochs - 1)
            return published_epoch_rate(epoch, config.rate, config.minimum_rate) / config.rate
        warmup = round(config.warmup_share * self.total_steps)
        return warmup_cosine(step, self.total_steps, warmup, config.rate, config.minimum_rate) / config.rate

    def _targets(self, batch: Sample, outputs: TrainingOutputs) -> Mapping[str, Tensor]:
        """The batch's targets and, where they are asked for, PDMS of the modes that the last layer proposes."""
        if self.judge is None or outputs.anchors is None:
            return batch.targets
        poses = outputs.poses[-1].detach().double().cpu().numpy()
        scores = torch.from_numpy(self.judge.scores(batch.token, poses))
        return {**batch.targets, "mode_scores": scores.to(self.device, torch.float32)}

    def _of_human(self, tokens: Sequence[str]) -> Tensor | None:
        """(B,) bool: scenes whose human plan is diffused in the place of the nearest anchor; None: nowhere."""
        source = self.planner.config.schedule.noise_source
        if source == ANCHOR:
            return None
        drawn = training_coin(tokens, self._epoch_seed) if source == MIXED else torch.ones(len(tokens)).bool()
        return on_device(drawn, self.device)

    def _input(self, batch: Sample) -> dict[str, Tensor]:
        return to_model_input(batch.features, self.features)

    @property
    def _epoch_seed(self) -> int:
        return self.seed * 1_000_003 + self.current_epoch

    def _dropout_seed(self, batch_idx: int) -> int:
        parts = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        return hash(parts) & 0x7FFFFFFF


def planned(
    planner: DiffusionDrive,
    config: FeatureConfig,
    features: dict[str, Tensor],
    targets: Mapping[str, Tensor],
    noise: Tensor,
    levels: Tensor,
    of_human: Tensor | None,
) -> TrainingOutputs:
    """A training pass: features (8 bits or float), targets and chance of a batch -> what the loss reads."""
    human = targets["trajectory"][..., :2].float()
    return planner.training_outputs(to_model_input(features, config), noise, levels, human, of_human)


def planned_with_losses(
    loss: LossConfig,
    planner: DiffusionDrive,
    config: FeatureConfig,
    features: dict[str, Tensor],
    targets: Mapping[str, Tensor],
    *chance: Tensor | None,
) -> dict[str, Tensor]:
    """The same and its losses: one graph."""
    return planner_loss(planned(planner, config, features, targets, *chance), targets, loss)


def lay_out_for(planner: DiffusionDrive, device: torch.device) -> None:
    """Channels-last weights and maps where the planner trains on a GPU, whose convolutions run fastest like that."""
    if device.type == "cuda":
        planner.perception.backbone.channels_last = True
        planner.to(memory_format=torch.channels_last)


def parameter_groups(planner: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW groups: camera branch and the rest, each with and without weight decay. Every parameter is in one group."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in planner.named_parameters():
        if not parameter.requires_grad:
            continue
        image = "image_encoder" in name
        learned_input = name.endswith(("positions", "queries", "latent"))
        decays = config.decay_everything or (parameter.ndim > 1 and not learned_input)
        groups.setdefault((image, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.rate * (config.image_encoder_factor if image else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
            "name": ("camera" if image else "rest") + ("" if decays else ", no decay"),
        }
        for (image, decays), parameters in groups.items()
    ]
