"""The reference planner's weights and inputs, rebuilt from names, shapes and one seed (golden/model/README.md)."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import torch

from tests.golden import GOLDEN

FOLDER = GOLDEN / "model"
SEED = 401
GAIN = {
    ".bn2.weight": 0.5,
    "_bev_downscale.weight": 0.4,
    "_status_encoding.weight": 0.4,
    "c5_conv.weight": 0.5,
    "in_proj_weight": 1.5,
    "attn.query.weight": 2,
    "attn.key.weight": 2,
    "_query_embedding.weight": 3,
    ".self_attn.out_proj.weight": 0.3,
    ".linear2.weight": 0.5,
    "cross_agent_attention.out_proj.weight": 0.7,
    "cross_ego_attention.out_proj.weight": 0.5,
    "_mlp_states.2.weight": 0.5,
    "plan_cls_branch.6.weight": 2,
    "plan_reg_branch.4.weight": 2,
}


def read_json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text())


def state_dict_spec() -> list[dict[str, Any]]:
    """All 763 entries: name, shape, dtype, parameter or buffer."""
    return next(value for value in read_json("state_dict_spec.json").values() if isinstance(value, list))


def official_weights() -> dict[str, torch.Tensor]:
    """Every tensor of the official layout, without prefix, filled by the recipe."""
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in state_dict_spec()}
    return {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}


def features() -> dict[str, torch.Tensor]:
    """The batch of two that the reference was run on."""

    def enlarge(coarse: np.ndarray, rows: int, columns: int) -> np.ndarray:
        return coarse.repeat(rows, 2).repeat(columns, 3)

    coarse = enlarge(unit("camera.coarse", (2, 3, 8, 32)), 32, 32)
    camera = 0.75 * coarse + 0.25 * unit("camera.fine", (2, 3, 256, 1024))
    occupied = enlarge(unit("lidar.coarse", (2, 1, 16, 16)), 16, 16) + unit("lidar.fine", (2, 1, 256, 256)) - 1
    lidar = np.floor(6 * np.maximum(0, occupied)) / 5
    return {
        "camera_feature": torch.from_numpy(camera.astype(np.float32)),
        "lidar_feature": torch.from_numpy(lidar.astype(np.float32)),
        "status_feature": torch.from_numpy(np.load(FOLDER / "forward.npz")["status_feature"]),
    }


def unit(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in [0, 1), 24 bits: splitmix64 on a counter that starts at the tag's CRC."""
    with np.errstate(over="ignore"):
        start = np.uint64(zlib.crc32(tag.encode()) << 32 | SEED)
        z = start + np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)) * 2.0**-24).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("plan_anchor"):
        return _anchors()
    s = 2 * unit(name, shape) - 1
    if name.endswith("running_var"):
        w = 1 + 0.25 * s
    elif name.endswith("running_mean"):
        w = 0.2 * s
    elif len(shape) == 1:
        w = 1 + 0.2 * s if name.endswith(".weight") else 0.1 * s
    elif name.endswith("pos_emb"):
        w = 0.5 * s
    elif name.endswith("_embedding.weight"):
        w = s
    else:
        w = np.sqrt(3 / np.prod(shape[1:])) * s
    for key, gain in GAIN.items():
        if key in name:
            w = w * gain
    return w.astype(np.float32)


def _anchors() -> np.ndarray:
    t = np.arange(1, 9) / 2
    speed = np.repeat([0.6, 4.5, 9.0, 14.2], 5)[:, None]
    bend = np.tile([-0.75, -0.3, 0, 0.4, 0.9], 4)[:, None]
    return np.stack([speed * t * (1 - bend * bend * t / 16), bend * speed * t * t / 8], -1).astype(np.float32)
