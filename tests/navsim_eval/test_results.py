"""Result files: NAVSIM's columns, means, and a headline only at full coverage."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from navsim_eval.errors import DataError
from navsim_eval.results import FORMATS, Coverage, Results, headline, make_summary, save_json, score_rows


def some_results(metric: str = "pdms_v1", scenes: int = 4, failed: int | None = 2) -> Results:
    rng = np.random.default_rng(0)
    columns = {name: rng.uniform(size=scenes) for name in FORMATS[metric].columns}
    failures = {}
    if failed is not None:
        for values in columns.values():
            values[failed] = np.nan
        failures = {f"token{failed}": "its log is broken"}
    return Results(metric, np.array([f"token{i}" for i in range(scenes)]), columns, failures)


def summary_of(results: Results, coverage: Coverage) -> dict:
    return make_summary(results, coverage, planner={"name": "someone"}, split="test", seed=3, environment={})


@pytest.mark.parametrize("metric", FORMATS)
def test_csv_has_navsims_layout_and_reads_back(tmp_path, metric):
    results = some_results(metric)
    path = results.save_csv(tmp_path / "scores.csv")
    rows = list(csv.reader(open(path, newline="")))
    assert rows[0] == ["", "token", "valid", *FORMATS[metric].columns]
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3", "4"]
    assert rows[3][1:] == ["token2", "False", *[""] * len(FORMATS[metric].columns)]
    assert rows[-1][1:3] == [FORMATS[metric].average, "False"]
    assert float(rows[-1][-1]) == pytest.approx(np.nanmean(results.columns["score"]), abs=1e-15)

    again = Results.load_csv(path, metric)
    assert again.tokens.tolist() == results.tokens.tolist()
    for name, values in results.columns.items():
        np.testing.assert_array_equal(again.columns[name], values)


def test_v1_columns_are_in_the_order_of_the_devkit():
    assert FORMATS["pdms_v1"].columns == (
        "no_at_fault_collisions", "drivable_area_compliance", "ego_progress", "time_to_collision_within_bound",
        "comfort", "driving_direction_compliance", "score",
    )  # fmt: skip


def test_headline_needs_every_expected_scene():
    complete = summary_of(some_results(failed=None), Coverage(4, 4, 4, 4))
    assert complete["pdms"] == headline(complete) == pytest.approx(complete["means_over_scored"]["score"])
    assert complete["verdict"] == "complete"
    partial = summary_of(some_results(), Coverage(4, 4, 4, 3, reasons={"token2": "broken"}))
    assert partial["pdms"] is None and partial["verdict"] == "partial: 3 of 4"
    lost = summary_of(some_results(failed=None), Coverage(4, 4, 4, 4, lost_logs=1))
    assert lost["pdms"] is None and lost["verdict"].startswith("partial: 4 of 4 (1 log")
    empty = Coverage(0, 0, 0, 0)
    assert not empty.complete


def test_v2_headline_has_its_own_name(tmp_path):
    summary = summary_of(some_results("epdms_v2", failed=None), Coverage(4, 4, 4, 4))
    assert "pdms" not in summary and 0 < summary["epdms"] < 1
    save_json(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 3


def test_table_shows_points_and_hides_partial_headlines():
    good = summary_of(some_results(failed=None), Coverage(4, 4, 4, 4))
    bad = summary_of(some_results(), Coverage(5, 4, 4, 3))
    header, rows = score_rows([good, bad])
    assert header[:2] == ["planner", "PDMS"] and header[-1] == "scenes"
    assert rows[0][1] == f"{100 * good['pdms']:.1f}" and rows[0][-1] == "4"
    assert rows[1][1] == "—" and rows[1][-1] == "partial: 3 of 5"


def test_undefined_column_has_no_mean_and_does_not_warn(recwarn):
    results = some_results("epdms_v2")
    results.columns["two_frame_extended_comfort"][:] = np.nan
    assert results.means()["two_frame_extended_comfort"] is None
    assert not recwarn.list


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="stage=score"):
        Results.load_csv(tmp_path / "absent.csv", "pdms_v1")
    path = some_results("pdms_v1").save_csv(tmp_path / "scores.csv")
    with pytest.raises(DataError, match="traffic_light_compliance"):
        Results.load_csv(path, "epdms_v2")
