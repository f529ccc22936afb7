"""The projection to more GPUs: exact where it can be checked by hand, never better than N times one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusiondrive.training.scaling import Device, Links, project

GRADIENT = 243e6


def test_one_gpu_is_what_was_measured() -> None:
    alone = project(Device(500.0, 64), Links(), GRADIENT, 1)
    assert alone.exposed == alone.hidden == pytest.approx(500.0)
    assert alone.sum_ms == alone.sent_inside_mb == alone.sent_between_mb == 0.0


def test_rings_by_hand() -> None:
    """Two machines of 8: each GPU sends 2 · 7/8 of the gradient inside, and 2 · 1/2 of its eighth between."""
    links = Links(per_machine=8, inside=100.0, between=10.0)
    found = project(Device(500.0, 64), links, GRADIENT, 16)
    assert found.sent_inside_mb == pytest.approx(425.25) and found.sent_between_mb == pytest.approx(30.375)
    assert found.sum_ms == pytest.approx(4.2525 + 3.0375)
    step = 64 / 500
    assert found.exposed == pytest.approx(16 * 64 / (step + found.sum_ms / 1e3))
    assert found.hidden == pytest.approx(16 * 500.0)  # shorter than the backward pass


def test_what_does_not_fit_behind_the_backward_pass_is_left_over() -> None:
    slow = Links(per_machine=1, between=1.0)
    found = project(Device(1000.0, 64, backward=0.5), slow, GRADIENT, 2)
    assert found.sum_ms == pytest.approx(243.0)
    assert found.hidden == pytest.approx(128 / (0.064 + 0.243 - 0.032))


@given(
    speed=st.floats(1.0, 1e4), batch=st.integers(1, 512), inside=st.floats(0.1, 1e3), between=st.floats(0.1, 1e3),
    machines=st.integers(1, 64),
)  # fmt: skip
def test_never_better_than_n_times_one_and_hiding_never_hurts(speed, batch, inside, between, machines) -> None:
    device, links = Device(speed, batch), Links(8, inside, between)
    found = project(device, links, GRADIENT, 8 * machines)
    assert found.exposed <= found.hidden <= 8 * machines * speed * (1 + 1e-9)


def test_machines_are_whole() -> None:
    with pytest.raises(ValueError, match="12"):
        project(Device(500.0, 64), Links(), GRADIENT, 12)
