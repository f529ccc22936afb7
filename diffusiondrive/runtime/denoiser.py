"""The two decoder passes for inference: a scene and noise in, proposals out.

Same numbers as `sampler.sample` with `CascadeDecoder.denoise`, up to float32 rounding:

* the value map's 3×3 convolution is evaluated at the four corners of each bilinear look-up only. Four corners are a
  2×2 tile that depends on 4×4 cells, which is exactly the tile of Winograd's F(2×2, 3×3) (winograd.py): 16
  products a channel pair instead of 36, and 160 tiles instead of 1024;
* scale and shift of the time modulation are constants of (layer, label), merged into the affine part of the norm
  before them;
* the noise-free part of the start, √ᾱ n(anchors), is a constant;
* logits of all but the last layer of the last pass, and headings of the same, are not computed: nothing reads them.

No operation depends on a value on the host, so a GPU never waits for it.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusiondrive.decoder import ANCHORS, POSE, CascadeLayer, MapLookup, point_embedding, time_embedding
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.encoder import BORDER, EncodedScene
from diffusiondrive.runtime.winograd import TILE, TO_OUTPUT, TO_PRODUCT, product_weight


class Denoiser(nn.Module):
    """Made from a planner, whose weights it copies; inference only, float32. The schedule is the planner's."""

    def __init__(self, planner: DiffusionDrive):
        super().__init__()
        decoder = copy.deepcopy(planner.decoder).eval()
        self.space, self.schedule, self.kernel = decoder.space, copy.deepcopy(planner.schedule), planner.kernel
        self.selector = planner.selector
        self.width, self.point_dims, self.from_anchors = decoder.width, decoder.point_dims, decoder.base == ANCHORS
        self.point_encoder, self.time_encoder = decoder.point_encoder, decoder.time_encoder
        self.layers = nn.ModuleList(DenoiserLayer(layer) for layer in decoder.layers)
        anchors = planner.initial.anchors.detach()
        self.register_buffer("anchors", anchors.clone())
        self.register_buffer("clean_start", self._clean_start(anchors))
        labels = torch.tensor(self.schedule.labels, device=anchors.device)
        with torch.no_grad():
            self.register_buffer("modulation", self.time_modulation(labels))

    def forward(
        self, scene: EncodedScene, noise: Tensor, anchors: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """noise (B, M, T, 2) standard normal -> poses (B, M, T, 3) [m, m, rad] and logits (B, M).

        anchors (M, T, 2) [m] and labels (K,) int64, one a pass, replace the planner's own (an exported graph takes
        them as inputs); otherwise what follows from them is a constant.
        """
        clean = self.clean_start if anchors is None else self._clean_start(anchors)
        modulation = self.modulation if labels is None else self.time_modulation(labels)
        base = (self.anchors if anchors is None else anchors) if self.from_anchors else None
        sample = clean + self.schedule.noise(self.schedule.start_level) * noise
        steps = list(zip(self.schedule.labels, self.schedule.next_labels, strict=True))
        for number, (label, next_label) in enumerate(steps[:-1]):
            points = self._pass(sample, base, modulation[number], scene)
            sample = self.kernel.step(sample, self.space.normalise(points), label, next_label)
        return self._last_pass(sample, base, modulation[-1], scene)

    def time_modulation(self, labels: Tensor) -> Tensor:
        """labels (K,) -> (K, L, 2, D): gain and shift that replace the affine part of each layer's last norm."""
        time = F.mish(self.time_encoder(time_embedding(labels, self.width)))
        return torch.stack([layer.modulation(time) for layer in self.layers], dim=1)

    def _pass(self, sample: Tensor, base: Tensor | None, modulation: Tensor, scene: EncodedScene) -> Tensor:
        """Points (B, M, T, 2) [m] that the last layer says."""
        points, query = self._query(sample)
        base = points if base is None else base
        for number, layer in enumerate(self.layers):
            x = layer(query, points, modulation[number], scene, number)
            points = base = base + layer.raw_poses(x)[..., :2]
        return points

    def _last_pass(
        self, sample: Tensor, base: Tensor | None, modulation: Tensor, scene: EncodedScene
    ) -> tuple[Tensor, Tensor]:
        points, query = self._query(sample)
        base = points if base is None else base
        for number, layer in enumerate(self.layers[:-1]):
            x = layer(query, points, modulation[number], scene, number)
            points = base = base + layer.raw_poses(x)[..., :2]
        last = self.layers[-1]
        x = last(query, points, modulation[-1], scene, len(self.layers) - 1)
        raw = last.raw_poses(x)
        poses = torch.cat([base + raw[..., :2], math.pi * raw[..., 2:].tanh()], dim=-1)
        return poses, last.classification(x).squeeze(-1)

    def _query(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        points = self.space.denormalise(sample.clamp(-1, 1))
        return points, self.point_encoder(point_embedding(points, self.point_dims))

    def _clean_start(self, anchors: Tensor) -> Tensor:
        return self.schedule.signal(self.schedule.start_level) * self.space.normalise(anchors)


class DenoiserLayer(nn.Module):
    """`CascadeLayer` on an encoded scene."""

    def __init__(self, layer: CascadeLayer):
        super().__init__()
        self.lookup = CornerLookup(layer.lookup)
        self.agents, self.agents_norm, self.ego_norm = layer.agents, layer.agents_norm, layer.ego_norm
        self.feed_forward, self.feed_forward_norm = layer.feed_forward, layer.feed_forward_norm
        self.scale_shift = layer.time.scale_shift
        self.classification, self.regression, self.poses = layer.classification, layer.regression, layer.poses

    def forward(self, query: Tensor, points: Tensor, modulation: Tensor, scene: EncodedScene, number: int) -> Tensor:
        """query (B, M, D), points (B, M, T, 2) [m], modulation (2, D) -> (B, M, D) after cascade layer `number`."""
        x = self.lookup(query, points, scene.map)
        keys, values = scene.agent_keys[:, number], scene.agent_values[:, number]
        x = self.agents_norm(x + self.agents(x, keys, values))
        x = self.ego_norm(x + scene.ego[:, number, None])
        norm = self.feed_forward_norm
        return F.layer_norm(self.feed_forward(x), norm.normalized_shape, modulation[0], modulation[1], norm.eps)

    def raw_poses(self, x: Tensor) -> Tensor:
        """(B, M, T, 3): offsets [m], and the heading before its tanh."""
        return self.regression(x).unflatten(-1, (self.poses, POSE))

    def modulation(self, time: Tensor) -> Tensor:
        """Mish of time embeddings (K, D) -> gain and shift (K, 2, D)."""
        scale, shift = self.scale_shift(time).chunk(2, dim=-1)
        norm = self.feed_forward_norm
        return torch.stack([norm.weight * (1 + scale), norm.bias * (1 + scale) + shift], dim=1)


class CornerLookup(nn.Module):
    """`MapLookup` without a value map: ReLU(3×3 convolution) only at the corners of the look-ups."""

    def __init__(self, lookup: MapLookup):
        super().__init__()
        self.range_m = lookup.range_m
        self.point_weights, self.output = lookup.point_weights, lookup.output
        conv = lookup.value[0]
        self.register_buffer("product_weight", product_weight(conv.weight))  # (16, D in, D out)
        self.register_buffer("bias", conv.bias.detach().clone())
        for name, matrix in (("to_product", TO_PRODUCT), ("to_output", TO_OUTPUT)):
            one = conv.weight.new_tensor(matrix)
            self.register_buffer(name, torch.kron(one, one))  # (16, 16), (4, 16)

    def forward(self, query: Tensor, points: Tensor, plane: Tensor) -> Tensor:
        """query (B, M, D), points (B, M, T, 2) [m], planning map with its border (B, H + 4, W + 4, D) -> (B, M, D)."""
        cells, corner_weights = self._locate(points, plane)  # (16, B · M · T), (4, B, M, T)
        patches = F.embedding(cells, plane.flatten(0, 2))  # (16, B · M · T, D)
        products = torch.bmm((self.to_product @ patches.flatten(1)).view_as(patches), self.product_weight)
        values = (self.to_output @ products.flatten(1)).view(4, *points.shape[:3], -1) + self.bias
        weights = corner_weights * self.point_weights(query).softmax(-1)
        return query + self.output((values.relu() * weights[..., None]).sum((0, 3)))

    def _locate(self, points: Tensor, plane: Tensor) -> tuple[Tensor, Tensor]:
        """For each point: flat indices of the 4×4 cells around it, and the weights of its four corners (row-major)."""
        batch, rows, columns = plane.shape[0], plane.shape[1], plane.shape[2]
        row, row_weights = self._axis(points[..., 0], rows - 2 * BORDER)
        column, column_weights = self._axis(points[..., 1], columns - 2 * BORDER)
        scene = torch.arange(batch, device=points.device).view(-1, 1, 1) * rows
        step = torch.arange(TILE, device=points.device).view(-1, 1, 1, 1)
        line = (scene + row + step) * columns  # (4, B, M, T)
        cells = line[:, None] + (column + step)[None]  # (4, 4, B, M, T)
        weights = row_weights[:, None] * column_weights[None]  # (2, 2, B, M, T)
        return cells.flatten(2).flatten(0, 1), weights.flatten(0, 1)

    def _axis(self, coordinate: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        """First of four cells (counted with the border), and weights (2, …) of the two in the middle, zero outside.

        `grid_sample` with zero padding and align_corners=False.
        """
        position = ((coordinate / self.range_m + 1) * cells - 1) / 2
        position = position.nan_to_num(nan=-1.0).clamp(-1, cells)  # an index made from NaN would end a CUDA context
        lower = position.floor().clamp(max=cells - 1)
        upper_weight = position - lower
        inside_lower, inside_upper = lower >= 0, lower <= cells - 2
        weights = torch.stack([(1 - upper_weight) * inside_lower, upper_weight * inside_upper])
        return lower.to(torch.int64) + (BORDER - 1), weights
