"""How a plan is made: features, the truncated-diffusion planner, its training and runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusiondrive.planner import DiffusionDrive as DiffusionDrive

__all__ = ["DiffusionDrive"]


def __getattr__(name: str) -> Any:
    """`from diffusiondrive import DiffusionDrive` without making every light import (features, anchors) load timm."""
    if name == "DiffusionDrive":
        from diffusiondrive.planner import DiffusionDrive

        return DiffusionDrive
    raise AttributeError(f"module 'diffusiondrive' has no attribute '{name}'")
