"""The worked example of docs/metrics.md: the page says what the evaluator says."""

from __future__ import annotations

from pathlib import Path

import pytest

from navsim_eval.example.explain import example_figure, example_plans, example_scores, example_tables
from navsim_eval.results import SHORT

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_holds_exactly_these_numbers():
    page = (DOCS / "metrics.md").read_text()
    for table in example_tables().strip().split("\n\n"):
        assert table in page, "the evaluator says other numbers: run python -m navsim_eval.example and update the page"
    for name in SHORT.values():
        assert name == "score" or f"| {name}, " in page, f"{name} is not explained"


def test_the_story_that_the_page_tells():
    scores = example_scores()
    v1, v2 = scores["pdms_v1"], scores["epdms_v2"]
    row = {plan.letter: index for index, plan in enumerate(example_plans())}
    assert v1["score"].argmax() == row["B"] and v2["score"].argmin() == row["B"], "best under v1, worst under v2"
    assert v2["traffic_light_compliance"][row["B"]] == 0.0
    assert scores["forgiven"]["score"][row["B"]] == 1.0
    assert v2["driving_direction_compliance"][row["C"]] == 0.5 and v1["score"][row["C"]] > 0.9
    assert v2["lane_keeping"][row["D"]] == 0.0 and v2["score"][row["D"]] > 0.8
    assert v1["comfort"][row["E"]] == 1.0 and v2["history_comfort"][row["E"]] == 0.0
    d = row["D"]
    assert v1["score"][d] == pytest.approx((5 * v1["ego_progress"][d] + 7) / 12)
    assert v2["score"][d] == pytest.approx((5 * v2["ego_progress"][d] + 7) / 14)


def test_the_picture():
    assert len(example_figure().axes) == 2
    assert 1_000 < (DOCS / "images" / "metrics.png").stat().st_size < 300_000
