"""The cascade decoder: noisy trajectories in, clean trajectories and a logit for each out.

One pass of `CascadeDecoder.denoise` is the unit that training, inference and export share:

    noisy points ─ clamp, metres ─ sine embedding ─ MLP ─ query (B,M,D)
      layer 1: look-ups in the planning map at the points ─ agents ─ ego ─ FFN ─ time ─ heads ─ poses, logits
      layer 2: the same query, at the points that layer 1 moved (detached)

Modes do not attend to each other, so any subset or order of modes may be decoded in one batch. What depends on neither
the points nor the pass (value maps, agents' keys and values, the ego vector) is computed once by `prepare`.

Source: DiffusionDrive (arXiv 2411.15139), section 3.3.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusiondrive.perception import SceneContext
from diffusiondrive.space import TrajectorySpace
from navsim_eval.errors import UserError

POSE = 3  # x, y, heading
POINTS, ANCHORS = "points", "anchors"
NEGATIVE_PRIOR = math.log(99.0)  # a mode starts with a 1 % chance of being the right one


@dataclass
class DecoderConfig:
    """Sizes of the cascade.

    layers: cascade layers, separate weights; heads: of the agent attention; hidden: of the feed-forward block
    point_dims: sine features of each coordinate of each point (even); dropout: in look-ups and attentions
    base: what the first layer's correction is added to: the noisy `points` (published), so that the network must learn
        to subtract the noise exactly, or the mode's clean `anchors`, which learns smooth plans in far fewer steps
    see_map, see_agents, see_ego: the three looks at the scene (look-ups in the planning map, attention to the agents,
        attention to the ego query); turning one off leaves it out of every layer, norm included (the paper's ablation)
    """

    layers: int = 2
    heads: int = 8
    hidden: int = 1024
    point_dims: int = 32
    dropout: float = 0.1
    base: str = POINTS
    see_map: bool = True
    see_agents: bool = True
    see_ego: bool = True

    def __post_init__(self) -> None:
        if self.base not in (POINTS, ANCHORS):
            raise UserError(f"decoder.base: '{self.base}' is neither {POINTS} nor {ANCHORS}")
        if self.layers < 1:
            raise UserError(f"decoder.layers: {self.layers} must be at least 1")
        if self.point_dims % 2 or self.point_dims < 2:
            raise UserError(f"decoder.point_dims: {self.point_dims} must be even (pairs of sine and cosine)")


@dataclass(frozen=True)
class Denoised:
    """What one pass of the decoder says.

    points: (B, M, T, 2)             where it looked: noisy points after the clamp [m]
    poses:  per layer (B, M, T, 3)   x, y [m], heading [rad], ego frame
    logits: per layer (B, M)
    """

    points: Tensor
    poses: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class LayerCache:
    """What a cascade layer needs of a scene, independent of points and pass.

    value_map: (B, D, H, W); agent_keys_values: two of (B, heads, A, D / heads); ego: (B, 1, D). None: not looked at
    """

    value_map: Tensor | None
    agent_keys_values: tuple[Tensor, Tensor] | None
    ego: Tensor | None


@dataclass(frozen=True)
class SceneCache:
    """What no pass changes: an entry for each cascade layer, and the anchors (M, T, 2) [m] if they are the base."""

    layers: tuple[LayerCache, ...]
    anchors: Tensor | None


class CascadeDecoder(nn.Module):
    """The denoiser: `prepare` once a scene, `denoise` once a pass."""

    def __init__(self, space: TrajectorySpace, width: int, poses: int, range_m: float, config: DecoderConfig):
        super().__init__()
        self.space = space
        self.width, self.point_dims, self.base = width, config.point_dims, config.base
        self.point_encoder = nn.Sequential(
            nn.Linear(poses * 2 * config.point_dims, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, width)
        )
        self.time_encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        first = CascadeLayer(width, poses, range_m, config)
        # Copies, not fresh draws: all layers of the published planner start from identical weights.
        self.layers = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(config.layers - 1))])

    def prepare(self, context: SceneContext, anchors: Tensor) -> SceneCache:
        """Everything that no pass changes. anchors: (M, T, 2) of the modes that will be decoded, metres."""
        layers = tuple(layer.prepare(context) for layer in self.layers)
        return SceneCache(layers, anchors if self.base == ANCHORS else None)

    def denoise(self, sample: Tensor, label: Tensor, cache: SceneCache) -> Denoised:
        """One pass.

        sample: (B, M, T, 2) normalised, clamped here to [-1, 1]. label: (B,) or (1,) level that the network is told.
        """
        points = self.space.denormalise(sample.clamp(-1, 1))
        query = self.point_encoder(point_embedding(points, self.point_dims))  # (B, M, D)
        time = self.time_encoder(time_embedding(label, self.width))[:, None]  # (B or 1, 1, D)
        poses: list[Tensor] = []
        logits: list[Tensor] = []
        looked_at, base = points, points if cache.anchors is None else cache.anchors
        for layer, scene in zip(self.layers, cache.layers, strict=True):
            pose, logit = layer(query, looked_at, base, time, scene)
            poses.append(pose)
            logits.append(logit)
            looked_at = base = pose[..., :2].detach()
        return Denoised(points, tuple(poses), tuple(logits))


class CascadeLayer(nn.Module):
    """One look at the scene along the given points, and a correction of them."""

    def __init__(self, width: int, poses: int, range_m: float, config: DecoderConfig):
        super().__init__()
        self.poses = poses
        self.lookup = MapLookup(width, poses, range_m, config.dropout) if config.see_map else None
        self.agents = self.ego = None
        if config.see_agents:
            self.agents = CrossAttention(width, config.heads)
            self.agents_dropout = nn.Dropout(config.dropout)
            self.agents_norm = nn.LayerNorm(width)
        if config.see_ego:
            self.ego = CrossAttention(width, config.heads)
            self.ego_dropout = nn.Dropout(config.dropout)
            self.ego_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, width))
        self.feed_forward_norm = nn.LayerNorm(width)
        self.time = TimeModulation(width)
        self.classification = classification_branch(width)
        self.regression = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, poses * POSE)
        )

    def prepare(self, context: SceneContext) -> LayerCache:
        return LayerCache(
            value_map=self.lookup and self.lookup.value(context.map),
            agent_keys_values=self.agents and self.agents.keys_values(context.agents),
            ego=self.ego and self.ego.attend_single(context.ego),
        )

    def forward(
        self, query: Tensor, points: Tensor, base: Tensor, time: Tensor, scene: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Look at the scene along `points` (B, M, T, 2) and correct `base`, broadcastable to the same shape [m].

        query (B, M, D), time (B or 1, 1, D) -> poses (B, M, T, 3), logits (B, M).
        """
        x = query if self.lookup is None else self.lookup(query, points, scene.value_map)
        if self.agents is not None:
            x = self.agents_norm(x + self.agents_dropout(self.agents(x, *scene.agent_keys_values)))
        if self.ego is not None:
            x = self.ego_norm(x + self.ego_dropout(scene.ego.expand_as(x)))
        x = self.feed_forward_norm(self.feed_forward(x))  # no residual in the published planner
        x = self.time(x, time)
        # Points keep their precision under autocast: half precision would round them to 3 cm beyond 32 m.
        raw = self.regression(x).to(points.dtype).unflatten(-1, (self.poses, POSE))  # (B, M, T, 3)
        poses = torch.cat([base + raw[..., :2], math.pi * raw[..., 2:].tanh()], dim=-1)
        return poses, self.classification(x).squeeze(-1)


def classification_branch(width: int) -> nn.Sequential:
    """Features (…, width) -> logit (…, 1) of being the right mode, which starts improbable."""
    branch = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width),
        nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width),
        nn.Linear(width, 1),
    )  # fmt: skip
    nn.init.constant_(branch[-1].bias, -NEGATIVE_PRIOR)
    return branch


class MapLookup(nn.Module):
    """Bilinear look-ups of the value map at a mode's own points, mixed by weights that the query chooses."""

    def __init__(self, width: int, poses: int, range_m: float, dropout: float):
        super().__init__()
        self.range_m = range_m
        self.value = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.point_weights = nn.Linear(width, poses)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.point_weights.weight)
        nn.init.zeros_(self.point_weights.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, query: Tensor, points: Tensor, value_map: Tensor) -> Tensor:
        """query (B, M, D), points (B, M, T, 2) [m], value map (B, D, H, W) -> (B, M, D). Zeros beyond the map."""
        grid = points.flip(-1) / self.range_m  # columns run along y, rows along x
        weights = self.point_weights(query).softmax(-1)  # (B, M, T)
        samples = F.grid_sample(value_map.to(grid.dtype), grid, padding_mode="zeros", align_corners=False)
        mixed = torch.einsum("bdmt,bmt->bmd", samples, weights.to(samples.dtype))
        return query + self.dropout(self.output(mixed))


class CrossAttention(nn.Module):
    """Multi-head attention whose keys and values may be computed ahead; parameters as in torch's fused layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # rows: query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.output = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.output.bias)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A, D) -> keys and values, each (B, heads, A, D / heads)."""
        width = memory.shape[-1]
        projected = F.linear(memory, self.in_proj_weight[width:], self.in_proj_bias[width:])
        keys, values = projected.chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def attend_single(self, memory: Tensor) -> Tensor:
        """Attention to one single entry (B, 1, D): its softmax is 1, so queries and keys do not matter. (B, 1, D)."""
        width = memory.shape[-1]
        return self.output(F.linear(memory, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :]))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries from x (B, M, D) -> (B, M, D)."""
        width = x.shape[-1]
        query = self._split(F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width]))
        mixed = F.scaled_dot_product_attention(query, keys, values)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)


class TimeModulation(nn.Module):
    """Scale and shift from the time embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.scale_shift = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, M, D), time (B or 1, 1, D) -> (B, M, D)."""
        scale, shift = self.scale_shift(F.mish(time)).chunk(2, dim=-1)
        return x * (1 + scale) + shift


def point_embedding(points: Tensor, dims: int) -> Tensor:
    """Sine features of points in metres: (B, M, T, 2) -> (B, M, T · 2 · dims), per point [dims of y, dims of x].

    Coordinate c has features sin, cos, sin, cos … of 2πc / 10000^(2j/dims), j = 0 … dims/2 - 1.
    """
    pair = torch.arange(dims, device=points.device) // 2
    period = 10000 ** (2 * pair / dims)  # each period twice: for a sine and for a cosine
    angle = (2 * math.pi * points.flip(-1))[..., None] / period.to(points.dtype)  # (B, M, T, 2, dims)
    waves = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1)  # (B, M, T, 2, dims / 2, 2)
    return waves.flatten(2)


def time_embedding(label: Tensor, width: int) -> Tensor:
    """Level (B,) -> (B, width): width/2 sines, then width/2 cosines, periods geometric from 2π to 2π · 10000."""
    half = width // 2
    rate = torch.exp(torch.arange(half, device=label.device) * (-math.log(10000.0) / (half - 1)))
    angle = label[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
