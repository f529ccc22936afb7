"""Where and in which precision a planner runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from navsim_eval.errors import UserError

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("float32", "tf32", *HALF)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: '{name}' is none; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no GPU; use device=cpu")
    return device


def checked_precision(name: str) -> str:
    """Raises UserError for a precision that is none."""
    if name not in PRECISIONS:
        raise UserError(f"precision: '{name}' is none of {', '.join(PRECISIONS)}")
    return name


@contextmanager
def float32_rule(precision: str) -> Iterator[None]:
    """float32 products as they are, or for `tf32` rounded on GPUs that can; restored at the end.

    With a half-precision backbone the rest is exact: it is cheap, and it is what poses are made of.
    """
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    exact = precision != "tf32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
