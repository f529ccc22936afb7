"""The two decoder passes in fused kernels: a scene and noise in, the plan's row of numbers out.

Same numbers as `denoiser.Denoiser` with `program.pack`, up to rounding; float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusiondrive.runtime.denoiser import Denoiser, DenoiserLayer
from diffusiondrive.runtime.fused_context import FusedScene
from diffusiondrive.runtime.kernels.attention import attend
from diffusiondrive.runtime.kernels.linear import FusedLinear, Norm
from diffusiondrive.runtime.kernels.lookup import FusedLookup
from diffusiondrive.runtime.kernels.points import Levels, PointEmbedding, finish


class FusedDenoiser:
    """Made from a denoiser on its device, whose weights it copies."""

    def __init__(self, denoiser: Denoiser, options: dict[str, object]):
        schedule = denoiser.schedule
        at = [(float(schedule.signal(n)), float(schedule.noise(n))) for n in schedule.labels]
        then = [(float(schedule.signal(n)), float(schedule.noise(n))) for n in schedule.next_labels]
        start = float(schedule.signal(schedule.start_level)), float(schedule.noise(schedule.start_level))
        levels = Levels(start, tuple((*a, *b) for a, b in zip(at, then, strict=True)))
        space = denoiser.space
        self.embedding = PointEmbedding(space.origin, space.span, denoiser.point_dims, levels)
        self.clean = space.normalise(denoiser.anchors).contiguous()
        self.anchors = denoiser.anchors[None].contiguous() if denoiser.from_anchors else None
        first, _, norm, second = denoiser.point_encoder
        self.encode = FusedLinear.of(first, **options), FusedLinear.of(second, Norm.of(norm), **options)
        self.passes = [
            [FusedLayer(layer, modulation[number], number, options) for number, layer in enumerate(denoiser.layers)]
            for modulation in denoiser.modulation
        ]

    def __call__(self, scene: FusedScene, noise: Tensor) -> Tensor:
        """noise (B, M, T, 2) -> (B, length)."""
        sample, points, features = self.embedding.start(noise, self.clean)
        for number, layers in enumerate(self.passes[:-1]):
            points = self._pass(layers, points, features, scene)
            sample, points, features = self.embedding.step(sample, points, number)
        return self._last_pass(self.passes[-1], points, features, scene)

    def _pass(self, layers: list[FusedLayer], points: Tensor, features: Tensor, scene: FusedScene) -> Tensor:
        query = self._query(features)
        base = points if self.anchors is None else self.anchors
        for layer in layers:
            points = base = layer.move(layer(query, points, scene), base)
        return points

    def _last_pass(self, layers: list[FusedLayer], points: Tensor, features: Tensor, scene: FusedScene) -> Tensor:
        query = self._query(features)
        base = points if self.anchors is None else self.anchors
        for layer in layers[:-1]:
            points = base = layer.move(layer(query, points, scene), base)
        last = layers[-1]
        x = last(query, points, scene)
        raw, logits = last.poses_and_logits(x)
        return finish(raw, base, logits)

    def _query(self, features: Tensor) -> Tensor:
        first, second = self.encode
        return second(first(features, relu=True))


class FusedLayer:
    """One cascade layer in one pass: the label's gain and shift are in the weights that read its last norm."""

    def __init__(self, layer: DenoiserLayer, modulation: Tensor, number: int, options: dict[str, object]):
        width = layer.agents_norm.normalized_shape[0]
        self.number, self.width, self.heads = number, width, layer.agents.heads
        self.precision = str(options["precision"])
        self.lookup = FusedLookup(layer.lookup, **options)
        self.seen = FusedLinear.of(layer.lookup.output, **options)
        agents = layer.agents
        self.ask = FusedLinear(agents.in_proj_weight[:width], agents.in_proj_bias[:width], **options)
        self.answer = FusedLinear.of(agents.output, **options)
        self.agents_norm, ego_norm = Norm.of(layer.agents_norm), Norm.of(layer.ego_norm)
        self.up = FusedLinear.of(layer.feed_forward[0], ego_norm, **options)
        self.down = FusedLinear.of(layer.feed_forward[2], **options)
        last = Norm(modulation[0].contiguous(), modulation[1].contiguous(), layer.feed_forward_norm.eps)
        first, second, raw = layer.regression[0], layer.regression[2], layer.regression[4]
        self.moves = FusedLinear.of(first, last, **options), FusedLinear.of(second, **options)
        planar = torch.arange(len(raw.weight), device=raw.weight.device) % 3 < 2  # without headings
        self.points = FusedLinear(raw.weight[planar], raw.bias[planar], **options)
        self.raw = FusedLinear.of(raw, **options)
        first, _, norm, second, _, final_norm, final = layer.classification
        self.rank = (
            FusedLinear.of(first, last, **options),
            FusedLinear.of(second, Norm.of(norm), **options),
            FusedLinear.of(final, Norm.of(final_norm), **options),
        )

    def __call__(self, query: Tensor, points: Tensor, scene: FusedScene) -> Tensor:
        """query (B, M, D), points (B, M, T, 2) [m] -> (B, M, D) before the layer's last norm."""
        x = self.seen(self.lookup(query, points, scene.map), residual=query)
        start = 2 * self.number * self.width
        keys, values = (scene.agents[..., a : a + self.width] for a in (start, start + self.width))
        x = self.answer(attend(x, keys, values, self.heads, self.precision, self.ask), residual=x)
        ego = scene.ego[..., self.number * self.width : (self.number + 1) * self.width]
        return self.down(self.up(x, relu=True, before=(self.agents_norm, ego)))

    def move(self, x: Tensor, base: Tensor) -> Tensor:
        """Points (B, M, T, 2) [m] that the layer says, from `base` (B or 1, M, T, 2)."""
        moved = self.points(self._features(x), residual=base.flatten(2))
        return moved.unflatten(2, (-1, 2))

    def poses_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets and headings before their tanh (B, M, 3 T), logits (B, M, 1)."""
        first, second, third = self.rank
        return self.raw(self._features(x)), third(second(first(x, relu=True), relu=True))

    def _features(self, x: Tensor) -> Tensor:
        first, second = self.moves
        return second(first(x, relu=True), relu=True)
