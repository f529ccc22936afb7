"""Learning-rate schedules: the published one against the reference scheduler, ours against its definition."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusiondrive.training.learning_rate import published_epoch_rate, warmup_cosine
from tests.golden import GOLDEN, needs_golden


@needs_golden
def test_published_rates_equal_the_reference_scheduler() -> None:
    golden = json.loads((GOLDEN / "model" / "lr_schedule.json").read_text())
    rates = golden["lr_per_epoch"]
    rates = rates.values() if isinstance(rates, dict) else rates
    for epoch, rate in enumerate(rates):
        expected = rate[0] if isinstance(rate, list) else rate
        assert published_epoch_rate(epoch) == pytest.approx(expected, rel=1e-9)


def test_warmup_reaches_the_base_rate_and_the_last_step_the_minimum() -> None:
    rates = [warmup_cosine(step, 100, 10, 1e-3, 1e-6) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-6)


@given(total=st.integers(2, 500), warmup=st.integers(0, 100))
def test_rate_stays_between_its_bounds_and_falls_after_the_warmup(total: int, warmup: int) -> None:
    rates = [warmup_cosine(step, total, warmup, 1.0, 0.1) for step in range(total)]
    assert all(0.0 < rate <= 1.0 + 1e-12 for rate in rates)
    tail = rates[warmup:]
    assert all(b <= a + 1e-12 for a, b in pairwise(tail))
