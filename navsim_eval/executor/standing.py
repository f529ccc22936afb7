"""Processes that stay, for work that comes again and again and leaves something behind that is worth keeping.

`run_jobs` gives an item to whoever is idle and ends its workers with the run; here the caller says which worker gets
what, so that what a worker has prepared for an item is there when the item comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from navsim_eval.executor.jobs import Chunk, OneByOne
from navsim_eval.executor.local import Worker


class StandingWorkers:
    """`count` processes with an own copy of `function` each, started when first asked.

    function: picklable, called with one argument; what it keeps in itself stays in its process
    """

    def __init__(self, function: Callable[[Any], Any], count: int):
        self.function, self.count = function, count
        self._workers: dict[int, Worker] = {}

    def __call__(self, parts: Mapping[int, Any]) -> dict[int, Any]:
        """`function(part)` by the worker of that number, all at the same time. Raises RuntimeError where one fails."""
        for number, part in parts.items():
            self._worker(number).give(Chunk([number], [part]))
        answers = {number: self._workers[number].take() for number in parts}
        for number, answer in answers.items():
            if answer is None:
                raise RuntimeError(f"worker process {number} of {self.count} died ({self._workers[number].farewell()})")
            if answer[0][1] is not None:
                raise RuntimeError(answer[0][1])
        return {number: answer[0][0] for number, answer in answers.items()}

    def close(self) -> None:
        """End the processes; they also end with this one."""
        for worker in self._workers.values():
            worker.stop()
        self._workers = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_workers": {}}

    def _worker(self, number: int) -> Worker:
        if number not in self._workers:
            self._workers[number] = Worker(OneByOne(self.function))
        return self._workers[number]
