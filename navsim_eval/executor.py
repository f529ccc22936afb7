"""Work spread over local processes: results in order, nothing dropped, a dead worker costs one chunk.

`run_jobs` maps a picklable callable over items. It differs from `concurrent.futures` in three ways that long
evaluations need: items are drawn lazily and only a bounded number is in flight (memory stays flat over any length), an
item that raises comes back as a failure with its message, and a worker that is killed is replaced and its chunk is
tried again, item by item, so that at the end only the item that kills workers has failed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FunctionType
from typing import Any

from navsim_eval.errors import UserError

_AHEAD = 8  # chunks per worker that may be finished but not yet handed out, because an earlier one is still running
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """What became of one item: a value, or the text of the error that took its place."""

    index: int
    value: Any = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int = 0,
    chunk_size: int = 1,
    retries: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Outcome]:
    """Yield `Outcome(index, function(item))` for every item, in the order of the items.

    function:   module-level function or picklable object with `__call__`; sent to every worker once, so per-process
                state (open maps, readers) belongs into a `functools.cached_property` of such an object
    workers:    processes; 0 means one per usable core, 1 means in this process (no protection against crashes)
    chunk_size: items handed to a worker at a time
    retries:    how often an item is tried again after the death of its worker
    progress:   called with the number of items newly finished
    """
    if workers < 0 or chunk_size < 1 or retries < 0:
        raise UserError(f"workers={workers}, chunk_size={chunk_size}, retries={retries}: must be ≥ 0, ≥ 1, ≥ 0")
    count = workers or usable_cores()
    if count == 1:
        for index, item in enumerate(items):
            value, error = _attempt(function, item)
            if progress:
                progress(1)
            yield Outcome(index, value, error)
        return
    yield from _Pool(function, count, chunk_size, retries).run(items, progress)


@dataclass
class _Chunk:
    """Consecutive items and how many workers have already died over them."""

    indices: list[int]
    items: list[Any]
    deaths: int = 0


class _Worker:
    """A process that answers every list of items with a list of (value, error)."""

    def __init__(self, function: Callable[[Any], Any]):
        context = _context(function)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        with _one_thread_per_worker():
            self.process.start()
        theirs.close()
        self.chunk: _Chunk | None = None

    def give(self, chunk: _Chunk) -> None:
        self.chunk = chunk
        try:
            self.connection.send(chunk.items)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died while idle; reading from the connection reports it

    def take(self) -> list[tuple[Any, str | None]] | None:
        """The answers to the last chunk, or None when the process died over it."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(5)


class _Pool:
    """One run of `run_jobs` with several processes."""

    def __init__(self, function: Callable[[Any], Any], workers: int, chunk_size: int, retries: int):
        self.function, self.limit, self.chunk_size, self.retries = function, workers, chunk_size, retries
        self.workers: list[_Worker] = []
        self.again: deque[_Chunk] = deque()
        self.finished: dict[int, Outcome] = {}

    def run(self, items: Iterable[Any], progress: Callable[[int], None] | None) -> Iterator[Outcome]:
        source, emitted, drawn, exhausted = iter(items), 0, 0, False
        try:
            while True:
                # 1. Keep every worker busy, without running far ahead of what the caller has received.
                while len(self._busy()) < self.limit:
                    if self.again:
                        chunk = self.again.popleft()
                    elif not exhausted and drawn - emitted < _AHEAD * self.limit * self.chunk_size:
                        drawn_items = list(islice(source, self.chunk_size))
                        exhausted = len(drawn_items) < self.chunk_size
                        if not drawn_items:
                            break
                        chunk = _Chunk(list(range(drawn, drawn + len(drawn_items))), drawn_items)
                        drawn += len(drawn_items)
                    else:
                        break
                    self._idle().give(chunk)
                # 2. Wait for one of them, 3. hand out what is next in order.
                if busy := self._busy():
                    ready = wait([w.connection for w in busy])
                    for worker in [w for w in busy if w.connection in ready]:
                        done = self._collect(worker)
                        if progress and done:
                            progress(done)
                while emitted in self.finished:
                    yield self.finished.pop(emitted)
                    emitted += 1
                if exhausted and emitted == drawn:
                    return
        finally:
            for worker in self.workers:
                worker.stop()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.chunk is not None]

    def _idle(self) -> _Worker:
        for worker in self.workers:
            if worker.chunk is None:
                return worker
        self.workers.append(_Worker(self.function))
        return self.workers[-1]

    def _collect(self, worker: _Worker) -> int:
        """Store the answers of a worker, or queue the items of a dead one again; the number of items settled."""
        chunk, answers = worker.chunk, worker.take()
        worker.chunk = None
        if answers is not None:
            for index, (value, error) in zip(chunk.indices, answers, strict=True):
                self.finished[index] = Outcome(index, value, error)
            return len(answers)
        self.workers.remove(worker)
        worker.process.join(5)
        reason = _exit_reason(worker.process.exitcode)
        worker.stop()
        if chunk.deaths < self.retries:
            pairs = zip(chunk.indices, chunk.items, strict=True)
            self.again.extend(_Chunk([index], [item], chunk.deaths + 1) for index, item in pairs)
            return 0
        for index in chunk.indices:
            self.finished[index] = Outcome(index, error=f"worker process died ({reason}), {chunk.deaths + 1} attempts")
        return len(chunk.indices)


def _context(function: Callable[[Any], Any]) -> Any:
    """How processes start: forked from a clean server that has imported what `function` needs, once for all workers.

    Forking this process instead would copy locks that threads of torch or BLAS hold; spawning would import everything
    again in every worker.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    target = getattr(function, "__self__", function)
    module = target.__module__ if isinstance(target, FunctionType | type) else type(target).__module__
    context.set_forkserver_preload(["__main__", module])
    return context


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a run is interrupted
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            return
        answers = [_attempt(function, item) for item in items]
        try:
            connection.send(answers)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # a result that cannot be pickled must not look like a crash
            connection.send([(None, f"result cannot be sent back: {describe_error(error)}")] * len(items))


def _attempt(function: Callable[[Any], Any], item: Any) -> tuple[Any, str | None]:
    try:
        return function(item), None
    except Exception as error:
        return None, describe_error(error)


def describe_error(error: Exception) -> str:
    """One line; an error not meant for users also says where it was raised."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


@contextmanager
def _one_thread_per_worker() -> Iterator[None]:
    """Processes are the parallelism; numeric libraries inside them that also thread would fight for the cores."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
