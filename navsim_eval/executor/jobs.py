"""What every executor shares: items in, outcomes in order, and the books on what is under way."""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from navsim_eval.errors import UserError

AHEAD = 8  # chunks per worker that may be finished but not yet handed out, because an earlier one is still running

Answer = tuple[Any, str | None]  # value, error
Answering = Callable[[list[Any]], list[Answer]]  # what a worker does with a chunk: `OneByOne` or `Together`


@dataclass(frozen=True)
class Outcome:
    """What became of one item: a value, or the text of the error that took its place."""

    index: int
    value: Any = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


@dataclass
class Chunk:
    """Items that one worker gets at a time, and how many workers have already died over them."""

    indices: list[int]
    items: list[Any]
    deaths: int = 0


class Backlog:
    """The items of one run: drawn lazily in chunks, given again after the death of a worker, handed out in order.

    ahead: how many items may be drawn beyond those handed out, so that memory stays flat over any number
    """

    def __init__(self, items: Iterable[Any], chunk_size: int, retries: int, ahead: int):
        self._source, self._exhausted = iter(items), False
        self._chunk_size, self._retries, self._ahead = chunk_size, retries, ahead
        self._drawn = self._handed_out = 0
        self._again: deque[Chunk] = deque()
        self._settled: dict[int, Outcome] = {}

    @property
    def finished(self) -> bool:
        """Whether every item has been handed out."""
        return self._exhausted and self._handed_out == self._drawn

    def next_chunk(self) -> Chunk | None:
        """What to work on next; None when there is nothing, or nothing before earlier items are handed out."""
        if self._again:
            return self._again.popleft()
        if self._exhausted or self._drawn - self._handed_out >= self._ahead:
            return None
        items = list(islice(self._source, self._chunk_size))
        self._exhausted = len(items) < self._chunk_size
        if not items:
            return None
        first, self._drawn = self._drawn, self._drawn + len(items)
        return Chunk(list(range(first, self._drawn)), items)

    def settle(self, chunk: Chunk, answers: Sequence[Answer]) -> int:
        """Note the answers to a chunk; the number of items settled."""
        for index, (value, error) in zip(chunk.indices, answers, strict=True):
            self._settled[index] = Outcome(index, value, error)
        return len(answers)

    def lost(self, chunk: Chunk, reason: str) -> int:
        """A worker died over a chunk: its items are tried again one by one, or have failed; the number settled."""
        if chunk.deaths < self._retries:
            pairs = zip(chunk.indices, chunk.items, strict=True)
            self._again.extend(Chunk([index], [item], chunk.deaths + 1) for index, item in pairs)
            return 0
        error = f"worker process died ({reason}), {chunk.deaths + 1} attempts"
        return self.settle(chunk, [(None, error)] * len(chunk.items))

    def ready(self) -> Iterator[Outcome]:
        """Outcomes that are next in order."""
        while self._handed_out in self._settled:
            outcome = self._settled.pop(self._handed_out)
            self._handed_out += 1
            yield outcome


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class OneByOne:
    """Answers a chunk by `function(item)`, item by item."""

    function: Callable[[Any], Any]

    def __call__(self, items: Sequence[Any]) -> list[Answer]:
        return [_attempt(self.function, item) for item in items]


@dataclass(frozen=True)
class Together:
    """Answers a chunk by one call `function(items)`; where that raises, by one call per item."""

    function: Callable[[list[Any]], Sequence[Any]]

    def __call__(self, items: Sequence[Any]) -> list[Answer]:
        values, error = _attempt(self._values, items)
        if error is None:
            return [(value, None) for value in values]
        if len(items) == 1:
            return [(None, error)]
        return [answer for item in items for answer in self([item])]

    def _values(self, items: Sequence[Any]) -> Sequence[Any]:
        values = self.function(list(items))
        if len(values) != len(items):
            raise ValueError(f"{len(values)} values for {len(items)} items")
        return values


def _attempt(function: Callable[[Any], Any], argument: Any) -> Answer:
    """function(argument), or why it failed."""
    try:
        return function(argument), None
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
