"""Appending samples to a store, or going on where a killed writer stopped."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write
from navsim_eval.shards.folder import (
    FORMAT_VERSION,
    SHARD_BYTES,
    Entry,
    data_file,
    index_file,
    lock,
    map_file,
    read_index,
    read_manifest,
    require_equal,
    shards_of,
)
from navsim_eval.shards.record import Arrays, Deflate, pack


class ShardWriter:
    """Appends samples to a store, which it creates or resumes. Use as a context manager.

    manifest: what the samples are (JSON values); must equal that of an existing store, otherwise UserError
    tokens:   keys that a complete store holds; every key already stored must be among them
    wait:     for another process that is writing to the folder; otherwise that is a UserError
    """

    def __init__(
        self,
        folder: Path | str,
        manifest: Mapping[str, Any],
        tokens: Sequence[str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        wait: bool = False,
    ):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder / ".lock", wait)
        try:
            self._resume(manifest, tokens)
        except BaseException:
            self._lock.close()
            raise

    def _resume(self, manifest: Mapping[str, Any], tokens: Sequence[str] | None) -> None:
        folder = self.folder
        if (folder / "manifest.json").exists():
            require_equal(folder, read_manifest(folder), manifest)
        else:
            content = {"format_version": FORMAT_VERSION, **manifest}
            atomic_write(folder / "manifest.json", json.dumps(content, indent=2) + "\n")
        shards = shards_of(folder)
        self._shard = shards[-1] if shards else 0
        last = _cut_back(folder, self._shard)
        self._keys = {entry.key for shard in shards[:-1] for entry in read_index(index_file(folder, shard))[0]}
        self._keys.update(entry.key for entry in last)
        if tokens is not None:
            strangers = sorted(self._keys - set(tokens))
            if strangers:
                raise UserError(
                    f"cache {folder} holds {len(strangers)} samples that the split does not have (first: "
                    f"{strangers[0]}) — the data changed; delete the folder or use another one"
                )
            atomic_write(folder / "tokens.txt", "".join(f"{token}\n" for token in tokens))
        self._open_shard(last[-1].end if last else 0)

    def _open_shard(self, size: int) -> None:
        self._size = size
        self._data = open(data_file(self.folder, self._shard), "ab")
        self._index = open(index_file(self.folder, self._shard), "a", encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def write(self, key: str, arrays: Arrays, deflate: Deflate = ()) -> None:
        """Store one sample. Raises ValueError for a key that is already there."""
        self.write_packed(key, pack(arrays, deflate))

    def write_packed(self, key: str, record: bytes) -> None:
        """Store one sample that `pack` made, possibly in another process."""
        if key in self._keys:
            raise ValueError(f"cache {self.folder}: {key} is already stored")
        if self._size and self._size + len(record) > self.shard_bytes:
            self._close_shard()
            self._shard += 1
            self._open_shard(0)
        self._data.write(record)
        self._data.flush()  # the record is in the file before its index line says so
        self._index.write(Entry(key, self._size, len(record), zlib.crc32(record)).line())
        self._index.flush()
        self._size += len(record)
        self._keys.add(key)

    def close(self) -> None:
        """Flush to the device and let other writers in."""
        if not self._lock.closed:
            self._close_shard()
            self._lock.close()

    def _close_shard(self) -> None:
        for file in (self._data, self._index):
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cut_back(folder: Path, shard: int) -> list[Entry]:
    """Reduce the shard that a killed writer may have left to its sound records; returns those."""
    data_path, index_path = data_file(folder, shard), index_file(folder, shard)
    entries, bad = read_index(index_path)
    data = map_file(data_path) if data_path.exists() else memoryview(b"")
    sound = [entry for entry in entries if entry.is_sound(data)]
    del data
    text = "".join(entry.line() for entry in sound)
    if bad or not index_path.exists() or index_path.stat().st_size != len(text.encode()):
        atomic_write(index_path, text)
    with open(data_path, "ab") as file:
        file.truncate(sound[-1].end if sound else 0)
    return sound
