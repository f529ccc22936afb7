"""Packed caches in object storage: what is read equals the local store, and only what is needed is downloaded."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from navsim_eval.errors import DataError, UserError
from navsim_eval.mirror import Mirror, default_root
from navsim_eval.shards import ShardReader, ShardWriter

URL = "memory://bucket/cache"


def sample(number: int) -> dict[str, np.ndarray]:
    return {"image": np.full((20, 30), number, np.uint8)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A local store of several data files."""
    with ShardWriter(tmp_path / "store", {"purpose": "test"}, [f"t{i}" for i in range(9)], 2048) as writer:
        for i in range(9):
            writer.write(f"t{i}", sample(i))
    return tmp_path / "store"


@pytest.fixture
def remote(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same in fsspec's storage in memory; mirrors lie below the test's folder."""
    monkeypatch.setenv("NAVSIM_MIRROR_ROOT", str(tmp_path / "mirror"))
    storage = fsspec.filesystem("memory")
    storage.put(f"{store}/*", "/bucket/cache/")
    yield storage
    storage.rm("/bucket", recursive=True)


@pytest.fixture
def downloads(remote, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were downloaded, in order."""
    names, real = [], remote.get_file
    cls = type(remote)

    def get_file(self, path: str, *rest, **more) -> None:
        names.append(path.rsplit("/", 1)[-1])
        real(path, *rest, **more)

    monkeypatch.setattr(cls, "get_file", get_file)
    return names


def test_samples_are_those_of_the_local_store(store: Path, remote) -> None:
    local, streamed = ShardReader(store), ShardReader(URL)
    assert streamed.keys == local.keys and streamed.manifest == local.manifest
    for key in local:
        np.testing.assert_array_equal(streamed[key]["image"], local[key]["image"])


def test_a_data_file_is_downloaded_once_and_when_wanted(downloads: list[str]) -> None:
    reader = ShardReader(URL)
    assert not [name for name in downloads if name.endswith(".data")]
    reader["t0"], reader["t1"]
    assert [name for name in downloads if name.endswith(".data")] == ["00000.data"]
    again = pickle.loads(pickle.dumps(ShardReader(URL)))
    again["t0"], again["t8"]
    data = [name for name in downloads if name.endswith(".data")]
    assert data[0] == "00000.data" and len(data) == len(set(data)) == 2


def test_a_store_that_grew_is_seen_and_its_last_file_read_again(store: Path, remote) -> None:
    ShardReader(URL)["t8"]
    with ShardWriter(store, {"purpose": "test"}, [f"t{i}" for i in range(10)], 4096) as writer:
        writer.write("t9", sample(9))
    remote.put(f"{store}/*", "/bucket/cache/")
    np.testing.assert_array_equal(ShardReader(URL)["t9"]["image"], sample(9)["image"])


def test_damage_in_the_storage_is_noticed(store: Path, remote) -> None:
    content = bytearray((store / "00000.data").read_bytes())
    content[500] ^= 1
    remote.pipe_file("/bucket/cache/00000.data", bytes(content))
    with pytest.raises(DataError, match=r"t0 is damaged.*delete .*mirror"):
        ShardReader(URL)["t0"]
    remote.pipe_file("/bucket/cache/00000.data", bytes(content[:-300]))
    with pytest.raises(DataError, match="truncated"):
        ShardReader(URL)


def test_a_download_that_breaks_off_leaves_nothing(remote, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(URL)

    def half(self, path: str, target: str, **more) -> None:
        Path(target).write_bytes(b"half")
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(type(remote), "get_file", half)
    with pytest.raises(DataError, match=r"00000.data: cannot be read \(ConnectionError: reset by peer\)"):
        mirror.fetch("00000.data")
    assert not [path for path in mirror.folder.iterdir() if path.suffix != ".lock"]


def _read(url: str, queue) -> None:
    queue.put(int(ShardReader(url)["t4"]["image"][0, 0]))


def test_several_processes_share_one_mirror(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAVSIM_MIRROR_ROOT", str(tmp_path / "mirror"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read, args=(f"file://{store}", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [4] * 4
    for process in processes:
        process.join()
    (folder,) = (tmp_path / "mirror").iterdir()
    assert len(list(folder.glob("*.data"))) == 1


@pytest.mark.parametrize(
    ("url", "kind", "fact"),
    [
        ("memory://bucket/nowhere", DataError, "no such file or folder"),
        ("memory://bucket/", DataError, "holds no packed cache"),
        ("nonsense://bucket/cache", UserError, "nonsense"),
    ],
)
def test_what_is_not_there_is_said(remote, url: str, kind: type, fact: str) -> None:
    with pytest.raises(kind, match=fact):
        ShardReader(url)


def test_where_mirrors_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NAVSIM_MIRROR_ROOT", str(tmp_path / "own"))
    assert default_root() == tmp_path / "own"
    monkeypatch.delenv("NAVSIM_MIRROR_ROOT")
    monkeypatch.setenv("NAVSIM_EXP_ROOT", str(tmp_path))
    assert default_root() == tmp_path / "mirror"
