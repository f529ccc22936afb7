"""Comparing two results: every kind of file is read, pairs are honest, intervals cover what they claim."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.comparison import show
from navsim_eval.comparison.bootstrap import paired_interval
from navsim_eval.comparison.compare import compare
from navsim_eval.comparison.read import TokenScores, read_scores
from navsim_eval.errors import UserError
from navsim_eval.predictions import Predictions
from navsim_eval.results import FORMATS, Coverage, Results, make_summary, save_json
from navsim_eval.score_table import ScoreTable

V1, V2 = FORMATS["pdms_v1"].columns, FORMATS["epdms_v2"].columns


def some_scores(seed: int = 0, scenes: int = 40, metric: str = "pdms_v1", **changes) -> TokenScores:
    """Factors 0, 0.5 or 1, other sub-scores anywhere; scenes come in logs of four."""
    rng = np.random.default_rng(seed)
    columns = {}
    for name in FORMATS[metric].columns:
        factor = name.endswith(("collisions", "compliance"))
        columns[name] = rng.choice([0.0, 0.5, 1.0], scenes) if factor else rng.uniform(size=scenes)
    tokens = np.array([f"{index:016x}" for index in range(scenes)])
    logs = np.array([f"log{index // 4}" for index in range(scenes)])
    values = {"source": f"{seed}.csv", "name": f"planner {seed}", "split": "test", "logs": logs, "tokens": tokens}
    return TokenScores(**{**values, "metric": metric, "columns": columns, **changes})


# --- reading ---------------------------------------------------------------------------------------------------------


def write_rows(path: Path, header: list[str], rows: list[list]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_official_v1_file_with_a_failed_scene(tmp_path):
    """As pandas writes it: index column, empty cells of a failed token, mean row at the end."""
    columns = ["no_at_fault_collisions", "drivable_area_compliance", "ego_progress", "time_to_collision_within_bound",
               "comfort", "driving_direction_compliance", "score"]  # fmt: skip
    rows = [
        [0, "a1b2c3d4e5f60718", True, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.7916666666666666],
        [1, "1234567890123456", False, *[""] * 7],
        [2, "average", False, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.7916666666666666],
    ]
    found = read_scores(write_rows(tmp_path / "2025.01.01.00.00.00.csv", ["", "token", "valid", *columns], rows))
    assert found.metric == "pdms_v1" and found.tokens.tolist() == ["a1b2c3d4e5f60718", "1234567890123456"]
    assert found.columns["score"][0] == 0.7916666666666666 and np.isnan(found.columns["score"][1])
    assert found.split is None and found.logs.tolist() == ["", ""]
    assert found.closing == {"average": 0.7916666666666666}


def test_official_v2_file(tmp_path):
    rows = [[0, "t0", True, *[1.0] * 8, "", 0.9], [1, "t1", True, *[1.0] * 10],
            [2, "average_all_frames", True, *[1.0] * 9, 0.95]]  # fmt: skip
    found = read_scores(write_rows(tmp_path / "x.csv", ["", "token", "valid", *V2], rows))
    assert found.metric == "epdms_v2" and len(found.tokens) == 2
    assert np.isnan(found.columns["two_frame_extended_comfort"][0]), "an undefined sub-score is not a zero"
    assert found.closing == {"average_all_frames": 0.95}


def test_official_two_stage_file(tmp_path):
    names = V2[:-1]
    header = ["", "token", "valid", *(f"{n}_stage_one" for n in names), *(f"{n}_stage_two" for n in names), "score"]
    rows = [[0, "first", True, *[1.0] * 9, *[""] * 9, 0.8], [1, "second", True, *[""] * 9, *[0.5] * 9, 0.3]]
    rows += [[k, f"extended_pdm_score_{kind}", True, *[""] * 18, 0.24]
             for k, kind in enumerate(("stage_one", "stage_two", "combined"), 2)]  # fmt: skip
    found = read_scores(write_rows(tmp_path / "x.csv", header, rows))
    assert found.metric == "epdms_v2_two_stage" and found.tokens.tolist() == ["first", "second"]
    np.testing.assert_equal(found.columns["score_stage_one"], [0.8, np.nan])
    np.testing.assert_equal(found.columns["score_stage_two"], [np.nan, 0.3])
    assert found.closing["extended_pdm_score_combined"] == 0.24
    result = compare(found, found)
    assert result.pairs == 2 and result.differences[0].name == "score_stage_one"
    assert show.short_name("lane_keeping_stage_two") == "LK, stage 2"
    assert any("unweighted" in note for note in result.notes)
    assert {flip.name for flip in result.flips} >= {f"traffic_light_compliance_stage_{n}" for n in ("one", "two")}
    json.dumps(show.as_json(result), allow_nan=False)

    save_json(tmp_path / "summary.json", {"metric": "epdms_v2", "split": "hard", "planner": {"name": "x"}})
    ours = (tmp_path / "x.csv").rename(tmp_path / "scores.csv")
    assert read_scores(ours).metric == "epdms_v2_two_stage", "the summary names the generation, the file the stages"


def an_evaluation(folder: Path, metric: str = "pdms_v1", split: str = "test") -> Path:
    """What tools/evaluate.py leaves for one planner."""
    scores = some_scores(metric=metric)
    results = Results(metric, scores.tokens, scores.columns)
    results.save_csv(folder / "scores.csv")
    coverage = Coverage(40, 40, 40, 40)
    save_json(folder / "summary.json", make_summary(results, coverage, planner={"name": "x"}, split=split, seed=0))
    Predictions(scores.tokens, np.zeros((40, 8, 3)), facts={"log": scores.logs}).save(folder / "predictions.npz")
    return folder


def test_a_folder_brings_split_planner_and_logs(tmp_path):
    found = read_scores(an_evaluation(tmp_path / "run"))
    assert (found.name, found.split, found.metric) == ("x", "test", "pdms_v1")
    assert found.logs.tolist() == some_scores().logs.tolist()


def test_a_folder_of_two_metrics_asks_which(tmp_path):
    an_evaluation(tmp_path / "run" / "pdms_v1")
    an_evaluation(tmp_path / "run" / "epdms_v2", "epdms_v2")
    with pytest.raises(UserError, match="name one of epdms_v2, pdms_v1 below it"):
        read_scores(tmp_path / "run")
    assert read_scores(tmp_path / "run", metric="epdms_v2").metric == "epdms_v2"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_of_score_py_with_several_proposals(tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    columns = {name: np.arange(6.0) / 10 for name in V1}
    columns["score"][5] = np.nan
    tokens, logs = np.repeat(["s", "t", "u"], 2), np.repeat(["l", "l", "m"], 2)
    table = ScoreTable("pdms_v1", tokens, logs, np.tile([0, 1], 3), np.isfinite(columns["score"]), columns)
    path = table.save(tmp_path / f"scores.{ending}")
    with pytest.raises(UserError, match=r"2 proposals.*a_proposal=K"):
        read_scores(path)
    with pytest.raises(UserError, match="no proposal 7"):
        read_scores(path, proposal=7)
    found = read_scores(path, proposal=1)
    assert found.tokens.tolist() == ["s", "t", "u"] and found.logs.tolist() == ["l", "l", "m"]
    np.testing.assert_equal(found.columns["score"], [0.1, 0.3, np.nan])


@pytest.mark.parametrize(
    "header, rows, complaint",
    [
        (["token", "pdms"], [["a", 1]], r"\[score\]"),
        (["token", "score"], [["a", 1]], "neither a PDMS nor an EPDMS"),
        (["token", *V1], [["a", *[1] * 7], ["a", *[1] * 7]], "more than once"),
        (["token", *V1], [["a", *["x"] * 7]], "not a number"),
        (["token", *V1], [["a", *[85.0] * 7]], "fractions"),
        (["token", *V1], [["average", *[1] * 7]], "no scene"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path, header, rows, complaint):
    with pytest.raises(UserError, match=complaint):
        read_scores(write_rows(tmp_path / "x.csv", header, rows))


def test_absent_and_empty_places_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        read_scores(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match=r"no scores\.csv"):
        read_scores(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"parquet"):
        read_scores(tmp_path / "x.parquet")


# --- comparing -------------------------------------------------------------------------------------------------------


def test_a_against_itself_is_exactly_nothing():
    result = compare(some_scores(), some_scores(), resamples=500)
    assert result.pairs == 40 and result.logs == 10
    for item in result.differences:
        assert item.difference == 0.0 and item.by_token == (0.0, 0.0) and item.by_log == (0.0, 0.0)
        assert item.verdict == 0
    assert not result.losses and not result.gains
    assert all(not flip.to_zero and not flip.from_zero for flip in result.flips)


@given(st.integers(0, 50), st.sampled_from(["pdms_v1", "epdms_v2"]))
@settings(max_examples=15)
def test_exchanging_sides_negates_everything_exactly(seed, metric):
    a, b = some_scores(seed, metric=metric), some_scores(seed + 1, metric=metric)
    forth, back = compare(a, b, resamples=300), compare(b, a, resamples=300)
    for one, other in zip(forth.differences, back.differences, strict=True):
        assert one.difference == -other.difference
        assert one.by_token == (-other.by_token[1], -other.by_token[0])
        assert one.by_log == (-other.by_log[1], -other.by_log[0])
    for one, other in zip(forth.flips, back.flips, strict=True):
        assert (one.to_zero, one.from_zero) == (other.from_zero, other.to_zero)
    assert [c.token for c in forth.losses] == [c.token for c in back.gains]


@given(st.permutations(range(12)))
@settings(max_examples=10)
def test_the_order_of_rows_changes_no_mean_flip_or_number_of_pairs(order):
    a, b = some_scores(0, 12), some_scores(1, 12)
    order = np.array(order)
    mixed = some_scores(1, 12, tokens=b.tokens[order], logs=b.logs[order],
                        columns={name: values[order] for name, values in b.columns.items()})  # fmt: skip
    assert compare(a, mixed, resamples=200).differences == compare(a, b, resamples=200).differences
    assert compare(a, mixed, resamples=200).flips == compare(a, b, resamples=200).flips


def test_flips_changes_and_unpaired_scenes_by_hand():
    a, b = some_scores(), some_scores()
    for side in (a, b):
        for values in side.columns.values():
            values[:] = 1.0
    b.columns["no_at_fault_collisions"][3], b.columns["score"][3] = 0.0, 0.0
    a.columns["drivable_area_compliance"][[5, 6]], a.columns["score"][[5, 6]] = 0.0, 0.0
    b.columns["ego_progress"][8], b.columns["score"][8] = 0.4, 0.75
    a.columns["score"][9], b.columns["score"][10] = np.nan, np.nan
    columns = {name: np.append(values[1:], 1.0) for name, values in b.columns.items()}
    b = some_scores(tokens=np.append(b.tokens[1:], "stranger"), columns=columns, logs=np.append(b.logs[1:], "far"))
    result = compare(a, b, resamples=200)

    assert result.only_a == (f"{0:016x}",) and result.only_b == ("stranger",)
    assert result.unscored_a == (f"{9:016x}",) and result.unscored_b == (f"{10:016x}",)
    assert result.pairs == 37
    flips = {flip.name: flip for flip in result.flips}
    assert set(flips) == {"no_at_fault_collisions", "drivable_area_compliance"}
    assert flips["no_at_fault_collisions"].to_zero == (f"{3:016x}",)
    assert flips["drivable_area_compliance"].from_zero == (f"{5:016x}", f"{6:016x}")
    assert [(c.token, c.difference) for c in result.losses] == [(f"{3:016x}", -1.0), (f"{8:016x}", -0.25)]
    assert result.losses[1].columns == {"ego_progress": (1.0, 0.4)}
    assert [c.token for c in result.gains] == [f"{5:016x}", f"{6:016x}"]
    score = result.differences[0]
    assert score.name == "score" and score.difference == pytest.approx((2 - 1 - 0.25) / 37)
    assert show.pairing_line(result) == (
        "37 pairs of scenes (10 logs), 1 only in A, 1 only in B, 1 not scored in A, 1 not scored in B"
    )


def test_a_sub_score_is_compared_where_both_sides_have_it():
    a, b = some_scores(metric="epdms_v2"), some_scores(1, metric="epdms_v2")
    a.columns["two_frame_extended_comfort"][::4] = np.nan
    item = next(d for d in compare(a, b, resamples=200).differences if d.name == "two_frame_extended_comfort")
    kept = np.arange(40) % 4 > 0
    assert item.pairs == 30
    assert item.mean_a == pytest.approx(a.columns["two_frame_extended_comfort"][kept].mean())
    assert item.mean_b == pytest.approx(b.columns["two_frame_extended_comfort"][kept].mean())


def test_different_metrics_splits_and_scenes_are_refused():
    a = some_scores()
    with pytest.raises(UserError, match="different metrics"):
        compare(a, some_scores(metric="epdms_v2"))
    with pytest.raises(UserError, match=r"split 'test'.*split 'val'"):
        compare(a, some_scores(split="val"))
    with pytest.raises(UserError, match="no token is in both"):
        compare(a, some_scores(tokens=np.array([f"other{i}" for i in range(40)])))
    empty = some_scores(columns={name: np.full(40, np.nan) for name in V1})
    with pytest.raises(UserError, match="none was scored on both sides"):
        compare(a, empty)


def test_logs_come_from_whoever_knows_them():
    unknown = np.full(40, "")
    a, b = some_scores(logs=unknown), some_scores(1)
    assert compare(a, b, resamples=200).logs == 10
    neither = compare(a, some_scores(1, logs=unknown), resamples=200)
    assert neither.logs is None and neither.differences[0].by_log is None
    assert any("logs are unknown" in note for note in neither.notes)
    told = dict(zip(b.tokens.tolist(), b.logs.tolist(), strict=True))
    assert compare(a, some_scores(1, logs=unknown), told, resamples=200).logs == 10


def test_page_and_json_say_the_same_and_need_nothing_else():
    result = compare(some_scores(), some_scores(1, name="<b>ours</b>"), resamples=300)
    page, content = show.page(result), show.as_json(result)
    assert "&lt;b&gt;ours" in page and "<b>ours" not in page
    assert "http" not in page.replace("http-equiv", "") and page.count("<svg") == 1
    assert f"{100 * content['differences']['score']['difference']:+.2f}" in page
    assert content["bootstrap"]["seed"] == 0 and content["pairs"] == 40


# --- intervals -------------------------------------------------------------------------------------------------------


def test_the_seed_decides():
    differences = np.random.default_rng(0).normal(size=(50, 2))
    first = paired_interval(differences, seed=3, resamples=400)
    np.testing.assert_array_equal(first, paired_interval(differences, seed=3, resamples=400))
    assert not np.array_equal(first, paired_interval(differences, seed=4, resamples=400))


def test_scenes_as_clusters_of_one_are_scenes():
    differences = np.random.default_rng(0).normal(size=(30, 1))
    labels = np.array([f"{i:02d}" for i in range(30)])
    np.testing.assert_array_equal(paired_interval(differences), paired_interval(differences, labels))


def test_a_single_cluster_has_no_interval():
    low, high = paired_interval(np.ones((5, 1)), np.full(5, "same"))
    assert np.isnan(low).all() and np.isnan(high).all()


def simulated_coverage(clusters: int, spread: float, over_logs: bool) -> float:
    """Share of 400 simulated comparisons whose 95 % interval holds the truth; scenes share a part with their log."""
    rng = np.random.default_rng(7)
    held = 0
    for trial in range(400):
        sizes = rng.integers(3, 12, clusters)
        logs = np.repeat(np.arange(clusters), sizes)
        shared = spread * rng.normal(size=clusters)[logs]
        differences = 0.02 + shared + 0.1 * rng.normal(size=len(logs))
        low, high = paired_interval(differences[:, None], logs if over_logs else None, resamples=400, seed=trial)
        held += bool(low[0] <= 0.02 <= high[0])
    return held / 400


@pytest.mark.parametrize("clusters", [12, 40])
def test_intervals_over_logs_cover_what_they_claim(clusters):
    assert 0.92 <= simulated_coverage(clusters, 0.1, over_logs=True) <= 0.98


def test_intervals_over_tokens_cover_independent_scenes_and_fail_correlated_ones():
    assert 0.92 <= simulated_coverage(12, 0.0, over_logs=False) <= 0.98
    assert simulated_coverage(12, 0.1, over_logs=False) < 0.80, "the reason why logs are resampled"
