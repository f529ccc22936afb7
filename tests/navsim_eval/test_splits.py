"""Scene filters and splits: NAVSIM's YAML files read as text, and names resolved to folders."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.splits import (
    PUBLISHED_SPLITS,
    SceneFilter,
    find_split,
    log_lists_path,
    read_log_lists,
    read_scene_filter,
    write_scene_filter,
)

PUBLISHED_STYLE = """\
_target_: navsim.common.dataclasses.SceneFilter
_convert_: 'all'

num_history_frames: 4 # number of past frames (1=only current frame, 2=1 second)
num_future_frames: 0

frame_interval: null # if null, extracted scenes are non-overlapping
has_route: false
max_scenes: null\x20
log_names:
- 2021.05.12.22.00.38_veh-35_01008_01518
  # a comment
- '2021.10.05.07.49.39_veh-52_00934_01406'
tokens:
  - "4adc4d31c899590a"  # quoted with a comment
  - 1e73301234567890
  - 0012345678901234
"""


def write_filters(folder: Path, name: str, content: str, split: str) -> Path:
    (folder / "scene_filter").mkdir(parents=True, exist_ok=True)
    (folder / "scene_filter" / f"{name}.yaml").write_text(content)
    (folder / f"{name}.yaml").write_text(split)
    return folder


# --- scene filters ---------------------------------------------------------------------------------------------------


def test_published_style(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(PUBLISHED_STYLE)
    assert read_scene_filter(tmp_path / "f.yaml") == SceneFilter(
        num_future_frames=0,
        has_route=False,
        log_names=("2021.05.12.22.00.38_veh-35_01008_01518", "2021.10.05.07.49.39_veh-52_00934_01406"),
        tokens=("4adc4d31c899590a", "1e73301234567890", "0012345678901234"),
    )


def test_all_fields_and_inline_lists(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(
        "---\nnum_history_frames: 2\nframe_interval: 3\nmax_scenes: 7\nlog_names: ['a', \"b\" ]\ntokens: []\n"
        "include_synthetic_scenes: True\nsynthetic_scene_tokens: ~\nall_mapping:\n  '1': ['2']\n- - 'x'\n"
        "reactive_synthetic_initial_tokens:\n- 'r'\nnon_reactive_synthetic_initial_tokens:\n"
    )
    assert read_scene_filter(tmp_path / "f.yaml") == SceneFilter(
        num_history_frames=2,
        frame_interval=3,
        max_scenes=7,
        log_names=("a", "b"),
        tokens=(),
        include_synthetic_scenes=True,
        reactive_synthetic_initial_tokens=("r",),
    )


names = st.text("0123456789abcdefABCDEF.-_e", min_size=1, max_size=20)
lists = st.none() | st.lists(names, max_size=5).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        SceneFilter,
        num_history_frames=st.integers(1, 9),
        num_future_frames=st.integers(0, 20),
        frame_interval=st.none() | st.integers(1, 20),
        has_route=st.booleans(),
        max_scenes=st.none() | st.integers(1, 10**6),
        log_names=lists,
        tokens=lists,
        include_synthetic_scenes=st.booleans(),
        synthetic_scene_tokens=lists,
        reactive_synthetic_initial_tokens=lists,
    )
)
def test_round_trip_also_through_a_full_yaml_reader(
    tmp_path_factory: pytest.TempPathFactory, scene_filter: SceneFilter
) -> None:
    path = write_scene_filter(tmp_path_factory.mktemp("filter") / "f.yaml", scene_filter)
    assert read_scene_filter(path) == scene_filter
    plain = yaml.safe_load(path.read_text())
    for name in ("tokens", "log_names", "has_route", "max_scenes", "num_history_frames"):
        value = getattr(scene_filter, name)
        assert plain[name] == (list(value) if isinstance(value, tuple) else value)


def test_a_filter_as_long_as_navtrain_is_read_fast(tmp_path: Path) -> None:
    tokens = tuple(f"{index * 178_602_000_000_007:016x}" for index in range(103_288))
    path = write_scene_filter(tmp_path / "f.yaml", SceneFilter(tokens=tokens))
    start = time.perf_counter()
    assert read_scene_filter(path).tokens == tokens
    assert time.perf_counter() - start < 3.0


@pytest.mark.parametrize(
    "content, message",
    [
        ("num_history: 3", r"\[num_history\]: unknown key — known keys: num_history_frames"),
        ("has_route: 7", r"\[has_route\]: '7' where true or false is expected"),
        ("num_future_frames: 2.5", r"\[num_future_frames\]: '2\.5' where a whole number is expected"),
        ("num_future_frames: null", r"\[num_future_frames\]: null where a value is needed"),
        ("tokens: abc", r"\[tokens\]: 'abc' where a list is expected"),
        ("max_scenes:\n- 3", r"\[max_scenes\]: \['3'\] where a whole number is expected"),
        ("max_scenes: 0", r"scene filter: max_scenes is 0; the least is 1"),
        ("frame_interval: 0", r"scene filter: frame_interval is 0; the least is 1"),
        ("tokens:\n- 'a'\ngarbage", r"line 3 is neither 'key: value' nor a list entry: 'garbage'"),
        ("a:\n  b: c", r"line 2 is neither"),
    ],
)
def test_malformed_filters(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "f.yaml").write_text(content)
    with pytest.raises(DataError, match=r"f\.yaml.*" + message):
        read_scene_filter(tmp_path / "f.yaml")


def test_absent_filter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"f\.yaml: no such file — check data\.filters"):
        read_scene_filter(tmp_path / "f.yaml")


def test_windows_of_a_log() -> None:
    assert list(SceneFilter().window_starts(13)) == []
    assert list(SceneFilter().window_starts(14)) == [0]
    assert list(SceneFilter().window_starts(41)) == [0, 14]
    assert list(SceneFilter(frame_interval=1).window_starts(16)) == [0, 1, 2]
    assert list(SceneFilter(num_future_frames=0, frame_interval=5).window_starts(10)) == [0, 5]
    assert list(SceneFilter().window_starts(0)) == []


@given(st.integers(1, 6), st.integers(0, 12), st.none() | st.integers(1, 20), st.integers(0, 80))
def test_windows_are_those_of_the_published_cut(history: int, future: int, interval: int | None, length: int) -> None:
    """All list slices of full length at multiples of the stride."""
    scene_filter = SceneFilter(history, future, interval)
    stride = interval or history + future
    frames = list(range(length))
    expected = [i for i in range(0, length, stride) if len(frames[i : i + history + future]) == history + future]
    assert list(scene_filter.window_starts(length)) == expected


# --- names -----------------------------------------------------------------------------------------------------------


def test_any_folder_is_a_split_of_overlapping_windows(tmp_path: Path) -> None:
    (tmp_path / "navsim_logs" / "city").mkdir(parents=True)
    split = find_split("city", tmp_path)
    assert (split.folder, split.scene_filter, split.published) == ("city", SceneFilter(frame_interval=1), None)


def test_published_splits_without_a_token_list(tmp_path: Path) -> None:
    split = find_split("mini", tmp_path)
    assert split.folder == "mini" and split.scene_filter == SceneFilter() and split.published.logs == 64


def test_published_splits_read_their_filter(tmp_path: Path) -> None:
    split_text = "defaults:\n  - scene_filter: navtest\n\ndata_split: test"
    filters = write_filters(tmp_path, "navtest", "frame_interval: 1\ntokens:\n- '00'\nlog_names:\n- 'a'\n", split_text)
    split = find_split("navtest", tmp_path, filters)
    assert split.folder == "test" and split.scene_filter.tokens == ("00",) and split.published.tokens == 12146


def test_two_stage_mapping_keeps_tokens_as_text(tmp_path: Path) -> None:
    split_text = (
        "defaults:\n- scene_filter: mine\ndata_split: test\nreactive_all_mapping:\n"
        "- - '6e3cf172a2755fae'\n  - 0012\n  - - - 1e7\n      - 'b'\n    - - 'c'\n      - 'd'\n"
    )
    split = find_split("mine", tmp_path, write_filters(tmp_path, "mine", "tokens: ['x']", split_text))
    assert split.second_stage == (("6e3cf172a2755fae", "0012", (("1e7", "b"), ("c", "d"))),)


def test_published_table_is_consistent() -> None:
    assert {split.folder for split in PUBLISHED_SPLITS.values()} <= {
        *("mini", "trainval", "test", "private_test_hard", "private_test_e2e")
    }
    assert PUBLISHED_SPLITS["navtrain"].tokens == 103288 and PUBLISHED_SPLITS["navtest"].logs == 136


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*navsim_logs; set data\.root .*make_city\.py"):
        find_split("city", tmp_path)
    (tmp_path / "navsim_logs" / "city").mkdir(parents=True)
    with pytest.raises(UserError, match=r"split 'town' is unknown; folders under .*: city; published splits: mini, "):
        find_split("town", tmp_path)
    with pytest.raises(UserError, match=r"split 'navtest' needs NAVSIM's list of tokens; set data\.filters"):
        find_split("navtest", tmp_path)
    with pytest.raises(UserError, match=r"data\.filters=.*absent is not a folder"):
        find_split("navtest", tmp_path, tmp_path / "absent")
    filters = write_filters(tmp_path, "mine", "", "data_split: test")
    with pytest.raises(DataError, match=r"mine\.yaml: not a split file \('defaults'\) — it needs defaults"):
        find_split("mine", tmp_path, filters)
    (tmp_path / "other.yaml").write_text("defaults:\n- scene_filter: gone\ndata_split: test")
    with pytest.raises(DataError, match=r"gone\.yaml: no such file"):
        find_split("other", tmp_path, filters)


def test_train_and_validation_logs(tmp_path: Path) -> None:
    filters = tmp_path / "config/common/train_test_split"
    path = log_lists_path(filters)
    path.parent.mkdir(parents=True)
    assert path == tmp_path / "config/training/default_train_val_test_log_split.yaml"
    path.write_text("train_logs:\n  - 2021.a\n  - '2021.b'\nval_logs:\n  - 2021.c\ntest_logs: []\n")
    parts = {"train": frozenset({"2021.a", "2021.b"}), "val": frozenset({"2021.c"}), "test": frozenset()}
    assert read_log_lists(path) == parts
    path.write_text("train_logs:\n  - 2021.a\n")
    with pytest.raises(DataError, match=r"\[val_logs\]: missing, or not a list"):
        read_log_lists(path)
