"""Candidates: diversity of shapes that can be checked by hand, calibration by hand, and what an evaluation writes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.errors import UserError
from navsim_eval.evaluate import EvaluateConfig, evaluate
from navsim_eval.modes.calibration import calibration, expected_error, reliability
from navsim_eval.modes.diversity import area_diversity, relative_spread
from navsim_eval.modes.judge import JudgedModes
from navsim_eval.planners import Plans, human
from navsim_eval.report.modes import reliability_diagram
from tests.worlds import World, write_world


def straight(speed: float, bearing: float = 0.0) -> np.ndarray:
    """(8, 3) poses at constant speed [m/s] in a direction [rad]."""
    along = speed * np.arange(1, 9) / 2
    return np.stack([along * math.cos(bearing), along * math.sin(bearing), np.full(8, bearing)], axis=1)


# --------------------------------------------------------------------------------------------------------- diversity


def test_equal_candidates_have_no_diversity() -> None:
    same = np.stack([straight(5.0)] * 20)[None]
    assert area_diversity(same) == pytest.approx([0.0], abs=1e-9) and relative_spread(same) == pytest.approx([0.0])


def test_single_candidate_has_no_diversity() -> None:
    one = straight(5.0)[None, None]
    assert area_diversity(one).tolist() == [0.0] and relative_spread(one).tolist() == [0.0]


def test_nested_candidates_by_hand() -> None:
    """Two ribbons of width w along one line, one twice as long: the union is the long one."""
    width, short, long = 2.0, 20.0, 40.0
    caps = math.pi * (width / 2) ** 2
    areas = [width * short + caps, width * long + caps]
    by_hand = 1 - (sum(areas) / 2) / areas[1]
    two = np.stack([straight(5.0), straight(10.0)])[None]
    assert area_diversity(two, width)[0] == pytest.approx(by_hand, abs=2e-3)  # polygons for round ends


def test_opposite_candidates_come_near_the_upper_bound() -> None:
    away = np.stack([straight(20.0, bearing) for bearing in (0.0, math.pi / 2, math.pi, -math.pi / 2)])[None]
    assert 0.70 < area_diversity(away)[0] < 0.75  # 1 - 1/4, less what they share at the start


def test_candidates_that_stand_still_cover_the_ego() -> None:
    assert area_diversity(np.zeros((1, 3, 8, 3))) == pytest.approx([0.0], abs=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_diversity_lies_within_its_bounds_and_has_no_order(seed: int, modes: int) -> None:
    draw = np.random.default_rng(seed)
    candidates = np.cumsum(draw.normal(1.0, 2.0, (1, modes, 8, 3)), axis=2)
    score, spread = area_diversity(candidates)[0], relative_spread(candidates)[0]
    assert 0 <= score <= 1 - 1 / modes + 1e-9 and 0 <= spread <= 1
    mixed = candidates[:, draw.permutation(modes)]
    assert area_diversity(mixed)[0] == pytest.approx(score, abs=1e-9)
    assert relative_spread(mixed)[0] == pytest.approx(spread, abs=1e-9)
    turned = candidates.copy()
    turned[..., :2] = candidates[..., :2] @ np.array([[0.6, 0.8], [-0.8, 0.6]])
    assert area_diversity(turned)[0] == pytest.approx(score, abs=5e-3)  # round ends are polygons


def test_spread_by_hand() -> None:
    """Candidates at 10 and 20 m everywhere: 10 m apart, 15 m from the start in the mean."""
    two = np.zeros((1, 2, 8, 3))
    two[0, 0, :, 0], two[0, 1, :, 0] = 10.0, 20.0
    assert relative_spread(two)[0] == pytest.approx(10 / 15)


def test_broken_candidates_have_no_diversity_score() -> None:
    candidates = np.stack([np.stack([straight(5.0), straight(6.0)])] * 2)
    candidates[1, 0, 3, 0] = np.nan
    scores = area_diversity(candidates)
    assert np.isfinite(scores[0]) and np.isnan(scores[1])


# ------------------------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand() -> None:
    said = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    came = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    table = reliability(said, came, came, bins=2)
    assert [(row.count, row.nearest) for row in table] == [(4, 0.25), (2, 0.5)]
    assert expected_error(table, "nearest") == pytest.approx((4 * 0.15 + 2 * 0.4) / 6)


def test_perfect_belief_has_no_error_and_unknown_outcomes_none() -> None:
    logits = np.array([[-50.0, 50.0]])
    perfect = calibration(logits, np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]]))
    assert perfect["ece_nearest"] == pytest.approx(0.0) and perfect["bins"][-1]["count"] == 1
    unknown = calibration(logits, np.full((1, 2), np.nan), np.array([[0.0, 1.0]]))
    assert unknown["ece_nearest"] is None and unknown["ece_score"] == pytest.approx(0.0)
    assert "circle" in reliability_diagram("a < b", unknown) and "a &lt; b" in reliability_diagram("a < b", unknown)


# ------------------------------------------------------------------------------------------------------------- judge


def test_numbers_of_a_scene_by_hand() -> None:
    modes = JudgedModes(
        tokens=np.array(["a", "b"]),
        chosen=np.array([1, 0]),
        logits=None,
        columns={"score": np.array([[0.2, 0.6], [np.nan, 0.5]])},
        ade=np.array([[1.0, 3.0], [np.nan, np.nan]]),
        fde=np.array([[2.0, 6.0], [np.nan, np.nan]]),
        diversity=np.array([0.3, 0.5]),
        spread=np.array([0.1, 0.1]),
    )
    summary = modes.summary()
    assert summary["chosen"] == pytest.approx(0.6)  # the choice in the second scene has no score
    assert summary["best"] == pytest.approx((0.6 + 0.5) / 2) and summary["mean"] == pytest.approx((0.4 + 0.5) / 2)
    assert summary["nearest"] == pytest.approx(0.2)  # only the first scene has a human plan
    assert (summary["ade"], summary["min_ade"], summary["fde"]) == (3.0, 1.0, 6.0)
    assert summary["diversity"] == pytest.approx(0.4) and summary["calibration"] is None


class Fan:
    """The human plan and two others, the first of which it prefers."""

    name = "fan"

    def plan(self, scenes) -> Plans:
        first = np.stack([human(scene) for scene in scenes])
        others = [np.stack([straight(speed)] * len(scenes)) for speed in (0.0, 25.0)]
        candidates = np.stack([others[0], first, others[1]], axis=1)
        return Plans(first, candidates, np.tile([-2.0, 2.0, -2.0], (len(scenes), 1)))

    def describe(self) -> dict:
        return {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"test": 1})


def test_an_evaluation_judges_every_candidate(world: World, tmp_path: Path) -> None:
    config = EvaluateConfig(
        data=world.data, planner="fan", split="test", output_dir=str(tmp_path), modes=True, workers=1, report_scenes=0
    )
    (run,) = evaluate(config, lambda *_: Fan())
    modes = json.loads((tmp_path / "summary.json").read_text())["modes"]
    assert modes["modes"] == 3 and modes["min_ade"] == pytest.approx(0.0, abs=1e-6)
    assert modes["chosen"] == pytest.approx(run.summary["pdms"]) and modes["nearest"] == pytest.approx(modes["chosen"])
    assert modes["best"] >= modes["chosen"] and modes["best"] >= modes["mean"] and modes["diversity"] > 0.2
    assert sum(row["count"] for row in modes["calibration"]["bins"]) == 3 * modes["scenes"]
    with open(tmp_path / "modes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * modes["scenes"] and [row["chosen"] for row in rows[:3]] == ["0", "1", "0"]
    plain = {row["token"]: float(row["score"]) for row in rows if row["chosen"] == "1"}
    scored = dict(zip(run.results.tokens.tolist(), run.results.columns["score"].tolist(), strict=True))
    assert plain == pytest.approx(scored)  # one scorer: a candidate is worth what the plan is worth
    with open(tmp_path / "mode_scenes.csv", newline="") as file:
        assert [row["token"] for row in csv.DictReader(file)] == run.results.tokens.tolist()
    page = (tmp_path / "report.html").read_text()
    assert "Candidates" in page and "reliability" in page


def test_baselines_have_one_candidate(world: World, tmp_path: Path) -> None:
    config = EvaluateConfig(
        data=world.data, planner="human", split="test", output_dir=str(tmp_path), modes=True, workers=1, report=False
    )
    (run,) = evaluate(config)
    modes = run.summary["modes"]
    assert modes["modes"] == 1 and modes["diversity"] == 0 and modes["best"] == modes["mean"] == modes["chosen"]
    assert modes["calibration"] is None


def test_candidates_are_judged_under_pdms_only(world: World) -> None:
    with pytest.raises(UserError, match=r"modes=true.*pdms_v1.*epdms_v2"):
        EvaluateConfig(data=world.data, metric="epdms_v2", modes=True)
