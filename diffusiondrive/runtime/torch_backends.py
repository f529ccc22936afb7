"""Backends that are torch alone: operation by operation, compiled, captured in a CUDA graph."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.backends import Backend, BackendOptions, Inputs
from diffusiondrive.runtime.cache import cache_folder
from diffusiondrive.runtime.device import HALF, float32_rule
from diffusiondrive.runtime.program import PlainProgram, PlanProgram, ReferenceProgram
from diffusiondrive.runtime.winograd import use_winograd
from navsim_eval.errors import UserError

CAPTURE_WARM_UPS = 3  # runs before a capture, so that libraries have chosen their algorithms and workspaces
COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
CPU_COMPILERS = ("g++", "clang++", "c++")


class DirectBackend:
    """Calls a function of tensors on the device; what `eager`, `reference` and `compile` share."""

    def __init__(self, program: Callable[..., Tensor], options: BackendOptions):
        self.program, self.options = program, options

    def __call__(self, inputs: Inputs) -> Tensor:
        device = self.options.device
        with float32_rule(self.options.precision):
            return self.program(*(x.to(device, non_blocking=True) for x in inputs)).cpu()


class CapturedBackend:
    """The whole plan as one CUDA graph: upload, backbone, both passes, choice, download.

    Inputs in host memory go through pinned buffers whose addresses the graph knows; inputs already on the device are
    copied into the graph's input buffers on the current stream.
    """

    def __init__(self, program: Callable[..., Tensor], example: Inputs, options: BackendOptions):
        """example: inputs of the right shapes, in host memory."""
        self.options = options
        self.kept = program  # a graph knows addresses only; its weights must stay
        self.pinned = tuple(torch.empty_like(x).pin_memory().copy_(x) for x in example)
        self.static = tuple(x.to(options.device) for x in example)
        self.done = torch.cuda.Event()
        with float32_rule(options.precision), torch.inference_mode(), fixed_shapes():
            stream = torch.cuda.Stream(options.device)
            stream.wait_stream(torch.cuda.current_stream(options.device))
            with torch.cuda.stream(stream):
                for _ in range(CAPTURE_WARM_UPS):
                    rows = program(*self.static)
            torch.cuda.current_stream(options.device).wait_stream(stream)
            self.rows = torch.empty(rows.shape, dtype=rows.dtype).pin_memory()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.rows.copy_(program(*self.static), non_blocking=True)

    def __call__(self, inputs: Inputs) -> Tensor:
        for given, pinned, static in zip(inputs, self.pinned, self.static, strict=True):
            if given.is_cuda or given.is_pinned():
                static.copy_(given, non_blocking=True)
            else:
                static.copy_(pinned.copy_(given), non_blocking=True)
        self.graph.replay()
        self.done.record()
        self.done.synchronize()  # the only wait of a plan
        return self.rows.clone()


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """cuDNN may measure its algorithms: the shapes that it meets here are all it will ever see."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def reference(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    """The plain published computation, maps in torch's default layout."""
    if options.precision in HALF:
        raise UserError(f"backend=reference computes in float32 or tf32, not in {options.precision}")
    return DirectBackend(ReferenceProgram(planner).to(options.device).eval(), options)


def plain(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    """The planner's own code."""
    if options.precision in HALF:
        raise UserError(f"backend=plain computes in float32 or tf32, not in {options.precision}")
    return DirectBackend(PlainProgram(planner, options.auxiliary).to(options.device).eval(), options)


def eager(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    return DirectBackend(rewritten(planner, options), options)


def compiled(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    """On a CPU in float32, convolutions with many channels take Winograd's form; GPU libraries choose by themselves."""
    program = rewritten(planner, options)
    if options.device.type == "cpu" and options.precision not in HALF:
        use_winograd(program.encoder)
    return DirectBackend(compile_program(program, options), options)


def captured(planner: DiffusionDrive, options: BackendOptions, compiled: bool = False) -> Backend:
    if options.device.type != "cuda":
        raise UserError("backend=cudagraph needs an NVIDIA GPU (device=cuda); on a CPU use backend=compile or onnx")
    program: Callable[..., Tensor] = rewritten(planner, options)
    if compiled:
        program = compile_program(program, options)
    return CapturedBackend(program, example_inputs(planner, options.batch), options)


def fused(planner: DiffusionDrive, options: BackendOptions) -> Backend:
    """Fused kernels, captured. Raises UserError without a GPU or without Triton."""
    if options.device.type != "cuda":
        raise UserError("backend=fused needs an NVIDIA GPU (device=cuda); on a CPU use backend=compile or onnx")
    try:
        from diffusiondrive.runtime.fused_program import FusedProgram
    except ImportError as error:
        raise UserError(f"backend=fused needs Triton ({error}); torch's builds for Linux bring it") from error
    program = FusedProgram(rewritten(planner, options), options.batch, options.precision)
    return CapturedBackend(program, example_inputs(planner, options.batch), options)


def rewritten(planner: DiffusionDrive, options: BackendOptions) -> PlanProgram:
    """The program in the options' precision: the backbone in half precision where asked for, maps channels last."""
    program = PlanProgram(planner, options.auxiliary, HALF.get(options.precision, torch.float32))
    return program.to(options.device, memory_format=torch.channels_last).eval()


def compile_program(program: nn.Module, options: BackendOptions) -> Callable[..., Tensor]:
    """torch.compile for fixed shapes and frozen weights. What it compiles is kept on disk for the next start.

    Raises UserError where a CPU has no C++ compiler.
    """
    settings: dict[str, Any] = {"freezing": True}
    if options.device.type == "cuda":
        settings |= {"max_autotune": True, "coordinate_descent_tuning": True}
    elif not any(map(shutil.which, (os.environ.get("CXX", ""), *CPU_COMPILERS))):
        raise UserError("backend=compile on a CPU needs a C++ compiler (apt install g++); or take eager or onnx")
    keep_compiled_code()
    return torch.compile(program, fullgraph=True, dynamic=False, options=settings)


def keep_compiled_code() -> None:
    """Let torch's compiler cache outlive a reboot, unless the user has chosen a place.

    Importing the compiler sets the variable to a folder in the temporary directory, which is not a choice.
    """
    chosen = os.environ.get(COMPILER_CACHE, "")
    if not chosen or Path(chosen).name.startswith("torchinductor_"):
        os.environ[COMPILER_CACHE] = str(cache_folder("inductor"))


def example_inputs(planner: DiffusionDrive, batch: int) -> Inputs:
    """Zeros of the right shapes, for tracing and capture."""
    backbone = planner.config.backbone
    return (
        torch.zeros(batch, backbone.image_channels, *backbone.image_size),
        torch.zeros(batch, backbone.lidar_channels, *backbone.lidar_size),
        torch.zeros(batch, planner.config.perception.status_size),
        torch.zeros(batch, *planner.noise_shape),
    )
