"""The batched program on other devices: nothing is left behind on the CPU, and a GPU gives the same answers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from navsim_eval import scoring
from navsim_eval.errors import UserError
from navsim_eval.metrics.comfort import comfort_checks_v1, comfort_checks_v2
from navsim_eval.metrics.footprint import Footprints
from navsim_eval.metrics.scene_batch import SceneBatch, prepare
from navsim_eval.pdm.dynamics import simulate
from navsim_eval.score_table import ScoreTable
from navsim_eval.scoring import score
from tests.navsim_eval.test_scoring import busy_street, plans

METRICS = pytest.mark.parametrize("metric", ["pdms_v1", "epdms_v2"])
CONTINUOUS = ("ego_progress", "score")


def assert_equal_scores(found: ScoreTable, expected: ScoreTable) -> None:
    """Steps and flags exactly, everything else to 1e-9."""
    np.testing.assert_array_equal(found.valid, expected.valid)
    for mine, theirs in ((found.columns, expected.columns), (found.details, expected.details)):
        for name, values in theirs.items():
            discrete = values.dtype.kind == "b" or not name.endswith((*CONTINUOUS, "progress", "reference", "state"))
            np.testing.assert_allclose(mine[name], values, rtol=0, atol=0 if discrete else 1e-9, err_msg=name)


@pytest.mark.gpu
@METRICS
def test_a_gpu_gives_the_scores_of_the_cpu(metric: str) -> None:
    streets = [replace(busy_street(seed, metric), log_name="log", start_time_us=500_000 * seed) for seed in range(20)]
    drives = np.stack([plans(seed, 64) for seed in range(20)])
    drives[3, 5] = np.nan
    assert_equal_scores(score(streets, drives, metric, "cuda"), score(streets, drives, metric, "cpu"))


@METRICS
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_batch_that_is_kept_and_any_part_of_it_give_the_same_scores(metric: str, device: str, monkeypatch) -> None:
    prepared = [prepare(replace(busy_street(s, metric), log_name="log", start_time_us=500_000 * s)) for s in range(6)]
    drives = np.stack([plans(seed, 9) for seed in range(6)])
    kept = SceneBatch.of(prepared, device)
    whole = score(kept, drives, metric)
    monkeypatch.setattr(scoring, "_rows_at_once", lambda *_: 30)  # three of nine plans at a time, two of six scenes
    assert_equal_scores(score(kept, drives, metric), whole)
    assert_equal_scores(score(prepared, drives, metric, device), whole)
    few = score(SceneBatch.of(prepared[2:4], device), drives[2:4, 4:6], metric, pair_scenes=False)
    mine = ((whole.tokens == "street2") | (whole.tokens == "street3")) & np.isin(whole.proposals, (4, 5))
    for name in ("no_at_fault_collisions", "drivable_area_compliance", "time_to_collision_within_bound"):
        np.testing.assert_array_equal(few.columns[name], whole.columns[name][mine], err_msg=name)


def test_a_batch_holds_recorded_or_synthetic_scenes() -> None:
    recorded = busy_street(0, "epdms_v2")
    synthetic = replace(recorded, synthetic=True, human_poses=None)
    both = SceneBatch.of([prepare(recorded), prepare(synthetic)])
    with pytest.raises(UserError, match="a batch each"):
        score(both, np.zeros((2, 1, 8, 3)), "epdms_v2")


def on_device(value: Any, mode: FakeTensorMode, device: str) -> Any:
    """A copy without data of a nest of dataclasses, its tensors on `device` (which need not exist)."""
    if isinstance(value, torch.Tensor):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=device)
    if is_dataclass(value):
        return type(value)(**{f.name: on_device(getattr(value, f.name), mode, device) for f in fields(value)})
    if isinstance(value, dict):
        return {key: on_device(item, mode, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_device(item, mode, device) for item in value)
    return value


def simulated(batch: SceneBatch, drives: torch.Tensor) -> tuple[torch.Tensor, ...]:
    states = simulate(batch.initial_state[:, None], batch.sample(drives))
    return states, Footprints.of(states).center_x, comfort_checks_v1(states), comfort_checks_v2(states)


@METRICS
def test_simulation_and_comfort_mix_no_devices(metric: str) -> None:
    """Shapes only, on a GPU that is not there: an operation that takes tensors of two devices raises.

    What follows from it depends on the data (which objects are near, which cells have edges) and cannot be run so.
    """
    batch = SceneBatch.of([prepare(busy_street(seed, metric)) for seed in (1, 2)])
    real = simulated(batch, torch.zeros(2, 5, 8, 3, dtype=torch.float64))  # fills the caches of constants, too
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    elsewhere = on_device(batch, mode, "cuda")
    with mode:
        fake = simulated(elsewhere, torch.empty(2, 5, 8, 3, dtype=torch.float64, device="cuda"))
        with pytest.raises(RuntimeError, match="device"):
            simulated(replace(elsewhere, initial_state=torch.empty(2, 11, dtype=torch.float64)), elsewhere.origin)
    for found, expected in zip(fake, real, strict=True):
        assert found.device.type == "cuda" and found.shape == expected.shape and found.dtype == expected.dtype
