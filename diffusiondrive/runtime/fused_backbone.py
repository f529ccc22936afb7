"""The backbone of the rewritten planner in fused kernels: cuDNN's convolutions with ReLU and residual inside, fusions
in Triton, camera and LiDAR side by side on two streams.

Same numbers as `Encoder.backbone` up to rounding. On a CPU convolutions are torch's own (for tests).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from diffusiondrive.backbone import Fusion, FusionBlock, Neck
from diffusiondrive.runtime.encoder import Encoder, LastFusion
from diffusiondrive.runtime.kernels.linear import FusedLinear, Norm
from diffusiondrive.runtime.kernels.maps import add_resized, max_pool, pool

Step = Callable[[Tensor], Tensor]
ALIGNED = 8  # channels that tensor cores want of an image in half precision


class FusedBackbone:
    """Camera (B, 3, H, W) and LiDAR (B, 1, h, w) -> coarse map and neck map, in the backbone's type."""

    def __init__(self, encoder: Encoder, options: dict[str, object]):
        """options: dtype and precision of linear layers (`FusedLinear`)."""
        self.image_stages = [convolution_steps(stage) for stage in encoder.image_stages]
        self.lidar_stages = [convolution_steps(stage) for stage in encoder.lidar_stages]
        self.camera, self.lidar = (
            AlignedInput(encoder.dtype, isinstance(stages[0][0], Stem | ConvolutionReLU))
            for stages in (self.image_stages, self.lidar_stages)
        )
        self.fusions = [FusedFusion(fusion, options) for fusion in encoder.fusions]
        self.side = SideStream()

    def __call__(self, camera: Tensor, lidar: Tensor) -> Tensor:
        """-> the coarse map; the neck is another call (it may run beside what reads the coarse map)."""
        camera, lidar = self.camera(camera), self.lidar(lidar)
        for image_stage, lidar_stage, fusion in zip(self.image_stages, self.lidar_stages, self.fusions, strict=True):
            before = lidar  # what the other stream reads must live until the streams meet
            with self.side.beside(camera):
                lidar = run(lidar_stage, before)
            camera = run(image_stage, camera)
            self.side.join(camera)
            camera, lidar = fusion(camera, lidar)
        return lidar


class AlignedInput:
    """An image in the backbone's type and layout; on a GPU in half precision with channels of zeros up to a multiple of
    eight, without which cuDNN falls back to a slow kernel."""

    def __init__(self, dtype: torch.dtype, may_grow: bool):
        """may_grow: whether what reads the image takes more channels than its weights have."""
        self.dtype, self.aligned = dtype, may_grow and dtype != torch.float32
        self.padded: Tensor | None = None  # the zeros stay from plan to plan

    def __call__(self, x: Tensor) -> Tensor:
        if not (x.is_cuda and self.aligned):
            return x.to(self.dtype, memory_format=torch.channels_last)
        batch, channels, height, width = x.shape
        if self.padded is None:
            shape = batch, channels + -channels % ALIGNED, height, width
            self.padded = torch.zeros(shape, dtype=self.dtype, device=x.device).to(memory_format=torch.channels_last)
        self.padded[:, :channels].copy_(x)
        return self.padded


class SideStream:
    """A second CUDA stream for independent work; on a CPU everything happens in order."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None

    @contextmanager
    def beside(self, x: Tensor) -> Iterator[None]:
        """Work in this context waits for what was queued before, and runs beside what is queued after."""
        if not x.is_cuda:
            yield
            return
        self.stream = self.stream or torch.cuda.Stream(x.device)
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self, x: Tensor) -> None:
        """From here on everything has been done."""
        if x.is_cuda:
            torch.cuda.current_stream(x.device).wait_stream(self.stream)


class FusedFusion:
    """`backbone.Fusion`, or `LastFusion`, whose image map stays as it is."""

    def __init__(self, fusion: Fusion | LastFusion, options: dict[str, object]):
        self.last = isinstance(fusion, LastFusion)
        fusion = fusion.fusion if self.last else fusion
        self.image_grid, self.lidar_grid, self.count = fusion.image_grid, fusion.lidar_grid, fusion.image_count
        self.positions = fusion.positions.detach()[0].contiguous()
        self.lidar_in = FusedLinear.of(fusion.lidar_in, **options)
        self.blocks = [FusedBlock(block, options) for block in fusion.blocks]
        self.norm = Norm.of(fusion.norm)
        self.lidar_out = FusedLinear.of(fusion.lidar_out, self.norm, **options)

    def __call__(self, image: Tensor, lidar: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(image, lidar)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        tokens = self.blocks[-1](tokens, self.count if self.last else 0)
        of_lidar = tokens if self.last else tokens[:, self.count :]
        if not self.last:
            of_image = self.norm(tokens[:, : self.count])
            image = add_resized(image, of_image, self.image_grid, image.shape[-2:])
        lidar = add_resized(lidar, self.lidar_out(of_lidar), self.lidar_grid, lidar.shape[-2:])
        return image, lidar

    def _tokens(self, image: Tensor, lidar: Tensor) -> Tensor:
        batch, channels = image.shape[:2]
        tokens = image.new_empty(batch, *self.positions.shape)
        pool(image, self.image_grid, tokens[:, : self.count], self.positions[: self.count])
        cells = image.new_empty(batch, len(self.positions) - self.count, channels)
        pool(lidar, self.lidar_grid, cells)
        self.lidar_in(cells, residual=self.positions[None, self.count :], out=tokens[:, self.count :])
        return tokens


class FusedBlock:
    """`backbone.FusionBlock`: five launches."""

    def __init__(self, block: FusionBlock, options: dict[str, object]):
        attention = block.attention
        self.heads = attention.heads
        three = (attention.query, attention.key, attention.value)
        weight, bias = torch.cat([layer.weight for layer in three]), torch.cat([layer.bias for layer in three])
        self.project = FusedLinear(weight, bias, Norm.of(block.norm1), **options)
        self.output = FusedLinear.of(attention.output, **options)
        self.up = FusedLinear.of(block.mlp[0], Norm.of(block.norm2), **options)
        self.down = FusedLinear.of(block.mlp[2], **options)

    def __call__(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens (B, N, C) -> those from `first` on."""
        split = self.project(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)  # (B, heads, N, C / heads)
        mixed = F.scaled_dot_product_attention(query[:, :, first:], key, value)
        tokens = self.output(mixed.transpose(1, 2).flatten(2), residual=tokens[:, first:])
        return self.down(self.up(tokens, relu=True), residual=tokens)


class FusedNeck:
    """`backbone.Neck`."""

    def __init__(self, neck: Neck, options: dict[str, object]):
        self.map_size = neck.map_size
        self.reduce = FusedLinear.of(neck.reduce, **options)
        self.middle, self.fine = (ConvolutionReLU(conv) for conv in (neck.middle, neck.fine))

    def __call__(self, coarse: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, neck channels, *map_size)."""
        grid = coarse.shape[-2:]
        cells = self.reduce(as_tokens(coarse), relu=True)
        x = self.middle(add_resized(None, cells, grid, (2 * grid[0], 2 * grid[1])))
        if tuple(x.shape[-2:]) != tuple(self.map_size):
            x = add_resized(None, as_tokens(x), x.shape[-2:], self.map_size)
        return self.fine(x)


def as_tokens(x: Tensor) -> Tensor:
    """Map (B, C, h, w), channels last -> its cells (B, h · w, C), the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


# --- convolutions ----------------------------------------------------------------------------------------------------


def run(steps: Sequence[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def convolution_steps(stage: nn.Module) -> list[Step]:
    """The modules of an encoder stage, in fused form where one exists; norms must be folded."""
    modules = [m for m in _flat(stage) if not isinstance(m, nn.Identity)]
    steps: list[Step] = []
    while modules:
        module = modules.pop(0)
        if isinstance(module, nn.Conv2d) and modules and isinstance(modules[0], nn.ReLU):
            modules.pop(0)
            if modules and _usual_pool(modules[0]):
                modules.pop(0)
                steps.append(Stem(module))
                continue
            steps.append(ConvolutionReLU(module))
        elif isinstance(module, BasicBlock) and _plain(module):
            steps.append(FusedBasicBlock(module))
        else:
            steps.append(module)
    return steps


class ConvolutionReLU:
    """ReLU(convolution), one launch on a GPU; with `added`, ReLU(convolution + added)."""

    def __init__(self, conv: nn.Conv2d, more_bias: Tensor | None = None):
        self.weight = conv.weight.detach()
        bias = torch.zeros(len(self.weight)).to(self.weight) if conv.bias is None else conv.bias.detach()
        self.bias = bias if more_bias is None else (bias.double() + more_bias.double()).to(bias.dtype)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def __call__(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        rest = (self.stride, self.padding, self.dilation, self.groups)
        self.fit(x)
        if not x.is_cuda:
            y = F.conv2d(x, self.weight, self.bias, *rest)
            return (y if added is None else y + added).relu()
        if added is None:
            return torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias, *rest)
        return torch.ops.aten.cudnn_convolution_add_relu(x, self.weight, added, 1.0, self.bias, *rest)

    def fit(self, x: Tensor) -> None:
        """Give the weights as many channels as the input, which `AlignedInput` may have filled up with zeros."""
        more = x.shape[1] - self.weight.shape[1] * self.groups
        if more > 0:
            padded = F.pad(self.weight, (0, 0, 0, 0, 0, more))
            self.weight = padded.contiguous(memory_format=torch.channels_last)


class Stem:
    """Convolution, ReLU, 3×3 max pooling; bias and ReLU come with the pooling."""

    def __init__(self, conv: nn.Conv2d):
        self.convolution = ConvolutionReLU(conv)

    def __call__(self, x: Tensor) -> Tensor:
        conv = self.convolution
        conv.fit(x)
        y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return max_pool(y, conv.bias)


class FusedBasicBlock:
    """timm's basic residual block; the bias of a strided short cut is added with the second convolution's."""

    def __init__(self, block: BasicBlock):
        short = [] if block.downsample is None else [m for m in block.downsample if not isinstance(m, nn.Identity)]
        *self.before, self.short = short or [None]
        self.first = ConvolutionReLU(block.conv1)
        self.second = ConvolutionReLU(block.conv2, None if self.short is None else self.short.bias)

    def __call__(self, x: Tensor) -> Tensor:
        short = x
        if self.short is not None:
            for module in self.before:
                short = module(short)
            conv = self.short
            short = F.conv2d(short, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return self.second(self.first(x), short)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in the order in which they run; sequences are opened."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _flat(child)
    else:
        yield module


def _usual_pool(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxPool2d) and (module.kernel_size, module.stride, module.padding) == (3, 2, 1)


def _plain(block: BasicBlock) -> bool:
    """Whether the block is what `FusedBasicBlock` computes."""
    idle = (block.drop_block, block.aa, block.drop_path)
    only_identity = all(m is None or isinstance(m, nn.Identity) for m in idle)
    short = [] if block.downsample is None else [m for m in block.downsample if not isinstance(m, nn.Identity)]
    usual = isinstance(block.act1, nn.ReLU) and isinstance(block.act2, nn.ReLU) and block.se is None
    return only_identity and usual and (not short or isinstance(short[-1], nn.Conv2d))
