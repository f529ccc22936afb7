"""Filling a store by a function of the key, in parallel."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from navsim_eval.errors import UserError
from navsim_eval.executor import Workers, run_jobs
from navsim_eval.files import atomic_write
from navsim_eval.shards.folder import SHARD_BYTES, is_finished
from navsim_eval.shards.record import Arrays, Deflate, pack
from navsim_eval.shards.writer import ShardWriter


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
    A store that lacks nothing is only read, so that any number of processes may ask for it at a time; where something
    is lacking, one builds, and the others wait and find it done.
    Raises UserError without tokens, or when not a single sample could be built.
    """
    if not tokens:
        raise UserError(f"cache {folder}: no scenes to build (the split is empty)")
    if is_finished(folder, manifest, tokens):
        if progress:
            progress(len(tokens))
        return BuildReport(Path(folder), len(tokens), len(tokens), 0)
    broken: dict[str, str] = {}
    with ShardWriter(folder, manifest, tokens, shard_bytes, wait=True) as writer:
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
