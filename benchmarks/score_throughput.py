"""(scene, proposal) pairs scored per second, against what the machine could do at best.

    python benchmarks/score_throughput.py data.root=data/city split=test
    python benchmarks/score_throughput.py device=cuda scenes=1024 proposals=[1,16,256]   # on a machine with a GPU

Metric caches are built and prepared beforehand (`caches=FOLDER` takes those of `tools/cache.py kind=metrics`, and needs
neither logs nor maps); timed is `navsim_eval.score`: simulation, sub-scores, aggregation, from plans and to a table in
main memory. On a GPU the scenes already lie there, as in training with a reward; putting them there is timed apart.
Proposals are the recorded drive, stretched and bent at random, so that most stay on the road and some do not. Each
figure is the median of `repeats` runs, in one thread; processor seconds are given beside wall seconds, because other
programs may share the machine. `two processes` runs two of them at once. `agreement` compares a GPU's scores with the
CPU's. `profile=true` prints the operators that take longest, and counts kernels, copies and waits of one call.

The bound: every state needs its five points looked up, every object on the way its box tested, and every array written
once. `machine` measures what one thread can copy [bytes/s] and multiply-add [1/s] here; `work` counts, for the run with
most proposals, bytes, edges and boxes that the program cannot do without. `bound` is the time of those alone.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from navsim_eval import scoring
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.files import atomic_write
from navsim_eval.metric_caches import MetricCaches, store_folder, stored_caches
from navsim_eval.metrics import areas, footprint, polygons, scene_batch, time_to_collision
from navsim_eval.metrics.aggregate import WEIGHTS
from navsim_eval.metrics.scene_batch import PreparedScene, SceneBatch
from navsim_eval.pdm import dynamics

Scenes = Sequence[PreparedScene] | SceneBatch

# Per pair, measured separately with the published evaluators on one thread of such a machine; not part of this run.
REFERENCE_MS = {"pdms_v1": 45.0, "epdms_v2": 101.0}
STAGES = {  # module-level functions of `navsim_eval.scoring` by what the table calls them
    "simulate": "simulate", "locate": "areas", "area_flags": "areas", "find_contacts": "contacts",
    "no_at_fault_collisions": "collisions", "time_to_collision_within_bound": "time to collision",
    "raw_progress": "progress", "comfort_checks_v1": "comfort", "history_comfort": "comfort",
    "lane_keeping": "lane keeping", "traffic_light_compliance": "traffic lights",
    "driving_direction_compliance": "direction", "extended_comfort": "comfort",
}  # fmt: skip


@dataclass
class ThroughputConfig:
    """scenes: at most so many (repeated to that number on cuda);  proposals: per scene, one run each
    caches:  folder with metric caches of both metrics, instead of the split's logs and maps
    """

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "test"
    caches: str | None = None
    scenes: int = 32
    proposals: list[int] = field(default_factory=lambda: [1, 8, 64, 256])
    repeats: int = 3
    device: str = "cpu"
    processes: int = 2
    profile: bool = False
    output: str = "benchmarks/results/score_throughput.json"

    def __post_init__(self) -> None:
        self.data.root = self.caches or self.data.root  # nothing else is read, and no city made


def main(config: ThroughputConfig) -> None:
    results = {metric: measure_metric(metric, config) for metric in WEIGHTS}
    result = {
        "split": config.split,
        "device": config.device,
        "reference_ms_per_pair_measured_separately": REFERENCE_MS,
        "results": results,
        "machine": measure_machine(config.device),
        "environment": describe_environment(),
    }
    for entry in results.values():
        entry["bound"] = bound(entry["work"], result["machine"])
    atomic_write(config.output, json.dumps(result, indent=1) + "\n")
    show(results)
    print(f"written: {config.output}")


def measure_metric(metric: str, config: ThroughputConfig) -> dict:
    """Pairs a second for every number of proposals, the share of each stage, and the work that cannot be avoided."""
    scenes, human = load_scenes(metric, config)
    most, on_cpu = config.proposals[-1], config.device == "cpu"
    entry: dict = {"scenes": len(scenes), "distinct_scenes": len({scene.cache.token for scene in scenes})}
    entry["milliseconds_per_scene_to_prepare"] = prepare_milliseconds(scenes)
    judged: Scenes = scenes
    if not on_cpu:
        start = time.perf_counter()
        judged = SceneBatch.of(scenes, config.device)
        entry["milliseconds_per_scene_to_put_on_device"] = (time.perf_counter() - start) / len(scenes) * 1e3
        entry["agreement"] = agreement(scenes[:128], bent(human[:128], 64), metric, config.device)
    entry["pairs_per_second"] = {
        count: timed(judged, bent(human, count), metric, config.repeats) for count in config.proposals
    }
    few = scenes[: max(1, 2048 // most)]
    plans = bent(human, most)
    inner = (few, plans[: len(few)], metric) if on_cpu else (judged, plans, metric)
    entry["stages"] = stage_shares(*inner)
    entry["work"] = count_work(few, plans[: len(few)])
    if config.profile:
        entry["profile"] = profile(*inner)
    if on_cpu and config.processes > 1:
        entry["processes"] = {"count": config.processes, "pairs_per_second": together(metric, config)}
    if not on_cpu:
        entry["peak_gib_so_far"] = torch.cuda.max_memory_allocated() / 2**30
    return entry


def load_scenes(metric: str, config: ThroughputConfig) -> tuple[list[PreparedScene], np.ndarray]:
    """Prepared scenes and the recorded drives (S, 8, 3); on a GPU the split is repeated until there are enough."""
    if config.caches is None:
        dataset = SceneDataset.from_config(config.data, config.split, max_scenes=config.scenes)
        stored = MetricCaches(config.data, dataset, metric)
        caches = [stored[token] for token in dataset.tokens]
    else:
        caches = list(islice(stored_caches(store_folder(config.caches, metric)), config.scenes))
    prepared = [scene_batch.prepare(cache) for cache in caches]
    if config.device != "cpu":
        prepared = [_copy(prepared[row % len(caches)], row // len(caches)) for row in range(config.scenes)]
    return prepared, np.stack([scene.cache.human_poses for scene in prepared])


def _copy(scene: PreparedScene, number: int) -> PreparedScene:
    """The scene in a log of its own for every copy, so that all are paired with the scene before them."""
    return replace(scene, cache=replace(scene.cache, log_name=f"{scene.cache.log_name}.{number}"))


def bent(human: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """(S, count, 8, 3) plans: the recorded drive at 0.3 to 1.5 times its speed, drifting sideways by metres."""
    rng = np.random.default_rng(seed)
    shape = (len(human), count, 1)
    speed, side = rng.uniform(0.3, 1.5, shape), rng.normal(0.0, 1.5, shape)
    plans = np.repeat(human[:, None], count, axis=1)
    plans[..., :2] *= speed[..., None]
    plans[..., 1] += side * np.linspace(0.0, 1.0, human.shape[1]) ** 2
    return plans


def timed(scenes: Scenes, plans: np.ndarray, metric: str, repeats: int) -> dict:
    """Median pairs per second of wall and of processor time."""
    pairs = plans.shape[0] * plans.shape[1]
    if isinstance(scenes, SceneBatch):
        scoring.score(scenes, plans, metric)  # memory, constants and kernels are made on first use
    else:
        scoring.score(scenes[:4], plans[:4], metric)
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        scoring.score(scenes, plans, metric)
        walls.append(time.perf_counter() - wall)  # the table lies in main memory: the device has finished
        processors.append(time.process_time() - processor)
    return {"wall": pairs / float(np.median(walls)), "processor": pairs / float(np.median(processors))}


def agreement(scenes: Sequence[PreparedScene], plans: np.ndarray, metric: str, device: str) -> dict[str, float]:
    """Pairs, values that are steps and differ, and the largest difference of those that are not steps."""
    here, there = (scoring.score(scenes, plans, metric, place) for place in ("cpu", device))
    steps, largest = 0, 0.0
    for name, values in here.columns.items():
        if name.endswith(("ego_progress", "score")):
            largest = max(largest, float(np.nanmax(np.abs(values - there.columns[name]))))
        else:
            steps += int((~np.isclose(values, there.columns[name], rtol=0, atol=0, equal_nan=True)).sum())
    return {"pairs": len(here.tokens), "differing_steps": steps, "largest_difference": largest}


def prepare_milliseconds(scenes: Sequence[PreparedScene]) -> float:
    start = time.process_time()
    for scene in scenes[:16]:
        scene_batch.prepare(scene.cache)
    return (time.process_time() - start) / len(scenes[:16]) * 1e3


def together(metric: str, config: ThroughputConfig) -> float:
    """Pairs per wall second of all processes, each scoring the same scenes with most proposals at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(config.processes), context.Queue()
    workers = [
        context.Process(target=_score_apart, args=(metric, config, barrier, queue)) for _ in range(config.processes)
    ]
    for worker in workers:
        worker.start()
    speeds = [queue.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return float(sum(speeds))


def _score_apart(metric: str, config: ThroughputConfig, barrier: object, queue: object) -> None:
    torch.set_num_threads(1)
    scenes, human = load_scenes(metric, config)
    plans = bent(human, config.proposals[-1])
    barrier.wait()
    queue.put(timed(scenes, plans, metric, config.repeats)["wall"])


# --- where the time goes ---------------------------------------------------------------------------------------------


def stage_shares(scenes: Scenes, plans: np.ndarray, metric: str) -> dict[str, float]:
    """Share of time (processor's, or a GPU's) by stage; `rest` is sampling, aggregation, copies and the table."""
    spent: dict[str, float] = {}
    now = _finished if isinstance(scenes, SceneBatch) else time.process_time
    originals = {name: getattr(scoring, name) for name in STAGES}
    try:
        for name, function in originals.items():
            setattr(scoring, name, _watched(function, spent, STAGES[name], now))
        start = now()
        scoring.score(scenes, plans, metric)
        total = now() - start
    finally:
        for name, function in originals.items():
            setattr(scoring, name, function)
    spent["rest"] = total - sum(spent.values())
    print(f"{metric}, ms:", {name: round(seconds * 1e3, 2) for name, seconds in spent.items()})
    return {name: round(seconds / total, 4) for name, seconds in sorted(spent.items(), key=lambda item: -item[1])}


def _watched(function: Callable, spent: dict[str, float], name: str, now: Callable[[], float]) -> Callable:
    def call(*arguments, **keywords):
        start = now()
        result = function(*arguments, **keywords)
        spent[name] = spent.get(name, 0.0) + now() - start
        return result

    return call


def _finished() -> float:
    """Seconds once a GPU has done all that it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


COUNTED = ("LaunchKernel", "StreamSynchronize", "DeviceSynchronize", "Memcpy HtoD", "Memcpy DtoH", "Memcpy DtoD",
           "aten::nonzero", "aten::_local_scalar_dense", "cudaMalloc")  # fmt: skip


def profile(scenes: Scenes, plans: np.ndarray, metric: str) -> dict[str, int]:
    """Print the 25 operators that take longest in one call, and count kernels, waits and copies."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
        scoring.score(scenes, plans, metric)
    events = profiler.key_averages()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    print(events.table(sort_by=f"self_{where}_time_total", row_limit=25, max_name_column_width=60))
    counts = {name: sum(event.count for event in events if name in event.key) for name in COUNTED}
    print(f"{metric}:", counts)
    return counts


# --- the bound -------------------------------------------------------------------------------------------------------


def count_work(scenes: Sequence[PreparedScene], plans: np.ndarray) -> dict[str, float]:
    """Per pair: bytes of the arrays that have to be written and read once, point-edge tests, and box-box tests."""
    batch = SceneBatch.of(scenes)
    poses = batch.sample(torch.from_numpy(plans))
    states = dynamics.simulate(batch.initial_state[:, None], poses)
    ego = footprint.Footprints.of(states)
    pairs = plans.shape[0] * plans.shape[1]
    edges = count_edges(ego, batch.areas.polygons)
    boxes = sum(count_boxes(ego, batch.boxes, lead) for lead in time_to_collision.LEADS)
    arrays = [poses, states, *(getattr(ego, name) for name in ego.__dataclass_fields__)]
    corners = 10 * ego.x.numel() * 8  # x and y of five points, and the word found for each
    bytes_moved = 2 * (sum(array.numel() * 8 for array in arrays) + corners + corners // 2)
    return {"bytes": bytes_moved / pairs, "edge_tests": edges / pairs, "box_tests": boxes / pairs}


def count_boxes(ego: footprint.Footprints, boxes: footprint.Boxes, lead: int) -> int:
    """Pairs of ego and object whose circles overlap (the ego not moved ahead; the number hardly differs)."""
    steps = min(ego.x.shape[2], boxes.x.shape[1] - lead)
    return len(footprint.candidates(ego.center_x[..., :steps], ego.center_y[..., :steps], boxes, lead)[0])


def count_edges(ego: footprint.Footprints, grid: polygons.PolygonBatch) -> int:
    """Edges in the cells of all corners and centres that can change an answer."""
    tested = 0
    cross_edges = polygons.PolygonBatch._cross_edges

    def counting(self, words, edges, active, x, y, center_x, center_y, start, count):
        nonlocal tested
        tested += int(count.sum())
        return cross_edges(self, words, edges, active, x, y, center_x, center_y, start, count)

    polygons.PolygonBatch._cross_edges = counting
    try:
        areas.locate(ego, grid)
    finally:
        polygons.PolygonBatch._cross_edges = cross_edges
    return tested


OPERATIONS = {"edge_tests": 20, "box_tests": 40}  # multiplications, additions, comparisons of one test


def measure_machine(device: str, size: int = 1 << 24) -> dict[str, float]:
    """What one thread (or the GPU) reaches: bytes read and written per second, float64 operations per second."""
    torch.set_num_threads(1)
    source = torch.rand(size, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    small = torch.rand(1 << (14 if device == "cpu" else 24), dtype=torch.float64, device=device)
    out = torch.empty_like(small)
    copied = _seconds(lambda: target.copy_(source))
    multiplied = _seconds(lambda: torch.addcmul(small, small, small, out=out), 200)
    return {"bytes_per_second": 16 * size / copied, "operations_per_second": 2 * small.numel() / multiplied}


def _seconds(function: Callable, repeats: int = 10) -> float:
    best = np.inf
    for _ in range(5):
        start = _finished()
        for _ in range(repeats):
            function()
        best = min(best, (_finished() - start) / repeats)
    return best


def bound(work: dict[str, float], machine: dict[str, float]) -> dict[str, float]:
    """Pairs per second if only memory, or only arithmetic of the tests, took time; and both one after the other."""
    memory = work["bytes"] / machine["bytes_per_second"]
    arithmetic = sum(work[name] * count for name, count in OPERATIONS.items()) / machine["operations_per_second"]
    return {"memory": 1 / memory, "arithmetic": 1 / arithmetic, "pairs_per_second": 1 / (memory + arithmetic)}


def show(results: dict[str, dict]) -> None:
    table = Table("metric", "proposals", "pairs/s", "pairs/s of processor time", "times the reference")
    for metric, entry in results.items():
        for count, speed in entry["pairs_per_second"].items():
            ratio = speed["processor"] * REFERENCE_MS[metric] / 1e3
            table.add_row(metric, str(count), f"{speed['wall']:,.0f}", f"{speed['processor']:,.0f}", f"{ratio:.0f}")
        table.add_row(metric, "bound", f"{entry['bound']['pairs_per_second']:,.0f}", "", "")
        if "processes" in entry:
            name = f"{entry['processes']['count']} processes"
            table.add_row(metric, name, f"{entry['processes']['pairs_per_second']:,.0f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_tool(main, ThroughputConfig, "benchmark_score_throughput", __doc__))
