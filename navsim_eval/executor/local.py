"""Processes on this machine, each answering chunks of items through a pipe."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FunctionType
from typing import Any

from navsim_eval.executor.jobs import Answer, Answering, Backlog, Chunk, Outcome, describe_error

_NOT_PRELOADED = ("__main__", "builtins")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class LocalPool:
    """Up to `workers` processes for one run; each is started when there is work for it, and replaced when it dies."""

    def __init__(self, answering: Answering, workers: int):
        self.answering, self.limit = answering, workers
        self.workers: list[Worker] = []

    def run(self, backlog: Backlog, progress: Callable[[int], None] | None) -> Iterator[Outcome]:
        """Work the backlog off; outcomes in order."""
        try:
            while not backlog.finished:
                while len(self._busy()) < self.limit and (chunk := backlog.next_chunk()):
                    self._idle().give(chunk)
                busy = self._busy()
                ready = wait([worker.connection for worker in busy]) if busy else []
                for worker in [worker for worker in busy if worker.connection in ready]:
                    settled = self._collect(worker, backlog)
                    if progress and settled:
                        progress(settled)
                yield from backlog.ready()
        finally:
            for worker in self.workers:
                worker.stop()

    def _busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.chunk is not None]

    def _idle(self) -> Worker:
        for worker in self.workers:
            if worker.chunk is None:
                return worker
        self.workers.append(Worker(self.answering))
        return self.workers[-1]

    def _collect(self, worker: Worker, backlog: Backlog) -> int:
        """Pass on the answers of a worker, or give up a dead one; the number of items settled."""
        chunk, answers = worker.chunk, worker.take()
        worker.chunk = None
        if answers is not None:
            return backlog.settle(chunk, answers)
        self.workers.remove(worker)
        return backlog.lost(chunk, worker.farewell())


class Worker:
    """A process that answers every list of items with a list of (value, error)."""

    def __init__(self, answering: Answering):
        context = _context(answering)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, answering), daemon=True)
        with _one_thread_per_worker():
            self.process.start()
        theirs.close()
        self.chunk: Chunk | None = None

    def give(self, chunk: Chunk) -> None:
        self.chunk = chunk
        try:
            self.connection.send(chunk.items)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died while idle; reading from the connection reports it

    def take(self) -> list[Answer] | None:
        """The answers to the last chunk, or None when the process died over it."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def farewell(self) -> str:
        """Why it died; clears it away."""
        self.process.join(5)
        reason = _exit_reason(self.process.exitcode)
        self.stop()
        return reason

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(5)


def _context(function: Callable[[Any], Any]) -> Any:
    """How processes start: forked from a clean server that has imported what `function` needs, once for all workers.

    Forking this process instead would copy locks that threads of torch or BLAS hold; spawning would import everything
    again in every worker.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_modules_of_main(), *_modules_of(function)])
    return context


def _modules_of_main() -> list[str]:
    """Modules that the main script takes names from: every worker imports that script, as `multiprocessing` does.

    Python before 3.12.8 does not preload the script itself, although it offers to.
    """
    named = [getattr(value, "__module__", None) for value in vars(sys.modules["__main__"]).values()]
    return [name for name in dict.fromkeys(named) if name in sys.modules and name not in _NOT_PRELOADED]


def _modules_of(function: Callable[[Any], Any]) -> list[str]:
    """Modules that unpickling the function imports, those of the objects it holds included."""
    modules: dict[str, None] = {}

    class Collector(pickle.Pickler):
        def reducer_override(self, item: Any) -> Any:
            named = item if isinstance(item, FunctionType | type) else type(item)
            modules[named.__module__] = None
            return NotImplemented

    Collector(io.BytesIO()).dump(function)
    return [name for name in modules if name not in _NOT_PRELOADED]


def _serve(connection: Connection, answering: Answering) -> None:
    """Body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when a run is interrupted
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            return
        answers = answering(items)
        try:
            connection.send(answers)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # a result that cannot be pickled must not look like a crash
            connection.send([(None, f"result cannot be sent back: {describe_error(error)}")] * len(items))


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
