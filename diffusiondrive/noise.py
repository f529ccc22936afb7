"""Where chance comes from: noise that belongs to a scene, not to a batch.

A plan's start noise is a function of (run seed, scene token) alone, so batch size, order and the number of workers
cannot change it. Philox's raw stream is fixed for ever, and Box-Muller in float64 on top of it does not depend on a
library's choice of a normal sampler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def scene_noise(tokens: Sequence[str], seed: int, shape: Sequence[int]) -> Tensor:
    """Independent N(0, 1) numbers for each scene: (len(tokens), *shape) float32 on the CPU."""
    size = int(np.prod(shape))
    noise = np.empty((len(tokens), size), np.float32)
    for row, token in zip(noise, tokens, strict=True):
        row[:] = _normal(f"{seed}:{token}", size)
    return torch.from_numpy(noise).view(len(tokens), *shape)


def training_draw(tokens: Sequence[str], seed: int, shape: Sequence[int], levels: int) -> tuple[Tensor, Tensor]:
    """Noise (B, *shape) float32 and levels (B,) int64 uniform in 0 … levels - 1 of one training step.

    Like `scene_noise`, a function of (seed, token) alone: put the step or the epoch into `seed` to draw afresh.
    """
    timesteps = [int.from_bytes(_digest(f"level:{seed}:{token}")[:8], "little") % levels for token in tokens]
    return scene_noise(tokens, seed, shape), torch.tensor(timesteps, dtype=torch.int64)


def training_coin(tokens: Sequence[str], seed: int) -> Tensor:
    """A fair coin for each scene, (B,) bool: a function of (seed, token), independent of `training_draw`."""
    return torch.tensor([bool(_digest(f"coin:{seed}:{token}")[0] & 1) for token in tokens])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _normal(tag: str, size: int) -> np.ndarray:
    """`size` standard normal float64 numbers of the stream that `tag` names (Box-Muller, 53-bit uniforms)."""
    key = np.frombuffer(_digest(tag)[:16], np.uint64)
    half = (size + 1) // 2
    raw = np.random.Philox(key=key).random_raw(2 * half)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[:half]))
    angle = 2.0 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
