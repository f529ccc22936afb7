"""From sensor features to what the planner looks at: tokens, ego and agent queries, a planning map.

    coarse map ─ 1×1 ─ tokens ┐
    status ─ linear ─ 1 token ┴─ + learned positions ─ key-values (B,65,256)
    learned queries (31) ─ 3 decoder layers on the key-values ─ 1 ego query, 30 agent queries
    tokens (resized) ‖ neck map ─ per-cell MLP ─ planning map (B,256,64,64)

Auxiliary heads: agent boxes from the agent queries, a semantic map from the neck map. They supervise training and are
not needed for a plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusiondrive.backbone import FusionBackbone, resize
from navsim_eval.errors import UserError


@dataclass
class PerceptionConfig:
    """Sizes of tokens, queries and auxiliary heads.

    range_m: half side of the square around the ego that LiDAR image and planning map cover [m]
    status_size: command (4, one-hot), velocity (2), acceleration (2)
    agents: number of agent queries
    decoder_layers, heads, hidden: of the query decoder; agent_hidden: of the agent head's MLP
    semantic_classes, semantic_size: of the semantic map, rows ahead of the ego × columns
    visible_deg: agents further than this to either side of the heading are not asked for in training (published: 180,
        all; 80 for the camera-only TransFuser, whose cameras do not see them)
    status_to_ego: also add the status token to the ego query (published: it is one of 65 tokens, and the query decoder
        must first learn to find it)
    """

    range_m: float = 32.0
    status_size: int = 8
    agents: int = 30
    decoder_layers: int = 3
    heads: int = 8
    hidden: int = 1024
    agent_hidden: int = 1024
    semantic_classes: int = 7
    semantic_size: tuple[int, int] = (128, 256)
    visible_deg: float = 180.0
    status_to_ego: bool = False

    def __post_init__(self) -> None:
        self.semantic_size = tuple(self.semantic_size)
        if not 0 < self.visible_deg <= 180:
            raise UserError(f"perception.visible_deg: {self.visible_deg} is not in (0, 180] degrees")
        if self.range_m <= 0:
            raise UserError(f"perception.range_m: {self.range_m} must be positive metres")
        if len(self.semantic_size) != 2:
            raise UserError(f"perception.semantic_size: {self.semantic_size} is not (rows, columns)")


@dataclass(frozen=True)
class SceneContext:
    """What one scene looks like to the planner. Maps cover ±range_m; rows run forward (x), columns leftward (y).

    map:    (B, D, H, W)  planning map; None where the planner does not look at one
    agents: (B, A, D)     agent queries
    ego:    (B, 1, D)     ego query
    neck:   (B, N, H, W)  neck map, input of the semantic head
    """

    map: Tensor | None
    agents: Tensor
    ego: Tensor
    neck: Tensor


@dataclass(frozen=True)
class Agents:
    """Predicted vehicles around the ego, ego frame.

    states: (B, A, 5)  x, y [m], heading [rad], length, width [m]
    logits: (B, A)     of being there
    """

    states: Tensor
    logits: Tensor


class Perception(nn.Module):
    """Backbone plus queries: features -> SceneContext."""

    def __init__(
        self,
        backbone: FusionBackbone,
        neck_channels: int,
        width: int,
        config: PerceptionConfig,
        planning_map: bool = True,
    ):
        """planning_map: off for planners that do not look at one."""
        super().__init__()
        self.backbone = backbone
        self.coarse_size, self.status_to_ego = backbone.coarse_size, config.status_to_ego
        cells = self.coarse_size[0] * self.coarse_size[1]
        self.token_projection = nn.Conv2d(backbone.coarse_channels, width, 1)
        self.status_projection = nn.Linear(config.status_size, width)
        self.positions = nn.Parameter(torch.randn(cells + 1, width))
        self.queries = nn.Parameter(torch.randn(1 + config.agents, width))
        layer = nn.TransformerDecoderLayer(width, config.heads, config.hidden, dropout=0.0, batch_first=True)
        self.query_decoder = nn.TransformerDecoder(layer, config.decoder_layers)
        self.map_projection = None
        if planning_map:
            self.map_projection = nn.Sequential(nn.Linear(width + neck_channels, width), nn.ReLU(), nn.LayerNorm(width))

    def forward(self, camera: Tensor, lidar: Tensor | None, status: Tensor) -> SceneContext:
        """camera (B, 3, H, W), lidar (B, 1, h, w), status (B, 8) -> SceneContext. A camera-only one needs no LiDAR."""
        coarse, neck = self.backbone(camera, lidar)
        tokens = self.tokens(coarse, status)
        queries = self.query_decoder(self.queries.expand(len(tokens), -1, -1), tokens)
        ego = queries[:, :1] + tokens[:, -1:] if self.status_to_ego else queries[:, :1]
        plane = None if self.map_projection is None else self.planning_map(tokens, neck)
        return SceneContext(map=plane, agents=queries[:, 1:], ego=ego, neck=neck)

    def tokens(self, coarse: Tensor, status: Tensor) -> Tensor:
        """Coarse cells row by row, then the status: (B, cells + 1, D), learned positions added."""
        cells = self.token_projection(coarse).flatten(2).transpose(1, 2)
        return torch.cat([cells, self.status_projection(status)[:, None]], dim=1) + self.positions

    def planning_map(self, tokens: Tensor, neck: Tensor) -> Tensor:
        """Coarse tokens (with their positions) and the neck map, cell by cell: (B, D, *map_size)."""
        linear, *rest = self.map_projection
        to_tokens, to_neck = linear.weight.split([tokens.shape[-1], neck.shape[1]], dim=1)
        # Resizing and a linear layer commute, so the tokens' share is computed on the coarse grid.
        coarse = F.linear(tokens[:, :-1], to_tokens).transpose(1, 2).unflatten(2, self.coarse_size)  # (B, D, h, w)
        x = F.linear(neck.permute(0, 2, 3, 1), to_neck, linear.bias)  # (B, H, W, D)
        x = x + resize(coarse, neck.shape[-2:]).permute(0, 2, 3, 1)
        for module in rest:
            x = module(x)
        return x.permute(0, 3, 1, 2)


class AgentHead(nn.Module):
    """Agent queries -> boxes and logits."""

    def __init__(self, width: int, config: PerceptionConfig):
        super().__init__()
        self.range_m = config.range_m
        self.states = nn.Sequential(nn.Linear(width, config.agent_hidden), nn.ReLU(), nn.Linear(config.agent_hidden, 5))
        self.logit = nn.Linear(width, 1)

    def forward(self, queries: Tensor) -> Agents:
        """(B, A, D) -> Agents; x, y bounded by the range, heading by ±π, length and width free."""
        position, heading, extent = self.states(queries).split([2, 1, 2], dim=-1)
        states = torch.cat([self.range_m * position.tanh(), math.pi * heading.tanh(), extent], dim=-1)
        return Agents(states, self.logit(queries).squeeze(-1))


class SemanticHead(nn.Module):
    """Neck map -> semantic map of the half plane ahead. The stretch from ±32 m to 0 … 32 m in x is learned."""

    def __init__(self, neck_channels: int, config: PerceptionConfig):
        super().__init__()
        self.size = config.semantic_size
        self.layers = nn.Sequential(
            nn.Conv2d(neck_channels, neck_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(neck_channels, config.semantic_classes, 1),
        )

    def forward(self, neck: Tensor) -> Tensor:
        """(B, N, H, W) -> logits (B, classes, *semantic_size)."""
        return resize(self.layers(neck), self.size)
