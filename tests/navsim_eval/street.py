"""A straight street for scoring tests: two lanes along x, traffic and lights by hand, states without a simulation.

The right lane is centred on y = 0 and 3.5 m wide, the left one on y = 3.5. The ego starts at the origin, rear axle on
the centre of the right lane, looking along x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.geometry import Vehicle
from navsim_eval.pdm.types import AreaKind, DrivableMap, MetricCache, Observation, StateIndex

ORIGIN = np.array([664_000.0, 3_997_000.0])
WIDTH = 3.5
CAR_LENGTH = 4.0
BUMPER = Vehicle.FRONT_LENGTH + CAR_LENGTH / 2  # centre of a car that touches the ego's front at the start


@dataclass(frozen=True)
class Car:
    """An object in steady motion: centre now, speed along its heading and sideways."""

    token: str
    x: float
    y: float
    heading: float
    velocity: tuple[float, float]
    length: float
    agent: bool


def car(token: str, x: float, y=0.0, *, heading=0.0, speed=0.0, side_speed=0.0, length=CAR_LENGTH, agent=True) -> Car:
    cos, sin = np.cos(heading), np.sin(heading)
    velocity = cos * speed - sin * side_speed, sin * speed + cos * side_speed
    return Car(token, x, y, heading, velocity, length, agent)


@dataclass(frozen=True)
class Light:
    polygon: shapely.Polygon
    red_until: int


def light(start: float, end: float, red_until: int = 51, *, width: float = WIDTH, y: float = 0.0) -> Light:
    """A connector from x = start to end, red before the time index `red_until`."""
    low, high = ORIGIN[1] + y - width / 2, ORIGIN[1] + y + width / 2
    return Light(shapely.box(ORIGIN[0] + start, low, ORIGIN[0] + end, high), red_until)


def make_street(
    cars: list[Car] | None = None,
    lights: list[Light] | None = None,
    *,
    metric: str = "pdms_v1",
    length: float = 150.0,
    left_on_route: bool = True,
    intersection: bool = False,
    speed: float = 8.0,
) -> MetricCache:
    """The street as a metric cache; the reference plan drives on at `speed`."""
    cars, lights = cars or [], lights or []
    steps = 51 if metric == "pdms_v1" else 41

    def strip(low: float, high: float) -> shapely.Polygon:
        return shapely.box(ORIGIN[0] - 50.0, ORIGIN[1] + low, ORIGIN[0] + 150.0, ORIGIN[1] + high)

    half = WIDTH / 2
    kinds = [AreaKind.ROADBLOCK, AreaKind.LANE, AreaKind.LANE] + [AreaKind.INTERSECTION] * intersection
    shapes = [strip(-half, half + WIDTH), strip(-half, half), strip(half, half + WIDTH), strip(-half, half + WIDTH)]
    on_route = [False, True, left_on_route, False]
    time = 0.1 * np.arange(steps)
    poses = np.zeros((steps, len(cars), 3))
    for index, item in enumerate(cars):
        poses[:, index, 0] = ORIGIN[0] + item.x + item.velocity[0] * time
        poses[:, index, 1] = ORIGIN[1] + item.y + item.velocity[1] * time
        poses[:, index, 2] = item.heading
    initial = np.zeros(StateIndex.SIZE)
    initial[:2], initial[StateIndex.VX] = ORIGIN, speed
    along = np.arange(0.0, length + 1.0)
    reference = np.column_stack([ORIGIN[0] + speed * 0.1 * np.arange(51), np.full(51, ORIGIN[1]), np.zeros(51)])
    return MetricCache(
        metric=metric,
        token="street",
        log_name="log",
        map_name="map",
        start_time_us=1_630_000_000_000_000,
        initial_state=initial,
        centerline=np.column_stack([ORIGIN[0] + along, np.full(len(along), ORIGIN[1]), np.zeros(len(along))]),
        drivable_map=DrivableMap(
            ids=np.arange(len(kinds)).astype(str),
            kinds=np.array(kinds, np.int8),
            on_route=np.array(on_route[: len(kinds)]),
            polygons=np.array(shapes[: len(kinds)], dtype=object),
        ),
        observation=Observation(
            tokens=np.array([item.token for item in cars], str),
            poses=poses,
            sizes=np.array([[item.length, 2.0] for item in cars]).reshape(-1, 2),
            is_agent=np.array([item.agent for item in cars], bool),
            speed=np.array([np.hypot(*item.velocity) for item in cars], float),
            red_light_ids=np.arange(len(lights)).astype(str),
            red_light_polygons=np.array([item.polygon for item in lights], dtype=object),
            red_light_active=np.arange(steps)[:, None] < np.array([item.red_until for item in lights], int)[None],
        ),
        reference_poses=reference,
        human_poses=np.column_stack([speed * 0.5 * np.arange(1, 9), np.zeros(8), np.zeros(8)]),
        history_states=np.tile(initial, (14, 1)) if metric == "epdms_v2" else None,
    )


def drive(speed: float, y: float = 0.0) -> np.ndarray:
    """(41, 11) states of an ego that keeps its speed and its lane, relative to the origin."""
    states = np.zeros((41, StateIndex.SIZE))
    states[:, StateIndex.X] = speed * 0.1 * np.arange(41)
    states[:, StateIndex.Y] = y
    states[:, StateIndex.VX] = speed
    return states
