"""How fast a planner runs: `Runtime` turns features in host memory into plans in host memory, on several backends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusiondrive.runtime.runtime import Runtime as Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    """`from diffusiondrive.runtime import Runtime` without making every light import load the planner."""
    if name == "Runtime":
        from diffusiondrive.runtime.runtime import Runtime

        return Runtime
    raise AttributeError(f"module 'diffusiondrive.runtime' has no attribute '{name}'")
