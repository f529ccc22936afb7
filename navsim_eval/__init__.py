"""What the world is and how a plan is judged: NAVSIM data, the synthetic city, PDMS and EPDMS."""

from __future__ import annotations

import importlib
from typing import Any

# Public names and the module each comes from; loaded on first use, so that reading a log does not import torch.
_PUBLIC = {
    "MetricCache": "navsim_eval.pdm.types",
    "SceneDataset": "navsim_eval.dataset",
    "score": "navsim_eval.scoring",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'navsim_eval' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
