"""What a backend has built once and finds again at the next start: compiled code, exported graphs, engines."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from diffusiondrive.planner import DiffusionDrive
from navsim_eval.environment import package_version

DIGEST_LENGTH = 16


def cache_folder(kind: str) -> Path:
    """`$DIFFUSIONDRIVE_CACHE/<kind>`, else `$XDG_CACHE_HOME/diffusiondrive/<kind>`, else under ~/.cache.

    Made if needed. Everything in it can be deleted at any time.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("DIFFUSIONDRIVE_CACHE") or Path(home) / "diffusiondrive") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def planner_digest(planner: DiffusionDrive, *options: object) -> str:
    """Name for what is built from a planner: changes with weights, configuration, options and versions."""
    digest = hashlib.sha256()
    versions = [package_version(name) for name in ("torch", "onnx", "onnxruntime", "tensorrt")]
    digest.update(repr((planner.config, options, versions)).encode())
    for name, tensor in planner.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return digest.hexdigest()[:DIGEST_LENGTH]
