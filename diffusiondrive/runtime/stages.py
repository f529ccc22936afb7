"""Where the time of a plan goes: marks at the seams of a program, set from outside while it runs.

    backbone ─ queries and map ─ plan head ─ rest (choice, copy to the host; reference: auxiliary heads, too)

The same seams serve the clock (benchmark.py) and the counter of operations and bytes (roofline.py). Only programs that
run operation by operation have them; a compiled or captured one is timed as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from diffusiondrive.runtime.program import PlainProgram, PlanProgram, ReferenceProgram

BACKBONE, CONTEXT, HEAD, REST = "backbone", "queries and map", "plan head", "rest"
STAGES = (BACKBONE, CONTEXT, HEAD, REST)


@dataclass
class StageClock:
    """Marks the ends of stages: CUDA events on a GPU, read together once the device has finished; else wall clock."""

    device: torch.device
    names: list[str] = field(default_factory=list)
    marks: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.marks.append(self._mark())

    def stop(self, name: str) -> None:
        """The stage `name` ends here."""
        self.names.append(name)
        self.marks.append(self._mark())

    def milliseconds(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            spans = [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        else:
            spans = [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return dict(zip(self.names, spans, strict=True))

    def _mark(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def marked(program: nn.Module, stop: Callable[[str], None]) -> Iterator[None]:
    """While the context is open, `stop(name)` is called at the end of each stage but the last of every run.

    Raises TypeError for a program without seams.
    """
    if isinstance(program, PlanProgram):
        seams = [(program.encoder, "backbone"), (program.encoder, "forward"), (program.denoiser, "forward")]
    elif isinstance(program, ReferenceProgram):
        seams = [(program.planner, "_backbone"), (program.planner, "perceive"), (program.planner, "passes")]
    elif isinstance(program, PlainProgram):
        planner = program.planner
        seams = [(planner.perception.backbone, "forward"), (planner, "perceive"), (planner, "propose")]
    else:
        raise TypeError(f"{type(program).__name__} has no seams")
    with ExitStack() as stack:
        for (owner, method), name in zip(seams, STAGES, strict=False):
            stack.enter_context(_after(owner, method, name, stop))
        yield


@contextmanager
def _after(owner: nn.Module, method: str, name: str, stop: Callable[[str], None]) -> Iterator[None]:
    original = getattr(owner, method)

    def called(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        stop(name)
        return result

    setattr(owner, method, called)  # on this object only, in front of the class's own
    try:
        yield
    finally:
        delattr(owner, method)
