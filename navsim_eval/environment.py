"""What a result was made with: package versions, hardware and the state of the source tree, as one plain dict."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from navsim_eval.executor import usable_cores

PACKAGES = (
    "torch", "torchvision", "timm", "pytorch-lightning", "numpy", "scipy", "shapely", "pyogrio",
    "opencv-python-headless", "hydra-core", "safetensors", "eclipse-sumo", "embreex", "onnxruntime",
)  # fmt: skip
_SOURCE = Path(__file__).resolve().parent.parent


def describe_environment() -> dict[str, Any]:
    """JSON-ready description, stored beside every score, benchmark and checkpoint.

    Keys: `time` (UTC), `python`, `packages` (name → version, None where absent), `hardware`, `git`.
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "hardware": describe_hardware(),
        "git": describe_git(),
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_hardware() -> dict[str, Any]:
    """Processor, usable cores, memory [GiB], and the GPUs that torch sees (asked only if torch is already loaded)."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": gpu_names() if "torch" in sys.modules else [],
    }


def gpu_names() -> list[str]:
    """Names of the CUDA devices that torch can use; empty without any."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def describe_git(folder: Path = _SOURCE) -> dict[str, Any]:
    """Commit of the source tree and whether tracked files differ from it; nulls outside a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "modified": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
