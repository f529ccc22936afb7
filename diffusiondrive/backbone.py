"""Two image encoders, camera and LiDAR, that exchange information after each of four stages.

    camera (B,3,256,1024) ─ stem ─ stage 1 ─┬─ stage 2 ─┬─ stage 3 ─┬─ stage 4 ─┐
                                        fusion 1    fusion 2    fusion 3    fusion 4
    lidar  (B,1,256,256)  ─ stem ─ stage 1 ─┴─ stage 2 ─┴─ stage 3 ─┴─ stage 4 ─┴─ coarse (B,512,8,8)
                                                                                     └─ neck ─ fine (B,64,64,64)

Each fusion pools both maps to a token grid, runs a small transformer over all tokens, and adds the resized result back
to both maps (TransFuser, arXiv 2205.15997). Sizes in this docstring are those of the published planner.

LiDAR maps keep the orientation of the LiDAR image: row 0 is 32 m behind the ego, column 0 is 32 m to its right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusiondrive.encoders import (
    STAGES,
    TIMM_WEIGHTS,
    build_encoder,
    encoder_channels,
    encoder_stages,
    encoder_stride,
)
from navsim_eval.errors import UserError


@dataclass
class BackboneConfig:
    """Sizes of the two branches. Sizes of images and grids are (rows, columns).

    encoder: timm model of both branches: a ResNet, RegNet, ConvNeXt or plain ViT; see `encoders.build_encoder`
    image_weights: start of the camera branch: `timm` (hub cache, else download), a local .safetensors/.pth file, or
        `none` (random); see `encoders.load_image_weights`
    lidar: off, one learned image takes the place of every LiDAR image (TransFuser's latent variant: camera only)
    stage_blocks, stage_channels: override of the encoder's blocks and channels per stage; empty keeps timm's
    stem_width: > 0 replaces the 7×7 stem by three 3×3 convolutions (stem_width, stem_width, 2·stem_width); 0 keeps it
    output_stride: of the last stage, where it is to be less than 32 (dilated instead of strided; ResNets): 16 or 8
    image_size, lidar_size: of `camera_feature` and `lidar_feature`
    image_tokens, lidar_tokens: token grids of the fusion transformers
    fusion_blocks, fusion_heads, fusion_expansion, fusion_dropout: of each of the four fusion transformers
    neck_channels, map_size: of the fine map that the neck makes from the coarse one
    channels_last: memory layout of all maps. Small planners on CPUs run 1.2 times faster with it; but there torch's
        batch norm then sums its statistics less exactly (1e-6 instead of 1e-7 after a pass)
    """

    encoder: str = "resnet34"
    image_weights: str = TIMM_WEIGHTS
    lidar: bool = True
    stage_blocks: tuple[int, ...] = ()
    stage_channels: tuple[int, ...] = ()
    stem_width: int = 0
    output_stride: int = 32
    image_size: tuple[int, int] = (256, 1024)
    image_channels: int = 3
    lidar_size: tuple[int, int] = (256, 256)
    lidar_channels: int = 1
    image_tokens: tuple[int, int] = (8, 32)
    lidar_tokens: tuple[int, int] = (8, 8)
    fusion_blocks: int = 2
    fusion_heads: int = 4
    fusion_expansion: int = 4
    fusion_dropout: float = 0.1
    neck_channels: int = 64
    map_size: tuple[int, int] = (64, 64)
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("stage_blocks", "stage_channels", "image_size", "lidar_size", "image_tokens", "lidar_tokens"):
            setattr(self, name, tuple(getattr(self, name)))
        self.map_size = tuple(self.map_size)
        for name in ("image_size", "lidar_size", "image_tokens", "lidar_tokens", "map_size"):
            if len(getattr(self, name)) != 2:
                raise UserError(f"backbone.{name}: {getattr(self, name)} is not (rows, columns)")
        for name in ("stage_blocks", "stage_channels"):
            given = getattr(self, name)
            if len(given) not in (0, STAGES):
                raise UserError(f"backbone.{name}: {given} has not one number for each of {STAGES} stages")


class FusionBackbone(nn.Module):
    """Camera and LiDAR images in; coarse fused BEV map and fine neck map out."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.channels_last = config.channels_last
        self.image_encoder = build_encoder(config, config.image_channels, config.image_size)
        self.lidar_encoder = build_encoder(config, config.lidar_channels, config.lidar_size)
        self.channels, stride = encoder_channels(self.image_encoder), encoder_stride(self.image_encoder)
        check_grids(config, self.channels, stride)
        self.coarse_size = config.lidar_size[0] // stride, config.lidar_size[1] // stride
        # In the place of the LiDAR: an image that is learnt, the same for every scene.
        self.latent = None if config.lidar else nn.Parameter(torch.randn(1, config.lidar_channels, *config.lidar_size))
        self.fusions = nn.ModuleList(Fusion(channels, config) for channels in self.channels)
        self.neck = Neck(self.channels[-1], config)

    @property
    def coarse_channels(self) -> int:
        return self.channels[-1]

    def forward(self, camera: Tensor, lidar: Tensor | None) -> tuple[Tensor, Tensor]:
        """camera (B, 3, H, W) in [0, 1], lidar (B, 1, h, w) -> coarse (B, C, h/32, w/32), fine (B, neck, *map_size).

        A camera-only backbone does not read `lidar`, which may be None.
        """
        if self.latent is not None:
            lidar = self.latent.expand(len(camera), -1, -1, -1)
        if self.channels_last:
            camera, lidar = (x.contiguous(memory_format=torch.channels_last) for x in (camera, lidar))
        stages = zip(encoder_stages(self.image_encoder), encoder_stages(self.lidar_encoder), self.fusions, strict=True)
        for image_stage, lidar_stage, fusion in stages:
            for module in image_stage:
                camera = module(camera)
            for module in lidar_stage:
                lidar = module(lidar)
            camera, lidar = fusion(camera, lidar)
        return lidar, self.neck(lidar)


def check_grids(config: BackboneConfig, channels: tuple[int, ...], stride: int) -> None:
    """Whether images, token grids and heads fit an encoder of these channels and this stride. Raises UserError."""
    for branch in ("image", "lidar"):
        size, tokens = getattr(config, f"{branch}_size"), getattr(config, f"{branch}_tokens")
        coarse = tuple(length // stride for length in size)
        if any(length % stride for length in size):
            raise UserError(f"backbone.{branch}_size: {size} is no multiple of the encoder's stride ({stride})")
        if any(cells < grid or cells % grid for cells, grid in zip(coarse, tokens, strict=True)):
            raise UserError(
                f"backbone.{branch}_tokens: grid {tokens} does not divide the last map {coarse} "
                f"({branch}_size {size} / stride {stride} of {config.encoder})"
            )
    if bad := [width for width in channels if width % config.fusion_heads]:
        raise UserError(f"backbone.fusion_heads: {config.fusion_heads} does not divide the channels {bad}")


class Fusion(nn.Module):
    """One exchange between the branches: tokens of both maps through a transformer, added back to both."""

    def __init__(self, channels: int, config: BackboneConfig):
        super().__init__()
        self.image_grid, self.lidar_grid = config.image_tokens, config.lidar_tokens
        self.image_count = self.image_grid[0] * self.image_grid[1]
        count = self.image_count + self.lidar_grid[0] * self.lidar_grid[1]
        self.lidar_in = nn.Conv2d(channels, channels, 1)
        self.positions = nn.Parameter(torch.zeros(1, count, channels))
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.blocks = nn.ModuleList(
            FusionBlock(channels, config.fusion_heads, config.fusion_expansion, config.fusion_dropout)
            for _ in range(config.fusion_blocks)
        )
        self.norm = nn.LayerNorm(channels)
        self.lidar_out = nn.Conv2d(channels, channels, 1)

    def forward(self, image: Tensor, lidar: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, H, W) and (B, C, h, w) -> the same, with what they learnt from each other added."""
        tokens = self.pooled_tokens(image, lidar)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens).transpose(1, 2)  # (B, C, tokens)
        to_image = tokens[:, :, : self.image_count].unflatten(2, self.image_grid)
        to_lidar = self.lidar_out(tokens[:, :, self.image_count :].unflatten(2, self.lidar_grid))
        return image + resize(to_image, image.shape[-2:]), lidar + resize(to_lidar, lidar.shape[-2:])

    def pooled_tokens(self, image: Tensor, lidar: Tensor) -> Tensor:
        """Cells of both pooled maps, image first, learned positions added: (B, tokens, C)."""
        pooled = (
            pool(image, self.image_grid),
            self.lidar_in(pool(lidar, self.lidar_grid)),
        )
        tokens = torch.cat([cells.flatten(2).transpose(1, 2) for cells in pooled], dim=1)
        return self.dropout(tokens + self.positions)


class FusionBlock(nn.Module):
    """Pre-norm transformer block: x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, channels: int, heads: int, expansion: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, heads, dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, expansion * channels),
            nn.ReLU(),
            nn.Linear(expansion * channels, channels),
            nn.Dropout(dropout),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class SelfAttention(nn.Module):
    """Full self-attention with separate query, key, value and output projections."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        query, key, value = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C / heads)
            for layer in (self.query, self.key, self.value)
        )
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        return self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))


class Neck(nn.Module):
    """Coarse map -> fine map, top-down without lateral connections: 1×1, then twice (resize, 3×3)."""

    def __init__(self, channels: int, config: BackboneConfig):
        super().__init__()
        self.map_size = config.map_size
        width = config.neck_channels
        self.reduce = nn.Conv2d(channels, width, 1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.fine = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, coarse: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, neck_channels, *map_size), same area and orientation."""
        x = self.reduce(coarse).relu()
        x = self.middle(resize(x, (2 * x.shape[-2], 2 * x.shape[-1]))).relu()
        return self.fine(resize(x, self.map_size)).relu()


def pool(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means over equal rectangles; (B, C, H, W) -> (B, C, *grid), of which H and W are multiples."""
    if torch.compiler.is_compiling() and x.requires_grad:
        return Pool.apply(x, tuple(grid))
    return F.adaptive_avg_pool2d(x, grid)


class Pool(torch.autograd.Function):
    """`pool` whose gradient a compiler can merge with what follows; torch's own is a kernel of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.window = x.shape[-2] // grid[0], x.shape[-1] // grid[1]
        return F.adaptive_avg_pool2d(x, grid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (height, width), (batch, channels, rows, columns) = ctx.window, gradient.shape
        share = (gradient / (height * width))[:, :, :, None, :, None]
        share = share.expand(-1, -1, -1, height, -1, width)
        return share.reshape(batch, channels, rows * height, columns * width), None


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, pixel areas aligned (align_corners=False); (B, C, h, w) -> (B, C, *size)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if torch.compiler.is_compiling() and x.requires_grad:
        return Resize.apply(x, tuple(size))
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class Resize(torch.autograd.Function):
    """`resize` whose gradient is two matrix products instead of a scatter.

    A compiler writes the gradient of an interpolation as a scatter with collisions (64 cells of a large map meet in one
    of the small one), in half precision by sorting indices; two products with the weights are exact and fixed in order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.source = x.shape[-2:]
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows, columns), (batch, channels, height, width) = ctx.source, gradient.shape
        cells = gradient.permute(0, 2, 3, 1)  # (B, H, W, C), as it lies in memory where maps are channels-last
        to_columns = interpolation_weights(columns, width, gradient).T.expand(batch * height, -1, -1)
        to_rows = interpolation_weights(rows, height, gradient).T.expand(batch, -1, -1)
        cells = torch.bmm(to_columns, cells.reshape(batch * height, width, channels))  # (B · H, w, C)
        cells = torch.bmm(to_rows, cells.reshape(batch, height, columns * channels))  # (B, h, w · C)
        return cells.reshape(batch, rows, columns, channels).permute(0, 3, 1, 2), None


def interpolation_weights(source: int, size: int, like: Tensor) -> Tensor:
    """(size, source): how a line of `source` cells is interpolated to `size` cells, pixel areas aligned."""
    cell = torch.arange(size, device=like.device, dtype=torch.float32)
    position = ((cell + 0.5) * (source / size) - 0.5).clamp(0, source - 1)
    distance = (position[:, None] - torch.arange(source, device=like.device, dtype=torch.float32)).abs()
    return (1 - distance).clamp(min=0).to(like.dtype)
