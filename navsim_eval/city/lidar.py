"""The merged point cloud: a spinning sensor on the roof and small ones at the corners, cast into the same world.

Frame: ego rear axle, x forward, y left, z up [m].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from navsim_eval.geometry import Vehicle

MAX_RANGE_M = 100.0
MIN_RANGE_M = 0.5
RANGE_NOISE_M = 0.012
_DROPOUT = 0.015


@dataclass(frozen=True)
class Sensor:
    """A spinning LiDAR.

    lidar_id:   number in the point cloud (0 top, 3 back, 4 front, 1 and 2 sides)
    position:   x, y, z in the ego frame [m]
    elevations: rings from the lowest up, degrees;  azimuths: columns over the full turn
    facing:     centre [deg] and width [deg] of the sector that is measured
    """

    lidar_id: int
    position: tuple[float, float, float]
    elevations: tuple[float, float, int]
    azimuths: int
    facing: tuple[float, float] = (0.0, 360.0)


SENSORS = (
    Sensor(0, (1.30, 0.0, 1.95), (-25.0, 12.0, 40), 1800),
    Sensor(4, (4.00, 0.0, 0.75), (-14.0, 8.0, 10), 600, (0.0, 180.0)),
    Sensor(3, (-1.10, 0.0, 0.95), (-18.0, 8.0, 10), 600, (180.0, 180.0)),
    Sensor(1, (2.40, -1.10, 1.10), (-30.0, 6.0, 10), 600, (-90.0, 180.0)),
    Sensor(2, (2.40, 1.10, 1.10), (-30.0, 6.0, 10), 600, (90.0, 180.0)),
)


@dataclass(frozen=True)
class Beams:
    """All rays of one sweep: origins (N, 3), unit directions (N, 3) float32; ring and lidar id (N,) float32."""

    origins: np.ndarray
    directions: np.ndarray
    ring: np.ndarray
    lidar_id: np.ndarray


@functools.lru_cache(maxsize=4)
def beams(sensors: tuple[Sensor, ...] = SENSORS) -> Beams:
    """Rays of `sensors`, in the order of the written cloud."""
    parts = [_sensor_beams(sensor) for sensor in sensors]
    columns = [np.concatenate([part[k] for part in parts]).astype(np.float32) for k in range(4)]
    return Beams(*columns)


def _sensor_beams(sensor: Sensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    centre, width = np.deg2rad(sensor.facing)
    azimuth = 2.0 * np.pi * np.arange(sensor.azimuths) / sensor.azimuths
    offset = np.angle(np.exp(1j * (azimuth - centre)))
    azimuth = azimuth[np.abs(offset) <= width / 2.0 + 1e-9]
    low, high, rings = sensor.elevations
    # Rings lie closer together near the horizon, where distant things are.
    fraction = np.linspace(-1.0, 1.0, rings)
    elevation = np.deg2rad(np.interp(np.sign(fraction) * np.abs(fraction) ** 1.5, [-1, 0, 1], [low, -2.0, high]))
    el, az = np.meshgrid(elevation, azimuth, indexing="ij")
    directions = np.stack([np.cos(el) * np.cos(az), np.cos(el) * np.sin(az), np.sin(el)], axis=-1).reshape(-1, 3)
    ring = np.repeat(np.arange(rings), len(azimuth))
    origins = np.tile(np.asarray(sensor.position), (len(directions), 1))
    return origins, directions, ring, np.full(len(directions), sensor.lidar_id)


def measure(rays: Beams, distance: np.ndarray, intensity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(6, M) float32 x, y, z, intensity, ring, lidar id of the rays that return, with range noise and lost echoes.

    distance: (N,) float32 true range [m], inf without a hit; intensity: (N,) float32 0 to 255
    """
    count = len(distance)
    jitter = np.clip(rng.standard_normal(count, dtype=np.float32), -2.5, 2.5) * np.float32(RANGE_NOISE_M)
    kept = rng.random(count, dtype=np.float32) > _DROPOUT
    kept &= (distance > MIN_RANGE_M) & (distance < MAX_RANGE_M)
    rows = np.flatnonzero(kept)
    points = rays.origins[rows] + rays.directions[rows] * (distance[rows] + jitter[rows])[:, None]
    on_ego = (points[:, 0] > -Vehicle.REAR_LENGTH) & (points[:, 0] < Vehicle.FRONT_LENGTH)
    on_ego &= np.abs(points[:, 1]) < Vehicle.HALF_WIDTH
    wanted = ~on_ego & (np.einsum("ij,ij->i", points, points) < MAX_RANGE_M**2)
    rows, points = rows[wanted], points[wanted]
    columns = [*points.T, np.round(intensity[rows]), rays.ring[rows], rays.lidar_id[rows]]
    return np.stack(columns).astype(np.float32)
