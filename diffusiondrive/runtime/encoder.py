"""Features of a scene -> everything the denoiser reads of it, with what inference does not need taken out.

Same numbers as `DiffusionDrive.perceive` followed by `CascadeDecoder.prepare`, up to float32 rounding:

* batch norms are folded into the convolutions before them;
* the last fusion updates the LiDAR map only (nothing reads the image map after it), in its last block only the LiDAR
  tokens ask;
* the first query-decoder layer starts from constants: its self-attention, first norm and cross-attention queries are
  computed once, when the encoder is built; keys and values of all its layers come from one product;
* agents' keys and values and the single-key ego attention (a linear map of the ego query) come from one product each,
  for all cascade layers;
* value maps are not computed at all: the denoiser evaluates their convolution where it looks (denoiser.py).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models._features import FeatureDictNet, FeatureListNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from diffusiondrive.backbone import Fusion, FusionBlock, resize
from diffusiondrive.decoder import CrossAttention
from diffusiondrive.encoders import encoder_stages
from diffusiondrive.planner import DiffusionDrive

BORDER = 2  # zero cells around the planning map: as far as a 3×3 window of a corner outside the map reaches
# Modules whose children run in the order of their registration, so that a norm after a convolution belongs to it.
_IN_ORDER = (nn.Sequential, FeatureDictNet, FeatureListNet, BasicBlock, Bottleneck)


class EncodedScene(NamedTuple):
    """What the denoiser reads. L cascade layers.

    map:          (B, H + 4, W + 4, D)        planning map, channels last, a border of two zero cells
    agent_keys:   (B, L, heads, A, D / heads)
    agent_values: (B, L, heads, A, D / heads)
    ego:          (B, L, D)                   what the ego attention adds
    """

    map: Tensor
    agent_keys: Tensor
    agent_values: Tensor
    ego: Tensor


class Encoder(nn.Module):
    """Made from a planner, whose weights it copies; inference only."""

    def __init__(self, planner: DiffusionDrive, dtype: torch.dtype = torch.float32):
        """dtype: of the backbone. Tokens, queries and the planning map stay float32: they cost little."""
        super().__init__()
        backbone = copy.deepcopy(planner.perception.backbone).eval().to(dtype)
        fold_batch_norms(backbone)
        self.dtype = dtype
        self.image_stages, self.lidar_stages = (
            nn.ModuleList(nn.Sequential(*stage) for stage in encoder_stages(encoder))
            for encoder in (backbone.image_encoder, backbone.lidar_encoder)
        )
        self.fusions = nn.ModuleList([*backbone.fusions[:-1], LastFusion(backbone.fusions[-1])])
        self.neck = backbone.neck
        # A perception without its backbone: tokens, positions, status, planning map.
        held = planner.perception.backbone
        planner.perception.backbone = None
        try:
            self.perception = copy.deepcopy(planner.perception).eval()
        finally:
            planner.perception.backbone = held
        self.queries = QueryDecoder(self.perception.query_decoder, self.perception.queries)
        del self.perception.query_decoder
        layers = planner.decoder.layers
        self.heads, self.count = layers[0].agents.heads, len(layers)
        self.to_agents = _joined([_key_value(layer.agents) for layer in layers])
        self.to_ego = _joined([_single_key(layer.ego) for layer in layers])

    def forward(self, camera: Tensor, lidar: Tensor, status: Tensor) -> tuple[EncodedScene, Tensor, Tensor]:
        """Features as in `DiffusionDrive` -> scene; agent queries (B, A, D) and neck map for the auxiliary heads."""
        coarse, neck = self.backbone(camera.to(self.dtype), lidar.to(self.dtype))
        tokens = self.perception.tokens(coarse, status)
        queries = self.queries(tokens)
        ego, agents = queries[:, :1], queries[:, 1:]
        if self.perception.status_to_ego:
            ego = ego + tokens[:, -1:]
        plane = self.perception.planning_map(tokens, neck).permute(0, 2, 3, 1)
        split = self.to_agents(agents).unflatten(-1, (self.count, 2, self.heads, -1))  # (B, A, L, 2, heads, d)
        keys, values = split.permute(3, 0, 2, 4, 1, 5).unbind(0)
        scene = EncodedScene(
            map=F.pad(plane, (0, 0, BORDER, BORDER, BORDER, BORDER)),
            agent_keys=keys,
            agent_values=values,
            ego=self.to_ego(ego).unflatten(-1, (self.count, -1)).squeeze(1),
        )
        return scene, agents, neck

    def backbone(self, camera: Tensor, lidar: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse and fine map, float32."""
        for image_stage, lidar_stage, fusion in zip(self.image_stages, self.lidar_stages, self.fusions, strict=True):
            camera, lidar = fusion(image_stage(camera), lidar_stage(lidar))
        return lidar.float(), self.neck(lidar).float()


class LastFusion(nn.Module):
    """A fusion whose image map nobody reads: the image tokens still answer, but they do not ask in the last block."""

    def __init__(self, fusion: Fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, image: Tensor, lidar: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, H, W) and (B, C, h, w) -> the image map as it is, the LiDAR map fused."""
        fusion = self.fusion
        tokens = fusion.pooled_tokens(image, lidar)
        for block in fusion.blocks[:-1]:
            tokens = block(tokens)
        tokens = _answer(fusion.blocks[-1], tokens, fusion.image_count)
        to_lidar = fusion.norm(tokens).transpose(1, 2).unflatten(2, fusion.lidar_grid)
        return image, lidar + resize(fusion.lidar_out(to_lidar), lidar.shape[-2:])


class QueryDecoder(nn.Module):
    """`nn.TransformerDecoder` (post-norm, no dropout) for learned queries that are the same for every scene."""

    def __init__(self, decoder: nn.TransformerDecoder, queries: Tensor):
        super().__init__()
        self.layers = copy.deepcopy(decoder.layers).eval()
        self.heads = self.layers[0].self_attn.num_heads
        self.to_memory = _joined([_key_value(layer.multihead_attn) for layer in self.layers])
        with torch.no_grad():
            start = queries.detach()[None]
            start = self.layers[0].norm1(start + self._self_attention(self.layers[0], start))
        self.register_buffer("start", start)
        self.register_buffer("start_query", _query(self.layers[0].multihead_attn, start).detach())

    def forward(self, memory: Tensor) -> Tensor:
        """Memory (B, N, D) -> queries (B, Q, D)."""
        split = self.to_memory(memory).unflatten(-1, (len(self.layers), 2, self.heads, -1))
        keys, values = split.permute(3, 2, 0, 4, 1, 5).unbind(0)  # each (layers, B, heads, N, d)
        x = self.start
        for number, layer in enumerate(self.layers):
            if number:
                x = layer.norm1(x + self._self_attention(layer, x))
            query = _query(layer.multihead_attn, x) if number else self.start_query
            query = _split_heads(query, self.heads).expand(len(memory), -1, -1, -1)
            mixed = F.scaled_dot_product_attention(query, keys[number], values[number])
            x = layer.norm2(x + layer.multihead_attn.out_proj(mixed.transpose(1, 2).flatten(2)))
            x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
        return x

    def _self_attention(self, layer: nn.Module, x: Tensor) -> Tensor:
        attention = layer.self_attn
        projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = (_split_heads(part, self.heads) for part in projected.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return attention.out_proj(mixed.transpose(1, 2).flatten(2))


def fold_batch_norms(module: nn.Module) -> None:
    """Merge every batch norm (evaluation statistics) into the convolution before it, in place, in float64."""
    before: nn.Conv2d | None = None
    for name, child in module.named_children():
        fold_batch_norms(child)
        if isinstance(child, nn.BatchNorm2d) and before is not None and isinstance(module, _IN_ORDER):
            _fold(before, child)
            module.add_module(name, nn.Identity())
        last = child[-1] if isinstance(child, nn.Sequential) and len(child) else child
        before = last if isinstance(last, nn.Conv2d) else None


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = 0 if conv.bias is None else conv.bias.double()
    shift = norm.bias.double() + (bias - norm.running_mean.double()) * scale
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)


def _answer(block: FusionBlock, tokens: Tensor, first: int) -> Tensor:
    """A fusion block for the tokens from `first` on: (B, N, C) -> (B, N - first, C)."""
    attention = block.attention
    normed, asking = block.norm1(tokens), tokens[:, first:]
    query, key, value = (
        _split_heads(layer(x), attention.heads)
        for layer, x in (
            (attention.query, normed[:, first:]),
            (attention.key, normed),
            (attention.value, normed),
        )
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    asking = asking + attention.output(mixed.transpose(1, 2).flatten(2))
    return asking + block.mlp(block.norm2(asking))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, D / heads)


def _query(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    width = x.shape[-1]
    return F.linear(x, attention.in_proj_weight[:width], attention.in_proj_bias[:width])


def _key_value(attention: CrossAttention | nn.MultiheadAttention) -> tuple[Tensor, Tensor]:
    """Weight and bias of the map from memory to keys and values."""
    width = attention.in_proj_weight.shape[1]
    return attention.in_proj_weight[width:], attention.in_proj_bias[width:]


def _single_key(attention: CrossAttention) -> tuple[Tensor, Tensor]:
    """Weight and bias of attention to one entry: its softmax is 1, so it is output(value(entry))."""
    width = attention.in_proj_weight.shape[1]
    value, bias = attention.in_proj_weight[2 * width :].double(), attention.in_proj_bias[2 * width :].double()
    output = attention.output
    return output.weight.double() @ value, output.weight.double() @ bias + output.bias.double()


@torch.no_grad()
def _joined(maps: list[tuple[Tensor, Tensor]]) -> nn.Linear:
    """Several linear maps of the same input as one."""
    weight, bias = torch.cat([w for w, _ in maps]).float(), torch.cat([b for _, b in maps]).float()
    joined = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    joined.weight.copy_(weight)
    joined.bias.copy_(bias)
    return joined.requires_grad_(False)
