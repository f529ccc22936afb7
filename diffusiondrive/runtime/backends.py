"""What runs the program: each backend is a function of (camera, lidar, status, noise) that returns rows in host memory.

Inputs are float32 tensors in host memory or on the device; the result is a (batch, length) float32 tensor in host
memory that the caller owns (`program.PlanLayout`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusiondrive.planner import DiffusionDrive
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


def _reference(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.torch_backends import reference

    return reference(planner, options)


def _plain(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.torch_backends import plain

    return plain(planner, options)


def _eager(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.torch_backends import eager

    return eager(planner, options)


def _compile(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.torch_backends import compiled

    return compiled(planner, options)


def _cudagraph(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.torch_backends import captured

    return captured(planner, options)


def _compile_cudagraph(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.torch_backends import captured

    return captured(planner, options, compiled=True)


def _fused(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.torch_backends import fused

    return fused(planner, options)


def _onnx(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.onnx_backend import OnnxBackend

    return OnnxBackend(planner, options)


def _tensorrt(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    from diffusiondrive.runtime.tensorrt_backend import TensorRTBackend

    return TensorRTBackend(planner, options)


# Each imports what it needs when it is asked for.
BACKENDS: dict[str, Callable[[DiffusionDrive, BackendOptions], Backend]] = {
    "reference": _reference,
    "eager": _eager,
    "compile": _compile,
    "cudagraph": _cudagraph,
    "compile+cudagraph": _compile_cudagraph,
    "fused": _fused,
    "onnx": _onnx,
    "tensorrt": _tensorrt,
    "plain": _plain,
}


def build_backend(name: str, planner: DiffusionDrive, options: BackendOptions) -> Backend:
    """A backend by name. Raises UserError that lists the names, or says what is not installed or does not fit."""
    if name not in BACKENDS:
        raise UserError(f"backend: '{name}' is none of {', '.join(BACKENDS)}")
    return BACKENDS[name](planner, options)
