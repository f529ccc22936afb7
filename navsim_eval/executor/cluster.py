"""Workers on several machines: one Ray actor a processor, under the same rules as local processes.

Ray places and starts the workers and carries items and results; which item is next, in what order outcomes come and
what is tried again is decided by the same `Backlog` as for local processes. An actor is given a chunk only once it
runs, so one that finds no free processor holds nothing up.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from navsim_eval.errors import UserError
from navsim_eval.executor.jobs import Answer, Answering, Backlog, Chunk, Outcome, describe_error, usable_cores

_PATIENCE_S = 120.0  # for the first free processor of the cluster
_FAILED_STARTS = 3  # actors that die in a row before one has run
_LINE = 200  # characters of a reason; Ray explains deaths at length


class RayPool:
    """Up to `workers` actors for one run (0: one per processor of the cluster). Raises UserError without Ray."""

    def __init__(self, answering: Answering, workers: int, address: str):
        self.ray = connect(address, workers)
        self.limit = workers or max(int(self.ray.cluster_resources().get("CPU", 0)), 1)
        # Sent once to each machine. As bytes, so that what goes wrong while unpickling is ours to explain.
        self.answering = self.ray.put(self.ray.cloudpickle.dumps(answering))
        self.server = self.ray.remote(num_cpus=1, max_restarts=0)(_Server)
        self.waiting: deque[Chunk] = deque()
        self.starting: dict[Any, Any] = {}  # reference to its being ready → actor
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Chunk]] = {}  # reference to the answers → actor, chunk
        self.failed_starts = 0

    def run(self, backlog: Backlog, progress: Callable[[int], None] | None) -> Iterator[Outcome]:
        """Work the backlog off; outcomes in order. Raises UserError when no worker can be started."""
        try:
            while not backlog.finished:
                self._hand_out(backlog)
                for reference in self._wait():
                    settled = self._collect(reference, backlog)
                    if progress and settled:
                        progress(settled)
                yield from backlog.ready()
        finally:
            if self.ray.is_initialized():
                for actor in (*self.starting.values(), *self.idle, *(actor for actor, _ in self.busy.values())):
                    self.ray.kill(actor)

    def _hand_out(self, backlog: Backlog) -> None:
        """A chunk to every idle actor, and an actor on its way for every chunk that waits."""
        while len(self.busy) + len(self.waiting) < self.limit and (chunk := backlog.next_chunk()):
            self.waiting.append(chunk)
        while self.waiting and self.idle:
            actor, chunk = self.idle.pop(), self.waiting.popleft()
            self.busy[actor.answer.remote(chunk.items)] = actor, chunk
        while len(self.starting) < len(self.waiting):
            actor = self.server.remote(self.answering)
            self.starting[actor.start.remote()] = actor

    def _wait(self) -> list[Any]:
        """References that are done, at least one of them."""
        pending = [*self.busy, *self.starting]
        if not pending:
            return []
        done, _ = self.ray.wait(pending, num_returns=1, timeout=None if self.busy else _PATIENCE_S)
        if not done:
            free = self.ray.available_resources().get("CPU", 0)
            raise UserError(
                f"executor=ray: no worker started within {_PATIENCE_S:.0f} s, {free:.0f} processors of the cluster are "
                "free; end what else runs there (`ray status` shows it), or use executor=local"
            )
        return done

    def _collect(self, reference: Any, backlog: Backlog) -> int:
        """Take note of an actor that has started, answered or died; the number of items settled."""
        errors = self.ray.exceptions
        if reference in self.starting:
            actor = self.starting.pop(reference)
            self._note_start(reference, actor)
            return 0
        actor, chunk = self.busy.pop(reference)
        try:
            answers = self.ray.get(reference)
        except errors.RayTaskError as error:  # not caught where the work is done: pickling
            self.idle.append(actor)
            reason = f"item or result cannot be sent: {_one_line(error.cause or error)}"
            return backlog.settle(chunk, [(None, reason)] * len(chunk.items))
        except errors.RayError as error:
            self.ray.kill(actor)
            return backlog.lost(chunk, _one_line(error))
        self.idle.append(actor)
        return backlog.settle(chunk, answers)

    def _note_start(self, reference: Any, actor: Any) -> None:
        errors = self.ray.exceptions
        try:
            self.ray.get(reference)
        except errors.RayTaskError as error:
            raise UserError(
                f"executor=ray: a worker cannot load its work ({_one_line(error.cause or error)}); install this "
                "project and what it needs on every machine of the cluster, in the same version"
            ) from error
        except errors.RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= _FAILED_STARTS:
                problem = f"{_FAILED_STARTS} workers in a row died while starting"
                raise UserError(f"executor=ray: {problem} ({_one_line(error)}); see Ray's logs") from error
        else:
            self.failed_starts = 0
            self.idle.append(actor)


class _Server:
    """Body of an actor. Ray gives an actor of one processor one thread for numeric libraries."""

    def __init__(self, answering: bytes):
        self.pickled = answering

    def start(self) -> None:
        """Load what answers; importing what it needs is the slow part."""
        self.answering = pickle.loads(self.pickled)  # made by the process that asks for the work

    def answer(self, items: list[Any]) -> list[Answer]:
        return self.answering(items)


def connect(address: str, workers: int = 0) -> Any:
    """The `ray` module, connected; the connection is kept until the process ends.

    address: "auto" or host:port of a running cluster; empty: $RAY_ADDRESS, or else a runtime of this machine's
             processors that ends with this process. A caller's own `ray.init` is used as it is.
    Raises UserError when ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "executor=ray needs the package ray: pip install -e '.[ray]', or use executor=local (one machine)"
        ) from error
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    address = address or os.environ.get("RAY_ADDRESS", "")
    own = {} if address else {"num_cpus": max(workers, usable_cores()), "include_dashboard": False}
    try:
        ray.init(address=address or "local", configure_logging=False, log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        remedy = "start one with `ray start --head` and join the other machines, or leave ray_address empty"
        raise UserError(f"ray_address={address}: no cluster can be reached ({_one_line(error)}); {remedy}") from error
    return ray


def _one_line(error: BaseException) -> str:
    text = describe_error(error)
    return text if len(text) <= _LINE else text[:_LINE] + "…"
