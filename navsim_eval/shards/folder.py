"""The files of a store: their names, index lines, manifest, lock."""

from __future__ import annotations

import fcntl
import json
import mmap
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navsim_eval.errors import DataError, UserError

FORMAT_VERSION = 1
SHARD_BYTES = 512 * 2**20
REPAIR = "drop damaged samples with tools/cache.py mode=repair, then build again"


@dataclass(frozen=True)
class Entry:
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


def data_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.data"


def index_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.index"


def shards_of(folder: Path) -> list[int]:
    return sorted({int(path.stem) for path in folder.glob("[0-9]*.*") if path.suffix in (".data", ".index")})


def read_index(path: Path) -> tuple[list[Entry], int]:
    """Entries of an index file and the number of complete lines that are none (a torn last line is no line)."""
    entries, bad = [], 0
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.split("\n")[:-1]:
        try:
            key, offset, size, crc = json.loads(line)
            entries.append(Entry(str(key), int(offset), int(size), int(crc)))
        except (ValueError, TypeError):
            bad += 1
    return entries, bad


def map_file(path: Path) -> memoryview:
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


def expected_tokens(folder: Path) -> list[str] | None:
    path = folder / "tokens.txt"
    return path.read_text().splitlines() if path.is_file() else None


def require_equal(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError that shows both sides of every difference between a store's manifest and the wanted one."""
    differences = list(_differences(found, json.loads(json.dumps(dict(wanted)))))  # as stored: tuples are lists
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


def is_finished(folder: Path | str, manifest: Mapping[str, Any], tokens: Sequence[str]) -> bool:
    """Whether a store holds exactly these keys, nothing of its last shard is torn and no key was noted as broken: then
    there is nothing to write. Raises UserError for a store of another manifest."""
    folder = Path(folder)
    if not (folder / "manifest.json").exists() or expected_tokens(folder) != list(tokens):
        return False
    require_equal(folder, read_manifest(folder), manifest)
    shards = shards_of(folder)
    indices = [read_index(index_file(folder, shard)) for shard in shards]
    if any(bad for _, bad in indices) or {entry.key for entries, _ in indices for entry in entries} != set(tokens):
        return False
    noted = folder / "broken.json"
    if noted.exists() and noted.read_text().strip() != "{}":
        return False
    last = data_file(folder, shards[-1])
    data = map_file(last) if last.exists() else memoryview(b"")
    return all(entry.is_sound(data) for entry in indices[-1][0])


def lock(path: Path, wait: bool = False) -> Any:
    """An open file that holds an exclusive lock; the system frees it when the process ends, however it ends.

    Where another process holds it: wait, and say so on standard error, or raise UserError.
    """
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held = f"cache {path.parent} is being written by another process"
        if not wait:
            file.close()
            raise UserError(f"{held} — wait for it or stop it") from error
        print(f"{held}; waiting for it to end", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file
