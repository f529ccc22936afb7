"""What runs the program: each backend is a function of (camera, lidar, status, noise) that returns rows in host memory.

Inputs are float32 tensors in host memory or on the device; the result is a (batch, length) float32 tensor in host
memory that the caller owns (`program.PlanLayout`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.device import HALF, float32_rule
from diffusiondrive.runtime.program import PlanProgram, ReferenceProgram
from navsim_eval.errors import UserError

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Backend(Protocol):
    """Computes plans of one fixed batch size."""

    def __call__(self, inputs: Inputs) -> Tensor:
        """(camera, lidar, status, noise) -> (batch, length) in host memory."""


@dataclass(frozen=True)
class BackendOptions:
    """What a backend is built for; see `Runtime`."""

    device: torch.device
    precision: str
    batch: int
    auxiliary: bool


class EagerBackend:
    """A module as it is."""

    def __init__(self, program: nn.Module, options: BackendOptions):
        self.program, self.options = program.to(options.device).eval(), options

    def __call__(self, inputs: Inputs) -> Tensor:
        device = self.options.device
        with float32_rule(self.options.precision):
            return self.program(*(x.to(device, non_blocking=True) for x in inputs)).cpu()


def rewritten(planner: DiffusionDrive, options: BackendOptions) -> PlanProgram:
    """The program in the options' precision: the backbone in half precision where asked for, channels last."""
    program = PlanProgram(planner, options.auxiliary, HALF.get(options.precision, torch.float32))
    return program.to(options.device, memory_format=torch.channels_last)


def _eager(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    return EagerBackend(rewritten(planner, options), options)


def _reference(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    if options.precision in HALF:
        raise UserError(f"backend=reference computes in float32 or tf32, not in {options.precision}")
    return EagerBackend(ReferenceProgram(planner), options)


BACKENDS: dict[str, Callable[[DiffusionDrive, BackendOptions], Backend]] = {
    "reference": _reference,
    "eager": _eager,
}


def build_backend(name: str, planner: DiffusionDrive, **options: object) -> Backend:
    """A backend by name. Raises UserError that lists the names."""
    if name not in BACKENDS:
        raise UserError(f"backend: '{name}' is none of {', '.join(BACKENDS)}")
    return BACKENDS[name](planner, BackendOptions(**options))  # type: ignore[arg-type]
