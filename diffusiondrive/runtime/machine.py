"""The machine as a measurement finds it: clocks, power, governor, load, memory. Nothing is changed."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

GPU_QUERY = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu", "memory.used",
)  # fmt: skip
_CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def machine_state() -> dict[str, Any]:
    """JSON-ready: CPU clock [MHz], governor and load now; of every NVIDIA GPU what nvidia-smi says.

    Values that a machine (a virtual one, say) does not tell are null.
    """
    return {
        "cpu_mhz": _cpu_mhz(),
        "cpu_governor": _text(_CPUFREQ / "scaling_governor"),
        "cpu_max_khz": _text(_CPUFREQ / "scaling_max_freq"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpus": _gpus(),
    }


def memory_use(device: torch.device) -> dict[str, float]:
    """Peaks of this process so far [MiB]: resident memory, and what torch held on the GPU."""
    peak = {"resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        peak["gpu_allocated_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        peak["gpu_reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
    return {name: round(value, 1) for name, value in peak.items()}


def _gpus() -> list[dict[str, str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
    return [dict(zip(GPU_QUERY, row, strict=False)) for row in rows]


def _cpu_mhz() -> float | None:
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(Path("/proc/cpuinfo")) or "", flags=re.MULTILINE)
    return round(sum(map(float, found)) / len(found), 1) if found else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
