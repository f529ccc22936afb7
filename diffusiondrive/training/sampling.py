"""Which samples form which batch: a function of (seed, epoch, position) alone.

A *global batch* is the set of samples of one optimiser step. Its content does not depend on how many processes share
it nor on how it is cut for gradient accumulation, so one GPU and N processes train on the same batches, and a resumed
run continues with the batch it would have seen next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: world × per_device × accumulation = global."""

    global_batch: int
    world: int
    per_device: int
    accumulation: int

    @classmethod
    def derive(cls, global_batch: int, world: int, largest_per_device: int) -> BatchPlan:
        """Fewest accumulation steps such that no process holds more than `largest_per_device` samples at once.

        Raises ValueError where the global batch does not divide evenly among processes and steps.
        """
        if global_batch % world:
            raise ValueError(f"global batch {global_batch} is not a multiple of {world} processes")
        share = global_batch // world
        accumulation = -(-share // largest_per_device)
        while share % accumulation:
            accumulation += 1
        return cls(global_batch, world, share // accumulation, accumulation)

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = {self.world} process(es) x {self.per_device} samples "
            f"x {self.accumulation} accumulation step(s)"
        )


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of sample indices for one process. The incomplete last global batch of an epoch is left out.

    num_samples: size of the data set;  rank: this process;  seed: of the run
    """

    def __init__(self, num_samples: int, plan: BatchPlan, rank: int, seed: int):
        if num_samples < plan.global_batch:
            raise ValueError(f"{num_samples} training samples are fewer than the global batch {plan.global_batch}")
        self.num_samples, self.plan, self.rank, self.seed = num_samples, plan, rank, seed
        self.epoch = 0
        self.start = 0  # micro-batches of the current epoch that are already done
        self.sampler = self  # Lightning looks here for `set_epoch`

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.plan.global_batch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)
        first, self.start = self.start, 0
        for index in range(first, len(self)):
            step, part = divmod(index, self.plan.accumulation)
            share = self.plan.global_batch // self.plan.world
            offset = step * self.plan.global_batch + self.rank * share + part * self.plan.per_device
            yield order[offset : offset + self.plan.per_device].tolist()
