"""Lists of SHA-256 sums in the format of `sha256sum`, written and compared in parallel; published MD5 sums of archives.

A list can be checked without this project, from the data root: `sha256sum -c test.sha256`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from navsim_eval.data_tools.published import ARCHIVES
from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import run_jobs
from navsim_eval.files import sha256

_CHUNK = 32


@dataclass(frozen=True)
class Comparison:
    """expected: files listed;  equal: of them;  different, missing: names of the others."""

    expected: int
    equal: int
    different: list[str]
    missing: list[str]


@dataclass(frozen=True)
class _Sum:
    """Picklable: SHA-256 of a file below a root; None where it is not there."""

    root: Path

    def __call__(self, name: str) -> str | None:
        path = self.root / name
        return sha256(path) if path.is_file() else None


def default_list(root: Path | str, split: str) -> Path:
    """Where the list of a split lies unless somebody says otherwise."""
    return Path(root) / f"{split.replace(':', '_')}.sha256"


def write_checksums(
    target: Path, root: Path, files: Iterable[Path], workers: int, bar: Callable[[str, int], Any]
) -> int:
    """List the files (below `root`), sorted by name; returns how many. Interrupted, the next call goes on.

    Finished sums wait in `<target>.part`; files that change between the two calls are not noticed.
    Raises UserError for a file outside `root`, DataError for one that cannot be read.
    """
    names = sorted(_relative(path, root) for path in set(files))
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    done = dict(_parse_line(line) for line in _whole_lines(part))
    todo = [name for name in names if name not in done]
    with part.open("a") as file, bar("checksums", len(names)) as update:
        file.seek(0, os.SEEK_END)
        update(len(names) - len(todo))
        for outcome in run_jobs(_Sum(root), todo, workers=workers, chunk_size=_CHUNK):
            name = todo[outcome.index]
            if not outcome.ok or outcome.value is None:
                raise DataError(root / name, outcome.error or "no such file", remedy="verify the split first")
            file.write(f"{outcome.value}  {name}\n")
            done[name] = outcome.value
            update(1)
    wanted = set(names)
    part.write_text("".join(f"{done[name]}  {name}\n" for name in sorted(wanted)))
    os.replace(part, target)
    return len(names)


def read_checksums(path: Path) -> dict[str, str]:
    """Sums by file name. Raises DataError for a file that is absent or not such a list."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read ({error})", remedy="write one with tools/data.py checksums") from error
    sums = {}
    for number, line in enumerate(lines, start=1):
        try:
            name, digest = _parse_line(line)
        except ValueError:
            raise DataError(path, f"line {number} is not '<sha256>  <file>': {line[:40]!r}") from None
        sums[name] = digest
    return sums


def compare_checksums(listed: Path, root: Path, workers: int, bar: Callable[[str, int], Any]) -> Comparison:
    """Compare the files below `root` with a list."""
    sums = read_checksums(listed)
    different, missing, names = [], [], list(sums)
    with bar("checksums", len(names)) as update:
        for outcome in run_jobs(_Sum(root), names, workers=workers, chunk_size=_CHUNK):
            name = names[outcome.index]
            if outcome.ok and outcome.value is None:
                missing.append(name)
            elif outcome.value != sums[name]:
                different.append(name)
            update(1)
    return Comparison(len(names), len(names) - len(different) - len(missing), different, missing)


def compare_archives(folder: Path, bar: Callable[[str, int], Any]) -> Comparison:
    """Compare archives in a folder with the published MD5 sums; archives without a published sum are left alone.

    Raises UserError when the folder holds none of those with a sum.
    """
    published = {name: digest for group in ARCHIVES.values() for name, digest in (group.md5 or {}).items()}
    there = sorted(name for name in published if (folder / name).is_file())
    if not there:
        raise UserError(f"archives: {folder} holds none of {', '.join(sorted(published))}")
    different = []
    with bar("archives", len(there)) as update:
        for name in there:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != published[name]:
                    different.append(name)
            update(1)
    return Comparison(len(there), len(there) - len(different), different, [])


def _relative(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        raise UserError(f"{path} is not below {root}; checksum lists hold names relative to data.root") from None


def _whole_lines(path: Path) -> list[str]:
    """Finished lines of a list that an interrupted run left."""
    text = path.read_text() if path.is_file() else ""
    lines = text.split("\n")[:-1]
    if path.is_file():
        path.write_text("".join(f"{line}\n" for line in lines))
    return lines


def _parse_line(line: str) -> tuple[str, str]:
    digest, gap, name = line.partition("  ")
    if len(digest) != 64 or not gap or not name or set(digest) - set("0123456789abcdef"):
        raise ValueError(line)
    return name, digest
