"""What the planner sees: camera strip, LiDAR counts and ego status of the current frame.

Follows the feature builder published with DiffusionDrive (inherited from TransFuser), bit for bit at the published
sizes. Features exist in two forms:

* compact: camera uint8, LiDAR counts uint8, status float32; lossless, what caches store (0.85 MB at full size);
* model input: float32, camera in [0, 1], LiDAR counts divided by the clip (`to_float`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from navsim_eval.dataset import sensor_files
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.sensors import read_image, read_point_cloud
from navsim_eval.scene import Frame, Scene

if TYPE_CHECKING:
    from diffusiondrive.planner import PlannerConfig

FEATURES_VERSION = 1  # raise when the same configuration would give other values: caches then refuse to mix
CAMERAS = ("CAM_L0", "CAM_F0", "CAM_R0")  # left to right, as stitched
REFERENCE_IMAGE = (1080, 1920)
_INTERPOLATION = {"linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
FEATURE_NAMES = ("camera_feature", "lidar_feature", "status_feature")


@dataclass
class FeatureConfig:
    """Sizes of the features; the defaults are the published ones.

    camera_height, camera_width: of the stitched strip [px]
    crop_rows:     rows cut off top and bottom of every image, given at 1080 × 1920; scales with the resolution
    crop_columns:  columns cut off both sides of the left and right image, likewise
    camera_resize: "linear" (OpenCV's bilinear without anti-aliasing, the reference) or "area" (anti-aliased; better
                   where the strip is shrunk more than four times)
    lidar_cells:   rows and columns of the histogram, which covers ± lidar_range [m] in x and y
    lidar_split:   points must lie strictly above this height [m], compared in float32 (drops the ground)
    lidar_ceiling: … and strictly below this one [m]
    lidar_clip:    counts per cell saturate here
    """

    camera_height: int = 256
    camera_width: int = 1024
    crop_rows: int = 28
    crop_columns: int = 416
    camera_resize: str = "linear"
    lidar_cells: int = 256
    lidar_range: float = 32.0
    lidar_split: float = 0.2
    lidar_ceiling: float = 100.0
    lidar_clip: int = 5

    def __post_init__(self) -> None:
        if self.camera_resize not in _INTERPOLATION:
            raise UserError(f"features.camera_resize: '{self.camera_resize}' is none of {', '.join(_INTERPOLATION)}")
        for name in ("camera_height", "camera_width", "lidar_cells", "lidar_range", "lidar_clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"features.{name}: {getattr(self, name)} must be positive")
        if self.lidar_clip > 255:
            raise UserError(f"features.lidar_clip: {self.lidar_clip} does not fit the 8 bits that caches store")

    @classmethod
    def for_sizes(
        cls, image_size: tuple[int, int] = (256, 1024), lidar_size: tuple[int, int] = (256, 256), range_m: float = 32.0
    ) -> FeatureConfig:
        """What a planner of these input sizes (rows, columns) takes; anti-aliased below the published size.

        Raises UserError for a LiDAR image that is not square.
        """
        if lidar_size[0] != lidar_size[1]:
            raise UserError(f"features: a LiDAR image of {lidar_size[0]}×{lidar_size[1]} cells is not square")
        published = image_size[0] >= cls.camera_height and image_size[1] >= cls.camera_width
        return cls(
            camera_height=image_size[0],
            camera_width=image_size[1],
            camera_resize="linear" if published else "area",
            lidar_cells=lidar_size[0],
            lidar_range=range_m,
        )

    @classmethod
    def for_planner(cls, config: PlannerConfig) -> FeatureConfig:
        """The features that a planner of this configuration reads."""
        return cls.for_sizes(config.backbone.image_size, config.backbone.lidar_size, config.perception.range_m)


def build_features(scene: Scene, config: FeatureConfig | None = None) -> dict[str, np.ndarray]:
    """Model input of a scene's current frame.

    camera_feature (3, H, W) float32 in [0, 1], RGB; lidar_feature (1, N, N) float32 in [0, 1]; status_feature (8,)
    float32. Raises DataError when a sensor file is absent, unreadable or of the wrong shape.
    """
    config = config or FeatureConfig()
    return to_float(compact_features(scene, config), config)


def compact_features(scene: Scene, config: FeatureConfig, lidar: bool = True) -> dict[str, np.ndarray]:
    """The same in the compact form: camera (3, H, W) uint8, LiDAR counts (1, N, N) uint8, status (8,) float32.

    lidar: off, the sweep is not opened and its feature is left out (camera-only planners).
    """
    files = sensor_files(scene, CAMERAS, lidar=lidar)
    camera_files = files[: len(CAMERAS)]
    images = [read_image(path) for path in camera_files]
    for path, image in zip(camera_files, images, strict=True):
        if image.shape != images[0].shape:
            problem = f"an image of {image.shape[:2]} px beside one of {images[0].shape[:2]} px of the same frame"
            raise DataError(path, problem, remedy="the three front cameras must have one resolution")
    counts = {"lidar_feature": lidar_feature(read_point_cloud(files[-1]), config)} if lidar else {}
    return {
        "camera_feature": camera_feature(*images, config),
        **counts,
        "status_feature": status_feature(scene.current),
    }


def to_float(features: dict[str, np.ndarray], config: FeatureConfig) -> dict[str, np.ndarray]:
    """Compact features as float32 model input: camera / 255, LiDAR counts / clip; the status is passed on."""
    scaled = dict(features)
    scaled["camera_feature"] = features["camera_feature"].astype(np.float32) / np.float32(255)
    if "lidar_feature" in features:
        scaled["lidar_feature"] = features["lidar_feature"].astype(np.float32) / np.float32(config.lidar_clip)
    return scaled


def camera_feature(left: np.ndarray, front: np.ndarray, right: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """Three images (H, W, 3) uint8 RGB of equal size, cropped, stitched and resized to (3, height, width) uint8."""
    rows, columns = crop_of(front.shape[:2], config)
    height, width = front.shape[0] - 2 * rows, front.shape[1]
    inner, sides = slice(rows, rows + height), slice(columns, width - columns)
    parts = [left[inner, sides], front[inner], right[inner, sides]]
    factor, rest = divmod(sum(part.shape[1] for part in parts), config.camera_width)
    if rest or any(part.shape[1] % factor for part in parts):
        parts = [np.concatenate(parts, axis=1)]
    # At a whole factor no output pixel looks across a seam: resized one by one the images give the same strip.
    total = sum(part.shape[1] for part in parts)
    strip = np.concatenate([_resized(part, part.shape[1] * config.camera_width // total, config) for part in parts], 1)
    return np.ascontiguousarray(strip.transpose(2, 0, 1))


def crop_of(size: tuple[int, int], config: FeatureConfig) -> tuple[int, int]:
    """Rows and columns that are cut off either side of an image of this size (rows, columns)."""
    height, width = size
    rows = round(config.crop_rows * height / REFERENCE_IMAGE[0])
    columns = round(config.crop_columns * width / REFERENCE_IMAGE[1])
    if 2 * rows >= height or 2 * columns >= width:
        raise UserError(f"features: crops of {rows} rows and {columns} columns leave nothing of {height}×{width} px")
    return rows, columns


def _resized(image: np.ndarray, width: int, config: FeatureConfig) -> np.ndarray:
    return cv2.resize(image, (width, config.camera_height), interpolation=_INTERPOLATION[config.camera_resize])


def lidar_feature(cloud: np.ndarray, config: FeatureConfig) -> np.ndarray:
    """Clipped number of points above ground per cell, (1, N, N) uint8; rows are x bins, columns are y bins.

    cloud: (6, P) float32 x, y, z [m], intensity, ring, sensor id, ego frame. Bins are closed on the left, the last one
    on both sides, exactly as `numpy.histogramdd` has them.
    """
    z = np.asarray(cloud[2], np.float32)
    kept = (z > np.float32(config.lidar_split)) & (z < np.float32(config.lidar_ceiling))
    points = np.asarray(cloud[:2], np.float64)[:, kept]
    points = points[:, (np.abs(points) <= config.lidar_range).all(axis=0)]  # a NaN fails here, too
    edges = np.linspace(-config.lidar_range, config.lidar_range, config.lidar_cells + 1)
    row, column = _bin_index(points, edges)
    cell = row * config.lidar_cells + column
    counts = np.bincount(cell, minlength=config.lidar_cells**2)
    clipped = np.minimum(counts, config.lidar_clip).astype(np.uint8)
    return clipped.reshape(1, config.lidar_cells, config.lidar_cells)


def status_feature(frame: Frame) -> np.ndarray:
    """(8,) float32: driving command (left, straight, right, unknown), velocity x, y, acceleration x, y (SI, ego)."""
    return np.concatenate([frame.driving_command, frame.ego_velocity, frame.ego_acceleration]).astype(np.float32)


def _bin_index(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Bin of each value, all of which lie within the edges.

    A division finds the bin up to rounding at an edge, one comparison on either side settles it: several times faster
    than the binary search of `numpy.histogramdd`, and equal to it.
    """
    last = len(edges) - 2
    index = ((values - edges[0]) * ((last + 1) / (edges[-1] - edges[0]))).astype(np.intp)
    np.minimum(index, last, out=index)
    index -= values < edges[index]
    index += (values >= edges[index + 1]) & (index < last)
    return index
