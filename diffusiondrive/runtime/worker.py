"""A clock to be told, and a thread that plans while the loop watches that clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class Clock(Protocol):
    """Seconds on a clock that only goes forward."""

    def now(self) -> float:
        """[s]."""

    def sleep_until(self, moment: float) -> None:
        """Return at `moment`, or at once if it is past."""


class WallClock:
    """The computer's own."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, moment: float) -> None:
        if (left := moment - time.perf_counter()) > 0:
            time.sleep(left)


@dataclass(frozen=True)
class Finished:
    """A job that is done: its item, and its value or the error in its place."""

    item: Any
    value: Any = None
    error: str | None = None


class Worker(Protocol):
    """Does one job at a time, somewhere else."""

    @property
    def busy(self) -> bool:
        """A job is under way, or done and not collected."""

    def submit(self, item: Any) -> None:
        """Begin a job. Only when not busy."""

    def wait(self, until: float) -> Finished | None:
        """The job's result as soon as there is one, or None at `until` on the clock."""


class ThreadWorker:
    """A worker in a thread of this process. A job that raises anything comes back with its error.

    Use as a context: leaving it waits for the job under way.
    """

    def __init__(self, function: Callable[[Any], Any], clock: Clock):
        self.function, self.clock = function, clock
        self.changed = threading.Condition()
        self.item: Any = None
        self.result: Finished | None = None
        self.busy = self.closing = False
        self.thread = threading.Thread(target=self._work, name="planner", daemon=True)
        self.thread.start()

    def submit(self, item: Any) -> None:
        with self.changed:
            if self.busy:
                raise RuntimeError("the worker is busy")
            self.item, self.result, self.busy = item, None, True
            self.changed.notify_all()

    def wait(self, until: float) -> Finished | None:
        with self.changed:
            while self.result is None and (left := until - self.clock.now()) > 0:
                self.changed.wait(left)
            result = self.result
            if result is not None:
                self.result, self.busy = None, False
            return result

    def __enter__(self) -> ThreadWorker:
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self.changed:
                while self.item is None and not self.closing:
                    self.changed.wait()
                if self.closing and self.item is None:
                    return
                item, self.item = self.item, None
            try:
                done = Finished(item, self.function(item))
            except Exception as error:  # a car goes on: whatever went wrong is reported with the tick
                done = Finished(item, error=str(error) or type(error).__name__)
            with self.changed:
                self.result = done
                self.changed.notify_all()
