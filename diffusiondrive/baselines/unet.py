"""The conditional 1-D U-Net of diffusion policies as a denoiser of trajectories.

    points (B·M, T, 2) ─ level 1 ─ down ─ level 2 ─ down ─ level 3 ─ middle ─┐       T → T/2 → T/4
                                       │             └──────── skip ─── up 2 ┤
                                       └───────── skip ────────────── up 1 ──┴─ x, y, heading  (and a logit)

Every block is told the level and the scene; of the scene it sees the ego query alone. With anchors it is the paper's
intermediate planner (truncated diffusion, 2 passes, a logit for each mode); without, the vanilla diffusion policy (20
passes from pure noise, samples that nothing ranks).

Sources: Diffusion Policy (arXiv 2303.04137) for the network; DiffusionDrive (arXiv 2411.15139), table 2, for its two
uses. How the paper conditioned it and what it predicted was not published; what is chosen here is in docs/baselines.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffusiondrive.decoder import ANCHORS, POINTS, POSE, Denoised, classification_branch, time_embedding
from diffusiondrive.perception import SceneContext
from diffusiondrive.space import TrajectorySpace
from navsim_eval.errors import UserError

ORIGIN = "origin"


@dataclass
class UNetConfig:
    """Sizes of the U-Net.

    channels: of its levels; each but the last halves the number of poses;  groups: of the group norms
    scale: blocks are told by scale and bias (else by bias alone)
    base: what the predicted x, y are relative to: `origin` (the normalised plan itself, as in diffusion policies), or,
        with anchors only, the noisy `points` or the clean `anchors` (see `DecoderConfig.base`)
    """

    channels: tuple[int, ...] = (256, 512, 1024)
    groups: int = 8
    scale: bool = True
    base: str = ORIGIN

    def __post_init__(self) -> None:
        self.channels = tuple(self.channels)
        if self.base not in (ORIGIN, POINTS, ANCHORS):
            raise UserError(f"unet.base: '{self.base}' is none of {ORIGIN}, {POINTS}, {ANCHORS}")
        if len(self.channels) < 2:
            raise UserError(f"unet.channels: {self.channels} are fewer than two levels")
        if bad := [width for width in self.channels if width % self.groups]:
            raise UserError(f"unet.groups: {self.groups} does not divide the channels {bad}")


@dataclass(frozen=True)
class UNetCache:
    """What no pass changes: the ego query (B, D), and the anchors (M, T, 2) [m] if they are the base."""

    ego: Tensor
    anchors: Tensor | None


class UNetDenoiser(nn.Module):
    """`prepare` once a scene, `denoise` once a pass; the same interface as the cascade decoder.

    anchored: samples are modes around anchors: clamped to the normalised range as in the cascade, and given logits
    """

    def __init__(self, space: TrajectorySpace, width: int, poses: int, anchored: bool, config: UNetConfig):
        super().__init__()
        shrink = 2 ** (len(config.channels) - 1)
        if poses % shrink:
            levels = len(config.channels)
            raise UserError(f"unet.channels: {levels} levels need a multiple of {shrink} poses, and there are {poses}")
        if config.base != ORIGIN and not anchored:
            raise UserError(f"unet.base: '{config.base}' needs anchors, and this planner starts from pure noise")
        self.space, self.width, self.base, self.anchored = space, width, config.base, anchored
        self.time_encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.network = UNet(2, POSE, 2 * width, config)
        self.classification = classification_branch(config.channels[0]) if anchored else None

    def prepare(self, context: SceneContext, anchors: Tensor | None) -> UNetCache:
        """Everything that no pass changes. anchors: (M, T, 2) of the modes that will be denoised, metres."""
        return UNetCache(context.ego[:, 0], anchors if self.base == ANCHORS else None)

    def denoise(self, sample: Tensor, label: Tensor, cache: UNetCache) -> Denoised:
        """One pass. sample: (B, M, T, 2) normalised. label: (B,) or (1,) level that the network is told."""
        batch, modes = sample.shape[:2]
        bounded = sample.clamp(-1, 1)
        points = self.space.denormalise(bounded)
        time = self.time_encoder(time_embedding(label, self.width)).expand(batch, -1)
        condition = torch.cat([time, cache.ego], dim=-1)  # (B, 2 D)
        seen = bounded if self.anchored else sample
        raw, features = self.network(seen.flatten(0, 1), condition)  # (B·M, T, 3), (B·M, T, C)
        raw = raw.to(points.dtype).unflatten(0, (batch, modes))  # (B, M, T, 3)
        poses = torch.cat([self._metres(raw[..., :2], points, cache), math.pi * raw[..., 2:].tanh()], dim=-1)
        if self.classification is None:
            return Denoised(points, (poses,), (poses.new_zeros(batch, modes),))
        logits = self.classification(features.mean(dim=1)).view(batch, modes)
        return Denoised(points, (poses,), (logits,))

    def _metres(self, raw: Tensor, points: Tensor, cache: UNetCache) -> Tensor:
        if self.base == ORIGIN:
            return self.space.denormalise(raw)
        return raw + (points if cache.anchors is None else cache.anchors)


class UNet(nn.Module):
    """Sequences (B·M, T, inputs), M of each scene, and the scenes' conditions (B, K) -> (B·M, T, outputs), and the
    features before the last layer."""

    def __init__(self, inputs: int, outputs: int, condition: int, config: UNetConfig):
        super().__init__()

        def pair(before: int, after: int) -> nn.ModuleList:
            blocks = ((before, after), (after, after))
            return nn.ModuleList(ConditionedBlock(a, b, condition, config) for a, b in blocks)

        widths = [inputs, *config.channels]
        levels = list(pairwise(widths))
        top = widths[-1]
        self.down = nn.ModuleList(pair(before, after) for before, after in levels)
        self.shrink = nn.ModuleList(PoseConv(after, after, 3, stride=2, padding=1) for _, after in levels[:-1])
        self.middle = pair(top, top)
        self.up = nn.ModuleList(pair(2 * after, before) for before, after in reversed(levels[1:]))
        self.grow = nn.ModuleList(
            PoseGrow(before, before, 4, stride=2, padding=1) for before, _ in reversed(levels[1:])
        )
        self.last = conv_block(widths[1], widths[1], config.groups)
        self.output = PoseConv(widths[1], outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x, condition)
            skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        for block in self.middle:
            x = block(x, condition)
        # The skip of the first level is never read: the published network has one way up less than ways down.
        for blocks, grow, skip in zip(self.up, self.grow, reversed(skips[1:]), strict=True):
            x = torch.cat([x, skip], dim=-1)
            for block in blocks:
                x = block(x, condition)
            x = grow(x)
        features = self.last(x)
        return self.output(features), features


class ConditionedBlock(nn.Module):
    """Two convolutions with a shortcut; between them, the condition scales and shifts every channel."""

    def __init__(self, before: int, after: int, condition: int, config: UNetConfig):
        super().__init__()
        self.first = conv_block(before, after, config.groups)
        self.second = conv_block(after, after, config.groups)
        self.scale = config.scale
        self.condition = nn.Sequential(nn.Mish(), nn.Linear(condition, (2 if config.scale else 1) * after))
        self.shortcut = PoseConv(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B·M, T, C), condition (B, K) -> (B·M, T, C')."""
        told = self.condition(condition).repeat_interleave(len(x) // len(condition), dim=0)[:, None]
        hidden = self.first(x)
        if self.scale:
            scale, bias = told.chunk(2, dim=-1)
            hidden = scale * hidden + bias
        else:
            hidden = hidden + told
        return self.second(hidden) + self.shortcut(x)


def conv_block(before: int, after: int, groups: int) -> nn.Sequential:
    """Convolution over three poses, group norm, Mish."""
    return nn.Sequential(PoseConv(before, after, 3, padding=1), PoseNorm(groups, after), nn.Mish())


class PoseConv(nn.Conv1d):
    """Convolution over poses, (N, T, C) -> (N, T', C'), as one matrix product: with eight poses or fewer the library's
    own convolution takes twice as long on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        (width,), (stride,), (padding,) = self.kernel_size, self.stride, self.padding
        poses = (x.shape[1] + 2 * padding - width) // stride + 1
        padded = nn.functional.pad(x, (0, 0, padding, padding))
        seen = [padded[:, first : first + stride * (poses - 1) + 1 : stride] for first in range(width)]
        weight = self.weight.permute(0, 2, 1).flatten(1)  # (C', width · C)
        return nn.functional.linear(torch.cat(seen, dim=-1), weight, self.bias)


class PoseNorm(nn.GroupNorm):
    """Group norm of (N, T, C) over poses and the channels of a group."""

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unsqueeze(2)  # one row of pixels, channels last: no copy
        return super().forward(image).squeeze(2).transpose(1, 2)


class PoseGrow(nn.ConvTranspose1d):
    """Transposed convolution over poses, (N, T, C) -> (N, T', C')."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2).contiguous()
