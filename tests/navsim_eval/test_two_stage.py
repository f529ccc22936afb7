"""Two-stage EPDMS: aggregation against the reference, weights, and a split from disk to the result file."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from navsim_eval.errors import DataError, UserError
from navsim_eval.evaluate import EvaluateConfig, evaluate
from navsim_eval.formats.splits import SceneFilter, Split
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.metrics.aggregate import COLUMNS
from navsim_eval.metrics.extended_comfort import motion
from navsim_eval.metrics.two_stage import StageRows, aggregate_two_stages, check_groups, second_stage_weights
from navsim_eval.pdm.cache import build_metric_cache, from_arrays, initial_state, to_arrays
from navsim_eval.pdm.dynamics import interpolate_trajectory, simulate
from navsim_eval.pseudo_simulation import choose_protocol, choose_protocols
from navsim_eval.score_file import ScoreConfig, score_file
from navsim_eval.scoring import score
from navsim_eval.two_stage_dataset import TwoStageDataset
from tests.golden import needs_golden
from tests.golden.pdms import PDMS, load, scenes
from tests.two_stage_world import SPLIT, TwoStageWorld, write_two_stage_world
from tests.worlds import write_world

GROUP = ("now", "before", (("a1", "b1"), ("a2", "b2")))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> TwoStageWorld:
    return write_two_stage_world(tmp_path_factory.mktemp("two_stage"))


def rows(**changes) -> StageRows:
    """Six rows of a planner that drives on evenly and scores 1 everywhere."""
    tokens = ["now", "before", "a1", "b1", "a2", "b2"]
    count = len(tokens)
    points = np.zeros((count, 2))
    values = {
        "tokens": np.array(tokens),
        "columns": {name: np.ones(count) for name in COLUMNS["epdms_v2"]},
        "motion": np.zeros((count, 2, 41)),
        "start_time": np.array([0.5, 0.0, 4.5, 4.0, 4.5, 4.0]),
        "start_point": points,
        "end_point": points.copy(),
    }
    return StageRows(**{**values, **changes})


@needs_golden
@pytest.mark.golden
def test_aggregation_equals_the_reference() -> None:
    known = {item.scene.token: item for item in scenes()}
    for case in json.loads((PDMS / "two_stage_aggregation.json").read_text()):
        listed = case["rows"]
        frames = [known[row["token"]].scene.current for row in listed]
        plans = np.stack([load("candidates")["poses"][known[row["token"]].row, row["candidate"]] for row in listed])
        initial = np.stack([initial_state(frame) for frame in frames])[:, None]
        start = torch.tensor([frame.timestamp_us for frame in frames])[:, None]
        states = simulate(initial, interpolate_trajectory(initial[..., :3], start, plans[:, None]))
        found = aggregate_two_stages(
            StageRows(
                tokens=np.array([row["token"] for row in listed]),
                columns={name: np.array([row[name] for row in listed]) for name in COLUMNS["epdms_v2"]},
                motion=motion(states)[:, 0].numpy(),
                start_time=np.array([row["start_time"] for row in listed]),
                start_point=np.array([[row["start_point_x"], row["start_point_y"]] for row in listed]),
                end_point=np.array([[row["endpoint_x"], row["endpoint_y"]] for row in listed]),
            ),
            [(now, previous, tuple(map(tuple, pairs))) for (now, previous), pairs in case["mapping"]],
        )
        by_row = {
            "weight": found.weights,
            "two_frame_extended_comfort": found.columns["two_frame_extended_comfort"],
            "score": found.columns["score"],
        }
        for name, values in by_row.items():
            expected = [case[name][row["token"]] for row in listed]
            np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9, err_msg=name)
        for part in ("stage_one", "stage_two", "combined"):
            ours = getattr(found, part)
            for name, value in case[part].items():
                assert ours[name] == pytest.approx(value, abs=1e-9), (part, name)


def test_weights_prefer_scenes_near_the_end_of_the_first_stage() -> None:
    weights = second_stage_weights(np.zeros(2), np.array([[0.1, 0.0], [0.5, 0.0], [0.0, 0.1]]))
    assert weights.sum() == pytest.approx(1.0) and weights[0] == pytest.approx(weights[2]) and weights[0] > weights[1]
    np.testing.assert_array_equal(second_stage_weights(np.zeros(2), np.full((4, 2), 1e3)), np.full(4, 0.25))


def test_stages_multiply_within_a_group() -> None:
    columns = {name: np.ones(6) for name in COLUMNS["epdms_v2"]}
    columns["drivable_area_compliance"] = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])  # the first pair's now fails
    found = aggregate_two_stages(rows(columns=columns), [GROUP])
    assert found.stage_one["score"] == 1.0
    assert found.stage_two["score"] == found.combined["score"] == pytest.approx(0.75)
    near = np.array([[0, 0], [0, 0], [5.0, 0], [0, 0], [0, 0], [0, 0]])  # but it starts where nobody gets to
    assert aggregate_two_stages(rows(columns=columns, start_point=near), [GROUP]).combined["score"] == pytest.approx(
        1.0
    )


def test_a_scene_without_a_score_leaves_no_number() -> None:
    columns = {name: np.ones(6) for name in COLUMNS["epdms_v2"]}
    columns["lane_keeping"] = np.array([1.0, 1.0, 1.0, np.nan, 1.0, 1.0])
    failed = np.zeros((6, 2, 41))
    failed[3] = np.nan
    found = aggregate_two_stages(rows(columns=columns, motion=failed), [GROUP])
    assert np.isnan(found.combined["score"]) and found.as_dict()["combined"]["score"] is None


def test_groups_that_do_not_fit_are_refused() -> None:
    tokens = rows().tokens.tolist()
    for groups, problem in (
        ([], "the split lists none"),
        ([("now", "before", ())], "no second-stage scenes"),
        ([("now", "before", (("a1", "a1"),))], "a1 belongs to more than one"),
        ([("now", "before", (("a1", "gone"),))], r"1 scenes have no row \(first: gone\)"),
    ):
        with pytest.raises(UserError, match=problem):
            check_groups(groups, tokens)
    with pytest.raises(UserError, match=r"4\.500 s apart"):
        aggregate_two_stages(rows(start_time=np.array([4.5, 0.0, 4.5, 4.0, 4.5, 4.0])), [GROUP])


# --- what a split supports -------------------------------------------------------------------------------------------


def test_a_metric_that_a_split_cannot_support_is_refused_with_the_reason() -> None:
    full, short = Split("full", "f", SceneFilter()), Split("short", "s", SceneFilter(num_future_frames=8))
    blind = Split("blind", "b", SceneFilter(num_future_frames=0))
    new = Split("new", "n", SceneFilter(num_history_frames=1))
    two = Split("two", "t", SceneFilter(num_future_frames=16), second_stage=(GROUP,))
    assert choose_protocol("epdms_v2", short).stages == 1 and choose_protocol("epdms_v2", two).stages == 2
    assert choose_protocol("epdms_v2", two).traffic == "reactive"
    assert choose_protocol("epdms_v2", two, stages=1).traffic == "non_reactive"
    for arguments, problem in (
        (("pdms_v1", short), "pdms_v1 observes 10 future frames, scenes of split short have 8"),
        (("epdms_v2", blind), "epdms_v2 observes 8 future frames, scenes of split blind have 0"),
        (("epdms_v2", new), "looks back over 4 frames"),
        (("epdms_v2", full, 2), "split full lists no second-stage scenes"),
        (("pdms_v1", two, 2), "pdms_v1 .* has no second stage"),
        (("pdms_v1", full, 1, "reactive"), "defined on replayed traffic only"),
        (("epdms_v2", full, 1, "wild"), "traffic='wild' is unknown"),
        (("epdms_v2", full, 3), "stages=3"),
        (("epdms_v3", full), "metric='epdms_v3' is unknown"),
    ):
        with pytest.raises(UserError, match=problem):
            choose_protocol(*arguments)
    with pytest.raises(UserError, match="pdms_v1: 1, epdms_v2: 2"):
        choose_protocols(["pdms_v1", "epdms_v2"], two)


def test_a_folder_has_no_second_stage(tmp_path: Path) -> None:
    folder = write_world(tmp_path, {"roads": 1}, num_frames=14, sensors=False)
    with pytest.raises(UserError, match="split roads has no second stage"):
        TwoStageDataset.from_config(folder.data, "roads")


# --- from disk to the result file ------------------------------------------------------------------------------------


def test_scenes_of_both_stages(world: TwoStageWorld) -> None:
    dataset = TwoStageDataset.from_config(world.data, SPLIT)
    assert sorted(dataset.tokens) == sorted(world.tokens) and len(dataset) == 6
    assert [dataset.is_second_stage(token) for token in dataset.tokens] == [False] * 2 + [True] * 4
    assert dataset.coverage.complete and dataset.coverage.scenes_expected == 6
    scene = dataset[world.group[2][0][0]]
    assert scene.token == world.group[2][0][0] and len(scene.frames) == 4 and scene.future == ()


def test_a_synthetic_scene_is_scored_without_a_human(world: TwoStageWorld) -> None:
    dataset = TwoStageDataset.from_config(world.data, SPLIT)
    caches = MetricCaches(world.data, dataset, "epdms_v2")
    mine = [caches[token] for token in dataset.tokens]
    assert [cache.synthetic for cache in mine] == [False] * 2 + [True] * 4
    again = from_arrays(to_arrays(mine[-1]))
    assert again.synthetic and again.human_poses is None
    np.testing.assert_array_equal(again.traffic.points, mine[-1].traffic.points)
    plans = np.zeros((6, 1, 8, 3))
    plans[:, 0, :, 0] = 4.0 * np.arange(1, 9)
    for traffic in ("non_reactive", "reactive"):
        table = score(mine, plans, metric="epdms_v2", traffic=traffic)
        assert table.valid.all() and table.tokens.tolist() == list(dataset.tokens)
        for name in COLUMNS["epdms_v2"]:
            np.testing.assert_array_equal(table.columns[name][2:], table.columns[f"unfiltered_{name}"][2:])
        paired = np.isfinite(table.columns["two_frame_extended_comfort"])
        assert paired.sum() == 1 and paired[:2].any()  # only recorded scenes have a predecessor in their log
        apart = score(mine[2:], plans[2:], metric="epdms_v2", traffic=traffic)
        np.testing.assert_array_equal(apart.columns["pdm_score"], table.columns["pdm_score"][2:])
    with pytest.raises(UserError, match="pdms_v1 has no second stage"):
        build_metric_cache(dataset.observed(dataset.tokens[-1]), caches.maps.get(mine[0].map_name), "pdms_v1")


def test_evaluate_reports_both_stages(world: TwoStageWorld, tmp_path: Path) -> None:
    config = EvaluateConfig(
        data=world.data, split=SPLIT, planner="constant_velocity", metric=["epdms_v2", "epdms_v2_unfixed_filter"],
        output_dir=str(tmp_path), workers=1,
    )  # fmt: skip
    runs = evaluate(config)
    assert [run.results.metric for run in runs] == config.metric
    summary = json.loads((tmp_path / "epdms_v2" / "summary.json").read_text())
    assert (summary["verdict"], summary["stages"], summary["traffic"]) == ("complete", 2, "reactive")
    assert summary["epdms"] == summary["two_stage"]["combined"]["score"]
    with open(tmp_path / "epdms_v2" / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    closing = [f"extended_pdm_score_{part}" for part in ("stage_one", "stage_two", "combined")]
    assert [row["token"] for row in table] == [*runs[0].results.tokens.tolist(), *closing]
    assert table[0]["lane_keeping_stage_one"] and not table[0]["lane_keeping_stage_two"]
    assert table[5]["lane_keeping_stage_two"] and not table[5]["lane_keeping_stage_one"]
    for row, part in zip(table[-3:], ("stage_one", "stage_two", "combined"), strict=True):
        assert float(row["score"]) == summary["two_stage"][part]["score"]
    assert "stage two" in (tmp_path / "report.html").read_text()

    # Scoring the same plans from their file says the same.
    scored = score_file(
        ScoreConfig(
            data=world.data, split=SPLIT, trajectories=str(tmp_path / "predictions.npz"), metric="epdms_v2",
            output_dir=str(tmp_path / "score"), workers=1,
        )
    )  # fmt: skip
    assert scored.two_stage[0].as_dict() == summary["two_stage"]
    stored = json.loads((tmp_path / "score" / "two_stage.json").read_text())
    assert stored["proposals"] == [summary["two_stage"]] and stored["traffic"] == "reactive"


def test_a_missing_second_stage_scene_takes_the_headline_away(world: TwoStageWorld, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("navsim_logs", "maps"):
        (root / name).symlink_to(Path(world.data.root) / name)
    folder = root / SPLIT / "synthetic_scene_pickles"
    folder.mkdir(parents=True)
    for path in sorted(world.second_stage.glob("*.pkl"))[1:]:
        (folder / path.name).symlink_to(path)
    data = replace(world.data, root=str(root), maps=str(root / "maps"))
    config = EvaluateConfig(
        data=data, split=SPLIT, planner="constant_velocity", metric="epdms_v2", output_dir=str(tmp_path / "out"),
        workers=1, report=False,
    )  # fmt: skip
    summary = evaluate(config)[0].summary
    assert summary["epdms"] is None and summary["verdict"] == "partial: 4 of 6"
    reasons = summary["coverage"]["first_reasons"]
    assert reasons["00000000000000001"].startswith("no extended comfort")  # the one whose neighbour is not there
    assert summary["two_stage"]["combined"]["score"] is None

    (folder / "empty.pkl").unlink(missing_ok=True)
    for path in folder.glob("*.pkl"):
        path.unlink()
    with pytest.raises(DataError, match="no synthetic scenes"):
        TwoStageDataset.from_config(data, SPLIT)


def test_a_file_without_a_scene_of_a_group_is_refused(world: TwoStageWorld, tmp_path: Path) -> None:
    file = tmp_path / "plans.npz"
    np.savez(file, tokens=np.array(world.tokens[:-1]), trajectories=np.zeros((5, 1, 8, 3), np.float32))
    config = ScoreConfig(
        data=world.data, split=SPLIT, trajectories=str(file), metric="epdms_v2", output_dir=str(tmp_path), workers=1
    )
    with pytest.raises(UserError, match="two stages need all scenes of a group; 1 are not in the file"):
        score_file(config)
