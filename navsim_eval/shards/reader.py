"""Reading samples of a store on this machine or, through a mirror, in object storage."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.mirror import Mirror, is_remote
from navsim_eval.shards.folder import (
    REPAIR,
    Entry,
    data_file,
    expected_tokens,
    index_file,
    map_file,
    read_index,
    read_manifest,
    require_equal,
    shards_of,
)
from navsim_eval.shards.record import unpack


class ShardReader:
    """Random access to a store: `reader[key] -> {name: array}`, arrays mapped from the file (read-only).

    folder: of the store, or a URL of one in object storage: index and manifest are then read at once, each data file
            when a sample in it is first wanted (see `navsim_eval.mirror`); checksums are compared as ever
    expect: entries that the manifest must have; a difference is a UserError that shows both sides
    check:  compare the checksum when this process first reads a sample (about a third of a millisecond per megabyte)
    Picklable and safe to use from several processes: each maps the files for itself.
    Raises DataError for a damaged folder, and on access for a damaged sample.
    """

    def __init__(self, folder: Path | str, expect: Mapping[str, Any] | None = None, check: bool = True):
        self._mirror = _mirrored(str(folder)) if is_remote(folder) else None
        self.folder, self.check = Path(folder) if self._mirror is None else self._mirror.folder, check
        self.manifest = read_manifest(self.folder)
        require_equal(self.folder, self.manifest, expect or {})
        self._entries: dict[str, tuple[int, Entry]] = {}
        for shard in shards_of(self.folder):
            entries = _sound_index(self.folder, shard, self._held(shard))
            self._entries.update((entry.key, (shard, entry)) for entry in entries)
        tokens = expected_tokens(self.folder)
        order = self._entries if tokens is None else [token for token in tokens if token in self._entries]
        self.keys: list[str] = list(order)
        self.missing: list[str] = [token for token in tokens or () if token not in self._entries]
        self._maps: dict[int, memoryview] = {}
        self._sound: set[str] = set()  # keys whose checksum this process has compared

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        if key not in self._entries:
            raise KeyError(f"{key} is not in cache {self.folder}")
        shard, entry = self._entries[key]
        if shard not in self._maps:
            self._maps[shard] = map_file(self._local(shard))
        record = self._maps[shard][entry.offset : entry.end]
        if self.check and key not in self._sound:
            if zlib.crc32(record) != entry.crc:
                remedy = REPAIR if self._mirror is None else f"delete {self.folder}, then start again"
                raise DataError(data_file(self.folder, shard), f"sample {key} is damaged (checksum)", remedy=remedy)
            self._sound.add(key)
        return unpack(record)

    def _held(self, shard: int) -> int:
        """Bytes of a data file, here or in the storage."""
        path = data_file(self.folder, shard)
        if self._mirror is not None:
            return self._mirror.size(path.name)
        return path.stat().st_size if path.exists() else 0

    def _local(self, shard: int) -> Path:
        path = data_file(self.folder, shard)
        return path if self._mirror is None else self._mirror.fetch(path.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_sound": set()}


def _mirrored(url: str) -> Mirror:
    """Mirror of a store with everything but its data files already there, as it is now."""
    mirror = Mirror(url)
    if "manifest.json" not in mirror.names:
        raise DataError(url, "holds no packed cache (no manifest.json)", remedy="copy a folder made by tools/cache.py")
    for name in mirror.names:
        if not name.endswith(".data"):
            mirror.fetch(name, again=True)
    return mirror


def _sound_index(folder: Path, shard: int, held: int) -> list[Entry]:
    """Entries of a shard of `held` bytes, after a look at what can be seen without reading the data."""
    entries, bad = read_index(index_file(folder, shard))
    if bad:
        raise DataError(index_file(folder, shard), f"{bad} lines are damaged", remedy=REPAIR)
    needed = max((entry.end for entry in entries), default=0)
    if held < needed:  # to be refused here: touching a mapped page beyond the end of a file kills the process
        raise DataError(data_file(folder, shard), f"is truncated: {held} of {needed} bytes", remedy=REPAIR)
    return entries
