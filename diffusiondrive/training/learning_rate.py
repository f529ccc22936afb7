"""Learning rates over a run: warm-up, then cosine, counted in optimiser steps of the run that really takes place.

`warmup_cosine` is what we train with. `published_epoch_rate` is the schedule of the released recipe, which counts
epochs and hard-codes 100 of them; it is kept for reproducing that recipe (`experiment=navtrain_reference`).
"""

from __future__ import annotations

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, base: float, minimum: float) -> float:
    """Learning rate before optimiser step `step` (0-based).

    Linear from base/warmup_steps to base over the warm-up, then half a cosine from base to minimum at the last step.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    span = max(total_steps - 1 - warmup_steps, 1)
    progress = min((step - warmup_steps) / span, 1.0)
    return minimum + 0.5 * (base - minimum) * (1.0 + math.cos(math.pi * progress))


def published_epoch_rate(
    epoch: int, base: float = 6e-4, minimum: float = 1e-6, warmup_epochs: int = 3, total_epochs: int = 100
) -> float:
    """Learning rate of 0-based `epoch` in the released recipe (all parameter groups alike)."""
    if epoch < warmup_epochs:
        return base * (epoch + 1) / warmup_epochs
    progress = (epoch - warmup_epochs) / (total_epochs - warmup_epochs)
    return minimum + 0.5 * (base - minimum) * (1.0 + math.cos(math.pi * progress))
