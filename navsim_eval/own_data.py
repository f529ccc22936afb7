"""Own recordings as NAVSIM logs and sensor files, so that every tool here reads them.

    recording = Recording("drive_01", cameras, moments)
    write_recordings("data/mine", "mine", [recording])
    python tools/train.py data.root=data/mine split=mine val_split=

A recording is a sequence of moments 0.5 s apart: pose, images, optionally a point cloud, objects, command, route. On a
map (`navsim_eval.lane_map`, or any nuPlan GeoPackage) plans can be scored; without one they can be made and learnt.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from navsim_eval.dataset import SENSORS_FOLDER
from navsim_eval.errors import UserError
from navsim_eval.formats.logs import write_log
from navsim_eval.formats.sensors import write_image, write_point_cloud
from navsim_eval.formats.splits import LOGS_FOLDER, OWN_FILTER_FILE, SceneFilter, write_scene_filter
from navsim_eval.geometry import to_local
from navsim_eval.scene import CAMERAS, COMMANDS, FRAME_INTERVAL_S, Annotations, Camera, Frame

NEEDED_CAMERAS = ("CAM_L0", "CAM_F0", "CAM_R0")  # what the planners here look through
TIME_TOLERANCE_S = 0.06
COMMAND_LOOK_AHEAD, COMMAND_OFFSET = 20.0, 2.0  # m: OpenScene's rule, applied to the driven path instead of a lane


@dataclass(frozen=True)
class Calibration:
    """How a camera sits on the vehicle and maps points to pixels.

    intrinsics:  (3, 3) pinhole matrix [px];  distortion: (5,) k1, k2, p1, p2, k3 (OpenCV)
    rotation:    (3, 3) camera → ego, camera axes x right, y down, z forward
    translation: (3,) camera position in the ego frame [m]: rear axle, x forward, y left, z up
    """

    intrinsics: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(5))


@dataclass(frozen=True)
class Moment:
    """What was recorded at one time.

    time_s:   seconds, from any origin
    pose:     (3,) x, y [m], heading [rad] of the rear axle in a fixed frame (with a map: the map's UTM metres)
    images:   camera name (CAM_F0, …) → (H, W, 3) uint8 RGB, or the path of a JPEG file, which is copied
    points:   (n, 3) x, y, z [m] in the ego frame, or (n, 6) with intensity, ring, sensor id; None: no LiDAR
    velocity, acceleration: (2,) in the ego frame [m/s], [m/s²]; None: from the poses
    command:  left, straight, right, unknown; None: from the path that is driven afterwards
    objects:  boxes in the ego frame of this moment, or None where nothing was labelled
    route:    map ids of the blocks to drive through;  red_lights: ids of lane connectors with a red light
    """

    time_s: float
    pose: np.ndarray
    images: Mapping[str, np.ndarray | Path | str]
    points: np.ndarray | None = None
    velocity: np.ndarray | None = None
    acceleration: np.ndarray | None = None
    command: str | None = None
    objects: Annotations | None = None
    route: tuple[str, ...] = ()
    red_lights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recording:
    """A drive without interruption. map_name: location of its map, "" without one."""

    name: str
    cameras: Mapping[str, Calibration]
    moments: Sequence[Moment]
    map_name: str = ""


def every_half_second(times_s: np.ndarray) -> np.ndarray:
    """Indices of the moments closest to a grid of 0.5 s that starts with the first one; a gap ends the grid.

    times_s: (n,) ascending seconds of a faster recording. Write what comes after a gap as a recording of its own.
    """
    times = np.asarray(times_s, np.float64)
    grid = np.arange(times[0], times[-1] + TIME_TOLERANCE_S, FRAME_INTERVAL_S)
    nearest = np.abs(times[None] - grid[:, None]).argmin(axis=1)
    missed = np.flatnonzero(np.abs(times[nearest] - grid) > TIME_TOLERANCE_S)
    return nearest[: missed[0] if len(missed) else None]


def write_recordings(
    root: Path | str,
    split: str,
    recordings: Sequence[Recording],
    *,
    future_frames: int = 10,
    blank_missing: bool = False,
) -> list[Path]:
    """Write logs and sensor files below `root`; `split` is then a split for every tool. Returns the log files.

    future_frames: after the current one, of each scene: 10 as in NAVSIM; 8 are enough to train, 0 to plan
    blank_missing: write black images and empty point clouds for sensors that planners read and the vehicle lacks
    Raises UserError, naming recording, moment and field, for anything that does not fit.
    """
    if not recordings:
        raise UserError(f"own data: no recordings for split '{split}'")
    needed = SceneFilter().num_history_frames + future_frames
    for recording in recordings:
        _check(recording, needed, blank_missing)
    folder = Path(root) / LOGS_FOLDER / split
    logs = []
    for recording in recordings:
        frames = as_frames(recording)
        _write_sensors(Path(root) / SENSORS_FOLDER / split, recording, frames)
        logs.append(write_log(folder / f"{recording.name}.pkl", frames, vehicle_name="own"))
    has_route = all(moment.route for recording in recordings for moment in recording.moments)
    own = SceneFilter(num_future_frames=future_frames, frame_interval=1, has_route=has_route)
    write_scene_filter(folder / OWN_FILTER_FILE, own)
    return logs


def as_frames(recording: Recording) -> list[Frame]:
    """The recording as frames, what it leaves open derived from the poses."""
    poses = np.array([moment.pose for moment in recording.moments], np.float64)
    times = np.array([moment.time_s for moment in recording.moments], np.float64)
    velocity, acceleration = motion(poses, times)
    frames = []
    for index, moment in enumerate(recording.moments):
        token = hashlib.sha256(f"{recording.name}/{index}".encode()).hexdigest()[:16]
        command = moment.command or driven_command(poses, index)
        frames.append(
            Frame(
                token=token,
                log_name=recording.name,
                scene_token=hashlib.sha256(recording.name.encode()).hexdigest()[:16],
                map_name=recording.map_name,
                timestamp_us=round(moment.time_s * 1e6),
                ego_pose=poses[index],
                ego_velocity=velocity[index] if moment.velocity is None else np.asarray(moment.velocity, float),
                ego_acceleration=(
                    acceleration[index] if moment.acceleration is None else np.asarray(moment.acceleration, float)
                ),
                driving_command=np.eye(len(COMMANDS), dtype=np.int64)[COMMANDS.index(command)],
                roadblock_ids=tuple(moment.route),
                traffic_lights=tuple((light, True) for light in moment.red_lights),
                annotations=moment.objects,
                cameras=_cameras(recording, token),
                lidar_path=Path(recording.name) / "MergedPointCloud" / f"{token}.pcd",
            )
        )
    return frames


def motion(poses: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Velocity and acceleration (n, 2) in the ego frame of each moment, by differences of poses (n, 3).

    Differences of positions 0.5 s apart are coarse; give the vehicle's own measurements where there are any.
    """
    if len(poses) < 2:
        return np.zeros((len(poses), 2)), np.zeros((len(poses), 2))
    velocity = np.gradient(poses[:, :2], times, axis=0)
    acceleration = np.gradient(velocity, times, axis=0)
    c, s = np.cos(poses[:, 2]), np.sin(poses[:, 2])
    turned = [
        np.stack([c * v[:, 0] + s * v[:, 1], -s * v[:, 0] + c * v[:, 1]], axis=1) for v in (velocity, acceleration)
    ]
    return turned[0], turned[1]


def driven_command(poses: np.ndarray, index: int) -> str:
    """Left or right when the path driven afterwards lies 2 m or more aside after 20 m, unknown when it ends before.

    This looks into the future: a vehicle that plans must get the command from its navigation instead.
    """
    ahead = to_local(poses[index], poses[index:])
    way = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(ahead[:, :2], axis=0), axis=1))])
    if way[-1] < COMMAND_LOOK_AHEAD:
        return "unknown"
    offset = np.interp(COMMAND_LOOK_AHEAD, way, ahead[:, 1])
    return "left" if offset >= COMMAND_OFFSET else "right" if offset <= -COMMAND_OFFSET else "straight"


# --- checks and files ------------------------------------------------------------------------------------------------


def _check(recording: Recording, needed: int, blank_missing: bool) -> None:
    def refuse(index: int | None, what: str) -> UserError:
        return UserError(f"recording {recording.name}" + ("" if index is None else f", moment {index}") + f": {what}")

    if len(recording.moments) < needed:
        raise refuse(None, f"{len(recording.moments)} moments; one scene needs {needed} (lower future_frames?)")
    unknown = [name for name in recording.cameras if name not in CAMERAS]
    if unknown:
        raise refuse(None, f"camera {unknown[0]} is none of {', '.join(CAMERAS)}")
    absent = [name for name in NEEDED_CAMERAS if name not in recording.cameras]
    if absent and not blank_missing:
        raise refuse(None, f"no {absent[0]}, which planners here read; blank_missing=True writes it black")
    for name, camera in recording.cameras.items():
        shapes = {"intrinsics": (3, 3), "rotation": (3, 3), "translation": (3,), "distortion": (5,)}
        for key, shape in shapes.items():
            if np.shape(getattr(camera, key)) != shape:
                raise refuse(None, f"{name}.{key} has shape {np.shape(getattr(camera, key))}, {shape} is expected")
        if not np.allclose(camera.rotation @ np.transpose(camera.rotation), np.eye(3), atol=1e-3):
            raise refuse(None, f"{name}.rotation is no rotation matrix (camera → ego)")
    before = None
    for index, moment in enumerate(recording.moments):
        if np.shape(moment.pose) != (3,) or not np.isfinite(moment.pose).all():
            raise refuse(index, f"pose {moment.pose} is not three finite numbers x, y, heading")
        if before is not None and abs(moment.time_s - before - FRAME_INTERVAL_S) > TIME_TOLERANCE_S:
            raise refuse(index, f"{moment.time_s - before:.2f} s after the one before; 0.5 s are needed "
                         "(every_half_second picks them; a gap begins a new recording)")  # fmt: skip
        before = moment.time_s
        if moment.command is not None and moment.command not in COMMANDS:
            raise refuse(index, f"command '{moment.command}' is none of {', '.join(COMMANDS)}")
        lost = [name for name in recording.cameras if name not in moment.images]
        if lost:
            raise refuse(index, f"no image of {lost[0]}")
        if moment.points is None and not blank_missing:
            raise refuse(index, "no points; blank_missing=True writes an empty point cloud")
        if moment.points is not None and (np.ndim(moment.points) != 2 or np.shape(moment.points)[1] not in (3, 6)):
            raise refuse(index, f"points have shape {np.shape(moment.points)}, (n, 3) or (n, 6) is expected")
        if moment.route and not recording.map_name:
            raise refuse(index, "a route needs map_name, whose ids it names")


def _cameras(recording: Recording, token: str) -> dict[str, Camera]:
    """All cameras of the vehicle, and blank ones in the place of those that planners read and it lacks."""
    front = next(iter(recording.cameras.values()), None)
    names = [name for name in CAMERAS if name in recording.cameras or name in NEEDED_CAMERAS]
    cameras = {}
    for name in names:
        calibration = recording.cameras.get(name, front)
        if calibration is None:
            calibration = Calibration(np.eye(3), np.eye(3), np.zeros(3))
        cameras[name] = Camera(
            path=Path(recording.name) / name / f"{token}.jpg",
            rotation=np.asarray(calibration.rotation, float),
            translation=np.asarray(calibration.translation, float),
            intrinsics=np.asarray(calibration.intrinsics, float),
            distortion=np.asarray(calibration.distortion, float),
        )
    return cameras


def _write_sensors(root: Path, recording: Recording, frames: Sequence[Frame]) -> None:
    size = None
    for moment, frame in zip(recording.moments, frames, strict=True):
        for name, image in moment.images.items():
            target = root / frame.cameras[name].path
            if isinstance(image, np.ndarray):
                size = image.shape
                write_image(target, image)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(image, target)
        for name in frame.cameras:
            if name not in moment.images:
                write_image(root / frame.cameras[name].path, np.zeros(size or (1080, 1920, 3), np.uint8))
        points = np.zeros((0, 3)) if moment.points is None else np.asarray(moment.points, np.float32)
        if points.shape[1] == 3:
            points = np.pad(points, ((0, 0), (0, 3)))
        write_point_cloud(root / frame.lidar_path, points.T)
