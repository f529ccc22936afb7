"""History comfort (HC): 1 or 0, in EPDMS only."""

from __future__ import annotations

import torch
from torch import Tensor

from navsim_eval.metrics.comfort import comfort_checks_v2


def history_comfort(states: Tensor, history: list[Tensor | None]) -> Tensor:
    """Sub-score (S, P): 1 if the recorded past and the simulated future together pass all comfort checks.

    states:  (S, P, 41, 11);  history: for each scene (H, 11) past states at 10 Hz, or None: then the sub-score is 1
    Source: NAVSIM v2's PDM scorer. The past ends 0.1 to 0.2 s before now; the seam is treated as uniform, as there.
    """
    scores = []
    for scene_states, past in zip(states, history, strict=True):
        if past is None:
            scores.append(torch.ones_like(scene_states[:, 0, 0]))
            continue
        joined = torch.cat([past.expand(len(scene_states), -1, -1), scene_states], dim=1)
        scores.append(comfort_checks_v2(joined).all(dim=-1).to(torch.float64))
    return torch.stack(scores)
