"""A tiny drivable world on disk, in the formats of the real data: one map, a few logs, optionally their sensors.

    world = write_world(tmp_path, {"train": 2, "val": 1})
    data = world.data                      # DataConfig for any reader or tool
    world.overrides                        # the same as command-line overrides

The map (metres around `ORIGIN`, x east, y north; everything drives east unless it turns):

    lanes 11 (left), 12 (right)   x 0 … 100       block 100
    connectors 31, 32 straight on, 33 left turn   blocks 300, 301, on intersection 900, x 100 … 120
    lanes 21, 22                  x 120 … 260     block 200
    lane 41 northward             y 20 … 80       block 400
    walkway 700 south of the road, carpark 800 south of that, crosswalk 600 and stop line 500 at the intersection

Each log drives lane 12 at constant speed behind a lead vehicle; around it stand or move one object of most classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely

from navsim_eval.config import DataConfig
from navsim_eval.formats.geopackage import FeatureTable
from navsim_eval.formats.logs import write_log
from navsim_eval.formats.map_store import write_map
from navsim_eval.formats.sensors import write_image, write_point_cloud
from navsim_eval.geometry import to_global, to_local
from navsim_eval.scene import CAMERAS, FRAME_INTERVAL_S, Annotations, Camera, Frame

LOCATION, MAP_VERSION, EPSG = "us-nv-las-vegas-strip", "9.15.1915", 32611
ORIGIN = np.array([664_000.0, 3_997_000.0])
LANE_WIDTH = 3.5
SPEED_LIMIT = 15.0
ROUTE = ("100", "300", "200")
COMMAND_STRAIGHT = np.array([0, 1, 0, 0])


@dataclass(frozen=True)
class World:
    """Where a written world lies and which logs each split holds."""

    root: Path
    logs: Mapping[str, tuple[str, ...]]

    @property
    def data(self) -> DataConfig:
        return DataConfig(root=str(self.root), maps=str(self.root / "maps"))

    @property
    def overrides(self) -> list[str]:
        return [f"data.root={self.root}", f"data.maps={self.root / 'maps'}"]

    def log_file(self, split: str, index: int = 0) -> Path:
        return self.root / "navsim_logs" / split / f"{self.logs[split][index]}.pkl"

    def sensor_files(self, split: str, index: int = 0) -> list[Path]:
        return sorted((self.root / "sensor_blobs" / split / self.logs[split][index]).rglob("*.*"))


def write_world(
    root: Path,
    splits: Mapping[str, int],
    num_frames: int = 17,
    sensors: bool = True,
    image_size: tuple[int, int] = (108, 192),
    speed: float = 8.0,
) -> World:
    """Write the map and, for every split, so many logs. Logs differ in speed and in what stands around."""
    write_road_map(root / "maps")
    names: dict[str, tuple[str, ...]] = {}
    for number, (split, count) in enumerate(splits.items()):
        names[split] = tuple(f"2021.01.01.00.00.0{i}_veh-{number:02d}_00000_00100" for i in range(count))
        for index, name in enumerate(names[split]):
            seed = 100 * number + index
            frames = drive(name, num_frames, speed=speed + 0.5 * index, seed=seed)
            write_log(root / "navsim_logs" / split / f"{name}.pkl", frames)
            if sensors:
                write_sensors(root / "sensor_blobs" / split, frames, image_size, seed)
    return World(root, names)


# --- map -------------------------------------------------------------------------------------------------------------


def write_road_map(root: Path) -> Path:
    """Write the map; returns the GeoPackage's path."""
    return write_map(root, LOCATION, MAP_VERSION, road_layers(), EPSG)


def road_layers() -> dict[str, FeatureTable]:
    """All layers of the map, geometries in UTM metres."""
    lanes = {  # id: (block, index from the left, centre line)
        11: (100, 0, line((0, 1.75), (100, 1.75))),
        12: (100, 1, line((0, -1.75), (100, -1.75))),
        21: (200, 0, line((120, 1.75), (260, 1.75))),
        22: (200, 1, line((120, -1.75), (260, -1.75))),
        41: (400, 0, line((108.25, 20), (108.25, 80))),
    }
    turn = [(100 + 8.25 * np.sin(a), 20 - 18.25 * np.cos(a)) for a in np.linspace(0, np.pi / 2, 12)]
    connectors = {  # id: (block, from lane, to lane, centre line)
        31: (300, 11, 21, line((100, 1.75), (120, 1.75))),
        32: (300, 12, 22, line((100, -1.75), (120, -1.75))),
        33: (301, 11, 41, line(*turn)),
    }
    blocks = {
        100: rectangle(0, 100, -3.5, 3.5),
        200: rectangle(120, 260, -3.5, 3.5),
        400: rectangle(106.5, 110, 20, 80),
    }
    block_connectors = {300: (100, 200, rectangle(100, 120, -3.5, 3.5)), 301: (100, 400, strip(connectors[33][3]))}
    edges = [*lanes, *connectors]
    no_lane, no_connector = [np.nan] * len(lanes), [np.nan] * len(connectors)
    return {
        "lanes_polygons": table(
            lanes,
            [strip(centre) for _, _, centre in lanes.values()],
            lane_fid=list(lanes),
            lane_group_fid=[block for block, _, _ in lanes.values()],
            lane_index=[index for _, index, _ in lanes.values()],
            left_boundary_fid=[1000 + 2 * i for i in range(len(lanes))],
            right_boundary_fid=[1001 + 2 * i for i in range(len(lanes))],
            speed_limit_mps=[SPEED_LIMIT] * len(lanes),
        ),
        "lane_connectors": table(
            connectors,
            [centre for *_, centre in connectors.values()],
            exit_lane_fid=[source for _, source, _, _ in connectors.values()],
            entry_lane_fid=[target for _, _, target, _ in connectors.values()],
            lane_group_connector_fid=[block for block, *_ in connectors.values()],
            intersection_fid=[900] * len(connectors),
            speed_limit_mps=[np.nan] * len(connectors),
            traffic_light_stop_line_fids=["500"] * len(connectors),
        ),
        "gen_lane_connectors_scaled_width_polygons": table(
            [3000 + fid for fid in connectors],
            [strip(centre) for *_, centre in connectors.values()],
            lane_connector_fid=list(connectors),
            left_boundary_fid=[1100 + 2 * i for i in range(len(connectors))],
            right_boundary_fid=[1101 + 2 * i for i in range(len(connectors))],
        ),
        "baseline_paths": table(
            [2000 + fid for fid in edges],
            [edge[-1] for edge in (*lanes.values(), *connectors.values())],
            lane_fid=[*(float(fid) for fid in lanes), *no_connector],
            lane_connector_fid=[*no_lane, *(float(fid) for fid in connectors)],
        ),
        "boundaries": table(
            [*range(1000, 1000 + 2 * len(lanes)), *range(1100, 1100 + 2 * len(connectors))],
            [
                edge[-1].parallel_offset(LANE_WIDTH / 2, side)
                for edge in (*lanes.values(), *connectors.values())
                for side in ("left", "right")
            ],
            boundary_type_fid=[2] * 2 * len(edges),
        ),
        "lane_groups_polygons": table(blocks, list(blocks.values())),
        "lane_group_connectors": table(
            block_connectors,
            [polygon for *_, polygon in block_connectors.values()],
            from_lane_group_fid=[source for source, _, _ in block_connectors.values()],
            to_lane_group_fid=[target for _, target, _ in block_connectors.values()],
            intersection_fid=[900] * len(block_connectors),
        ),
        "intersections": table([900], [rectangle(100, 120, -20, 20)], intersection_type_fid=[1]),
        "stop_polygons": table([500], [rectangle(98, 100, -3.5, 3.5)], stop_polygon_type_fid=[2]),
        "crosswalks": table([600], [rectangle(101, 104, -8, 8)], is_marked=[True]),
        "walkways": table([700], [rectangle(0, 260, -6.5, -3.5)]),
        "carpark_areas": table([800], [rectangle(40, 60, -16, -6.5)], heading=[0.0]),
        "generic_drivable_areas": table([], []),
    }


def line(*points: tuple[float, float]) -> shapely.LineString:
    """Centre line through local points, with a vertex every 2 m or closer."""
    return shapely.segmentize(shapely.LineString(np.array(points) + ORIGIN), 2.0)


def rectangle(x0: float, x1: float, y0: float, y1: float) -> shapely.Polygon:
    """Axis-aligned rectangle in local coordinates."""
    return shapely.box(x0 + ORIGIN[0], y0 + ORIGIN[1], x1 + ORIGIN[0], y1 + ORIGIN[1])


def strip(centre: shapely.LineString) -> shapely.Polygon:
    """Surface of a lane around its centre line."""
    return centre.buffer(LANE_WIDTH / 2, cap_style="flat")


def table(fids, geometries: list[shapely.Geometry], **columns: list) -> FeatureTable:
    """Layer from lists."""
    array = np.empty(len(geometries), dtype=object)
    array[:] = geometries
    values = {name: np.array(c, object if c and isinstance(c[0], str) else None) for name, c in columns.items()}
    return FeatureTable(np.array(list(fids), np.int64), array, values)


# --- logs ------------------------------------------------------------------------------------------------------------


def drive(log_name: str, num_frames: int = 17, speed: float = 8.0, seed: int = 0, start: float = 10.0) -> list[Frame]:
    """Frames of a drive along lane 12 at constant speed [m/s], `start` metres behind its beginning."""
    rng = np.random.default_rng(seed)
    sway = rng.uniform(-0.2, 0.2)
    return [_frame(log_name, index, speed, start, sway, seed) for index in range(num_frames)]


def _frame(log_name: str, index: int, speed: float, start: float, sway: float, seed: int) -> Frame:
    seconds = index * FRAME_INTERVAL_S
    ego = np.array([ORIGIN[0] + start + speed * seconds, ORIGIN[1] - 1.75 + sway, 0.0])
    token = f"{seed:08x}{index:08x}"
    return Frame(
        token=token,
        log_name=log_name,
        scene_token=f"{seed:016x}",
        map_name=LOCATION,
        timestamp_us=1_600_000_000_000_000 + round(seconds * 1e6),
        ego_pose=ego,
        ego_velocity=np.array([speed, 0.0]),
        ego_acceleration=np.zeros(2),
        driving_command=COMMAND_STRAIGHT,
        roadblock_ids=ROUTE,
        traffic_lights=(("31", False), ("32", False), ("33", True)),
        annotations=_annotations(ego, speed, seconds, start),
        cameras={name: _camera(log_name, name, token) for name in CAMERAS},
        lidar_path=Path(log_name) / "MergedPointCloud" / f"{token}.pcd",
    )


def _annotations(ego: np.ndarray, speed: float, seconds: float, start: float) -> Annotations:
    """What is around: (class, track, local position at time 0, velocity along x, size)."""
    objects = [
        ("vehicle", "lead", (start + 22.0, -1.75, 0.0), speed, (4.6, 1.9, 1.6)),
        ("vehicle", "beside", (start - 3.0, 1.75, 0.0), speed + 1.0, (4.6, 1.9, 1.6)),
        ("vehicle", "parked", (50.0, -11.0, 1.2), 0.0, (4.8, 2.0, 1.7)),
        ("pedestrian", "walker", (start + 30.0, -5.0, 0.0), 1.2, (0.7, 0.7, 1.8)),
        ("bicycle", "rider", (start + 45.0, -3.0, 0.0), 4.0, (1.8, 0.6, 1.7)),
        ("traffic_cone", "cone", (70.0, 4.5, 0.0), 0.0, (0.4, 0.4, 0.8)),
        ("barrier", "barrier", (30.0, 5.0, 0.1), 0.0, (2.0, 0.5, 1.0)),
    ]
    poses = np.array([[*ORIGIN, 0.0]]) + np.array([[x + v * seconds, y, h] for _, _, (x, y, h), v, _ in objects])
    local = to_local(ego, poses)
    sizes = np.array([size for *_, size in objects])
    return Annotations(
        boxes=np.column_stack([local[:, :2], sizes[:, 2] / 2, sizes, local[:, 2]]),
        names=np.array([name for name, *_ in objects]),
        velocity=np.array([[v, 0.0] for *_, v, _ in objects]),
        track_tokens=np.array([track for _, track, *_ in objects]),
    )


def _camera(log_name: str, name: str, token: str) -> Camera:
    turn = {"F0": 0, "L0": 55, "L1": 111, "L2": 141, "R0": -55, "R1": -111, "R2": -141, "B0": 180}[name[4:]]
    forward = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # camera axes (right, down, ahead) → ego
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    return Camera(
        path=Path(log_name) / name / f"{token}.jpg",
        rotation=np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ forward,
        translation=np.array([1.6, 0.0, 1.5]),
        intrinsics=np.array([[1545.0, 0.0, 960.0], [0.0, 1545.0, 560.0], [0.0, 0.0, 1.0]]),
        distortion=np.zeros(5),
    )


# --- sensors ---------------------------------------------------------------------------------------------------------


def write_sensors(root: Path, frames: list[Frame], image_size: tuple[int, int], seed: int = 0) -> None:
    """Three front cameras (smooth colours, another picture for every frame) and a sweep, for every frame."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : image_size[0], 0 : image_size[1]] / max(image_size)
    for frame in frames:
        for name in ("CAM_L0", "CAM_F0", "CAM_R0"):
            weights = rng.uniform(0, 255, (2, 3))
            image = (rows[..., None] * weights[0] + columns[..., None] * weights[1]) / 2
            write_image(root / frame.cameras[name].path, image.astype(np.uint8))
        write_point_cloud(root / frame.lidar_path, _sweep(frame, rng))


def _sweep(frame: Frame, rng: np.random.Generator) -> np.ndarray:
    """(6, N) points: ground all around, and the corners of the boxes."""
    ground = np.vstack([rng.uniform(-40, 40, (2, 300)), np.zeros((1, 300))])
    boxes = frame.annotations.boxes
    unit = rng.uniform(-0.5, 0.5, (len(boxes), 20, 2)) * boxes[:, None, 3:5]
    local = np.concatenate([unit, np.zeros((*unit.shape[:2], 1))], axis=-1)
    poses = np.concatenate([to_global(box[[0, 1, 6]], points) for box, points in zip(boxes, local, strict=True)])
    on_objects = np.vstack([poses[:, :2].T, np.full(len(poses), 1.0)])
    points = np.hstack([ground, on_objects])
    return np.vstack([points, np.zeros((3, points.shape[1]))]).astype(np.float32)
