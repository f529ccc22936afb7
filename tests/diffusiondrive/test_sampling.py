"""Batches depend on seed, epoch and position only: not on processes, accumulation or interruptions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusiondrive.training.sampling import BatchPlan, EpochBatchSampler


def global_batches(num: int, plan: BatchPlan, seed: int, epoch: int) -> list[set[int]]:
    """Union over ranks and micro-batches of each optimiser step."""
    ranks = []
    for rank in range(plan.world):
        sampler = EpochBatchSampler(num, plan, rank, seed)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
    steps = num // plan.global_batch
    return [
        {i for micro in ranks for part in micro[s * plan.accumulation : (s + 1) * plan.accumulation] for i in part}
        for s in range(steps)
    ]


@given(
    world=st.sampled_from([1, 2, 4]),
    largest=st.integers(1, 16),
    extra=st.integers(0, 40),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_global_batches_do_not_depend_on_how_they_are_cut(world, largest, extra, seed, epoch) -> None:
    num = 16 + extra
    plan = BatchPlan.derive(16, world, largest)
    assert plan.world * plan.per_device * plan.accumulation == 16 and plan.per_device <= largest
    assert global_batches(num, plan, seed, epoch) == global_batches(num, BatchPlan.derive(16, 1, 16), seed, epoch)


def test_an_epoch_visits_each_sample_at_most_once_and_differs_from_the_next() -> None:
    plan = BatchPlan.derive(8, 1, 4)
    first, second = global_batches(50, plan, 0, 0), global_batches(50, plan, 0, 1)
    assert sum(map(len, first)) == len(set().union(*first)) == 48
    assert first != second


def test_resumed_epoch_continues_where_it_stopped() -> None:
    plan = BatchPlan.derive(8, 1, 4)
    whole = list(EpochBatchSampler(50, plan, 0, 3))
    resumed = EpochBatchSampler(50, plan, 0, 3)
    resumed.start = 5
    assert list(resumed) == whole[5:]
    assert list(resumed) == whole, "the epoch after the resumed one is complete"


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of 3"):
        BatchPlan.derive(16, 3, 8)
    with pytest.raises(ValueError, match="fewer than the global batch"):
        EpochBatchSampler(10, BatchPlan.derive(16, 1, 16), 0, 0)
