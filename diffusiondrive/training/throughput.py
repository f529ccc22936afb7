"""How many samples a second a training loop takes in, and where the time goes, without slowing it down to find out.

`Ours` is what tools/train.py does in a step, `Published` the published pipeline's equivalent. On CUDA the parts of a
step are cut by events on the device's own time line, so that the host never waits for a measurement; the wait for data
is the time that the host was blocked in the loader. `measure_trainer` times Lightning's own loop, with all callbacks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.flop_counter import FlopCounterMode

from diffusiondrive import losses
from diffusiondrive.assignment import assign_on_host
from diffusiondrive.dataset import PlanningDataset, Sample
from diffusiondrive.planner import DiffusionDrive, PlannerConfig
from diffusiondrive.training.config import OptimizerConfig, TrainConfig, TrainerConfig
from diffusiondrive.training.data import DeviceLoader, PlanningData
from diffusiondrive.training.module import PlannerModule, parameter_groups
from diffusiondrive.training.sampling import BatchPlan
from diffusiondrive.training.train import build_trainer, quiet_lightning

PARTS = ("data wait", "copy", "forward", "backward", "optimiser")
RUN_AHEAD = 2  # steps that the host may be ahead of the device
PUBLISHED_BATCH, PUBLISHED_WORKERS = 64, 4  # of the released recipe, a process


@dataclass(frozen=True)
class Timing:
    """Of `steps` steps: wall-clock seconds in all, seconds of each part of each step, peak memory [bytes] on CUDA.

    first: seconds that the first step took (compilation, choice of algorithms)
    idle:  seconds that the device had nothing to do between the steps; None on a CPU
    """

    batch: int
    seconds: float
    parts: list[dict[str, float]]
    first: float
    idle: float | None = None
    memory: int = 0

    @property
    def samples_per_s(self) -> float:
        return self.batch * len(self.parts) / self.seconds

    def row(self, flops: float) -> dict[str, float]:
        """JSON-ready; flops: of one training sample."""
        waited = sum(parts["data wait"] for parts in self.parts)
        return {
            "batch": self.batch,
            "samples/s": self.samples_per_s,
            **{f"{part} ms": 1e3 * median(parts[part] for parts in self.parts) for part in PARTS},
            "data wait %": 100 * waited / self.seconds,
            **({} if self.idle is None else {"idle %": 100 * self.idle / self.seconds}),
            "TFLOP/s": flops * self.samples_per_s / 1e12,
            "peak GB": self.memory / 1e9,
            "first step s": self.first,
        }


@dataclass
class Marks:
    """The borders of one step's parts: on the host's clock and, on CUDA, on the device's."""

    cuda: bool
    host: list[float] = field(default_factory=list)
    device: list[torch.cuda.Event] = field(default_factory=list)

    def __call__(self) -> None:
        self.host.append(time.perf_counter())
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.device.append(event)

    def parts(self) -> dict[str, float]:
        """Seconds of each part; the device must be done."""
        host = [end - start for start, end in pairwise(self.host)]
        if self.cuda:
            host[1:] = [start.elapsed_time(end) / 1e3 for start, end in pairwise(self.device)][1:]
        return dict(zip(PARTS, host, strict=True))


class Loop:
    """A training loop that can be timed. Subclasses say what a step is."""

    benchmark = False  # whether cuDNN measures its algorithms

    def __init__(self, device: torch.device, batch: int, loader: DataLoader):
        """loader: endless enough for all steps that will be asked for."""
        self.device, self.batch, self.cuda = device, batch, device.type == "cuda"
        self.batches: Iterator[Any] = iter(loader)
        self._ends: list[torch.cuda.Event] = []

    def prepare(self, batch: Any) -> Any:
        """A batch of the loader -> what `loss` takes."""

    def loss(self, batch: Any) -> Tensor:
        """Forward pass and loss."""

    def backward(self, loss: Tensor) -> None:
        """Gradients."""

    def update(self) -> None:
        """The optimiser's step."""

    def run(self, warm_up: int, steps: int) -> Timing:
        """Time `steps` steps after `warm_up` others; see `settled`."""
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, self.benchmark
        try:
            started = time.perf_counter()
            self.step()
            self._wait()
            first = time.perf_counter() - started
            for _ in range(warm_up - 1):
                self.step()
            self._wait()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            started = time.perf_counter()
            marks = [self.step() for _ in range(steps)]
            self._wait()
            seconds = time.perf_counter() - started
        finally:
            torch.backends.cudnn.benchmark = before
        idle, memory = None, 0
        if self.cuda:
            pairs = pairwise(marks)
            idle = sum(max(one.device[-1].elapsed_time(two.device[1]), 0.0) for one, two in pairs) / 1e3
            memory = torch.cuda.max_memory_allocated(self.device)
        return Timing(self.batch, seconds, [mark.parts() for mark in marks], first, idle, memory)

    def step(self) -> Marks:
        marks = Marks(self.cuda)
        marks()
        batch = next(self.batches)
        marks()
        batch = self.prepare(batch)
        marks()
        loss = self.loss(batch)
        marks()
        self.backward(loss)
        marks()
        self.update()
        marks()
        self._ends += marks.device[-1:]
        if len(self._ends) > RUN_AHEAD:
            self._ends.pop(0).synchronize()  # of a step long queued: the device still has work
        return marks

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


class Ours(Loop):
    """A step as tools/train.py makes it: packed cache, batches copied ahead, bf16 on CUDA, compiled if asked for."""

    benchmark = True

    def __init__(
        self, module: PlannerModule, data: PlanningDataset, batch: int, workers: int, total: int, device: torch.device
    ):
        """total: batches that the loader will have to give."""
        loader = DeviceLoader(data, device, workers, batch_sampler=RepeatedBatches(len(data), batch, total))
        super().__init__(device, batch, loader)
        self.module = module
        self.optimizer = module.configure_optimizers()["optimizer"]
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def prepare(self, batch: Sample) -> Sample:
        return batch

    def loss(self, batch: Sample) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda):
            return self.module.loss_terms(batch)["loss"]

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def update(self) -> None:
        if clip := self.module.optimizer_config.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()


class Published(Loop):
    """The published pipeline's step: float32 pickles, torch's collation, eager, fp16 with loss scaling on CUDA,
    matching by scipy on the host, AdamW with decay on everything, no clipping."""

    def __init__(
        self, planner: DiffusionDrive, data: Dataset, batch: int, workers: int, total: int, device: torch.device
    ):
        loader = DataLoader(
            data,
            batch_sampler=RepeatedBatches(len(data), batch, total),
            collate_fn=default_collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        super().__init__(device, batch, loader)
        self.planner = planner
        groups = parameter_groups(planner, OptimizerConfig(decay_everything=True, image_encoder_factor=1.0))
        self.optimizer = torch.optim.AdamW(groups)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.cuda)

    def prepare(self, batch: list) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return tuple({n: v.to(self.device, non_blocking=True) for n, v in part.items()} for part in batch[:2])

    def loss(self, batch: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
        features, targets = batch
        count, planner = len(features["status_feature"]), self.planner
        noise = torch.randn(count, *planner.noise_shape, device=self.device)
        levels = torch.randint(0, planner.config.schedule.train_levels, (count,), device=self.device)
        with (
            torch.autocast(self.device.type, torch.float16, enabled=self.cuda),
            patch.object(losses, "assign", assign_on_host),
        ):
            human = targets["trajectory"][..., :2].float()
            outputs = planner.training_outputs(features, noise, levels, human)
            return losses.planner_loss(outputs, targets)["loss"]

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def settled(warm_up: int, workers: int) -> int:
    """Steps before timing: at least `warm_up`, and enough to use up what the loader prepared during the first one."""
    return max(warm_up, 2 * workers + 1)


class RepeatedBatches(Sampler[list[int]]):
    """`total` batches of indices: one shuffled pass over `count` samples after the other, whatever the batch."""

    def __init__(self, count: int, batch: int, total: int, seed: int = 0):
        self.count, self.batch, self.total, self.seed = count, batch, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        draw, left = np.random.default_rng(self.seed), []
        for _ in range(self.total):
            while len(left) < self.batch:
                left += draw.permutation(self.count).tolist()
            yield left[: self.batch]
            left = left[self.batch :]


class Longer(Dataset):
    """A data set whose samples come round until there are `length` of them."""

    def __init__(self, data: PlanningDataset, length: int):
        self.data, self.length = data, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> Sample:
        return self.data.__getitems__([index % len(self.data) for index in indices])


class Stopwatch(pl.Callback):
    """Wall-clock seconds from the end of step `first` to the end of step `last`; waits for the device there only."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.times = first, last, []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (self.first, self.last):
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def measure_trainer(
    module: PlannerModule, data: PlanningDataset, batch: int, workers: int, warm_up: int, steps: int, folder: Path
) -> dict[str, float]:
    """Samples a second of Lightning's loop with the module and every callback of a run, one optimiser step a batch.

    The epoch is as long as the measurement; writing last.ckpt at its end is not part of it.
    """
    total = warm_up + steps
    cuda = module.device.type == "cuda"
    config = TrainConfig(
        output_dir=str(folder),
        val_split="",
        trainer=TrainerConfig(
            epochs=1, max_steps=total, global_batch=batch, largest_per_device=batch, workers=workers, devices="1",
            accelerator="gpu" if cuda else "cpu", compile=module.compiled, checkpoint_every_steps=10 * total,
            progress_bar=False,
        ),
        optimizer=module.optimizer_config,
    )  # fmt: skip
    watch = Stopwatch(warm_up, total)
    with quiet_lightning():
        trainer = build_trainer(config, folder, None)
        trainer.callbacks.append(watch)
        plan = BatchPlan.derive(batch, 1, batch)
        trainer.fit(module, PlanningData(Longer(data, total * batch), None, plan, workers, seed=0))
    seconds = watch.times[-1] - watch.times[0]
    return {"batch": batch, "steps": steps, "samples/s": steps * batch / seconds, "ms a step": 1e3 * seconds / steps}


def training_flops(config: PlannerConfig) -> float:
    """Floating-point operations (2 a multiply-add) of the forward and backward pass of one sample, counted."""
    batch, backbone = 2, config.backbone
    with torch.device("meta"):
        anchors = torch.zeros(config.modes, config.poses, 2) if config.anchored else None
        planner = DiffusionDrive(config, anchors).train()
        features = {
            "camera_feature": torch.zeros(batch, backbone.image_channels, *backbone.image_size),
            "lidar_feature": torch.zeros(batch, backbone.lidar_channels, *backbone.lidar_size),
            "status_feature": torch.zeros(batch, config.perception.status_size),
        }
        noise, levels = torch.zeros(batch, *planner.noise_shape), torch.zeros(batch, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            outputs = planner.training_outputs(features, noise, levels, torch.zeros(batch, config.poses, 2))
            ends = (*outputs.poses, *outputs.logits, outputs.bev_semantic_map, outputs.agents.states)
            torch.stack([end.sum() for end in (*ends, outputs.agents.logits) if end.requires_grad]).sum().backward()
    return counter.get_total_flops() / batch
