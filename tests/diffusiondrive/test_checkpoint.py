"""Checkpoint folders, and the official layout in and out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusiondrive.checkpoint import read_tensors, save_planner, save_weights
from diffusiondrive.official import (
    PREFIX,
    ImportConfig,
    import_checkpoint,
    official_name,
    official_names,
    official_state_dict,
    planner_from_official,
)
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.schedule import ScheduleConfig
from diffusiondrive.variants import diffusiondrive, tiny
from navsim_eval.command_line import run_tool
from navsim_eval.errors import DataError, UserError
from tests.golden import model as golden
from tests.golden import needs_golden


@pytest.fixture(scope="module")
def planner() -> DiffusionDrive:
    torch.manual_seed(0)
    config = tiny()
    config.schedule = ScheduleConfig(preset="consistent", steps=4)
    config.space.x_span = 60.0
    return DiffusionDrive(config, torch.rand(6, 8, 2) * 30).eval()


@pytest.fixture
def folder(planner, tmp_path) -> Path:
    return planner.save_pretrained(tmp_path / "planner", metrics={"pdms": 0.5})


def same(a: DiffusionDrive, b: DiffusionDrive) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- our folder


def test_round_trip_keeps_every_bit_and_setting(planner, folder) -> None:
    loaded = DiffusionDrive.from_pretrained(folder)
    assert same(planner, loaded) and loaded.config == planner.config and not loaded.training
    assert loaded.schedule.labels == (15, 10, 5, 0)
    assert torch.equal(loaded.space.span, planner.space.span)  # normalisation travels with the weights
    assert torch.equal(loaded.initial.anchors, planner.initial.anchors)
    backbone = planner.config.backbone
    features = {
        "camera_feature": torch.rand(1, 3, *backbone.image_size),
        "lidar_feature": torch.rand(1, 1, *backbone.lidar_size),
        "status_feature": torch.rand(1, 8),
    }
    with torch.no_grad():
        assert torch.equal(planner(features).candidates, loaded(features).candidates)


def test_weights_file_alone_is_enough(planner, folder, tmp_path) -> None:
    alone = tmp_path / "elsewhere.safetensors"
    alone.write_bytes((folder / "model.safetensors").read_bytes())
    loaded = DiffusionDrive.from_pretrained(alone)
    assert same(planner, loaded) and loaded.config == planner.config


def test_folder_says_what_it_is(folder) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "metrics.json", "model.safetensors"
    ]  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == {"pdms": 0.5}
    card = (folder / "README.md").read_text()
    assert "| pdms | 0.5 |" in card and "consistent, labels 15, 10, 5, 0" in card
    with safe_open(str(folder / "model.safetensors"), framework="pt") as stored:
        assert json.loads(stored.metadata()["config"]) == json.loads((folder / "config.json").read_text())


def test_saving_twice_overwrites_and_leaves_nothing_behind(planner, folder) -> None:
    save_planner(planner, folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert same(planner, DiffusionDrive.from_pretrained(folder))


def test_missing_unexpected_and_misshaped_entries_are_all_listed(folder) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(str(file))
    del tensors["decoder.layers.1.ego_norm.bias"]
    tensors["intruder"] = torch.zeros(1)
    tensors["perception.queries"] = torch.zeros(2, 3)
    save_file(tensors, str(file))
    with pytest.raises(DataError) as caught:
        DiffusionDrive.from_pretrained(folder)
    message = str(caught.value)
    assert "1 missing: decoder.layers.1.ego_norm.bias" in message
    assert "1 unexpected: intruder" in message
    assert "perception.queries (2, 3) instead of (31, 16)" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "truncated"),
        (lambda f: (f / "config.json").write_text("{}"), "no planner configuration"),
        (lambda f: (f / "config.json").write_text("not json"), "no planner configuration"),
        (lambda f: _edit(f, version=99), "version 99"),
        (lambda f: _edit(f, planner={"widht": 3}), "widht"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: save_file({"x": torch.zeros(1)}, str(f / "model.safetensors")), "no anchors"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder, damage, words) -> None:
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        DiffusionDrive.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def _edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_path_that_is_not_there(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        DiffusionDrive.from_pretrained(tmp_path / "nowhere")


def test_a_foreign_checkpoint_points_to_the_import_tool(tmp_path) -> None:
    torch.save({}, tmp_path / "epoch=99.ckpt")
    with pytest.raises(UserError, match="import_checkpoint"):
        DiffusionDrive.from_pretrained(tmp_path / "epoch=99.ckpt")


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


def test_pickled_code_is_never_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "extra": _Bomb()}, "bomb.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    for name in ("bomb.ckpt", "plain.ckpt"):
        with pytest.raises(DataError, match="safety"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "bomb-went-off").exists()


# ------------------------------------------------------------------------------------------------------ official layout


def test_official_round_trip(planner) -> None:
    exported = official_state_dict(planner)
    assert all(name.startswith(PREFIX) for name in exported) and len(exported) == len(planner.state_dict())
    back, prefix, converted = planner_from_official(exported, planner.config)
    assert same(planner, back) and prefix == PREFIX and converted == 0


def test_official_names_are_one_to_one(planner) -> None:
    names = official_names(planner)
    assert len(set(names.values())) == len(names)
    with pytest.raises(KeyError, match="novelty"):
        official_name("decoder.novelty")


@needs_golden
@pytest.mark.golden
def test_official_names_of_the_full_planner_are_the_published_list() -> None:
    with torch.device("meta"):
        names = [official_name(name) for name in DiffusionDrive(diffusiondrive(), torch.zeros(20, 8, 2)).state_dict()]
    assert sorted(names) == sorted(entry["name"] for entry in golden.state_dict_spec())
    assert len(names) == 763


@pytest.mark.parametrize("prefix", [PREFIX, "_transfuser_model.", "model.agent._transfuser_model.", "module.", ""])
def test_any_common_prefix_is_accepted(planner, prefix) -> None:
    back, found, _ = planner_from_official(official_state_dict(planner, prefix), planner.config)
    assert found == prefix and same(planner, back)


def test_half_precision_files_are_converted_and_counted(planner) -> None:
    halves = {n: t.half() if t.is_floating_point() else t for n, t in official_state_dict(planner).items()}
    back, _, converted = planner_from_official(halves, planner.config)
    assert converted == sum(t.is_floating_point() for t in halves.values())
    assert all(p.dtype == torch.float32 for p in back.parameters())


def test_import_accounts_for_every_key(planner) -> None:
    given = official_state_dict(planner)
    del given[PREFIX + "_bev_downscale.bias"]
    given[PREFIX + "_extra.weight"] = torch.zeros(2)
    given["optimizer.step"] = torch.zeros(1)
    given[PREFIX + "_query_embedding.weight"] = torch.zeros(3, 16)
    with pytest.raises(DataError) as caught:
        planner_from_official(given, planner.config)
    message = str(caught.value)
    assert "1 missing: _bev_downscale.bias" in message
    assert "2 unexpected: _extra.weight, optimizer.step" in message
    assert "_query_embedding.weight (3, 16) instead of (31, 16)" in message


def test_anchors_of_another_size_are_a_shape_error_not_a_crash(planner) -> None:
    given = official_state_dict(planner)
    given[PREFIX + "_trajectory_head.plan_anchor"] = torch.zeros(20, 8, 2)
    with pytest.raises(DataError, match=r"plan_anchor \(20, 8, 2\) instead of \(6, 8, 2\)"):
        planner_from_official(given, planner.config)


def test_a_file_of_something_else_is_named_as_such() -> None:
    with pytest.raises(DataError, match="not a DiffusionDrive checkpoint"):
        planner_from_official({"conv1.weight": torch.zeros(1)}, tiny())


def lightning_file(planner: DiffusionDrive, path: Path) -> Path:
    """A checkpoint as Lightning writes it: weights among bookkeeping."""
    content = {"epoch": 99, "global_step": 20200, "pytorch-lightning_version": "2.2.1", "loops": {}, "callbacks": {},
               "optimizer_states": [], "lr_schedulers": [], "state_dict": official_state_dict(planner)}  # fmt: skip
    torch.save(content, path)
    return path


@pytest.mark.parametrize("out", ["converted", "converted.safetensors"])
def test_import_tool_writes_a_planner(planner, tmp_path, out, capsys) -> None:
    source = lightning_file(planner, tmp_path / "official.ckpt")
    arguments = [f"source={source}", f"out={tmp_path / out}", "model=tiny"]
    status = run_tool(lambda c: print(import_checkpoint(c)), ImportConfig, "import_checkpoint", "doc", arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    count = len(planner.state_dict())
    assert f"{count} of {count} entries imported" in captured.out and "none missing" in captured.out
    assert same(planner, DiffusionDrive.from_pretrained(tmp_path / out))


def test_import_tool_refuses_in_one_line(planner, tmp_path, capsys) -> None:
    source = lightning_file(planner, tmp_path / "official.ckpt")
    half = tmp_path / "half.ckpt"
    half.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    cases = {
        "source is not set": [],
        "no such file": ["source=nowhere.ckpt", "out=x"],
        "half.ckpt": [f"source={half}", "out=x"],
        "official.ckpt is a file": [f"source={source}", f"out={source}", "model=tiny"],
        "does not account for every entry": [f"source={source}", f"out={tmp_path / 'x'}", "model=city_nano"],
        "did you mean 'model.width'": ["model.widht=3"],
    }
    for words, arguments in cases.items():
        assert run_tool(import_checkpoint, ImportConfig, "import_checkpoint", "doc", arguments) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and "\n" not in error, error
    assert not (tmp_path / "x").exists()


def test_weights_of_a_planner_in_training_can_be_saved(planner, tmp_path) -> None:
    """Tensors that share or stride memory oddly are written as plain ones."""
    other = DiffusionDrive(planner.config, planner.initial.anchors).to(memory_format=torch.channels_last)
    save_weights(other, tmp_path / "w.safetensors")
    assert same(other, DiffusionDrive.from_pretrained(tmp_path / "w.safetensors"))
