"""Checking every record of a store, and dropping the damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from navsim_eval.files import atomic_write
from navsim_eval.shards.folder import (
    data_file,
    expected_tokens,
    index_file,
    lock,
    map_file,
    read_index,
    read_manifest,
    shards_of,
)


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
    with lock(folder / ".lock"):
        return _inspect(folder, mend=True, progress=progress)


def _inspect(folder: Path, mend: bool, progress: Callable[[int], None] | None) -> Verification:
    read_manifest(folder)
    sound_keys: dict[str, None] = {}
    damaged = []
    for shard in shards_of(folder):
        entries, bad = read_index(index_file(folder, shard))
        damaged += [(index_file(folder, shard).name, "?", "unreadable line")] * bad
        path = data_file(folder, shard)
        data = map_file(path) if path.exists() else memoryview(b"")
        sound = []
        for entry in entries:
            if entry.is_sound(data):
                sound.append(entry)
            else:
                problem = "truncated" if entry.end > len(data) else "checksum differs"
                damaged.append((path.name, entry.key, problem))
            if progress:
                progress(1)
        del data
        if mend and (bad or len(sound) < len(entries)):
            atomic_write(index_file(folder, shard), "".join(entry.line() for entry in sound))
        sound_keys.update((entry.key, None) for entry in sound)
    missing = [token for token in expected_tokens(folder) or () if token not in sound_keys]
    return Verification(len(sound_keys), damaged, missing)
