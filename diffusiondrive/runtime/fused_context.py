"""Coarse map to what the denoiser reads, in fused kernels: tokens, query decoder, agents, ego, planning map.

Same numbers as `Encoder` behind its backbone, up to rounding. Every layer norm is read where its result is needed:
tensors between layers are sums before their norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusiondrive.runtime.encoder import BORDER, Encoder, QueryDecoder
from diffusiondrive.runtime.fused_backbone import FusedNeck, SideStream, as_tokens
from diffusiondrive.runtime.kernels.attention import attend
from diffusiondrive.runtime.kernels.linear import FusedLinear, Norm
from diffusiondrive.runtime.kernels.maps import planning_map


class FusedScene(NamedTuple):
    """What the denoiser reads. L cascade layers, D features.

    map: (B, H + 4, W + 4, D); agents: (B, A, L · 2 · D) keys and values of every layer; ego: (B, 1, L · D)
    """

    map: Tensor
    agents: Tensor
    ego: Tensor


class FusedContext:
    """Coarse map (B, C, h, w) and status -> FusedScene; queries and neck for auxiliary heads."""

    def __init__(self, encoder: Encoder, batch: int, neck_options: dict[str, object], options: dict[str, object]):
        """neck_options: of the neck (the backbone's type); options: of everything else (float32)."""
        perception = encoder.perception
        self.grid = perception.coarse_size
        self.positions = perception.positions.detach().contiguous()
        self.project = FusedLinear.of(perception.token_projection, **options)
        self.status = FusedLinear.of(perception.status_projection, **options)
        self.queries = FusedQueries(encoder.queries, options)
        self.status_to_ego = perception.status_to_ego
        self.to_agents = FusedLinear.of(encoder.to_agents, **options)
        self.to_ego = FusedLinear.of(encoder.to_ego, **options)
        self.neck = FusedNeck(encoder.neck, neck_options)
        linear, _, norm = perception.map_projection
        width = self.positions.shape[1]
        to_tokens, to_neck = linear.weight.detach().split([width, linear.weight.shape[1] - width], dim=1)
        self.to_coarse = FusedLinear(to_tokens, **options)
        self.to_neck, self.map_norm = FusedLinear(to_neck, linear.bias, **options), Norm.of(norm)
        rows, columns = encoder.neck.map_size
        # Kernels fill the inside; the border of zeros stays.
        self.map = torch.zeros(batch, rows + 2 * BORDER, columns + 2 * BORDER, width, device=self.positions.device)
        self.side = SideStream()

    def __call__(self, coarse: Tensor, status: Tensor) -> tuple[FusedScene, Tensor, Tensor]:
        tokens = self._tokens(coarse, status)
        with self.side.beside(tokens):
            neck = self.neck(coarse)
            of_tokens = self.to_coarse(tokens[:, :-1])
            plane = planning_map(neck, self.to_neck, of_tokens, self.grid, self.map_norm, self.map, BORDER)
        queries = self.queries(tokens)
        ego = queries[:, :1] + tokens[:, -1:] if self.status_to_ego else queries[:, :1]
        agents, of_ego = self.to_agents(queries[:, 1:]), self.to_ego(ego)
        self.side.join(tokens)
        return FusedScene(plane, agents, of_ego), queries, neck

    def _tokens(self, coarse: Tensor, status: Tensor) -> Tensor:
        tokens = torch.empty(len(coarse), *self.positions.shape, device=coarse.device)
        self.project(as_tokens(coarse), residual=self.positions[None, :-1], out=tokens[:, :-1])
        self.status(status[:, None].contiguous(), residual=self.positions[None, -1:], out=tokens[:, -1:])
        return tokens


class FusedQueries:
    """`encoder.QueryDecoder`."""

    def __init__(self, decoder: QueryDecoder, options: dict[str, object]):
        self.to_memory = FusedLinear.of(decoder.to_memory, **options)
        self.start, self.start_query = decoder.start.contiguous(), decoder.start_query.contiguous()
        before: list[Norm | None] = [None, *(Norm.of(layer.norm3) for layer in decoder.layers[:-1])]
        self.layers = [
            FusedQueryLayer(layer, norm, decoder.heads, options)
            for layer, norm in zip(decoder.layers, before, strict=True)
        ]
        self.norm = Norm.of(decoder.layers[-1].norm3)

    def __call__(self, memory: Tensor) -> Tensor:
        """Memory (B, N, D) -> queries (B, Q, D)."""
        pairs = self.to_memory(memory).chunk(2 * len(self.layers), dim=2)
        x = self.layers[0].look(self.start_query, self.start, pairs[0], pairs[1], first=True)
        for number, layer in enumerate(self.layers[1:], 1):
            x = layer(x, pairs[2 * number], pairs[2 * number + 1])
        return self.norm(x)


class FusedQueryLayer:
    """A post-norm decoder layer from sum to sum: the norm before it is read on the way in."""

    def __init__(self, layer: nn.TransformerDecoderLayer, before: Norm | None, heads: int, options: dict[str, object]):
        self.heads, self.before, self.precision = heads, before, str(options["precision"])
        own, cross = layer.self_attn, layer.multihead_attn
        self.after_own, self.after_cross = Norm.of(layer.norm1), Norm.of(layer.norm2)
        self.project = FusedLinear(own.in_proj_weight, own.in_proj_bias, before, **options)
        self.own_output = FusedLinear.of(own.out_proj, **options)
        width = cross.embed_dim
        self.ask = FusedLinear(cross.in_proj_weight[:width], cross.in_proj_bias[:width], self.after_own, **options)
        self.cross_output = FusedLinear.of(cross.out_proj, **options)
        self.up = FusedLinear.of(layer.linear1, self.after_cross, **options)
        self.down = FusedLinear.of(layer.linear2, **options)

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Sums (B, Q, D) before norm 3 of the layer before -> sums before this one's."""
        query, key, value = self.project(x).chunk(3, dim=2)
        x = self.own_output(
            attend(query, key, value, self.heads, self.precision), residual=x, residual_norm=self.before
        )
        return self.look(x, x, keys, values)

    def look(self, x: Tensor, residual: Tensor, keys: Tensor, values: Tensor, first: bool = False) -> Tensor:
        """Cross-attention and feed-forward. first: x are queries already, and the residual is normed already."""
        mixed = attend(x, keys, values, self.heads, self.precision, None if first else self.ask)
        x = self.cross_output(mixed, residual=residual, residual_norm=None if first else self.after_own)
        return self.down(self.up(x, relu=True), residual=x, residual_norm=self.after_cross)
