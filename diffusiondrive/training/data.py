"""The loaders of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from diffusiondrive.dataset import PlanningDataset, Sample, collate
from diffusiondrive.training.sampling import BatchPlan, EpochBatchSampler
from navsim_eval.metric_caches import MetricCaches


class PlanningData(pl.LightningDataModule):
    """Training batches by `EpochBatchSampler`, validation batches in order (each process its share).

    val:    may be None;  workers: loader processes
    stores: metric caches that the run needs; one process fills them before it starts, the others wait
    """

    def __init__(
        self,
        train: PlanningDataset,
        val: PlanningDataset | None,
        plan: BatchPlan,
        workers: int,
        seed: int,
        stores: Sequence[MetricCaches] = (),
    ):
        super().__init__()
        self.train, self.val = train, val
        self.plan, self.workers, self.seed, self.stores = plan, workers, seed, stores

    def prepare_data(self) -> None:
        for store in self.stores:
            store.build(workers=1)

    def train_dataloader(self) -> DataLoader:
        sampler = EpochBatchSampler(len(self.train), self.plan, self.trainer.global_rank, self.seed)
        sampler.set_epoch(self.trainer.current_epoch)
        # Lightning restores how many batches of the interrupted epoch were done; go on behind them.
        sampler.start = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % max(len(sampler), 1)
        return self._loader(self.train, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader | list:
        if self.val is None:
            return []
        share = range(self.trainer.global_rank, len(self.val), self.trainer.world_size)
        return self._loader(Subset(self.val, share), batch_size=self.plan.per_device)

    def _loader(self, dataset: Dataset, **how: Any) -> DataLoader:
        return DeviceLoader(dataset, self.trainer.strategy.root_device, self.workers, **how)


class DeviceLoader(DataLoader):
    """Batches that already lie on the device: while one is worked on, the next is copied on a stream of its own.

    Without a GPU a plain loader.
    """

    def __init__(self, dataset: Dataset, device: torch.device, workers: int, **how: Any):
        super().__init__(
            dataset,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            **how,
        )
        self.device = device

    def __iter__(self) -> Iterator[Sample]:
        batches = super().__iter__()
        return copied_ahead(batches, self.device) if self.device.type == "cuda" else batches


def copied_ahead(batches: Iterator[Sample], device: torch.device) -> Iterator[Sample]:
    """The batches, in pinned memory, as copies on the device; each is on its way while the one before is used."""
    stream = torch.cuda.Stream(device)
    under_way: tuple[Sample, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = moved(batch, device)
        if under_way:
            yield handed_over(*under_way, device)
        under_way = copy, stream.record_event()
    if under_way:
        yield handed_over(*under_way, device)


def moved(batch: Sample, device: torch.device) -> Sample:
    """A batch of tensors on another device; the host does not wait where they come from pinned memory."""
    parts = ({name: x.to(device, non_blocking=True) for name, x in part.items()} for part in batch[:2])
    return Sample(*parts, batch.token)


def handed_over(batch: Sample, arrived: torch.cuda.Event, device: torch.device) -> Sample:
    """A batch that another stream copies, made safe to use on the current one."""
    current = torch.cuda.current_stream(device)
    current.wait_event(arrived)
    for part in batch[:2]:
        for tensor in part.values():
            tensor.record_stream(current)
    return batch
