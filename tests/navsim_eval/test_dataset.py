"""SceneDataset: the published cut, honest coverage, and use from workers."""

from __future__ import annotations

import csv
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from navsim_eval import SceneDataset, log_index
from navsim_eval.config import DataConfig
from navsim_eval.dataset import missing_sensor_files, sensor_coverage, sensor_files
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.logs import read_log, write_log
from navsim_eval.formats.splits import SceneFilter, log_lists_path, write_scene_filter
from navsim_eval.log_index import LogSummary, summarize_log
from navsim_eval.scene import Frame
from tests.golden import GOLDEN, needs_golden
from tests.worlds import drive, write_world


def write_logs(root: Path, folder: str = "city", **logs: list[Frame]) -> DataConfig:
    for name, frames in logs.items():
        write_log(root / "navsim_logs" / folder / f"{name}.pkl", frames)
    return DataConfig(root=str(root), maps=str(root / "maps"))


def write_filter(root: Path, scene_filter: SceneFilter, name: str = "mine", folder: str = "city") -> str:
    filters = root / "filters"
    write_scene_filter(filters / "scene_filter" / f"{name}.yaml", scene_filter)
    (filters / f"{name}.yaml").write_text(f"defaults:\n- scene_filter: {name}\ndata_split: {folder}\n")
    return str(filters)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Three logs of 17, 15 and 10 frames: 4 + 2 + 0 windows."""
    return write_logs(tmp_path, a=drive("a", 17, seed=1), b=drive("b", 15, seed=2), c=drive("c", 10, seed=3))


# --- the cut ---------------------------------------------------------------------------------------------------------


def test_all_windows_of_a_folder(data: DataConfig) -> None:
    dataset = SceneDataset.from_config(data, "city")
    frames = {name: read_log(Path(data.root) / f"navsim_logs/city/{name}.pkl") for name in "ab"}
    expected = [("a", i) for i in range(4)] + [("b", i) for i in range(2)]
    assert dataset.tokens == tuple(frames[log][i + 3].token for log, i in expected)
    for scene, (log, start) in zip(dataset, expected, strict=True):
        assert [frame.token for frame in scene.frames] == [frame.token for frame in frames[log][start : start + 14]]
        assert scene.log_name == log and scene.num_history == 4 and len(scene.future) == 10
        assert scene.sensor_root == Path(data.root) / "sensor_blobs/city"
        assert (dataset.log_of(scene.token), dataset.start_of(scene.token)) == (log, start)
    assert dataset.log_names == ("a", "b") and len(dataset) == 6
    assert str(dataset.coverage) == "split city: complete: 6 of 6 scenes, 3 of 3 logs"


def test_published_cut_does_not_overlap(tmp_path: Path) -> None:
    data = write_logs(tmp_path, "mini", a=drive("a", 30, seed=1))
    dataset = SceneDataset.from_config(data, "mini")
    assert [dataset.start_of(token) for token in dataset.tokens] == [0, 14]
    assert "the published split has 64 logs, here 1 are listed or present" in str(dataset.coverage)


def test_filter_chooses_logs_tokens_and_length(data: DataConfig, tmp_path: Path) -> None:
    a = read_log(Path(data.root) / "navsim_logs/city/a.pkl")
    chosen = SceneFilter(frame_interval=1, num_future_frames=8, log_names=("a",), tokens=(a[5].token, a[4].token))
    data = replace(data, filters=write_filter(tmp_path, chosen))
    dataset = SceneDataset.from_config(data, "mine")
    assert dataset.tokens == (a[4].token, a[5].token), "in the order of the log"
    assert len(dataset[0].frames) == 12 and dataset.coverage.complete


def test_part_of_a_split_by_the_published_log_lists(data: DataConfig, tmp_path: Path) -> None:
    first, *rest = SceneDataset.from_config(data, "city").log_names
    data.filters = str(tmp_path / "config/common/train_test_split")
    Path(data.filters).mkdir(parents=True)
    lists = log_lists_path(data.filters)
    with pytest.raises(UserError, match=r"split part ':val' needs NAVSIM's log lists"):
        SceneDataset.from_config(data, "city:val")
    lists.parent.mkdir(parents=True)
    lists.write_text(
        "train_logs:\n" + "".join(f"  - {log}\n" for log in rest) + f"val_logs:\n  - {first}\ntest_logs: []\n"
    )
    assert SceneDataset.from_config(data, "city:val").log_names == (first,)
    assert SceneDataset.from_config(data, "city:train").log_names == tuple(rest)
    assert SceneDataset.from_config(data, "city:val").split.name == "city:val"
    with pytest.raises(UserError, match=r"split part ':dev' is none of :train, :val, :test"):
        SceneDataset.from_config(data, "city:dev")


def test_frames_without_a_route_are_skipped_unless_allowed(tmp_path: Path) -> None:
    frames = drive("a", 16, seed=1)
    frames[4] = replace(frames[4], roadblock_ids=())
    data = write_logs(tmp_path, a=frames)
    dataset = SceneDataset.from_config(data, "city")
    assert dataset.tokens == (frames[3].token, frames[5].token)
    assert "1 windows without a route left out" in str(dataset.coverage)
    data = replace(data, filters=write_filter(tmp_path, SceneFilter(frame_interval=1, has_route=False)))
    assert len(SceneDataset.from_config(data, "mine")) == 3


def test_gaps_are_kept_unless_strict(tmp_path: Path) -> None:
    frames = drive("a", 20, seed=1)
    delays = [500_000 if i >= 15 else 50_000 * (i % 2) for i in range(20)]
    late = [replace(f, timestamp_us=f.timestamp_us + delay) for f, delay in zip(frames, delays, strict=True)]
    data = write_logs(tmp_path, a=late)
    assert len(SceneDataset.from_config(data, "city")) == 7
    strict = SceneDataset.from_config(data, "city", strict_gaps=True)
    assert [strict.start_of(token) for token in strict.tokens] == [0, 1], "windows that end before the gap"
    assert "5 windows with a gap in time left out" in str(strict.coverage)


def test_limits(data: DataConfig) -> None:
    whole = SceneDataset.from_config(data, "city")
    assert SceneDataset.from_config(data, "city", max_scenes=5).tokens == whole.tokens[:5]
    assert SceneDataset.from_config(data, "city", log_names=["b"]).tokens == whole.tokens[4:]
    assert SceneDataset.from_config(data, "city", max_scenes=1).coverage.complete


def test_exactly_these_tokens(data: DataConfig, tmp_path: Path) -> None:
    """Asked for by token, a scene is found wherever the split's logs hold it, also off the split's stride."""
    whole = SceneDataset.from_config(data, "city")
    data = replace(data, filters=write_filter(tmp_path, SceneFilter(log_names=("c",))))
    dataset = SceneDataset.from_config(data, "mine", tokens=[whole.tokens[5], whole.tokens[1], "feed"])
    assert dataset.tokens == (whole.tokens[1], whole.tokens[5])
    assert dataset.coverage.tokens_missing == ("feed",) and not dataset.coverage.complete
    assert str(dataset.coverage).startswith("split mine: partial: 2 of 3 scenes, 3 of 3 logs; 1 listed tokens not")


def test_a_doubled_folder_is_tolerated_only_if_the_direct_one_is_empty(data: DataConfig, tmp_path: Path) -> None:
    logs = Path(data.root) / "navsim_logs"
    (logs / "city").rename(logs / "inner")
    (logs / "city").mkdir()
    (logs / "inner").rename(logs / "city" / "city")
    assert len(SceneDataset.from_config(data, "city")) == 6
    write_log(logs / "city" / "x.pkl", drive("x", 14, seed=9))
    assert SceneDataset.from_config(data, "city").log_names == ("x",)


# --- what is missing or broken ---------------------------------------------------------------------------------------


def test_broken_and_missing_logs_are_counted_and_named(data: DataConfig, tmp_path: Path) -> None:
    path = Path(data.root) / "navsim_logs/city/a.pkl"
    path.write_bytes(path.read_bytes()[:1000])
    chosen = SceneFilter(frame_interval=1, log_names=("a", "b", "x", "y"))
    dataset = SceneDataset.from_config(replace(data, filters=write_filter(tmp_path, chosen)), "mine")
    coverage = dataset.coverage
    assert len(dataset) == 2 and not coverage.complete
    assert coverage.logs_missing == ("x", "y") and [name for name, _ in coverage.logs_broken] == ["a"]
    text = str(coverage)
    assert text.startswith("split mine: partial: 2 scenes, 1 of 4 logs; 2 logs missing on disk (x, y); 1 logs broken")
    assert "a.pkl: not a readable pickle" in text


def test_listed_tokens_that_no_log_holds(data: DataConfig, tmp_path: Path) -> None:
    token = SceneDataset.from_config(data, "city").tokens[0]
    chosen = SceneFilter(frame_interval=1, tokens=(token, "1", "2", "3", "4"))
    dataset = SceneDataset.from_config(replace(data, filters=write_filter(tmp_path, chosen)), "mine")
    assert dataset.coverage.tokens_missing == ("1", "2", "3", "4")
    assert "partial: 1 of 5 scenes" in str(dataset.coverage) and "(1, 2, 3, …)" in str(dataset.coverage)


def test_an_incomplete_copy_of_a_published_filter_is_noticed(data: DataConfig, tmp_path: Path) -> None:
    token = SceneDataset.from_config(data, "city").tokens[0]
    chosen = SceneFilter(frame_interval=1, log_names=("a",), tokens=(token,))
    dataset = SceneDataset.from_config(replace(data, filters=write_filter(tmp_path, chosen, "navtest")), "navtest")
    assert "the published split has 136 logs, here 1 are" in str(dataset.coverage)
    assert "the published split has 12146 scenes, here 1 are listed" in str(dataset.coverage)


def test_a_frame_that_cannot_be_read_costs_its_scenes_only(data: DataConfig) -> None:
    path = Path(data.root) / "navsim_logs/city/a.pkl"
    content = pickle.loads(path.read_bytes())
    content[16]["ego_dynamic_state"] = [1.0]
    path.write_bytes(pickle.dumps(content))
    dataset = SceneDataset.from_config(data, "city")
    assert len(list(dataset)) == 5
    token = dataset.tokens[3]
    assert list(dataset.failures) == [token] and "[frame 16.ego_dynamic_state]" in dataset.failures[token]
    with pytest.raises(DataError, match=r"a\.pkl \[frame 16\.ego_dynamic_state\]"):
        dataset[token]


def test_splits_without_scenes_say_why(data: DataConfig, tmp_path: Path) -> None:
    def why(name: str, scene_filter: SceneFilter) -> str:
        with pytest.raises(UserError) as error:
            SceneDataset.from_config(replace(data, filters=write_filter(tmp_path, scene_filter, name)), name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "3 logs hold no window of 4 + 90 frames with a route (0 without)" in why("f1", SceneFilter(4, 90))
    assert "none of its 1 tokens is in the 3 logs there" in why("f2", SceneFilter(tokens=("feed",)))
    assert "none of the 2 logs of its filter are there" in why("f3", SceneFilter(log_names=("x", "y")))
    for name in "abc":
        (Path(data.root) / f"navsim_logs/city/{name}.pkl").write_bytes(b"garbage")
    assert "none of 3 logs can be read (first: " in why("f4", SceneFilter())
    (Path(data.root) / "navsim_logs/empty").mkdir()
    with pytest.raises(UserError, match=r"no log files \(\*\.pkl\) in .*empty; download them, or check data\.root"):
        SceneDataset.from_config(data, "empty")
    with pytest.raises(UserError, match=r"no log files \(\*\.pkl\) in .*mini"):
        SceneDataset.from_config(data, "mini")


def test_unknown_token_and_index(data: DataConfig) -> None:
    dataset = SceneDataset.from_config(data, "city")
    with pytest.raises(UserError, match=r"scene feed is not in split city \(6 scenes under .*city\)"):
        dataset["feed"]
    with pytest.raises(IndexError):
        dataset[6]
    assert "feed" not in dataset and dataset.tokens[0] in dataset and dataset[-1].token == dataset.tokens[-1]


# --- workers ---------------------------------------------------------------------------------------------------------


def first_and_last(dataset: SceneDataset) -> tuple[str, str]:
    return dataset[0].token, dataset[-1].token


def test_a_subset_in_another_process(data: DataConfig) -> None:
    dataset = SceneDataset.from_config(data, "city")
    dataset[0]
    part = dataset.subset(log_names=["b"])
    assert part.tokens == dataset.tokens[4:] and len(dataset) == 6
    assert len(pickle.dumps(dataset)) < 5000, "logs stay at home"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(first_and_last, part).result() == (dataset.tokens[4], dataset.tokens[5])
    assert dataset.subset(tokens=dataset.tokens[4:2:-1]).tokens == dataset.tokens[3:5]
    with pytest.raises(UserError, match="scene feed is not in split city"):
        dataset.subset(tokens=["feed"])


def test_parallel_scan_equals_the_serial_one(data: DataConfig) -> None:
    serial = SceneDataset.from_config(data, "city")
    parallel = SceneDataset.from_config(data, "city", workers=2, max_scenes=5)
    assert parallel.tokens == serial.tokens[:5] and parallel.coverage.complete


def test_what_logs_hold_is_remembered(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAVSIM_EXP_ROOT", str(tmp_path / "exp"))
    logs = Path(data.root) / "navsim_logs/city"
    (logs / "broken.pkl").write_bytes(b"garbage")
    first = SceneDataset.from_config(data, "city", strict_gaps=True)
    (memory,) = (tmp_path / "exp/log_index").iterdir()

    def forbidden(path: Path) -> LogSummary:
        assert path.stem in ("broken", "b"), f"{path} is read again"
        return summarize_log(path)

    monkeypatch.setattr(log_index, "summarize_log", forbidden)
    changed = drive("b", 16, seed=5)
    write_log(logs / "b.pkl", changed)
    again = SceneDataset.from_config(data, "city", strict_gaps=True)
    assert again.tokens == (*first.tokens[:4], *(frame.token for frame in changed[3:6]))
    assert [name for name, _ in again.coverage.logs_broken] == ["broken"]
    monkeypatch.undo()
    for damage in (b"", b"garbage", memory.read_bytes()[:300]):
        memory.write_bytes(damage)
        monkeypatch.setenv("NAVSIM_EXP_ROOT", str(tmp_path / "exp"))
        assert SceneDataset.from_config(data, "city").tokens == again.tokens
        assert len(memory.read_bytes()) > 300, "rewritten"


def test_at_most_two_logs_are_open(tmp_path: Path) -> None:
    data = write_logs(tmp_path, **{f"log{i}": drive(f"log{i}", 14, seed=i) for i in range(5)})
    dataset = SceneDataset.from_config(data, "city")
    for _ in dataset:
        assert len(dataset._open) <= 2


def test_overlapping_windows_share_frames(data: DataConfig) -> None:
    dataset = SceneDataset.from_config(data, "city")
    assert dataset[0].frames[1] is dataset[1].frames[0]


# --- sensor files ----------------------------------------------------------------------------------------------------


def test_sensor_files_of_a_scene(data: DataConfig) -> None:
    scene = SceneDataset.from_config(data, "city")[0]
    root = Path(data.root) / "sensor_blobs/city"
    token = scene.token
    files = sensor_files(scene, ("CAM_F0", "CAM_L0"), lidar=True)
    assert files == [
        *(root / "a" / camera / f"{token}.jpg" for camera in ("CAM_F0", "CAM_L0")),
        root / "a" / "MergedPointCloud" / f"{token}.pcd",
    ]
    assert len(sensor_files(scene, ("CAM_F0",), frames=range(4))) == 4
    files[0].parent.mkdir(parents=True)
    files[0].write_bytes(b"x")
    files[1].parent.mkdir(parents=True)
    files[1].write_bytes(b"")
    assert missing_sensor_files(scene, ("CAM_F0", "CAM_L0"), lidar=True) == files[1:]


def test_sensor_files_of_a_split_are_counted_and_the_first_missing_named(tmp_path: Path) -> None:
    world = write_world(tmp_path, {"train": 1}, sensors=True)
    dataset = SceneDataset.from_config(world.data, "train")
    cameras = ("CAM_L0", "CAM_F0", "CAM_R0")
    whole = sensor_coverage(dataset, cameras, lidar=True)
    n = len(dataset)
    assert whole.complete and str(whole) == f"sensors of train: complete: {n} of {n} scenes, {4 * n} of {4 * n} files"
    lost = sensor_files(dataset[1], ("CAM_F0",), lidar=True)
    for path in lost:
        path.unlink()
    partial = sensor_coverage(dataset, cameras, lidar=True)
    assert (partial.scenes_complete, partial.files_missing) == (n - 1, 2)
    assert str(partial).endswith(f"{4 * n - 2} of {4 * n} files; missing: {lost[0]}, {lost[1]}")
    assert (
        sensor_coverage(dataset, ("CAM_X9",), lidar=False)
        .first_missing[0]
        .endswith("lists no CAM_X9 (listed: CAM_F0, CAM_L0, CAM_L1, CAM_L2, CAM_R0, CAM_R1, CAM_R2, CAM_B0)")
    )


def test_sensors_that_the_log_does_not_list(data: DataConfig) -> None:
    scene = SceneDataset.from_config(data, "city")[0]
    bare = replace(scene, frames=tuple(replace(frame, cameras={}, lidar_path=None) for frame in scene.frames))
    with pytest.raises(DataError, match=rf"log a: frame {scene.token} lists no CAM_F0 \(listed: none\)"):
        sensor_files(bare, ("CAM_F0",))
    with pytest.raises(DataError, match=rf"log a: frame {scene.token} lists no LiDAR sweep"):
        sensor_files(bare, lidar=True)
    with pytest.raises(UserError, match="has no sensor folder"):
        sensor_files(replace(scene, sensor_root=None), ("CAM_F0",))


# --- reference data --------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.golden
def test_windows_and_human_trajectories_of_the_golden_logs(tmp_path: Path) -> None:
    (tmp_path / "navsim_logs").mkdir()
    os.symlink(GOLDEN / "pdms/logs", tmp_path / "navsim_logs/golden")
    dataset = SceneDataset.from_config(DataConfig(root=str(tmp_path), maps="x"), "golden")
    assert len(dataset) == 32 * 4 and dataset.coverage.complete
    with open(GOLDEN / "pdms/scenes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 76
    for row in rows:
        assert (dataset.log_of(row["token"]), dataset.start_of(row["token"])) == (row["log"], int(row["start"]))
    for path in (GOLDEN / "pdms/debug").glob("*.npz"):
        debug = np.load(path)
        scene = dataset[str(debug["token"])]
        np.testing.assert_allclose(scene.human_trajectory(), debug["v2_human_poses"], rtol=0, atol=1e-6)


@needs_golden
@pytest.mark.golden
def test_real_recordings() -> None:
    dataset = SceneDataset.from_config(DataConfig(root=str(GOLDEN / "real_scenes")), "real")
    frames = [len(read_log(path)) for path in sorted((GOLDEN / "real_scenes/navsim_logs/real").glob("*.pkl"))]
    assert len(dataset) == sum(count - 13 for count in frames) and len(dataset.log_names) == 10
    assert missing_sensor_files(dataset[0], ("CAM_F0",), lidar=True)
