"""Configuration: strict about keys and types, helpful in its refusals; environment variables as NAVSIM users do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from navsim_eval.config import DataConfig, load_config
from navsim_eval.errors import UserError


@dataclass
class Schema:
    data: DataConfig = field(default_factory=DataConfig)
    split: str = "test"
    workers: int = 2
    rate: float = 0.5


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OPENSCENE_DATA_ROOT", "NUPLAN_MAPS_ROOT", "NUPLAN_MAP_VERSION", "NAVSIM_DEVKIT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "other.yaml").write_text("root: other\n")
    (tmp_path / "tool.yaml").write_text("split: train\nworkers: 1\n")
    return tmp_path


def test_defaults_file_and_command_line_in_this_order(root: Path) -> None:
    config = load_config(Schema, "tool", ["workers=3"], root)
    assert (config.split, config.workers, config.rate) == ("train", 3, 0.5)
    assert config.data.root == "data/city" and config.data.maps == "data/city/maps"


def test_group_option_fills_the_nested_dataclass(root: Path) -> None:
    assert load_config(Schema, "tool", ["data=other"], root).data.root == "other"


def test_unknown_group_option_lists_the_options(root: Path) -> None:
    with pytest.raises(UserError, match="data=othe: no such option; there are other; did you mean 'other'"):
        load_config(Schema, "tool", ["data=othe"], root)


def test_unknown_key_names_the_nearest_one(root: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'worker'; did you mean 'workers'"):
        load_config(Schema, "tool", ["worker=3"], root)
    with pytest.raises(UserError, match=r"did you mean 'data\.root'"):
        load_config(Schema, "tool", ["data.rot=x"], root)


def test_unknown_key_in_a_file_is_refused_too(root: Path) -> None:
    (root / "tool.yaml").write_text("splitt: train\n")
    with pytest.raises(UserError, match="unknown key 'splitt'; did you mean 'split'"):
        load_config(Schema, "tool", [], root)


def test_wrong_type_names_the_key(root: Path) -> None:
    with pytest.raises(UserError, match="workers"):
        load_config(Schema, "tool", ["workers=many"], root)


def test_not_an_override(root: Path) -> None:
    with pytest.raises(UserError, match="key=value"):
        load_config(Schema, "tool", ["train"], root)


def test_environment_names_the_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSCENE_DATA_ROOT", "/d")
    monkeypatch.setenv("NUPLAN_MAPS_ROOT", "/m")
    data = load_config(Schema, "tool", [], root).data
    assert (data.root, data.maps) == ("/d", "/m")


def test_an_explicit_root_with_maps_beside_it_wins_over_the_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSCENE_DATA_ROOT", "/d")
    monkeypatch.setenv("NUPLAN_MAPS_ROOT", "/m")
    own = root / "own"
    (own / "maps").mkdir(parents=True)
    assert load_config(Schema, "tool", [f"data.root={own}"], root).data.maps == str(own / "maps")
    bare = root / "bare"
    assert load_config(Schema, "tool", [f"data.root={bare}"], root).data.maps == "/m"
