"""The exported graphs as TensorRT engines. Written against TensorRT 10; not run on a machine of this project yet.

An engine belongs to one GPU model and one TensorRT version; it is built once and kept in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.backends import BackendOptions, Inputs
from diffusiondrive.runtime.export import AUXILIARY, FEATURES, PLAN, ExportedPlanner
from diffusiondrive.runtime.onnx_backend import cached_export
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write

WORKSPACE_BYTES = 4 << 30
ENGINE_SUFFIX = ".engine"


class TensorRTBackend:
    """Two engines that share tensors on the device; one wait a plan."""

    def __init__(self, planner: DiffusionDrive, options: BackendOptions):
        """Raises UserError without TensorRT or a GPU, or for a precision that the engines are not built for."""
        trt = _tensorrt()
        if options.device.type != "cuda":
            raise UserError("backend=tensorrt needs an NVIDIA GPU (device=cuda); on a CPU use backend=compile or onnx")
        if options.precision == "bf16":
            raise UserError("backend=tensorrt: precision bf16 is not built; use float32, tf32 or fp16")
        self.device, self.names = options.device, PLAN + (AUXILIARY if options.auxiliary else ())
        dtype = torch.float16 if options.precision == "fp16" else torch.float32
        exported = cached_export(planner, options.batch, options.auxiliary, dtype)
        files = build_engines(exported, tf32=options.precision == "tf32")
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.engines = [runtime.deserialize_cuda_engine(file.read_bytes()) for file in files]
        self.contexts = [engine.create_execution_context() for engine in self.engines]
        self.tensors: dict[str, Tensor] = {}
        for engine, context in zip(self.engines, self.contexts, strict=True):
            for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
                if name not in self.tensors:
                    shape, kind = tuple(engine.get_tensor_shape(name)), _torch_type(trt, engine.get_tensor_dtype(name))
                    self.tensors[name] = torch.zeros(shape, dtype=kind, device=self.device)
                context.set_tensor_address(name, self.tensors[name].data_ptr())
        for name, array in exported.defaults().items():
            self.tensors[name].copy_(torch.from_numpy(array))

    def __call__(self, inputs: Inputs) -> Tensor:
        stream = torch.cuda.current_stream(self.device)
        for name, given in zip((*FEATURES, "noise"), inputs, strict=True):
            self.tensors[name].copy_(given, non_blocking=True)
        for context in self.contexts:
            if not context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError("TensorRT refused to run the engine; its log says why")
        rows = [self.tensors[name].float().view(len(inputs[0]), -1) for name in self.names]
        return torch.cat(rows, dim=1).cpu()


def build_engines(exported: ExportedPlanner, tf32: bool = False) -> tuple[Path, Path]:
    """Engines of both graphs beside them, built where they are not there yet.

    Types are those of the graphs: half precision comes from an export in half precision, not from a builder that
    chooses layer by layer. Raises UserError when TensorRT cannot parse or build a graph.
    """
    trt = _tensorrt()
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    tag = f"{gpu}-{trt.__version__}-{'tf32' if tf32 else 'float32'}"
    files = tuple(graph.with_suffix(f".{tag}{ENGINE_SUFFIX}") for graph in (exported.encoder, exported.denoiser))
    for graph, file in zip((exported.encoder, exported.denoiser), files, strict=True):
        if not file.is_file():
            engine = bytes(_build(trt, graph, tf32))
            atomic_write(file, lambda path, engine=engine: Path(path).write_bytes(engine))
    return files  # type: ignore[return-value]


def _build(trt: Any, graph: Path, tf32: bool) -> Any:
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(graph)):
        raise UserError(f"{graph}: TensorRT {trt.__version__} cannot read it: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{graph}: TensorRT {trt.__version__} cannot build an engine; its log above says why")
    return engine


def _tensorrt() -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise UserError("backend=tensorrt needs tensorrt, which is not installed; pip install tensorrt") from error
    return tensorrt


def _torch_type(trt: Any, kind: Any) -> torch.dtype:
    types = {trt.float32: torch.float32, trt.float16: torch.float16, trt.int32: torch.int32, trt.int64: torch.int64}
    return types[kind]
