"""The numeric self-check passes here, and fails where arithmetic is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from navsim_eval import selfcheck
from navsim_eval.errors import UserError


def test_this_machine_is_sound():
    assert selfcheck.check_matmul() is None
    assert selfcheck.check_scoring() is None
    selfcheck.require_sound()


def test_the_street_is_scored_as_a_person_would():
    """Slow down, pass, leave the road, ram: only the last collides, only the third leaves the road."""
    found = selfcheck.score_street()
    assert found["no_at_fault_collisions"] == [1, 1, 1, 0]
    assert found["drivable_area_compliance"] == [1, 1, 0, 1]
    assert found["time_to_collision_within_bound"] == [1, 1, 1, 0]
    assert found["score"][0] == pytest.approx((5 * found["ego_progress"][0] + 5 + 2) / 12)
    assert found["score"][1:] == [1, 0, 0]


def test_a_product_that_returns_zeros_is_noticed(monkeypatch):
    class Silent(np.ndarray):
        def __matmul__(self, other):
            return np.zeros((len(self), other.shape[-1])) if len(self) > 1000 else np.asarray(self) @ other

    real = np.random.default_rng

    class Generator:
        def __init__(self, seed):
            self.rng = real(seed)

        def standard_normal(self, shape):
            return self.rng.standard_normal(shape).view(Silent)

    monkeypatch.setattr(selfcheck.np.random, "default_rng", Generator)
    assert "tall float64 matrix product" in selfcheck.check_matmul()


def test_a_wrong_score_is_noticed_and_refuses_evaluation(monkeypatch, tmp_path):
    stored = json.loads(selfcheck.EXPECTED.read_text())
    stored["score"][0] += 1e-4
    (tmp_path / "other.json").write_text(json.dumps(stored))
    monkeypatch.setattr(selfcheck, "EXPECTED", tmp_path / "other.json")
    selfcheck.problems.cache_clear()
    try:
        with pytest.raises(UserError, match="no score is printed: score of the hand-made street is off"):
            selfcheck.require_sound()
    finally:
        selfcheck.problems.cache_clear()
