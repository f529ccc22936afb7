"""What each log of a folder holds, frame by frame, and remembered between runs.

A published split has up to 1310 logs and 14 GB of pickles, of which cutting windows needs three things per frame:
token, whether there is a route, and the time. They are read once (in several processes if asked) and kept in a small
file; a log that changed in size or time stamp is read again.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import zipfile
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write
from navsim_eval.formats.logs import parse_route, read_log_dicts

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LogSummary:
    """Frames of one log in file order, or why it cannot be read.

    tokens: (n,) str;  has_route: (n,) bool;  timestamps_us: (n,) int64, -1 where a frame has none
    """

    name: str
    tokens: np.ndarray
    has_route: np.ndarray
    timestamps_us: np.ndarray
    broken: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def summarize_log(path: Path) -> LogSummary:
    """Read one log. A log that cannot be read gives an empty summary with the reason."""
    try:
        frames = read_log_dicts(path)
        times = [frame.get("timestamp") for frame in frames]
        return LogSummary(
            name=path.stem,
            tokens=np.array([str(frame["token"]) for frame in frames], dtype=np.str_),
            has_route=np.array([bool(parse_route(frame.get("roadblock_ids") or ())) for frame in frames], dtype=bool),
            timestamps_us=np.array([-1 if time is None else int(time) for time in times], dtype=np.int64),
        )
    except DataError as error:
        reason = str(error)
    except (TypeError, ValueError, OverflowError) as error:
        reason = f"{path}: route or time stamp of a frame cannot be read ({error})"
    return LogSummary(path.stem, np.array([], np.str_), np.array([], bool), np.array([], np.int64), reason)


def summarize_logs(
    paths: Sequence[Path], workers: int = 1, progress: bool = False, memory: Path | None = None
) -> Generator[LogSummary, None, None]:
    """Summaries in order of paths, read lazily; stopping early stops reading.

    workers: processes that read logs;  progress: show a bar
    memory:  folder for what was read (one file per folder of logs), None: remember nothing
    """
    store = None if memory is None or not paths else memory / _memory_name(paths[0].parent)
    known = {} if store is None else _load(store)
    stamps = {path.stem: _stamp(path) for path in paths}
    unread = [path for path in paths if known.get(path.stem, (None,))[0] != stamps[path.stem]]
    pool = None
    if workers > 1 and len(unread) > 1:
        pool = ProcessPoolExecutor(min(workers, len(unread)), mp_context=multiprocessing.get_context("spawn"))
    fresh: dict[str, tuple[tuple[int, int], LogSummary]] = {}
    try:
        read = iter(map(summarize_log, unread) if pool is None else pool.map(summarize_log, unread))
        waiting = {path.stem for path in unread}
        for path in _with_bar(paths, progress and bool(unread)):
            if path.stem not in waiting:
                yield known[path.stem][1]
                continue
            summary = next(read)
            if summary.broken is None:
                fresh[path.stem] = (stamps[path.stem], summary)
            yield summary
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        if fresh and store is not None:
            _save(store, {**known, **fresh})


def default_memory() -> Path | None:
    """`log_index` under $NAVSIM_EXP_ROOT, where NAVSIM users keep caches; None without it."""
    root = os.environ.get("NAVSIM_EXP_ROOT", "")
    return Path(root) / "log_index" if root else None


def _with_bar(paths: Sequence[Path], show: bool) -> Iterable[Path]:
    if not show:
        return paths
    from tqdm import tqdm

    return tqdm(paths, desc="scanning logs", unit="log")


def _memory_name(folder: Path) -> str:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return f"{folder.name}-{digest}.npz"


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _save(store: Path, logs: dict[str, tuple[tuple[int, int], LogSummary]]) -> None:
    summaries = [summary for _, summary in logs.values()]
    arrays = {
        "version": np.array(FORMAT_VERSION),
        "names": np.array(list(logs), dtype=np.str_),
        "stamps": np.array([stamp for stamp, _ in logs.values()], dtype=np.int64),
        "lengths": np.array([len(summary) for summary in summaries], dtype=np.int64),
        "tokens": np.concatenate([summary.tokens for summary in summaries]),
        "has_route": np.concatenate([summary.has_route for summary in summaries]),
        "timestamps_us": np.concatenate([summary.timestamps_us for summary in summaries]),
    }
    atomic_write(store, lambda temporary: np.savez(temporary, **arrays))


def _load(store: Path) -> dict[str, tuple[tuple[int, int], LogSummary]]:
    """What was remembered; nothing when the file is absent, damaged or of another version (it is then rewritten)."""
    try:
        with np.load(store, allow_pickle=False) as file:
            if int(file["version"]) != FORMAT_VERSION:
                return {}
            ends = np.cumsum(file["lengths"])[:-1]
            columns = [np.split(file[name], ends) for name in ("tokens", "has_route", "timestamps_us")]
            rows = zip(file["names"].tolist(), file["stamps"].tolist(), *columns, strict=True)
            return {name: ((size, time), LogSummary(name, *parts)) for name, (size, time), *parts in rows}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
