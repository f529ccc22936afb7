"""3×3 convolutions with 16 products a channel pair and 2×2 outputs instead of 36: Winograd's F(2×2, 3×3).

In one dimension output = TO_OUTPUT [(TO_PRODUCT_WEIGHT g) · (TO_PRODUCT d)] for four inputs d, three weights g and
two outputs (arXiv 1509.09308); in two dimensions the same along rows, then columns. The only factors are ±1 and ½, so
float32 results differ from the direct sum by rounding alone.

The products are matrix products, the transforms are sums that a compiler turns into a few passes over memory. Torch and
its CPU libraries choose the direct algorithm for float32, so `compile` on a CPU gains from it where there are many
channels a pixel; operation by operation the transforms cost more than they save.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TO_PRODUCT = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
TO_PRODUCT_WEIGHT = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
TO_OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
TILE, STEP = 4, 2  # cells that a tile reads along an axis, outputs that it gives
MIN_CHANNELS = 128  # with fewer, the transforms cost what the products save (measured on two AVX2 cores)


def product_weight(weight: Tensor) -> Tensor:
    """Convolution weights (O, C, 3, 3) -> (16, C, O) float32, computed in float64."""
    transform = weight.new_tensor(TO_PRODUCT_WEIGHT, dtype=torch.float64)
    product = torch.einsum("ai,bj,ocij->abco", transform, transform, weight.detach().double())
    return product.flatten(0, 1).float().contiguous()


class WinogradConvolution(nn.Module):
    """A 3×3 convolution with stride 1 and padding 1, on maps with an even number of rows and columns."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.register_buffer("weight", product_weight(conv.weight))
        self.register_buffer("bias", torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H, W), both channels last."""
        batch, channels, height, width = x.shape
        rows, columns = height // STEP, width // STEP
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        cells = [
            [padded[:, i : i + STEP * rows - 1 : STEP, j : j + STEP * columns - 1 : STEP] for j in range(TILE)]
            for i in range(TILE)
        ]  # each (B, rows, columns, C)
        along_rows = [_to_product([cells[i][j] for i in range(TILE)]) for j in range(TILE)]
        tiles = [tile for a in range(TILE) for tile in _to_product([along_rows[j][a] for j in range(TILE)])]
        products = torch.bmm(torch.stack(tiles).view(TILE * TILE, -1, channels), self.weight)
        products = products.view(TILE, TILE, batch, rows, columns, -1)
        along_rows = [_to_output([products[a, b] for a in range(TILE)]) for b in range(TILE)]
        outputs = [_to_output([along_rows[b][p] for b in range(TILE)]) for p in range(STEP)]
        stacked = torch.stack([torch.stack(pair, dim=3) for pair in outputs], dim=2)  # (B, rows, 2, columns, 2, O)
        return (stacked.reshape(batch, height, width, -1) + self.bias).permute(0, 3, 1, 2)


def use_winograd(module: nn.Module, min_channels: int = MIN_CHANNELS) -> int:
    """Replace every convolution that it fits and pays for, in place; returns how many. Maps must have even sides."""
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and _fits(child) and min(child.in_channels, child.out_channels) >= min_channels:
            module.add_module(name, WinogradConvolution(child))
            replaced += 1
        else:
            replaced += use_winograd(child, min_channels)
    return replaced


def _fits(conv: nn.Conv2d) -> bool:
    wanted = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == wanted


def _to_product(d: list[Tensor]) -> list[Tensor]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _to_output(m: list[Tensor]) -> list[Tensor]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]
