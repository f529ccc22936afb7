"""Matching of agents: the device's solver finds assignments as cheap as scipy's, whatever the costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusiondrive import assignment
from diffusiondrive.assignment import HUGE, assign, assign_on_host

ROOT = Path(__file__).resolve().parents[2]


def tables(count: int, size: int) -> list[Tensor]:
    """(count, size, size) float32 costs: random, tied, constant, of very different sizes, with equal rows, sparse."""
    rng = np.random.default_rng(size)
    plain = rng.normal(size=(count, size, size))
    kinds = [
        plain,
        rng.integers(0, 3, size=plain.shape),
        np.zeros_like(plain),
        plain * 10.0 ** rng.integers(-8, 9, size=plain.shape),
        np.repeat(plain[:, :1], size, axis=1),
        np.where(rng.random(plain.shape) < 0.2, plain, HUGE),
    ]
    return [torch.tensor(kind, dtype=torch.float32) for kind in kinds]


def assert_as_good(costs: Tensor, columns: Tensor) -> None:
    """Permutations, and as cheap as scipy's."""
    assert columns.dtype == torch.int64
    assert torch.equal(columns.sort(dim=1).values, torch.arange(costs.shape[1]).expand_as(columns))
    exact = costs.double().nan_to_num(nan=HUGE, posinf=HUGE, neginf=-HUGE)
    mine, best = (exact.gather(2, x[..., None]).sum((1, 2)) for x in (columns, assign_on_host(costs)))
    torch.testing.assert_close(mine, best, rtol=1e-12, atol=1e-9)


INTERPRETED = """
from diffusiondrive.assignment import assign_by_triton
from tests.diffusiondrive.test_assignment import assert_as_good, tables
for count, size in ((2, 1), (2, 2), (1, 5), (1, 9)):
    for costs in tables(count, size):
        assert_as_good(costs, assign_by_triton(costs))
for costs in tables(1, 30)[:1]:
    assert_as_good(costs, assign_by_triton(costs))
print("as good")
"""


def test_the_triton_kernel_interpreted() -> None:
    pytest.importorskip("triton", reason="torch without Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "as good", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 7, 30, 33, 64, 100])
def test_the_triton_kernel_on_the_device(size: int) -> None:
    for costs in tables(40, size):
        assert_as_good(costs, assign(costs.cuda()).cpu())


@pytest.mark.gpu
def test_the_device_does_not_make_the_host_wait() -> None:
    costs = torch.randn(16, 30, 30, device="cuda")
    assign(costs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        columns = assign(costs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_good(costs.cpu(), columns.cpu())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_costs_that_are_no_numbers_still_give_a_permutation(device: str) -> None:
    costs = torch.randn(4, 6, 6)
    costs[0] = float("nan")
    costs[1, 2], costs[1, :, 3], costs[2, 0, 0], costs[3] = float("inf"), float("nan"), -float("inf"), 3e38
    assert_as_good(costs, assign(costs.to(device)).cpu())
    assert assign(costs[:0].to(device)).shape == (0, 6)


def test_a_compiler_takes_it_as_one_operation() -> None:
    def doubled(costs: Tensor) -> Tensor:
        return 2 * assign(2 * costs)

    costs = torch.randn(3, 5, 5)
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(costs), doubled(costs))
    torch.library.opcheck(assignment._assign, (costs,))
