"""What a training run is made of; filled from `configs/train.yaml`, its groups and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusiondrive.losses import LossConfig
from diffusiondrive.planner import PlannerConfig
from diffusiondrive.training.augmentation import AugmentationConfig
from navsim_eval.config import DataConfig
from navsim_eval.errors import UserError

LEARNING_RATES = ("warmup_cosine", "published")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    rate, minimum_rate: learning rate after the warm-up and at the last step
    schedule:      "warmup_cosine" counts steps of the real run; "published" is the released recipe's epoch schedule
    warmup_share:  share of all steps that the linear warm-up takes
    image_encoder_factor: rate of the camera branch relative to the rest (the released recipe means 0.5, but its
                   scheduler overwrites it, so what it really runs is 1.0)
    weight_decay:  on matrices only, unless decay_everything (the released recipe decays biases, norms, embeddings)
    epsilon:       AdamW's; gradients well below it hardly move a weight
    clip_norm:     gradient norm is clipped here; 0 turns clipping off
    ema_decay:     exponential moving average of the weights, used for validation and the published planner; 0: none
    freeze_batch_norm: batch norms keep their running statistics (results independent of the per-device batch)
    """

    rate: float = 6e-4
    minimum_rate: float = 1e-6
    schedule: str = "warmup_cosine"
    warmup_share: float = 0.03
    image_encoder_factor: float = 0.5
    weight_decay: float = 1e-4
    decay_everything: bool = False
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    freeze_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in LEARNING_RATES:
            raise UserError(f"optimizer.schedule: '{self.schedule}' is none of {', '.join(LEARNING_RATES)}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise UserError(f"optimizer.ema_decay: {self.ema_decay} is not in [0, 1)")


@dataclass
class TrainerConfig:
    """How long, on what, and how often to look.

    global_batch:       samples of one optimiser step over all processes; per-device batch and accumulation follow
    largest_per_device: most samples that one process holds at once
    max_steps:          stop after so many optimiser steps whatever `epochs` says (-1: no such limit)
    accelerator, devices, nodes, strategy: as Lightning has them; "auto" takes what the machine offers
    compile:            run forward pass and loss through torch.compile, and let cuDNN measure its algorithms; the first
                        step then takes a minute or two
    precision:          "auto" is bf16 where the device has it, else float32
    workers:            loader processes;  judge_workers: processes that score modes for `loss.judged` (0: the training
                        process itself), for GPUs, which would wait for one core
    validate_every_epochs: validation PDMS;  checkpoint_every_steps, checkpoint_every_epochs: last.ckpt (1 GB at full
                        size), whichever comes first
    max_bad_steps:      optimiser steps in a row with non-finite gradients before the run stops
    """

    epochs: int = 100
    max_steps: int = -1
    global_batch: int = 512
    largest_per_device: int = 64
    accelerator: str = "auto"
    devices: str = "auto"
    nodes: int = 1
    strategy: str = "auto"
    compile: bool = False
    precision: str = "auto"
    workers: int = 4
    judge_workers: int = 0
    validate_every_epochs: int = 5
    checkpoint_every_steps: int = 200
    checkpoint_every_epochs: int = 1
    log_every_steps: int = 10
    max_bad_steps: int = 10
    progress_bar: bool = True


@dataclass
class TrainConfig:
    """A run. `cache`, `val_cache`, `metrics` and `val_metrics` are folders written by `tools/cache.py`.

    split, val_split: names of splits (see docs/data.md); an empty val_split trains without validation
    cache, val_cache: feature caches; empty: straight from the raw logs and sensors
    val_metrics:      metric cache of val_split; empty: built when training starts
    metrics:          metric cache of split, which `loss.judged` needs; empty: built when training starts
    anchors:          .npy from `tools/cluster_anchors.py`; empty: clustered from the training split
    pretrained:       planner folder or file whose weights to start from; empty: none
    resume:           "auto" continues <output_dir>/last.ckpt where it exists, "never" refuses to overwrite it,
                      otherwise the path of a checkpoint
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: PlannerConfig = field(default_factory=PlannerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    split: str = "train"
    val_split: str = "val"
    cache: str = ""
    val_cache: str = ""
    val_metrics: str = ""
    metrics: str = ""
    anchors: str = ""
    pretrained: str = ""
    resume: str = "auto"
    output_dir: str = "outputs/train"
    seed: int = 0
