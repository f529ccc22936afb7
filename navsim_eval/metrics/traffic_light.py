"""Traffic light compliance (TLC): 1 or 0, in EPDMS only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_eval.geometry import Vehicle
from navsim_eval.metrics.areas import Located
from navsim_eval.metrics.footprint import EGO_RADIUS, Footprints, rectangles_touch


@dataclass(frozen=True)
class RedLights:
    """Lane connectors that are red at some time, S scenes padded to R connectors.

    active: (S, T, R) bool;  words: (W, S, T) the bits of those active, as the scene's polygon grid numbers them
    bounds: (S, R, 4) x and y minimum, x and y maximum
    first_edge, edge_count: (S, R) run of each connector's edges in
    edges:  (5, E) middle x, y, direction cos, sin, and half length of each edge
    """

    active: Tensor
    words: Tensor
    bounds: Tensor
    first_edge: Tensor
    edge_count: Tensor
    edges: Tensor


def traffic_light_compliance(ego: Footprints, located: Located, lights: RedLights) -> Tensor:
    """Sub-score (S, P): 0 if at any time the ego's footprint touches a lane connector whose light is red then.

    There is no exemption for an ego that is in the connector already.
    Source: NAVSIM v2's PDM scorer.
    """
    steps = min(ego.x.shape[2], lights.active.shape[1])
    red = lights.words[:, :, None, None, :steps]
    violated = ((located.corners[..., :steps] & red) != 0).any(dim=0).any(dim=1).any(dim=-1)  # a corner is inside
    return (~(violated | _touched_by_boundary(ego, lights, ~violated, steps))).to(torch.float64)


def _touched_by_boundary(ego: Footprints, lights: RedLights, asked: Tensor, steps: int) -> Tensor:
    """(S, P) bool: a red connector's boundary meets the footprint. Only rows with `asked` (S, P) are looked at."""
    x, y = ego.center_x[..., :steps, None], ego.center_y[..., :steps, None]
    low_x, low_y, high_x, high_y = (bound[:, None, None] for bound in lights.bounds.unbind(-1))
    near = (
        (x >= low_x - EGO_RADIUS) & (x <= high_x + EGO_RADIUS) & (y >= low_y - EGO_RADIUS) & (y <= high_y + EGO_RADIUS)
    )
    near &= lights.active[:, None, :steps] & asked[:, :, None, None]
    scene, proposal, time, light = torch.nonzero(near, as_tuple=True)

    count = lights.edge_count[scene, light]
    pair = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    place = torch.arange(len(pair), device=count.device) - (torch.cumsum(count, 0) - count)[pair]
    edge_x, edge_y, edge_cos, edge_sin, half_length = lights.edges[:, lights.first_edge[scene, light][pair] + place]
    at = (scene[pair], proposal[pair], time[pair])
    touched = rectangles_touch(
        edge_x - ego.center_x[at],
        edge_y - ego.center_y[at],
        ego.cos[at],
        ego.sin[at],
        Vehicle.HALF_LENGTH,
        Vehicle.HALF_WIDTH,
        edge_cos,
        edge_sin,
        half_length,
        0.0,
    )
    violated = torch.zeros_like(asked)
    violated[at[0][touched], at[1][touched]] = True
    return violated
