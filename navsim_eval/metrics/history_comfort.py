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
    score = torch.ones_like(states[:, :, 0, 0])
    lengths = [0 if past is None else len(past) for past in history]
    for length in sorted(set(lengths) - {0}):  # 14 or 15: one or two groups of scenes
        scenes = [scene for scene, own in enumerate(lengths) if own == length]
        past = torch.stack([history[scene] for scene in scenes])[:, None].expand(-1, states.shape[1], -1, -1)
        joined = torch.cat([past, states[scenes]], dim=2)
        score[scenes] = comfort_checks_v2(joined).all(dim=-1).to(torch.float64)
    return score
