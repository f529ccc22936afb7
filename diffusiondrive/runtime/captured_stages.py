"""Latency of the parts of a captured program: each part captured alone and replayed, timed by CUDA events."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffusiondrive.runtime.fused_program import FusedProgram
from diffusiondrive.runtime.latency_report import statistics

WARM_UPS, REPLAYS = 20, 500


@torch.inference_mode()
def stage_latencies(program: FusedProgram, inputs: tuple[torch.Tensor, ...]) -> dict[str, dict[str, float]]:
    """Milliseconds of every stage (statistics), on inputs on the device. Their sum is more than the whole: every replay
    starts anew."""
    return {name: _replayed(stage) for name, stage in program.stages(*inputs).items()}


def _replayed(stage: Callable[[], object]) -> dict[str, float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        stage()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = stage()  # results must outlive the capture, or replays would write into others' memory
    spans = []
    for _ in range(WARM_UPS + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end))
    del kept
    return statistics(torch.tensor(spans[WARM_UPS:]).numpy())
