"""Work spread over processes: results in order, nothing dropped, a dead worker costs one chunk.

`run_jobs` maps a picklable callable over items, with local processes (`local.py`) or on a Ray cluster (`cluster.py`).
It differs from `concurrent.futures` in three ways that long evaluations need: items are drawn lazily and only a bounded
number is in flight (memory stays flat over any length), an item that raises comes back as a failure with its message,
and a worker that is killed is replaced and its chunk is tried again, item by item, so that at the end only the item
that kills workers has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from navsim_eval.errors import UserError
from navsim_eval.executor.jobs import (
    AHEAD,
    Answering,
    Backlog,
    OneByOne,
    Outcome,
    Together,
    describe_error,
    usable_cores,
)

__all__ = ["Outcome", "Workers", "describe_error", "run_jobs", "usable_cores"]

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Workers:
    """Who does the work of a run. A plain number stands for so many local processes.

    count:       processes; 0: one per usable core of this machine, or per processor of the cluster;
                 1 with executor local: in this process (no protection against crashes)
    executor:    local, or ray: the machines of a Ray cluster, which need the same packages and paths
    ray_address: "auto" or host:port of a running cluster; empty: $RAY_ADDRESS, or else a runtime on this machine
    """

    count: int = 0
    executor: str = "local"
    ray_address: str = ""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UserError(f"workers={self.count}: must be at least 0 (0: one per core)")
        if self.executor not in EXECUTORS:
            raise UserError(f"executor='{self.executor}' is none of {', '.join(EXECUTORS)}")
        if self.ray_address and self.executor != "ray":
            raise UserError(f"ray_address={self.ray_address} has no effect with executor=local; add executor=ray")

    @classmethod
    def of(cls, config: Any) -> Workers:
        """From the keys `workers`, `executor` and `ray_address` of a configuration. Raises UserError."""
        return cls(config.workers, config.executor, config.ray_address)

    def unless_given(self, most: int) -> Workers:
        """The same, but where the number of local processes is left to us, `most` of them at the most."""
        if self.count or self.executor != "local":
            return self
        return replace(self, count=min(usable_cores(), most))


def run_jobs(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int | Workers = 0,
    chunk_size: int = 1,
    together: bool = False,
    retries: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Outcome]:
    """Yield `Outcome(index, function(item))` for every item, in the order of the items.

    function:   module-level function or picklable object with `__call__`; sent to every worker once, so per-process
                state (open maps, readers) belongs into a `functools.cached_property` of such an object
    workers:    see `Workers`
    chunk_size: items handed to a worker at a time
    together:   `function` takes the list of the items of a chunk and returns as many values, for work that is cheaper
                that way. A chunk that raises is tried again item by item, so that a bad item takes no other along.
    retries:    how often an item is tried again after the death of its worker
    progress:   called with the number of items newly finished
    """
    if not isinstance(workers, Workers):
        workers = Workers(workers)
    if chunk_size < 1 or retries < 0:
        raise UserError(f"chunk_size={chunk_size}, retries={retries}: must be ≥ 1, ≥ 0")
    answering = Together(function) if together else OneByOne(function)
    pool = _pool(answering, workers)
    if pool is None:
        yield from _run_here(answering, items, chunk_size if together else 1, progress)
        return
    backlog = Backlog(items, chunk_size, retries, ahead=AHEAD * pool.limit * chunk_size)
    yield from pool.run(backlog, progress)


def _run_here(
    answering: Answering, items: Iterable[Any], chunk_size: int, progress: Callable[[int], None] | None
) -> Iterator[Outcome]:
    """Outcomes of a run in this process."""
    source, index = iter(items), 0
    while chunk := list(islice(source, chunk_size)):
        answers = answering(chunk)
        if progress:
            progress(len(answers))
        for value, error in answers:
            yield Outcome(index, value, error)
            index += 1


def _pool(answering: Answering, workers: Workers) -> Any:
    """The pool of a run, None for a run in this process."""
    if workers.executor == "ray":
        from navsim_eval.executor.cluster import RayPool  # only who asks for Ray needs it

        return RayPool(answering, workers.count, workers.ray_address)
    count = workers.count or usable_cores()
    if count == 1:
        return None
    from navsim_eval.executor.local import LocalPool

    return LocalPool(answering, count)
