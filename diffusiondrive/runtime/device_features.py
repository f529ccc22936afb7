"""Features by tensor operations on any device: the camera strip as one indexed read, the LiDAR histogram as one count.

No operation depends on the data (no synchronisation), so both may be captured in a CUDA graph. On a GPU with Triton
each is one kernel, with the same results.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from diffusiondrive.features import FeatureConfig, crop_of
from navsim_eval.errors import UserError

try:
    from diffusiondrive.runtime.kernels import sensors as kernels

    FUSED = True
except ImportError:  # no Triton
    FUSED = False


class StripSampler(nn.Module):
    """Crop, stitch, resize, round to 8 bits and scale to [0, 1], without ever writing the stitched image.

    Each output pixel reads its taps through one table that knows which camera and which of its columns a column of the
    strip is. Against `features.camera_feature`:

    * linear: equal at the published factor 4 and at every other that shrinks, because the arithmetic is OpenCV's own
      (32-bit integers, weights in 1/2048); where it enlarges, one level (1/255) in some pixels;
    * area: float32, added up in another order, so one level in hardly any pixel.
    """

    def __init__(self, image_size: tuple[int, int], config: FeatureConfig):
        """image_size: rows and columns of each of the three images. Raises UserError for "area" that would enlarge."""
        super().__init__()
        rows, columns = crop_of(image_size, config)
        height, width = image_size[0] - 2 * rows, image_size[1]
        side, front = np.arange(columns, width - columns), np.arange(width)
        camera = np.repeat([0, 1, 2], [len(side), len(front), len(side)])
        column = np.concatenate([side, front, side])
        down, across = height / config.camera_height, len(column) / config.camera_width
        self.linear = config.camera_resize == "linear"
        if not self.linear and min(down, across) < 1:
            raise UserError(
                f"features: {height}×{len(column)} px would be enlarged to "
                f"{config.camera_height}×{config.camera_width}, for which camera_resize=area is not defined here; "
                "use camera_resize=linear or sensors.resize=host"
            )
        self.half_up = down == across == 2  # OpenCV rounds this mean of four with integers, other areas half to even
        taps = _linear_taps if self.linear else _area_taps
        row_tap, row_weight = taps(height, config.camera_height)
        tap, weight = taps(len(column), config.camera_width)
        for name, table in {"row": rows + row_tap, "camera": camera[tap], "column": column[tap]}.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)  # (K, rows or columns of the strip)
        for name, table in {"row_weight": row_weight, "column_weight": weight}.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        self.register_buffer("white", torch.tensor(255.0), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(3, 3, H, W) uint8 (camera left, front, right; RGB), any strides -> (3, height, width) float32 in [0, 1]."""
        if images.is_cuda and self.linear and FUSED:
            return kernels.strip(images, dict(self.named_buffers()))
        return (self._linear(images) if self.linear else self._area(images)) / self.white

    def _linear(self, images: Tensor) -> Tensor:
        """2 × 2 taps, with the shifts and the rounding of OpenCV's 8-bit bilinear resize. (3, h, w) int32."""
        total = 0
        for row, row_weight in zip(self.row, self.row_weight, strict=True):
            across = 0  # one row of the strip, in 1/2048
            for camera, column, weight in zip(self.camera, self.column, self.column_weight, strict=True):
                pixels = images[camera[None], :, row[:, None], column[None]]  # (h, w, 3)
                across = across + pixels.int() * weight[:, None]
            total = total + ((row_weight[:, None, None] * (across >> 4)) >> 16)
        return ((total + 2) >> 2).permute(2, 0, 1)

    def _area(self, images: Tensor) -> Tensor:
        """Many taps: rows first, then columns. (3, h, w) float32, whole numbers."""
        squeezed = sum(images[:, :, row] * w[:, None] for row, w in zip(self.row, self.row_weight, strict=True))
        tables = zip(self.camera, self.column, self.column_weight, strict=True)
        mixed = sum(squeezed[c, :, :, x] * w[:, None, None] for c, x, w in tables).permute(1, 2, 0)
        return torch.floor(mixed + 0.5) if self.half_up else torch.round(mixed)


class LidarHistogram(nn.Module):
    """Clipped number of points above ground per cell, divided by the clip; equals `features.lidar_feature` exactly.

    Edges are float64 as in the reference, so a point on an edge falls where the reference puts it.
    """

    def __init__(self, config: FeatureConfig):
        super().__init__()
        self.cells, self.clip = config.lidar_cells, config.lidar_clip
        self.range_m = config.lidar_range
        edges = np.linspace(-config.lidar_range, config.lidar_range, config.lidar_cells + 1)
        self.register_buffer("edges", torch.from_numpy(edges), persistent=False)
        self.height_numbers = config.lidar_split, config.lidar_ceiling
        self.register_buffer("heights", torch.tensor(self.height_numbers, dtype=torch.float32), persistent=False)
        self.register_buffer("full", torch.tensor(float(config.lidar_clip)), persistent=False)

    def forward(self, cloud: Tensor) -> Tensor:
        """(≥ 3, P) float32 x, y, z [m], ego frame -> (1, N, N) float32; rows are x bins, columns y bins.

        Points that are NaN count nowhere: pad with them where P must be fixed.
        """
        if cloud.is_cuda and FUSED:
            counts = kernels.count_points(cloud, self.edges, self.range_m, *self.height_numbers)
            return (counts.clamp(max=self.clip).float() / self.full)[None]
        ground, ceiling = self.heights
        xy = cloud[:2].double()
        counts_here = (cloud[2] > ground) & (cloud[2] < ceiling) & (xy.abs() <= self.range_m).all(dim=0)
        # Bins are closed on the left; the last one on both sides, hence the clamp.
        row, column = (torch.bucketize(xy, self.edges, right=True) - 1).clamp(0, self.cells - 1)
        elsewhere = self.cells**2
        cell = torch.where(counts_here, row * self.cells + column, elsewhere)
        counts = torch.zeros(elsewhere + 1, dtype=torch.int32, device=cloud.device)
        counts.scatter_add_(0, cell, torch.ones_like(cell, dtype=torch.int32))
        return (counts[:-1].clamp(max=self.clip).float() / self.full).view(1, self.cells, self.cells)


def _linear_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and int32 weights [1/2048], each (2, out), of bilinear resizing between pixel centres, edges repeated."""
    position = ((np.arange(out) + 0.5) * (size / out) - 0.5).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    share = np.where((first < 0) | (first >= size - 1), 0, position - first)
    weights = np.rint(np.stack([1 - share, share]) * 2048).astype(np.int32)
    return np.stack([first, first + 1]).clip(0, size - 1), weights


def _area_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and float32 weights, each (K, out): an output pixel is the mean of what it covers (size ≥ out)."""
    factor = size / out
    start = np.arange(out) * factor
    count = int(np.ceil(factor)) + 1
    index = np.floor(start + 1e-9).astype(np.int64) + np.arange(count)[:, None]
    covered = np.minimum(index + 1, start + factor) - np.maximum(index, start)
    return index.clip(0, size - 1), (covered.clip(0) / factor).astype(np.float32)
