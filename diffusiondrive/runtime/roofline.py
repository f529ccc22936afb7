"""How far a plan is from what the machine can do: operations and bytes of each stage against rates measured here.

Two floors a stage: its floating-point operations at the rate of a large matrix product, and the bytes that must move
(weights, and what enters and leaves the stage, each once) at the rate of a large copy. Beside them the bytes that the
operations read and write when none is fused with another, and their number, which is about the number of launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from diffusiondrive.runtime.device import HALF, float32_rule
from diffusiondrive.runtime.program import PlanProgram
from diffusiondrive.runtime.stages import BACKBONE, CONTEXT, HEAD, REST, marked

MATRIX, COPY_MIB, REPEATS = 2048, 256, 7


@dataclass(frozen=True)
class Rates:
    """Measured on this machine, in the planner's precision: matrix products [FLOP/s], copies [byte/s, read + write]."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class StageCount:
    """One stage of one plan.

    flops: 2 a multiply-add, matrix products, convolutions and attention;  launches: operations that are no views
    weight_bytes: of the stage's parameters;  edge_bytes: of the tensors that enter or leave the stage
    unfused_bytes: read and written by all operations together
    """

    name: str
    flops: int
    launches: int
    weight_bytes: int
    edge_bytes: int
    unfused_bytes: int

    def floors_ms(self, rates: Rates) -> tuple[float, float]:
        """Least time for the operations, and for the bytes."""
        return 1e3 * self.flops / rates.flops, 1e3 * (self.weight_bytes + self.edge_bytes) / rates.bytes


class _Traffic(TorchDispatchMode):
    """Adds up operations and the bytes that they touch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.last_output = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, Tensor)]
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        owned = {x.untyped_storage().data_ptr() for x in inputs}
        view = bool(outputs) and all(x.untyped_storage().data_ptr() in owned for x in outputs)
        if not view or function.overloadpacket.__name__.endswith("_"):
            self.launches += 1
            self.bytes += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        return result


@torch.no_grad()
def count_stages(program: PlanProgram, inputs: tuple[Tensor, ...]) -> list[StageCount]:
    """Run once and count. inputs: camera, lidar, status, noise on the program's device.

    Edges: a stage's results are counted where they leave it and where they enter the next one.
    """
    seen: list[tuple[str, int, int, int]] = []
    flops, traffic = FlopCounterMode(display=False), _Traffic()

    def note(name: str) -> None:
        seen.append((name, flops.get_total_flops(), traffic.launches, traffic.bytes))

    with flops, traffic, marked(program, note):
        row = program(*inputs)
        note(REST)
    edges, weights = _edges(program, inputs, row), _weights(program)
    stages, before = [], (0, 0, 0)
    for name, *totals in seen:
        step = [now - then for now, then in zip(totals, before, strict=True)]
        stages.append(StageCount(name, step[0], step[1], weights[name], edges[name], step[2]))
        before = tuple(totals)
    return stages


def measure_rates(device: torch.device, precision: str) -> Rates:
    """The best of a few large matrix products and copies."""
    dtype = HALF.get(precision, torch.float32)
    size = MATRIX if device.type == "cpu" else 4 * MATRIX
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(COPY_MIB * 2**18, device=device)
    target = torch.empty_like(source)
    with float32_rule(precision):
        product = _best_seconds(lambda: torch.mm(a, b), device)
    copy = _best_seconds(lambda: target.copy_(source), device)
    return Rates(2 * size**3 / product, 2 * source.numel() * source.element_size() / copy)


def roofline(stages: list[StageCount], rates: Rates, measured_ms: dict[str, float]) -> dict[str, Any]:
    """JSON-ready: every stage and the sum with floors, measured time and the share of the floor in it."""
    rows = []
    for stage in stages:
        compute, memory = stage.floors_ms(rates)
        rows.append(
            {
                "stage": stage.name, "gflop": stage.flops / 1e9, "launches": stage.launches,
                "weights_mb": stage.weight_bytes / 1e6, "edges_mb": stage.edge_bytes / 1e6,
                "unfused_mb": stage.unfused_bytes / 1e6, "compute_floor_ms": compute, "memory_floor_ms": memory,
                "unfused_memory_ms": 1e3 * stage.unfused_bytes / rates.bytes, "measured_ms": measured_ms[stage.name],
            }
        )  # fmt: skip
    total = {"stage": "sum"} | {key: sum(row[key] for row in rows) for key in rows[0] if key != "stage"}
    for row in (*rows, total):
        floor = max(row["compute_floor_ms"], row["memory_floor_ms"])
        row["floor_ms"], row["gap_ms"] = floor, row["measured_ms"] - floor
    total["floor_ms"] = sum(row["floor_ms"] for row in rows)
    total["gap_ms"] = total["measured_ms"] - total["floor_ms"]
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in (*rows, total)]
    return {"matrix_gflops": rates.flops / 1e9, "copy_gb_s": rates.bytes / 1e9, "stages": rounded}


def as_table(result: dict[str, Any]) -> Table:
    """The roofline as people read it."""
    title = f"floors at {result['matrix_gflops']:.0f} GFLOP/s and {result['copy_gb_s']:.1f} GB/s, measured in this run"
    columns = {
        "stage": "stage", "GFLOP": "gflop", "ops": "launches", "weights": "weights_mb", "edges": "edges_mb",
        "unfused": "unfused_mb", "FLOP": "compute_floor_ms", "bytes": "memory_floor_ms", "took": "measured_ms",
        "gap": "gap_ms",
    }  # fmt: skip
    caption = "weights, edges (what enters and leaves), unfused (all operations): MB; FLOP and bytes: floors in ms"
    table = Table(*columns, title=title, caption=caption, padding=(0, 0))
    for row in result["stages"]:
        values = (row[key] for key in columns.values())
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in values))
    return table


def _edges(program: PlanProgram, inputs: tuple[Tensor, ...], row: Tensor) -> dict[str, int]:
    """Bytes that cross the borders of each stage."""
    camera, lidar, status, noise = inputs
    maps = program.encoder.backbone(camera.to(program.encoder.dtype), lidar.to(program.encoder.dtype))
    scene, *_ = program.encoder(camera, lidar, status)
    result = program.denoiser(scene, noise)
    backbone_out, context_out, head_out = (_size(x) for x in (maps, scene, result))
    return {
        BACKBONE: _size((camera, lidar)) + backbone_out,
        CONTEXT: backbone_out + _size(status) + context_out,
        HEAD: context_out + _size(noise) + head_out,
        REST: head_out + _size(row),
    }


def _weights(program: PlanProgram) -> dict[str, int]:
    """Bytes of parameters and buffers behind each stage."""
    encoder = program.encoder
    total, head = (_size(list(module.state_dict().values())) for module in (encoder, program.denoiser))
    parts = (encoder.image_stages, encoder.lidar_stages, encoder.fusions, encoder.neck)  # of `Encoder.backbone`
    backbone = sum(_size(list(part.state_dict().values())) for part in parts)
    return {BACKBONE: backbone, CONTEXT: total - backbone, HEAD: head, REST: 0}


def _size(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_flatten(tensors)[0] if isinstance(x, Tensor))


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    spans = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spans.append(time.perf_counter() - started)
    return min(spans)
