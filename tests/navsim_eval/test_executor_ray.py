"""Work on a Ray cluster: the same contract as local processes, on a runtime of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import pytest

from navsim_eval.errors import DataError, UserError
from navsim_eval.executor import Workers, run_jobs
from tests.navsim_eval.jobs import KillOnce, kill_on_five
from tests.worlds import write_world

WITHOUT = "ray is not installed (pip install -e '.[ray]')"
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason=WITHOUT)
RAY = Workers(2, "ray")


@pytest.fixture(scope="module")
def runtime() -> Iterator[None]:
    """A runtime for the tests of this file; `run_jobs` would start the same one by itself."""
    ray = pytest.importorskip("ray", reason=WITHOUT)
    from navsim_eval.executor.cluster import connect

    connect("", workers=2)
    yield
    ray.shutdown()


def fail_on_three(x: int) -> int:
    if x == 3:
        raise ValueError("three\nis too much")
    if x == 4:
        raise DataError("some/log.pkl", "truncated", remedy="download it again")
    return x * x


class CountsItsSetUps:
    @cached_property
    def state(self) -> object:
        return object()

    def __call__(self, _: int) -> tuple[int, int, str | None]:
        return os.getpid(), id(self.state), os.environ.get("OMP_NUM_THREADS")


class NeedsWhatIsNotThere:
    def __reduce__(self) -> tuple:
        return __import__, ("a_package_of_the_driver_only",)

    def __call__(self, x: int) -> int:
        return x


def test_outcomes_come_in_order_failures_with_their_message_and_progress_counts_all(runtime):
    done = []
    outcomes = list(run_jobs(fail_on_three, range(9), workers=RAY, chunk_size=2, progress=done.append))
    assert [o.index for o in outcomes] == list(range(9)) and sum(done) == 9
    assert [o.value for o in outcomes if o.ok] == [0, 1, 4, 25, 36, 49, 64]
    assert outcomes[3].error.startswith("ValueError: three is too much (test_executor_ray.py:")
    assert outcomes[4].error == "some/log.pkl: truncated — download it again"


def test_a_killed_worker_loses_only_its_chunk_which_is_tried_again(runtime, tmp_path):
    outcomes = list(run_jobs(KillOnce(tmp_path), range(12), workers=RAY, chunk_size=4))
    assert (tmp_path / "died").exists()
    assert [o.value for o in outcomes] == list(range(12)), [o.error for o in outcomes if not o.ok]


def test_an_item_that_always_kills_is_the_only_failure(runtime):
    outcomes = list(run_jobs(kill_on_five, range(8), workers=RAY, chunk_size=4))
    assert [o.index for o in outcomes if not o.ok] == [5]
    assert "ActorDiedError" in outcomes[5].error and "2 attempts" in outcomes[5].error


def test_items_are_drawn_lazily_and_workers_are_set_up_once(runtime):
    drawn = []

    def source() -> Iterator[int]:
        for x in range(10_000):
            drawn.append(x)
            yield x

    results = run_jobs(CountsItsSetUps(), source(), workers=RAY, chunk_size=2)
    seen = [next(results).value for _ in range(30)]
    results.close()
    assert len(drawn) < 200
    processes = {pid for pid, *_ in seen}
    assert os.getpid() not in processes and len({(pid, state) for pid, state, _ in seen}) == len(processes)
    assert {threads for *_, threads in seen} <= {"1", os.environ.get("OMP_NUM_THREADS")}


def test_what_cannot_be_pickled_is_a_failure_not_a_crash(runtime):
    outcomes = list(run_jobs(threading_lock, range(2), workers=RAY))
    assert all("cannot be sent" in o.error for o in outcomes)


def threading_lock(_: int) -> object:
    return threading.Lock()


def test_more_workers_than_processors_finish_all_the_same(runtime):
    assert [o.value for o in run_jobs(abs, range(9), workers=Workers(5, "ray"))] == list(range(9))


def test_a_machine_without_our_packages_is_a_clear_error(runtime):
    with pytest.raises(UserError, match=r"cannot load its work \(ModuleNotFoundError.*a_package_of_the_driver_only"):
        list(run_jobs(NeedsWhatIsNotThere(), range(2), workers=RAY))


def test_no_items(runtime):
    assert list(run_jobs(abs, [], workers=RAY)) == []


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # makes `import ray` fail
    with pytest.raises(UserError, match=r"executor=ray needs the package ray: pip install"):
        list(run_jobs(abs, [1], workers=RAY))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "workers=-1"),
        ((0, "slurm"), "executor='slurm' is none of local, ray"),
        ((0, "local", "auto"), "ray_address=auto has no effect with executor=local"),
    ],
)
def test_wrong_choices(arguments, message):
    with pytest.raises(UserError, match=message):
        Workers(*arguments)


@pytest.mark.slow
@needs_ray
def test_a_machine_that_disappears_costs_its_chunks_only():
    """Two raylets stand for two machines; one is killed in the middle of a run. In a process of its own."""
    script = """
import time
from navsim_eval.executor import Workers, run_jobs
from ray.cluster_utils import Cluster
import ray

def work(x):
    time.sleep(0.2)
    return ray.get_runtime_context().get_node_id(), x

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, configure_logging=False, log_to_driver=False)
cluster.wait_for_nodes()
nodes, values = [], []
for count, outcome in enumerate(run_jobs(work, range(60), workers=Workers(0, "ray"), chunk_size=2), 1):
    assert outcome.ok, outcome.error
    node, value = outcome.value
    nodes.append(node)
    values.append(value)
    if count == 20:
        assert len(set(nodes)) == 2, "both machines worked"
        cluster.remove_node(other, allow_graceful=False)
assert values == list(range(60))
assert len(set(nodes[-20:])) == 1
ray.shutdown()
cluster.shutdown()
print("all there")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("all there"), done.stderr[-2000:]


@pytest.mark.slow
@needs_ray
def test_an_evaluation_on_ray_writes_what_a_local_one_writes(tmp_path):
    world = write_world(tmp_path / "world", {"test": 2}, sensors=False)
    tool = Path(__file__).parents[2] / "tools" / "evaluate.py"
    written = {}
    for executor in ("local", "ray"):
        out = tmp_path / executor
        command = [sys.executable, tool, "planner=human", f"output_dir={out}", "metric=[pdms_v1,epdms_v2]", "workers=2"]
        command += [*world.overrides, f"executor={executor}", "report=false"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        written[executor] = [(out / metric / "scores.csv").read_text() for metric in ("pdms_v1", "epdms_v2")]
    assert written["ray"] == written["local"]
