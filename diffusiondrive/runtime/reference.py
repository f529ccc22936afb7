"""The plain published computation, kept as the yardstick of speed and of equality.

Same weights, no rewrite, in the order of the published code: value maps in every layer of every pass, agents' keys and
values likewise, attention to one ego token as full attention, explicit softmax, batch norms on their own, time
embedding in every pass, tokens resized before the planning map's linear layer, every logit and heading of every layer,
the update after the last pass, auxiliary heads. What is not repeated are accidents of that code which cost host time
(rebuilding the list of timesteps in every call, tests on device tensors).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusiondrive.backbone import Fusion, SelfAttention, resize
from diffusiondrive.decoder import ANCHORS, POSE, CascadeLayer, CrossAttention, point_embedding, time_embedding
from diffusiondrive.encoders import encoder_stages
from diffusiondrive.perception import SceneContext
from diffusiondrive.planner import DiffusionDrive, Plan, choose


class ReferencePlanner(nn.Module):
    """Holds the planner (not a copy) and computes its plan the long way."""

    def __init__(self, planner: DiffusionDrive):
        super().__init__()
        self.planner = planner.eval()

    def forward(self, camera: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> Plan:
        """Features as in `DiffusionDrive`, noise (B, M, T, 2) -> Plan with auxiliary predictions."""
        context = self.perceive(camera, lidar, status)
        poses, logits = self.passes(context, noise)
        mode = logits.argmax(dim=1)
        return Plan(
            trajectory=choose(poses, mode),
            candidates=poses,
            logits=logits,
            mode=mode,
            agents=self.planner.agent_head(context.agents),
            bev_semantic_map=self.planner.semantic_head(context.neck),
        )

    def perceive(self, camera: Tensor, lidar: Tensor, status: Tensor) -> SceneContext:
        perception = self.planner.perception
        coarse, neck = self._backbone(camera, lidar)
        tokens = perception.tokens(coarse, status)
        queries = perception.query_decoder(perception.queries.expand(len(tokens), -1, -1), tokens)
        ego = queries[:, :1] + tokens[:, -1:] if perception.status_to_ego else queries[:, :1]
        cells = tokens[:, :-1].transpose(1, 2).unflatten(2, perception.coarse_size)
        both = torch.cat([resize(cells, neck.shape[-2:]), neck], dim=1)
        plane = perception.map_projection(both.flatten(2).transpose(1, 2))
        return SceneContext(plane.transpose(1, 2).unflatten(2, neck.shape[-2:]), queries[:, 1:], ego, neck)

    def passes(self, context: SceneContext, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The last pass' poses (B, M, T, 3) and logits (B, M)."""
        planner, schedule = self.planner, self.planner.schedule
        sample = planner.initial.start(noise, schedule)
        for label, next_label in zip(schedule.labels, schedule.next_labels, strict=True):
            told = torch.full((len(noise),), label, dtype=torch.int64, device=noise.device)
            poses, logits = self._pass(sample, told, context)
            sample = planner.kernel.step(sample, planner.space.normalise(poses[..., :2]), label, next_label)
        return poses, logits

    def _pass(self, sample: Tensor, label: Tensor, context: SceneContext) -> tuple[Tensor, Tensor]:
        planner, decoder = self.planner, self.planner.decoder
        points = planner.space.denormalise(sample.clamp(-1, 1))
        query = decoder.point_encoder(point_embedding(points, decoder.point_dims))
        time = decoder.time_encoder(time_embedding(label, decoder.width))[:, None]
        base = planner.initial.anchors if decoder.base == ANCHORS else points
        for layer in decoder.layers:
            poses, logits = self._layer(layer, query, points, base, time, context)
            points = base = poses[..., :2]
        return poses, logits

    def _layer(
        self, layer: CascadeLayer, query: Tensor, points: Tensor, base: Tensor, time: Tensor, context: SceneContext
    ) -> tuple[Tensor, Tensor]:
        x = layer.lookup(query, points, layer.lookup.value(context.map))
        x = layer.agents_norm(x + plain_attention(layer.agents, x, context.agents))
        x = layer.ego_norm(x + plain_attention(layer.ego, x, context.ego))
        x = layer.time(layer.feed_forward_norm(layer.feed_forward(x)), time)
        raw = layer.regression(x).unflatten(-1, (layer.poses, POSE))
        poses = torch.cat([base + raw[..., :2], math.pi * raw[..., 2:].tanh()], dim=-1)
        return poses, layer.classification(x).squeeze(-1)

    def _backbone(self, camera: Tensor, lidar: Tensor) -> tuple[Tensor, Tensor]:
        backbone = self.planner.perception.backbone
        encoders = (encoder_stages(encoder) for encoder in (backbone.image_encoder, backbone.lidar_encoder))
        for image_stage, lidar_stage, fusion in zip(*encoders, backbone.fusions, strict=True):
            for module in image_stage:
                camera = module(camera)
            for module in lidar_stage:
                lidar = module(lidar)
            camera, lidar = _fuse(fusion, camera, lidar)
        return lidar, backbone.neck(lidar)


def _fuse(fusion: Fusion, image: Tensor, lidar: Tensor) -> tuple[Tensor, Tensor]:
    tokens = fusion.pooled_tokens(image, lidar)
    for block in fusion.blocks:
        tokens = tokens + plain_self_attention(block.attention, block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
    tokens = fusion.norm(tokens).transpose(1, 2)
    to_image = tokens[:, :, : fusion.image_count].unflatten(2, fusion.image_grid)
    to_lidar = fusion.lidar_out(tokens[:, :, fusion.image_count :].unflatten(2, fusion.lidar_grid))
    return image + resize(to_image, image.shape[-2:]), lidar + resize(to_lidar, lidar.shape[-2:])


def plain_self_attention(attention: SelfAttention, x: Tensor) -> Tensor:
    """(B, N, C) -> (B, N, C)."""
    query, key, value = (layer(x) for layer in (attention.query, attention.key, attention.value))
    return attention.output(_attend(query, key, value, attention.heads))


def plain_attention(attention: CrossAttention, x: Tensor, memory: Tensor) -> Tensor:
    """Queries from x (B, M, D), keys and values from memory (B, A, D) -> (B, M, D)."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    inputs = (x, memory, memory)
    query, key, value = (F.linear(i, w, b) for i, w, b in zip(inputs, weights, biases, strict=True))
    return attention.output(_attend(query, key, value, attention.heads))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)
