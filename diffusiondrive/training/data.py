"""The loaders of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Subset

from diffusiondrive.dataset import PlanningDataset, collate
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
            if not store.complete:  # several runs may share a finished one
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
        return DataLoader(
            dataset,
            collate_fn=collate,
            num_workers=self.workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.workers > 0,
            **how,
        )
