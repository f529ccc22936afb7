"""The same plans as the driver would see them: projected onto the road in the front camera's image.

Points are in the ego frame (x forward, y left, z up; the road is z = 0), images have their origin top left.
"""

from __future__ import annotations

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from navsim_eval.geometry import Vehicle, to_global
from navsim_eval.report.bev import CHOSEN, HUMAN, Drawing
from navsim_eval.scene import Annotations, BoxIndex, Camera

_NEAREST = 1.0  # metres before the lens
_SPACING = 0.25  # metres between the points of a projected line
_BOX_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))


def camera_figure(
    image: np.ndarray, camera: Camera, drawing: Drawing, annotations: Annotations | None = None
) -> Figure:
    """The image with modes, recorded drive and chosen plan on the road, and the boxes of the objects.

    image: (H, W, 3) uint8 RGB as the camera took it (distorted, as its calibration says)
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(9.6, 9.6 * height / width), dpi=100)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(image, interpolation="bilinear")
    if annotations is not None:
        _draw_boxes(axes, camera, annotations, image.shape)
    _draw_ribbon(axes, camera, drawing.chosen, image.shape)
    if drawing.candidates is not None:
        order = drawing.worst_first()
        for mode, color in zip(order, drawing.colors()[order], strict=True):
            _draw_line(axes, camera, drawing.candidates[mode], image.shape, color, 1.8)
    if drawing.human is not None:
        _draw_line(axes, camera, drawing.human, image.shape, "white", 4.0)
        _draw_line(axes, camera, drawing.human, image.shape, HUMAN, 2.0, (0, (3, 1.5)))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_axis_off()
    return figure


def project(camera: Camera, points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Ego points (N, 3) → pixels (N, 2), NaN for points behind the lens or well outside the picture.

    shape: (H, W, …) of the image. Distortion k1, k2, p1, p2, k3 is applied where it is meant to be: near the picture
    (its polynomial folds points that lie far outside back into it).
    """
    local = (np.asarray(points, np.float64) - camera.translation) @ camera.rotation
    pixels = np.full((len(local), 2), np.nan)
    corners = (np.array([[0.0, 0.0], [shape[1], shape[0]]]) - camera.intrinsics[:2, 2]) / np.diag(camera.intrinsics)[:2]
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = np.abs(local[:, :2] / local[:, 2:])
    seen = (local[:, 2] > _NEAREST) & (reach < 1.35 * np.abs(corners).max(axis=0)).all(axis=1)
    if seen.any():
        zero = np.zeros(3)
        found, _ = cv2.projectPoints(local[seen], zero, zero, camera.intrinsics, np.asarray(camera.distortion, float))
        pixels[seen] = found[:, 0]
    return pixels


def _draw_line(axes: Axes, camera: Camera, poses: np.ndarray, shape: tuple[int, ...], color, width, style="solid"):
    path = _dense(poses)
    pixels = project(camera, np.column_stack([path[:, :2], np.zeros(len(path))]), shape)
    axes.plot(*pixels.T, color=color, linewidth=width, linestyle=style, alpha=0.95, solid_capstyle="round")


def _draw_ribbon(axes: Axes, camera: Camera, poses: np.ndarray, shape: tuple[int, ...]) -> None:
    """The strip of road that the vehicle would cover."""
    path = _dense(poses)
    edges = []
    for side in (Vehicle.HALF_WIDTH, -Vehicle.HALF_WIDTH):
        edge = to_global(path, np.broadcast_to([0.0, side, 0.0], path.shape))
        edges.append(project(camera, np.column_stack([edge[:, :2], np.zeros(len(edge))]), shape))
    left, right = edges
    seen = np.flatnonzero(np.isfinite(left).all(axis=1) & np.isfinite(right).all(axis=1))
    for run in np.split(seen, np.flatnonzero(np.diff(seen) > 1) + 1):
        strip = np.concatenate([left[run], right[run][::-1]])
        axes.add_collection(PolyCollection([strip], facecolor=CHOSEN, edgecolor="none", alpha=0.35))
    for edge in edges:
        axes.plot(*edge.T, color=CHOSEN, linewidth=1.6)


def _draw_boxes(axes: Axes, camera: Camera, annotations: Annotations, shape: tuple[int, ...]) -> None:
    for box in annotations.boxes:
        pixels = project(camera, _box_points(box), shape)
        if np.isfinite(pixels).all():
            lines = [pixels[list(edge)] for edge in _BOX_EDGES]
            axes.add_collection(LineCollection(lines, colors="#ffffff", linewidth=0.8, alpha=0.8))


def _box_points(box: np.ndarray) -> np.ndarray:
    """(8, 3) corners of a box, bottom four first."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2.0
    flat = np.column_stack([signs * box[[BoxIndex.LENGTH, BoxIndex.WIDTH]], np.zeros(4)])
    corners = to_global(box[[BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]], flat)[:, :2]
    heights = box[BoxIndex.Z] + np.array([-0.5, 0.5]) * box[BoxIndex.HEIGHT]
    return np.concatenate([np.column_stack([corners, np.full(4, z)]) for z in heights])


def _dense(poses: np.ndarray) -> np.ndarray:
    """(N, 3) points along a plan from the rear axle on, `_SPACING` apart; heading along the path.

    A plan that does not move is the single point where the vehicle stands.
    """
    corners = np.concatenate([np.zeros((1, 2)), np.asarray(poses, np.float64)[:, :2]])
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
    along = np.arange(0.0, max(lengths[-1], _SPACING), _SPACING)
    path = np.column_stack([np.interp(along, lengths, corners[:, axis]) for axis in (0, 1)])
    step = np.gradient(path, axis=0) if len(path) > 1 else np.array([[1.0, 0.0]])
    return np.column_stack([path, np.arctan2(step[:, 1], step[:, 0])])
