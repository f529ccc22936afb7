"""What stands still in a district: parked cars, construction sites in parking strips, boxes and bins at kerbs.

Everything follows from the network and the seed. Local coordinates of the district, metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely

from navsim_eval.city import lines
from navsim_eval.city.network import CAR, PARKING, PEDESTRIAN
from navsim_eval.city.road_map import CarPark
from navsim_eval.city.sumo_net import NetLane, Network

BAY_LENGTH_M, BAY_WIDTH_M = 6.2, 2.9
CLEAR_OF_JUNCTION_M = 10.0
PARKED_SHARE = 0.62
SITE_SHARE = 0.3  # parking strips that hold a construction site
SITE_LENGTH_M = 15.0
CAR_PARK_SHARE = 0.14  # streets with a car park beside them
CAR_PARK_LENGTH_M, CAR_PARK_DEPTH_M, DRIVEWAY_M = 28.0, 18.0, 6.0
OBJECT_SPACING_M = 45.0  # between boxes and bins along a kerb
_PARKED_SIZES = np.array(
    [[4.1, 1.78, 1.48], [4.5, 1.82, 1.5], [4.75, 1.85, 1.45], [4.85, 1.93, 1.75], [5.2, 1.95, 2.0]]
)
_CONE, _BARRIER, _SIGN = (0.35, 0.35, 0.75), (0.45, 2.0, 1.0), (0.15, 0.8, 1.5)
_BINS = np.array([[0.6, 0.6, 1.1], [1.1, 0.5, 1.2], [0.45, 0.45, 0.9]])


@dataclass(frozen=True)
class Furniture:
    """Objects that never move. names: (N,) annotation class; poses: (N, 3) centre x, y, heading; sizes: (N, 3)
    length, width, height."""

    names: np.ndarray
    poses: np.ndarray
    sizes: np.ndarray


class _Placed:
    def __init__(self) -> None:
        self.names, self.poses, self.sizes = [], [], []

    def add(self, name: str, x: float, y: float, heading: float, size) -> None:
        self.names.append(name)
        self.poses.append((x, y, heading))
        self.sizes.append(tuple(size))


def furnish(network: Network, seed: int) -> tuple[Furniture, list[CarPark]]:
    """Static objects and car parks of a district."""
    rng = np.random.default_rng([seed, 2])
    placed = _Placed()
    for lane in network.lanes.values():
        if lane.use == PARKING:
            _fill_strip(placed, lane, rng)
    parks = _car_parks(placed, network, rng)
    areas = shapely.STRtree([park.polygon for park in parks])
    for lane in network.lanes.values():
        if lane.use == PEDESTRIAN:
            _kerb_objects(placed, lane, areas, rng)
    return (
        Furniture(
            np.array(placed.names, dtype=str),
            np.array(placed.poses, np.float64).reshape(-1, 3),
            np.array(placed.sizes, np.float64).reshape(-1, 3),
        ),
        parks,
    )


def _fill_strip(placed: _Placed, lane: NetLane, rng: np.random.Generator) -> None:
    """Parked cars, one a bay, and perhaps a construction site in place of a few of them."""
    stations = np.arange(CLEAR_OF_JUNCTION_M, lane.length - CLEAR_OF_JUNCTION_M - BAY_LENGTH_M, BAY_LENGTH_M)
    if len(stations) < 3:
        return
    middles, angles = stations + BAY_LENGTH_M / 2, np.unwrap(lines.headings(lane.shape))
    centres, heading = lines.sample(lane.shape, middles), np.interp(middles, lines.arc_lengths(lane.shape), angles)
    site = float(rng.uniform(0.0, lane.length - SITE_LENGTH_M)) if rng.random() < SITE_SHARE else None
    for station, (x, y), angle in zip(stations, centres, heading, strict=True):
        occupied, size = rng.random() < PARKED_SHARE, _PARKED_SIZES[rng.integers(len(_PARKED_SIZES))]
        side, along, skew = rng.uniform(-0.12, 0.05), rng.uniform(-0.4, 0.4), rng.normal(0, 0.015)
        if not occupied or (site is not None and abs(station + BAY_LENGTH_M / 2 - site) < SITE_LENGTH_M / 2 + 4.0):
            continue
        x, y = x + along * np.cos(angle) - side * np.sin(angle), y + along * np.sin(angle) + side * np.cos(angle)
        placed.add("vehicle", x, y, angle + skew, size)
    if site is not None and SITE_LENGTH_M < site < lane.length - SITE_LENGTH_M:
        _construction_site(placed, lane, site, rng)


def _construction_site(placed: _Placed, lane: NetLane, middle: float, rng: np.random.Generator) -> None:
    """Cones along the traffic, barriers across both ends, a sign ahead, material inside."""
    arc, angles = lines.arc_lengths(lane.shape), np.unwrap(lines.headings(lane.shape))

    def at(station: float, side: float) -> tuple[float, float, float]:
        angle = float(np.interp(station, arc, angles))
        x, y = lines.sample(lane.shape, np.array([station]))[0]
        return x - side * np.sin(angle), y + side * np.cos(angle), angle

    first, last, kerb = middle - SITE_LENGTH_M / 2, middle + SITE_LENGTH_M / 2, lane.width / 2 - 0.35
    for station in np.arange(first, last + 0.1, 2.5):
        placed.add("traffic_cone", *at(station, kerb), _CONE)
    for station in (first + 0.5, last - 0.5):
        placed.add("barrier", *at(station, -0.2), _BARRIER)
    placed.add("czone_sign", *at(first - 1.5, -0.3), _SIGN)
    placed.add("generic_object", *at(middle + rng.uniform(-3, 3), -0.4), (1.6, 1.1, 1.0))


def _car_parks(placed: _Placed, network: Network, rng: np.random.Generator) -> list[CarPark]:
    """Paved areas beside long streets, with a driveway over the sidewalk, where nothing else is."""
    used = [shapely.LineString(lane.shape).buffer(lane.width / 2 + 2.0) for lane in network.lanes.values()]
    used += [shapely.Polygon(j.shape).buffer(4.0) for j in network.junctions.values() if len(j.shape) >= 3]
    tree = shapely.STRtree(used)
    parks: list[CarPark] = []
    for lane in network.lanes.values():
        if lane.use != PEDESTRIAN or lane.length < 70.0 or rng.random() > CAR_PARK_SHARE:
            continue
        middle = lane.length / 2
        (x, y), (ahead_x, ahead_y) = lines.sample(lane.shape, np.array([middle, middle + 1.0]))
        angle = float(np.arctan2(ahead_y - y, ahead_x - x))
        forward, right = np.array([np.cos(angle), np.sin(angle)]), np.array([np.sin(angle), -np.cos(angle)])
        near = lane.width / 2 + 3.0

        def area(a: float, b: float, near_side: float, far_side: float, x=x, y=y, forward=forward, right=right):
            corners = [(a, near_side), (b, near_side), (b, far_side), (a, far_side)]
            return shapely.Polygon([np.array([x, y]) + along * forward + aside * right for along, aside in corners])

        half = CAR_PARK_LENGTH_M / 2
        lot = area(-half, half, near, near + CAR_PARK_DEPTH_M)
        if len(tree.query(lot, predicate="intersects")) or any(park.polygon.distance(lot) < 3.0 for park in parks):
            continue
        to_road = sum(network.lanes[i].width for i in network.edges[lane.edge] if network.lanes[i].use != CAR)
        driveway = area(-DRIVEWAY_M / 2, DRIVEWAY_M / 2, lane.width / 2 - to_road - 0.3, near + 0.3)
        heading = angle - np.pi / 2
        parks.append(CarPark(lot.union(driveway), heading))
        for aside in (near + 3.2, near + CAR_PARK_DEPTH_M - 3.2):
            for along in np.arange(-half + BAY_WIDTH_M / 2 + 0.3, half - BAY_WIDTH_M / 2, BAY_WIDTH_M):
                size, free = _PARKED_SIZES[rng.integers(len(_PARKED_SIZES))], rng.random() > PARKED_SHARE
                entry = aside < near + CAR_PARK_DEPTH_M / 2 and abs(along) < DRIVEWAY_M / 2 + BAY_WIDTH_M / 2
                if not free and not entry:
                    position = np.array([x, y]) + along * forward + (aside + rng.uniform(-0.3, 0.3)) * right
                    turned = np.pi if rng.random() < 0.5 else 0.0
                    placed.add("vehicle", *position, heading + turned + rng.normal(0, 0.02), size)
    return parks


def _kerb_objects(placed: _Placed, lane: NetLane, car_parks: shapely.STRtree, rng: np.random.Generator) -> None:
    """Bins and boxes behind the sidewalk, where nobody walks or drives."""
    for station in np.arange(OBJECT_SPACING_M / 2, lane.length - CLEAR_OF_JUNCTION_M, OBJECT_SPACING_M):
        at = station + rng.uniform(-10, 10)
        size, wanted = _BINS[rng.integers(len(_BINS))], rng.random() < 0.6
        (x, y), (ahead_x, ahead_y) = lines.sample(lane.shape, np.array([at, at + 0.5]))
        angle = np.arctan2(ahead_y - y, ahead_x - x)
        aside = lane.width / 2 + 0.5
        point = shapely.Point(x + aside * np.sin(angle), y - aside * np.cos(angle))
        if wanted and not len(car_parks.query(point.buffer(1.0), predicate="intersects")):
            placed.add("generic_object", point.x, point.y, float(angle), size)
