"""The process pool: order, failures, crashes, laziness."""

from __future__ import annotations

import os
import signal
import threading
from functools import cached_property

import pytest

from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import run_jobs
from navsim_eval.executor.standing import StandingWorkers
from tests.navsim_eval.jobs import KillOnce, kill_on_five


def square(x: int) -> int:
    return x * x


def raise_on_three(x: int) -> int:
    if x == 3:
        raise ValueError("three\nis too much")
    if x == 4:
        raise DataError("some/log.pkl", "truncated", remedy="download it again")
    return x


class CountsItsSetUps:
    @cached_property
    def state(self) -> object:
        return object()

    def __call__(self, _: int) -> tuple[int, int, str]:
        return os.getpid(), id(self.state), os.environ["OMP_NUM_THREADS"]


def squares(items: list[int]) -> list[tuple[int, int]]:
    """x² with the number of items that came together; 7 spoils its chunk, 9 kills the process."""
    if 9 in items:
        os.kill(os.getpid(), signal.SIGKILL)
    if 7 in items:
        raise ValueError("seven")
    return [(x * x, len(items)) for x in items]


def unpicklable(_: int) -> object:
    return threading.Lock()


@pytest.mark.parametrize("workers", [1, 2])
def test_values_come_back_in_order_and_progress_counts_them(workers):
    done = []
    outcomes = list(run_jobs(square, range(17), workers=workers, chunk_size=3, progress=done.append))
    assert [o.value for o in outcomes] == [x * x for x in range(17)]
    assert [o.index for o in outcomes] == list(range(17))
    assert sum(done) == 17


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_is_an_outcome_with_its_message_and_leaves_the_others_alone(workers):
    outcomes = list(run_jobs(raise_on_three, range(6), workers=workers, chunk_size=4))
    assert [o.ok for o in outcomes] == [True, True, True, False, False, True]
    assert outcomes[3].error.startswith("ValueError: three is too much (test_executor.py:")
    assert outcomes[4].error == "some/log.pkl: truncated — download it again"


def test_a_killed_worker_loses_only_its_chunk_which_is_tried_again(tmp_path):
    outcomes = list(run_jobs(KillOnce(tmp_path), range(12), workers=2, chunk_size=4))
    assert (tmp_path / "died").exists()
    assert [o.value for o in outcomes] == list(range(12))


def test_an_item_that_always_kills_is_the_only_failure():
    outcomes = list(run_jobs(kill_on_five, range(12), workers=2, chunk_size=4))
    assert [o.index for o in outcomes if not o.ok] == [5]
    assert "SIGKILL" in outcomes[5].error and "2 attempts" in outcomes[5].error


@pytest.mark.parametrize("workers", [1, 2])
def test_a_chunk_is_answered_together_and_item_by_item_where_that_fails(workers):
    done = []
    outcomes = list(run_jobs(squares, range(9), workers=workers, chunk_size=3, together=True, progress=done.append))
    assert [o.index for o in outcomes] == list(range(9)) and sum(done) == 9
    assert [o.value for o in outcomes] == [*((x * x, 3) for x in range(6)), (36, 1), None, (64, 1)]
    assert outcomes[7].error.startswith("ValueError: seven (test_executor.py:")


def test_a_killer_in_a_chunk_that_is_answered_together_is_the_only_failure():
    outcomes = list(run_jobs(squares, [0, 1, 2, 8, 9, 10], workers=2, chunk_size=3, together=True))
    assert [o.value for o in outcomes] == [(0, 3), (1, 3), (4, 3), (64, 1), None, (100, 1)]
    assert "SIGKILL" in outcomes[4].error


def test_a_function_that_forgets_items_is_found_out():
    outcomes = list(run_jobs(lambda items: items[1:], range(2), workers=1, chunk_size=2, together=True))
    assert ["0 values for 1 items" in o.error for o in outcomes] == [True, True]


def test_items_are_drawn_lazily():
    drawn = []

    def source():
        for x in range(10_000):
            drawn.append(x)
            yield x

    results = run_jobs(square, source(), workers=2, chunk_size=2)
    for _ in range(10):
        next(results)
    results.close()
    assert len(drawn) < 200


def test_state_is_made_once_per_process_and_workers_do_not_thread():
    outcomes = list(run_jobs(CountsItsSetUps(), range(20), workers=2))
    by_process = {}
    for pid, state, threads in (o.value for o in outcomes):
        by_process.setdefault(pid, set()).add(state)
        assert threads == "1"
    assert os.getpid() not in by_process
    assert all(len(states) == 1 for states in by_process.values())


def test_a_result_that_cannot_be_pickled_is_a_failure_not_a_crash():
    outcomes = list(run_jobs(unpicklable, range(2), workers=2))
    assert all("cannot be sent back" in o.error for o in outcomes)


def test_no_items_and_bad_arguments():
    assert list(run_jobs(square, [], workers=2)) == []
    with pytest.raises(UserError, match="workers=-1"):
        list(run_jobs(square, [1], workers=-1))


class Notes:
    """Keeps what it was given; where it is given 9, its process dies."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def __call__(self, x: int) -> list[int]:
        if x == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        self.kept.append(10 // x)
        return self.kept


def test_standing_workers_keep_what_is_theirs() -> None:
    workers = StandingWorkers(Notes(), 2)
    try:
        assert workers({0: 1, 1: 2}) == {0: [10], 1: [5]}
        assert workers({1: 5}) == {1: [5, 2]} and workers({0: 2}) == {0: [10, 5]}
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            workers({0: 0, 1: 1})
        assert workers({1: 10}) == {1: [5, 2, 10, 1]}
        with pytest.raises(RuntimeError, match=r"worker process 0 of 2 died \(SIGKILL\)"):
            workers({0: 9})
    finally:
        workers.close()
