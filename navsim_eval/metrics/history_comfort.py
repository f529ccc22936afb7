"""History comfort (HC): 1 or 0, in EPDMS only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from navsim_eval.metrics.comfort import comfort_checks_v2


def history_comfort(states: Tensor, histories: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sub-score (S, P): 1 if the recorded past and the simulated future together pass all comfort checks.

    states: (S, P, 41, 11)
    histories: scenes (G,) and their past states (G, H, 11) at 10 Hz, those of one length together; H is 14 or 15, so
               there are one or two. A scene that is in none of them has no past: then the sub-score is 1
    Source: NAVSIM v2's PDM scorer. The past ends 0.1 to 0.2 s before now; the seam is treated as uniform, as there.
    """
    score = torch.ones_like(states[:, :, 0, 0])
    for scenes, past in histories:
        past = past[:, None].expand(-1, states.shape[1], -1, -1)
        joined = torch.cat([past, torch.index_select(states, 0, scenes)], dim=2)
        score[scenes] = comfort_checks_v2(joined).all(dim=-1).to(torch.float64)
    return score
