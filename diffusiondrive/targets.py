"""What the planner is trained on: the human trajectory, nearby vehicles, and a semantic map of the road ahead.

Follows the target builder published with DiffusionDrive (inherited from TransFuser). The map is exact for the OpenCV
version at hand; polygon filling changed between OpenCV 4 and 5 in half a percent of the pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import shapely

from navsim_eval.errors import DataError, UserError
from navsim_eval.geometry import box_corners
from navsim_eval.scene import STATIC_CLASSES, Annotations, BoxIndex, Scene

TARGETS_VERSION = 1  # raise when the same configuration would give other values: caches then refuse to mix
TARGET_NAMES = ("trajectory", "agent_states", "agent_labels", "bev_semantic_map")
UNLABELLED = 255  # cells of a scene without a map: no class, left out of the loss
BEV_CLASSES = ("empty", "road", "walkway", "centerline", "static object", "vehicle", "pedestrian")
CENTERLINE_THICKNESS = 2  # pixels
STATE_COLUMNS = [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING, BoxIndex.LENGTH, BoxIndex.WIDTH]


@dataclass
class TargetConfig:
    """Sizes of the targets; the defaults are the published ones.

    num_poses:   future poses, 0.5 s apart
    max_agents:  slots for vehicles, nearest first
    agent_range: vehicles count when their centre lies within ± this in x and y [m]
    bev_rows:    cells ahead of the rear axle (row 0 nearest);  bev_columns: cells from right to left
    bev_cell:    side of a cell [m]
    map_range:   half side [m] of the square, along the map's axes, from which map objects are taken
    """

    num_poses: int = 8
    max_agents: int = 30
    agent_range: float = 32.0
    bev_rows: int = 128
    bev_columns: int = 256
    bev_cell: float = 0.25
    map_range: float = 32.0

    def __post_init__(self) -> None:
        for name in ("num_poses", "max_agents", "agent_range", "bev_rows", "bev_columns", "bev_cell", "map_range"):
            if not getattr(self, name) > 0:
                raise UserError(f"targets.{name}: {getattr(self, name)} must be positive")


def build_targets(scene: Scene, road_map: Any, config: TargetConfig | None = None) -> dict[str, np.ndarray]:
    """Training targets of a scene; everything in the ego frame at the current time.

    trajectory (8, 3) float64; agent_states (30, 5) float32 and agent_labels (30,) bool; bev_semantic_map (128, 256)
    uint8. road_map: `navsim_eval.formats.maps.RoadMap`, or None for a scene without a map, whose cells are then
    `UNLABELLED`. Raises DataError for a scene without labels or future.
    """
    config = config or TargetConfig()
    annotations = scene.current.annotations
    if annotations is None:
        raise DataError(f"log {scene.log_name}, frame {scene.token}", "has no annotations to learn from", field="anns")
    if len(scene.future) < config.num_poses:
        raise DataError(
            f"log {scene.log_name}, frame {scene.token}",
            f"is followed by {len(scene.future)} frames, {config.num_poses} are needed",
            remedy="use a split with more future frames",
        )
    agent_states, agent_labels = agent_targets(annotations, config)
    if road_map is None:
        semantic = np.full((config.bev_rows, config.bev_columns), UNLABELLED, np.uint8)
    else:
        semantic = bev_semantic_map(annotations, road_map, scene.current.ego_pose, config)
    return {
        "trajectory": scene.human_trajectory(config.num_poses),
        "agent_states": agent_states,
        "agent_labels": agent_labels,
        "bev_semantic_map": semantic,
    }


def agent_targets(annotations: Annotations, config: TargetConfig) -> tuple[np.ndarray, np.ndarray]:
    """The nearest vehicles: states (max_agents, 5) float32 x, y, heading, length, width; labels (max_agents,) bool.

    Empty slots are zero rows with label False. Headings stay as they are in the log (not wrapped).
    """
    x, y = annotations.boxes[:, BoxIndex.X], annotations.boxes[:, BoxIndex.Y]
    near = (np.abs(x) <= config.agent_range) & (np.abs(y) <= config.agent_range)
    vehicles = annotations.boxes[near & (annotations.names == "vehicle")][:, STATE_COLUMNS].astype(np.float32)
    nearest = np.argsort(np.linalg.norm(vehicles[:, :2], axis=-1))[: config.max_agents]
    states = np.zeros((config.max_agents, len(STATE_COLUMNS)), np.float32)
    states[: len(nearest)] = vehicles[nearest]
    return states, np.arange(config.max_agents) < len(nearest)


def bev_semantic_map(annotations: Annotations, road_map: Any, ego_pose: np.ndarray, config: TargetConfig) -> np.ndarray:
    """Class of every cell ahead of the ego, (rows, columns) uint8, indices into `BEV_CLASSES`.

    Row r covers x in [0.25 r, 0.25 r + 0.25), column c covers y from 0.25 c - 32. Later classes are painted over
    earlier ones. Map objects are taken from an axis-aligned square of the map, so corners of the rotated window may
    lack some (the published behaviour).
    """
    canvas = np.zeros((config.bev_columns, config.bev_rows), np.uint8)  # image rows are y, image columns are x
    x, y = float(ego_pose[0]), float(ego_pose[1])

    def polygons(layer: str) -> Iterable[np.ndarray]:
        rows = road_map.layer(layer).in_square(x, y, config.map_range)
        return _to_ego(_exteriors(road_map.layer(layer).geometries[rows]), ego_pose)

    def centerlines(layer: str) -> Iterable[np.ndarray]:
        edges = road_map.layer(layer)
        ids = edges.ids[edges.in_square(x, y, config.map_range)]
        return _to_ego([np.asarray(road_map.baseline(edge))[:, :2] for edge in ids], ego_pose)

    def boxes(*names: str) -> Iterable[np.ndarray]:
        return _box_outlines(annotations, names)

    # The order of painting is the order of the classes.
    _fill(canvas, 1, [*polygons("lanes_polygons"), *polygons("intersections")], config)
    _fill(canvas, 2, polygons("walkways"), config)
    for line in [*centerlines("lanes_polygons"), *centerlines("lane_connectors")]:
        pixels = _pixels(line, config)
        cv2.polylines(canvas, [pixels], isClosed=False, color=3, thickness=CENTERLINE_THICKNESS)
    _fill(canvas, 4, boxes(*STATIC_CLASSES), config)
    _fill(canvas, 5, boxes("vehicle"), config)
    _fill(canvas, 6, boxes("pedestrian"), config)
    return np.ascontiguousarray(canvas.T)


def _fill(canvas: np.ndarray, label: int, outlines: Iterable[np.ndarray], config: TargetConfig) -> None:
    for outline in outlines:  # one by one: cv2 cancels overlapping outlines of a single call
        cv2.fillPoly(canvas, [_pixels(outline, config)], color=label)


def _pixels(points: np.ndarray, config: TargetConfig) -> np.ndarray:
    """Ego coordinates (n, 2) as image points (n, 1, 2) int32, truncated toward zero as the reference truncates."""
    scaled = points / config.bev_cell + np.array([0.0, config.bev_columns / 2.0])
    return scaled.astype(np.int32)[:, None]


def _exteriors(geometries: np.ndarray) -> list[np.ndarray]:
    """Outer rings of polygons (parts of multi-polygons one by one); holes are ignored, as in the reference."""
    rings = shapely.get_exterior_ring(shapely.get_parts(geometries))
    coordinates, owner = shapely.get_coordinates(rings, return_index=True)
    return np.split(coordinates, np.flatnonzero(np.diff(owner)) + 1) if len(coordinates) else []


def _to_ego(lines: Sequence[np.ndarray], ego_pose: np.ndarray) -> list[np.ndarray]:
    """Global lines (n, 2) in the ego frame: first shifted, then turned."""
    if not lines:
        return []
    points = np.concatenate(lines) - ego_pose[:2]
    c, s = np.cos(ego_pose[2]), np.sin(ego_pose[2])
    turned = np.stack([c * points[:, 0] + s * points[:, 1], -s * points[:, 0] + c * points[:, 1]], axis=-1)
    return np.split(turned, np.cumsum([len(line) for line in lines])[:-1])


def _box_outlines(annotations: Annotations, names: Sequence[str]) -> list[np.ndarray]:
    """Closed outlines (5, 2) of the boxes of some classes, in the order of the log."""
    boxes = annotations.boxes[np.isin(annotations.names, names)]
    poses = boxes[:, [BoxIndex.X, BoxIndex.Y, BoxIndex.HEADING]]
    corners = box_corners(poses, boxes[:, BoxIndex.LENGTH], boxes[:, BoxIndex.WIDTH])
    return list(np.concatenate([corners, corners[:, :1]], axis=1))
