"""Packed storage of many small samples: a few large files, checksums, resumable after a kill at any moment.

A *sample* is a mapping from names to numpy arrays under a key (a scene token). A store is a folder:

    manifest.json     what the samples are: purpose, split, configuration, hash of the preprocessing, format version
    tokens.txt        the keys that a complete store holds, one a line, in the order in which readers list them
    broken.json       keys that could not be built in the last run, with the reason
    00000.data        records one after the other, each aligned to 64 bytes
    00000.index       one JSON line per finished record: [key, offset, size, crc32]

A record describes itself: length of the header, header (JSON: name, dtype, shape, codec, position of every array), then
the arrays. A sample exists once its index line is complete, and the line is written after the record; so a killed
writer leaves nothing half-valid: the next one cuts the last shard back to its last sound record and goes on. Shards
before the last one are never written again.

One process writes (`ShardWriter` takes a lock; `build_shards` lets a pool of processes compute and pack the samples).
Any number of processes may read, also while the store grows; each maps the files into memory for itself.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import Workers, run_jobs
from navsim_eval.files import atomic_write
from navsim_eval.mirror import Mirror, is_remote

FORMAT_VERSION = 1
SHARD_BYTES = 512 * 2**20
_ALIGNMENT = 64
_REPAIR = "drop damaged samples with tools/cache.py mode=repair, then build again"

Arrays = Mapping[str, np.ndarray]
Deflate = Collection[str] | Mapping[str, int]  # names of arrays to compress; a zlib level for each, where 6 is too slow


# --- one record ------------------------------------------------------------------------------------------------------


def pack(arrays: Arrays, deflate: Deflate = ()) -> bytes:
    """One sample as a self-describing record. Arrays named in `deflate` are compressed without loss (see `_encode`)."""
    levels = deflate if isinstance(deflate, Mapping) else dict.fromkeys(deflate, 6)
    entries, parts, position = [], [], 0
    for name, value in arrays.items():
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise TypeError(f"array '{name}' holds Python objects; shards store plain numbers and fixed-width text")
        raw = name not in levels
        codec, body = ("raw", np.ascontiguousarray(array).tobytes()) if raw else _encode(array, levels[name])
        entries.append([name, array.dtype.str, list(array.shape), codec, position, len(body)])
        parts.append(_padded(body))
        position += len(parts[-1])
    header = json.dumps(entries, separators=(",", ":")).encode()
    return _padded(len(header).to_bytes(8, "little") + header) + b"".join(parts)


def unpack(record: bytes | memoryview) -> dict[str, np.ndarray]:
    """Arrays of a record; uncompressed ones are read-only views into it, without a copy."""
    length = int.from_bytes(record[:8], "little")
    entries = json.loads(bytes(record[8 : 8 + length]))
    start = _round_up(8 + length)
    arrays = {}
    for name, dtype, shape, codec, position, size in entries:
        body = record[start + position : start + position + size]
        arrays[name] = _decode(codec, body, np.dtype(dtype), shape)
    return arrays


def _encode(array: np.ndarray, level: int) -> tuple[str, bytes]:
    """Codec and compressed bytes, without loss.

    "zlib":  the bytes in C order, through zlib of that level
    "delta": for numbers of 8 bytes. Read as integers, each row is replaced by its difference from the one before (the
             first axis are the rows); of all numbers the first byte is stored first, then the second, and so on, and
             that goes through zlib of level 1. Coordinates along a line share their leading bytes: half the size of
             "zlib" alone.
    """
    if array.dtype.itemsize != 8 or array.ndim == 0:
        return "zlib", zlib.compress(np.ascontiguousarray(array).tobytes(), level)
    changes = np.diff(np.ascontiguousarray(array).view(np.int64), axis=0, prepend=np.int64(0))
    planes = changes.reshape(-1, 1).view(np.uint8).T
    return "delta", zlib.compress(planes.tobytes(), 1)


def _decode(codec: str, body: bytes | memoryview, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    if codec == "raw":
        return np.frombuffer(body, dtype).reshape(shape)
    body = zlib.decompress(body)
    if codec == "delta":
        changes = np.frombuffer(body, np.uint8).reshape(8, -1).T.copy().view(np.int64)
        return np.cumsum(changes.reshape(shape), axis=0).view(dtype)
    return np.frombuffer(body, dtype).reshape(shape)


def _padded(body: bytes) -> bytes:
    return body + b"\0" * (_round_up(len(body)) - len(body))


def _round_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# --- the folder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """Where a record lies."""

    key: str
    offset: int
    size: int
    crc: int

    @property
    def end(self) -> int:
        return self.offset + self.size

    def line(self) -> str:
        return json.dumps([self.key, self.offset, self.size, self.crc]) + "\n"

    def is_sound(self, data: memoryview | bytes) -> bool:
        return self.end <= len(data) and zlib.crc32(data[self.offset : self.end]) == self.crc


def _data_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.data"


def _index_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.index"


def _shards(folder: Path) -> list[int]:
    return sorted({int(path.stem) for path in folder.glob("[0-9]*.*") if path.suffix in (".data", ".index")})


def _read_index(path: Path) -> tuple[list[_Entry], int]:
    """Entries of an index file and the number of complete lines that are none (a torn last line is no line)."""
    entries, bad = [], 0
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.split("\n")[:-1]:
        try:
            key, offset, size, crc = json.loads(line)
            entries.append(_Entry(str(key), int(offset), int(size), int(crc)))
        except (ValueError, TypeError):
            bad += 1
    return entries, bad


def _map(path: Path) -> memoryview:
    """The file's bytes, mapped read-only; the mapping closes with its last view."""
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """What a store holds. Raises DataError when the folder is no store or the manifest is damaged."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise DataError(folder, "holds no packed cache (no manifest.json)", remedy="make one with tools/cache.py")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(path, f"is damaged ({error})", remedy="delete the folder and build it again") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        problem = f"format version {found}, this code reads {FORMAT_VERSION}"
        raise DataError(path, problem, remedy="build the cache again")
    return manifest


def _expected_tokens(folder: Path) -> list[str] | None:
    path = folder / "tokens.txt"
    return path.read_text().splitlines() if path.is_file() else None


def _require_equal(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differences = list(_differences(found, wanted))
    if differences:
        raise UserError(
            f"cache {folder} was made with another configuration: {'; '.join(differences)} "
            "— ask for the same configuration, or use another folder"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Readable differences of what is wanted, both sides shown."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in wanted:
            yield from _differences(found.get(key, "absent"), wanted[key], f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name} is {found} there, {wanted} here"


# --- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Appends samples to a store, which it creates or resumes. Use as a context manager.

    manifest: what the samples are (JSON values); must equal that of an existing store, otherwise UserError
    tokens:   keys that a complete store holds; every key already stored must be among them
    Raises UserError when another process is writing to the folder.
    """

    def __init__(
        self,
        folder: Path | str,
        manifest: Mapping[str, Any],
        tokens: Sequence[str] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder / ".lock")
        try:
            self._resume(json.loads(json.dumps(dict(manifest))), tokens)
        except BaseException:
            self._lock.close()
            raise

    def _resume(self, manifest: dict[str, Any], tokens: Sequence[str] | None) -> None:
        folder = self.folder
        if (folder / "manifest.json").exists():
            _require_equal(folder, read_manifest(folder), manifest)
        else:
            content = {"format_version": FORMAT_VERSION, **manifest}
            atomic_write(folder / "manifest.json", json.dumps(content, indent=2) + "\n")
        shards = _shards(folder)
        self._shard = shards[-1] if shards else 0
        last = _cut_back(folder, self._shard)
        self._keys = {entry.key for shard in shards[:-1] for entry in _read_index(_index_file(folder, shard))[0]}
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
        self._data = open(_data_file(self.folder, self._shard), "ab")
        self._index = open(_index_file(self.folder, self._shard), "a", encoding="utf-8")

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
        self._index.write(_Entry(key, self._size, len(record), zlib.crc32(record)).line())
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


def _lock(path: Path) -> Any:
    """An open file that holds an exclusive lock; the system frees it when the process ends, however it ends."""
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"cache {path.parent} is being written by another process — wait for it or stop it") from error
    return file


def _cut_back(folder: Path, shard: int) -> list[_Entry]:
    """Reduce the shard that a killed writer may have left to its sound records; returns those."""
    data_file, index_file = _data_file(folder, shard), _index_file(folder, shard)
    entries, bad = _read_index(index_file)
    data = _map(data_file) if data_file.exists() else memoryview(b"")
    sound = [entry for entry in entries if entry.is_sound(data)]
    del data
    text = "".join(entry.line() for entry in sound)
    if bad or not index_file.exists() or index_file.stat().st_size != len(text.encode()):
        atomic_write(index_file, text)
    with open(data_file, "ab") as file:
        file.truncate(sound[-1].end if sound else 0)
    return sound


# --- reading ---------------------------------------------------------------------------------------------------------


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
        _require_equal(self.folder, self.manifest, json.loads(json.dumps(dict(expect or {}))))
        self._entries: dict[str, tuple[int, _Entry]] = {}
        for shard in _shards(self.folder):
            entries = _sound_index(self.folder, shard, self._held(shard))
            self._entries.update((entry.key, (shard, entry)) for entry in entries)
        tokens = _expected_tokens(self.folder)
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
            self._maps[shard] = _map(self._local(shard))
        record = self._maps[shard][entry.offset : entry.end]
        if self.check and key not in self._sound:
            if zlib.crc32(record) != entry.crc:
                remedy = _REPAIR if self._mirror is None else f"delete {self.folder}, then start again"
                raise DataError(_data_file(self.folder, shard), f"sample {key} is damaged (checksum)", remedy=remedy)
            self._sound.add(key)
        return unpack(record)

    def _held(self, shard: int) -> int:
        """Bytes of a data file, here or in the storage."""
        path = _data_file(self.folder, shard)
        if self._mirror is not None:
            return self._mirror.size(path.name)
        return path.stat().st_size if path.exists() else 0

    def _local(self, shard: int) -> Path:
        path = _data_file(self.folder, shard)
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


def _sound_index(folder: Path, shard: int, held: int) -> list[_Entry]:
    """Entries of a shard of `held` bytes, after a look at what can be seen without reading the data."""
    entries, bad = _read_index(_index_file(folder, shard))
    if bad:
        raise DataError(_index_file(folder, shard), f"{bad} lines are damaged", remedy=_REPAIR)
    needed = max((entry.end for entry in entries), default=0)
    if held < needed:  # to be refused here: touching a mapped page beyond the end of a file kills the process
        raise DataError(_data_file(folder, shard), f"is truncated: {held} of {needed} bytes", remedy=_REPAIR)
    return entries


# --- verify and repair -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """Outcome of reading everything: sound samples, damaged places (file, key, problem), keys not there at all."""

    sound: int
    damaged: list[tuple[str, str, str]]
    missing: list[str]

    @property
    def ok(self) -> bool:
        return not self.damaged

    def __str__(self) -> str:
        expected = self.sound + len(self.missing)
        text = f"{self.sound} sound samples" if not self.missing else f"partial: {self.sound} of {expected} samples"
        if self.damaged:
            file, key, problem = self.damaged[0]
            text += f"; {len(self.damaged)} damaged (first: {file} {key}: {problem})"
        return text


def verify(folder: Path | str, progress: Callable[[int], None] | None = None) -> Verification:
    """Check every checksum. progress: called with the number of samples newly read."""
    return _inspect(Path(folder), mend=False, progress=progress)


def repair(folder: Path | str, progress: Callable[[int], None] | None = None) -> Verification:
    """Drop damaged samples from the indices, so that the next build makes them again; reports what was dropped."""
    folder = Path(folder)
    read_manifest(folder)
    with _lock(folder / ".lock"):
        return _inspect(folder, mend=True, progress=progress)


def _inspect(folder: Path, mend: bool, progress: Callable[[int], None] | None) -> Verification:
    read_manifest(folder)
    sound_keys: dict[str, None] = {}
    damaged = []
    for shard in _shards(folder):
        entries, bad = _read_index(_index_file(folder, shard))
        damaged += [(_index_file(folder, shard).name, "?", "unreadable line")] * bad
        data_file = _data_file(folder, shard)
        data = _map(data_file) if data_file.exists() else memoryview(b"")
        sound = []
        for entry in entries:
            if entry.is_sound(data):
                sound.append(entry)
            else:
                problem = "truncated" if entry.end > len(data) else "checksum differs"
                damaged.append((data_file.name, entry.key, problem))
            if progress:
                progress(1)
        del data
        if mend and (bad or len(sound) < len(entries)):
            atomic_write(_index_file(folder, shard), "".join(entry.line() for entry in sound))
        sound_keys.update((entry.key, None) for entry in sound)
    missing = [token for token in _expected_tokens(folder) or () if token not in sound_keys]
    return Verification(len(sound_keys), damaged, missing)


# --- parallel build --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildReport:
    """What a build did: keys expected, keys now stored, how many of them are new, and why others are not there."""

    folder: Path
    expected: int
    stored: int
    added: int
    broken: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.broken:
            return f"complete: {self.stored} samples ({self.added} new) in {self.folder}"
        token, reason = next(iter(self.broken.items()))
        return (
            f"partial: {self.stored} of {self.expected} samples in {self.folder}; {len(self.broken)} broken, listed in "
            f"broken.json (first: {token}: {reason})"
        )


def build_shards(
    folder: Path | str,
    manifest: Mapping[str, Any],
    tokens: Sequence[str],
    function: Callable[[str], Arrays] | Callable[[list[str]], Sequence[Arrays]],
    *,
    deflate: Deflate = (),
    workers: int | Workers = 0,
    chunk_size: int = 16,
    together: bool = False,
    progress: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> BuildReport:
    """Compute and store `function(token)` for every token that is not stored yet.

    function: picklable; runs in the `workers` (see `navsim_eval.executor.Workers`), packing included
    together: `function` takes the tokens of a chunk and returns as many samples; when it raises, it is asked for each
              token by itself
    progress: called with the number of tokens newly settled, those already stored first
    A token whose function raises is left out, counted and listed in `broken.json`; the next run tries it again.
    Raises UserError without tokens, or when not a single sample could be built.
    """
    if not tokens:
        raise UserError(f"cache {folder}: no scenes to build (the split is empty)")
    broken: dict[str, str] = {}
    with ShardWriter(folder, manifest, tokens, shard_bytes) as writer:
        todo = [token for token in tokens if token not in writer]
        before = len(writer)
        if progress and before:
            progress(before)
        job = _PackedJobs(function, deflate) if together else _PackedJob(function, deflate)
        for outcome in run_jobs(job, todo, workers=workers, chunk_size=chunk_size, together=together):
            if outcome.ok:
                writer.write_packed(todo[outcome.index], outcome.value)
            else:
                broken[todo[outcome.index]] = outcome.error
            if progress:
                progress(1)
        stored = len(writer)
        atomic_write(Path(folder) / "broken.json", json.dumps(broken, indent=1) + "\n")
    if not stored:
        reason = next(iter(broken.values()))
        raise UserError(f"cache {folder}: none of {len(tokens)} samples could be built; first: {reason}")
    return BuildReport(Path(folder), len(tokens), stored, stored - before, broken)


@dataclass(frozen=True)
class _PackedJob:
    """`function`, with its result packed where it was made (compression is then parallel, too)."""

    function: Callable[[str], Arrays]
    deflate: Deflate

    def __call__(self, token: str) -> bytes:
        return pack(self.function(token), self.deflate)


@dataclass(frozen=True)
class _PackedJobs:
    """The same for a `function` that makes several samples at once."""

    function: Callable[[list[str]], Sequence[Arrays]]
    deflate: Deflate

    def __call__(self, tokens: list[str]) -> list[bytes]:
        return [pack(arrays, self.deflate) for arrays in self.function(tokens)]
