"""Several trainings compared: every command resolves, and rows are told apart as the numbers allow."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from diffusiondrive.experiments import ablations
from diffusiondrive.experiments.findings import RatioClaim, difference, read_environments, read_row
from diffusiondrive.experiments.matrix import (
    EGO_MLP,
    HUMAN,
    MatrixConfig,
    Row,
    check_planners,
    evaluate_trained,
    prepare_steps,
    run_matrix,
    train_step,
)
from diffusiondrive.experiments.paper import OURS, ROWS, VANILLA
from diffusiondrive.tool_steps import ROOT, Step
from navsim_eval.config import load_config
from navsim_eval.errors import DataError, UserError
from navsim_eval.results import FORMATS
from tests.steps import assert_resolves

CONFIG = MatrixConfig(seeds=[3], train=["trainer.epochs=1"])
FULL_SIZE = MatrixConfig(seeds=[3], variant="", features="diffusiondrive")
STEPS = [
    *prepare_steps(CONFIG),
    *(train_step(row, 3, config) for config in (CONFIG, FULL_SIZE) for row in ROWS),
    *(train_step(row, 3, CONFIG) for row in ablations.ROWS if not row.weights_of),
    evaluate_trained(ROWS[0], 3, CONFIG),
    *(evaluate_trained(row, 3, CONFIG) for row in ablations.ROWS if row.weights_of),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_command_resolves(step: Step, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert_resolves(step, monkeypatch, capsys)


def test_rows_differ_in_the_model_that_they_name() -> None:
    models = {row.name: next(a for a in train_step(row, 0, CONFIG).command if a.startswith("model=")) for row in ROWS}
    assert models["diffusiondrive"] == "model=city_nano" and models["transfuser"] == "model=city_nano_transfuser"
    names = {a for row in ROWS for a in train_step(row, 0, FULL_SIZE).command if a.startswith("model=")}
    assert names == {"model=diffusiondrive", "model=transfuser", "model=diffusion_policy", "model=truncated_unet"}


def test_rows_that_sample_otherwise_use_the_weights_of_the_base() -> None:
    base, *others = ablations.ROWS
    for row in others:
        shared = CONFIG.planner_folder(row, 0) == CONFIG.planner_folder(base, 0)
        assert shared == bool(row.sampling) and bool(row.sampling) != bool(row.overrides)
    assert {base.name, "diffusiondrive"} <= {row.name for row in ROWS}  # trainings that the paper's table shares
    assert len({row.name for row in ablations.ROWS}) == len(ablations.ROWS)


def test_planners_that_are_loaded_are_not_trained(tmp_path: Path) -> None:
    ours, other = Row("ours", "ours"), Row("more", "more", weights_of="ours", sampling=("sampling.steps=4",))
    plain = Row("plain", "plain")
    config = MatrixConfig(seeds=[3, 4], planners={"ours": str(tmp_path / "ours_{seed}")})
    assert [config.trains(row) for row in (ours, other, plain)] == [False, False, True]
    assert config.planner_folder(ours, 4) == config.planner_folder(other, 4) == tmp_path / "ours_4"
    assert f"planner={tmp_path / 'ours_4'}" in evaluate_trained(ours, 4, config).command
    assert len(config.training_folders([ours, other, plain])) == 2
    with pytest.raises(UserError, match="ours_3"):
        check_planners([ours, plain], config)
    with pytest.raises(UserError, match="no row is called ours"):
        check_planners([plain], config)
    for seed in (3, 4):
        (tmp_path / f"ours_{seed}").mkdir()
        (tmp_path / f"ours_{seed}" / "config.json").write_text("{}")
    check_planners([ours, plain], config)


def evaluation(folder: Path, scores: np.ndarray, names: list[str] | None = None, modes: dict | None = None) -> Path:
    """An evaluation folder with these scores, three scenes a log."""
    folder.mkdir(parents=True)
    names = names or [f"{k:016x}" for k in range(len(scores))]
    columns = FORMATS["pdms_v1"].columns
    with open(folder / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "token", "log_name", "valid", *columns])
        for k, (token, score) in enumerate(zip(names, scores, strict=True)):
            writer.writerow([k, token, f"log{int(token, 16) // 3}", np.isfinite(score), *[score] * len(columns)])
    (folder / "summary.json").write_text(json.dumps({"metric": "pdms_v1", "modes": modes or {}}))
    return folder


def test_rows_are_paired_by_scene_and_averaged_over_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.8, 60)
    tokens = [f"{k:016x}" for k in range(60)]
    order = rng.permutation(60)
    good = read_row("good", [
        evaluation(tmp_path / "g0", base + 0.1, modes={"diversity": 0.2, "calibration": {"ece_nearest": 0.1}}),
        evaluation(tmp_path / "g1", (base + 0.2)[order], [tokens[k] for k in order], modes={"diversity": 0.4}),
    ])  # fmt: skip
    plain = read_row("plain", [evaluation(tmp_path / f"p{k}", base) for k in range(2)])
    assert good.modes == {"diversity": pytest.approx(0.3)} and plain.modes == {}
    found = difference(good, plain)
    assert found.difference == pytest.approx(15.0) and found.by_seed == pytest.approx((10.0, 20.0))
    assert found.interval == pytest.approx((15.0, 15.0)) and found.verdict == "holds"
    assert difference(plain, good).verdict == "reversed" and difference(good, good).verdict == "undecided"
    entry = good.as_dict()
    assert entry["by_seed"] == pytest.approx([100 * base.mean() + 10, 100 * base.mean() + 20])
    assert entry["interval"][0] < entry["pdms"] < entry["interval"][1]
    assert entry["modes"]["diversity"] == pytest.approx(0.3)


def test_half_an_evaluation_is_none(tmp_path: Path) -> None:
    whole = evaluation(tmp_path / "whole", np.full(6, 0.5))
    scores = np.full(6, 0.5)
    scores[2] = np.nan
    with pytest.raises(DataError, match="without a score"):
        read_row("x", [evaluation(tmp_path / "hole", scores)])
    with pytest.raises(DataError, match="other scenes"):
        read_row("x", [whole, evaluation(tmp_path / "five", np.full(5, 0.5))])
    with pytest.raises(DataError, match="different scenes"):
        difference(read_row("a", [whole]), read_row("b", [tmp_path / "five"]))


def test_trainings_on_several_machines_are_told_apart(tmp_path: Path) -> None:
    gpu, cpu = {"hardware": {"gpus": ["H100"]}}, {"hardware": {"gpus": []}}
    for name, environment in (("a_0", gpu), ("a_1", gpu), ("b_0", cpu)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "environment.json").write_text(json.dumps({"time": name, **environment}))
    folders = [tmp_path / name for name in ("a_0", "a_1", "b_0")]
    assert read_environments(folders) == [{"trainings": ["a_0", "a_1"], **gpu}, {"trainings": ["b_0"], **cpu}]
    with pytest.raises(DataError, match="b_1"):
        read_environments([tmp_path / "b_1"])


def test_ratio_claims() -> None:
    assert RatioClaim("passes", 0.1, 0.1, at_least=False).verdict == "holds"
    assert RatioClaim("diversity", 2.9, 3.0, at_least=True).verdict == "missed"


def test_the_ablations_are_told_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "ablations.py"))
    rng = np.random.default_rng(0)
    judged = {"best": 0.9, "mean": 0.5, "diversity": 0.8}
    rows = [
        read_row(name, [evaluation(tmp_path / f"{name}{k}", rng.uniform(0.2, 0.8, 12), modes=judged) for k in range(2)])
        for name in (ablations.BASE, "steps_1")
    ]
    against = [None, difference(rows[1], rows[0]).as_dict()]
    result = {"variant": "tiny", "seeds": [0, 1], "scenes": {"train": 1}}
    result["rows"] = {
        row.name: {"title": row.name, **row.as_dict(), "against_base": found}
        for row, found in zip(rows, against, strict=True)
    }
    sheet = benchmark["sheet"](result)
    sheet.show()
    benchmark["draw"](result, tmp_path / "figure.png")
    printed = capsys.readouterr().out
    for text in (printed, sheet.markdown()):
        assert f"{against[1]['difference']:+.1f}" in text and "steps_1" in text
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_ablations_go_on_from_the_papers_table() -> None:
    table, others = (load_config(MatrixConfig, f"benchmark_{name}", []) for name in ("paper_table", "ablations"))
    assert table.train and (table.train, table.folder) == (others.train, others.folder)


def test_the_papers_table_is_told_and_drawn(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "paper_table.py"))
    rng = np.random.default_rng(0)
    modes = {OURS: {"best": 0.9, "mean": 0.5, "diversity": 0.8}, VANILLA: {"diversity": 0.1}}
    rows = {
        name: read_row(
            name,
            [evaluation(tmp_path / f"{name}{k}", rng.uniform(0.2, 0.8, 12), modes=modes.get(name)) for k in range(2)],
        )
        for name in (OURS, VANILLA, HUMAN, EGO_MLP)
    }
    heads = {OURS: {"passes": 2, "head_ms": 1.0}, VANILLA: {"passes": 20, "head_ms": 5.0}}
    orderings, ratios = [difference(rows[OURS], rows[VANILLA])], benchmark["ratio_claims"](rows, heads)
    result = {
        "variant": "tiny",
        "seeds": [0, 1],
        "scenes": {"train": 1, "test": 12},
        "preconditions_not_met": ["one training scene"],
        "rows": {name: {"title": name, **rows[name].as_dict(), **heads[name]} for name in heads},
        "beside": {name: rows[name].as_dict() for name in (HUMAN, EGO_MLP)},
    }
    text = benchmark["sheet"](result, orderings, ratios).markdown()
    expected = ["passes ≤ 0.1 × the vanilla policy's: holds (0.1)", "head latency ≤ 0.1", "missed (0.2)"]
    expected += ["mode diversity ≥ 3", "holds (8)", "not met: one training scene", orderings[0].verdict]
    assert [words for words in expected if words not in text] == []
    benchmark["draw"](result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_odd_matrices_are_refused() -> None:
    for wrong in ({"seeds": []}, {"seeds": [1, 1]}, {"parallel": 0}):
        with pytest.raises(UserError):
            MatrixConfig(**wrong)


@pytest.mark.slow
def test_a_matrix_from_the_raw_city_to_scores(tmp_path: Path) -> None:
    """Two tiny trainings, interrupted and resumed, from a city of a few scenes."""
    from navsim_eval.city.make import CityConfig, make_city
    from navsim_eval.config import DataConfig

    root = tmp_path / "city"
    make_city(CityConfig(scenes=24, val_scenes=4, test_scenes=6, width=320), root)
    config = MatrixConfig(
        DataConfig(str(root), str(root / "maps")), seeds=[0], workdir=str(tmp_path / "work"),
        train=["trainer.epochs=1", "trainer.validate_every_epochs=1", "loss.judged=0"],
    )  # fmt: skip
    rows = [Row("ours", "ours"), Row("broken", "broken", overrides=("model.width=0",))]
    said: list[str] = []
    with pytest.raises(UserError, match="train_broken_0"):
        run_matrix(rows, config, said.append)
    run_matrix(rows[:1], config, said.append)
    assert any("train ours, seed 0: done before" in line for line in said)
    row = read_row("ours", [config.evaluation_folder("ours", 0)])
    assert row.scores.shape == (1, 6) and row.modes["diversity"] > 0.0
