"""Camera images and point clouds of a city's scenes, rendered log by log.

Only frames that are the current one of a scene get sensor files, as in NAVSIM's own downloads, unless whole logs are
asked for (to be replayed). Files that are there already are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from navsim_eval.city.network import LOCATIONS
from navsim_eval.city.recorder import FUTURE_FRAMES, HISTORY_FRAMES
from navsim_eval.errors import UserError
from navsim_eval.formats.logs import read_log
from navsim_eval.formats.map_store import MapStore
from navsim_eval.formats.maps import RoadMap
from navsim_eval.formats.sensors import write_image, write_point_cloud
from navsim_eval.geometry import to_global
from navsim_eval.scene import CAMERAS, Frame

SENSOR_SETS = {"none": (), "front": ("CAM_L0", "CAM_F0", "CAM_R0"), "all": CAMERAS}
BRAKING_M_S = 0.4  # loss of speed within a frame interval that lights the brake lamps
STANDING_M_S = 0.3


def require_renderer() -> None:
    """Raises UserError with the remedy where the packages for ray casting are missing."""
    try:
        import navsim_eval.city.render  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"rendering sensors needs '{error.name}': pip install -e '.[city]', or city.sensors=none"
        ) from error


@dataclass(frozen=True)
class RenderLog:
    """Renders the current frames of a log, or all of them, (split, log name); sent to every worker once.

    Returns the number of frames of which something was missing.
    """

    root: Path
    maps: Path
    sensors: str
    image_size: tuple[int, int]
    seed: int
    whole_logs: bool = False

    @cached_property
    def _renderers(self) -> dict[str, tuple[RoadMap, Any]]:
        return {}

    def _renderer(self, split: str) -> tuple[RoadMap, Any]:
        if split not in self._renderers:
            from navsim_eval.city.render import Renderer

            road_map = MapStore(self.maps).get(LOCATIONS[split].name)
            self._renderers[split] = road_map, Renderer(road_map, seed=self.seed)
        return self._renderers[split]

    def __call__(self, item: tuple[str, str]) -> int:
        split, log_name = item
        frames = read_log(self.root / "navsim_logs" / split / f"{log_name}.pkl")
        current = range(len(frames)) if self.whole_logs else range(HISTORY_FRAMES, len(frames) - FUTURE_FRAMES)
        return sum(self._render(split, frames[max(number - 1, 0)], frames[number]) for number in current)

    def _render(self, split: str, before: Frame, frame: Frame) -> bool:
        folder = self.root / "sensor_blobs" / split
        cameras = tuple(c for c in SENSOR_SETS[self.sensors] if not (folder / frame.cameras[c].path).is_file())
        cloud = folder / frame.lidar_path
        if not cameras and cloud.is_file():
            return False
        road_map, renderer = self._renderer(split)
        braking = braking_tracks(before, frame, road_map)
        if cameras:
            for name, image in renderer.render(frame, cameras, self.image_size, braking).items():
                write_image(folder / frame.cameras[name].path, image)
        if not cloud.is_file():
            write_point_cloud(cloud, renderer.point_cloud(frame, braking))
        return True


def braking_tracks(before: Frame, frame: Frame, road_map: RoadMap) -> frozenset[str]:
    """Track tokens of vehicles whose brake lights are on: they lose speed, or stand in a lane rather than parked."""
    earlier = dict(
        zip(before.annotations.track_tokens.tolist(), np.hypot(*before.annotations.velocity.T).tolist(), strict=True)
    )
    now = frame.annotations
    speed = np.hypot(*now.velocity.T)
    slower = np.array(
        [v < earlier.get(t, v) - BRAKING_M_S for t, v in zip(now.track_tokens.tolist(), speed, strict=True)]
    )
    centres = shapely.points(to_global(frame.ego_pose, now.boxes[:, [0, 1, 6]])[:, :2])
    standing = (speed < STANDING_M_S) & _on(road_map, "lanes_polygons", "intersections", points=centres)
    braking = (now.names == "vehicle") & (slower | standing)
    return frozenset(now.track_tokens[braking].tolist())


def _on(road_map: RoadMap, *layers: str, points: np.ndarray) -> np.ndarray:
    """(N,) bool: the point is inside a polygon of one of the layers."""
    inside = np.zeros(len(points), bool)
    for layer in layers:
        inside[road_map.layer(layer).tree.query(points, predicate="within")[0]] = True
    return inside
