"""What a SUMO network file says, as plain data: lanes, the links between them, junctions and footpaths.

Coordinates are metres in the district's own frame. A link is one permitted movement from a lane to a lane; its line
joins all internal lanes that SUMO cuts it into, from the end of the first lane to the start of the second.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from navsim_eval.city.network import BICYCLE, CAR, PARKING, PEDESTRIAN


@dataclass(frozen=True)
class NetLane:
    """A lane of a street. use: CAR, BICYCLE, PARKING or PEDESTRIAN; index counts from the right."""

    id: str
    edge: str
    index: int
    use: str
    shape: np.ndarray
    width: float
    speed: float
    length: float


@dataclass(frozen=True)
class NetLink:
    """A movement of cars through a junction. signal: (traffic light id, index in its state) or None."""

    from_lane: str
    to_lane: str
    shape: np.ndarray
    speed: float
    direction: str
    state: str
    signal: tuple[str, int] | None


@dataclass(frozen=True)
class Junction:
    id: str
    shape: np.ndarray
    signalised: bool
    incoming: tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """lanes by id; edges: street id → its lane ids, right to left; links of cars; footpaths as polygons or lines.

    crossings: (line, width) of pedestrian crossings; walking_areas: polygons at corners
    arms:      street id → (junction it leaves, junction it enters)
    """

    lanes: dict[str, NetLane]
    edges: dict[str, tuple[str, ...]]
    arms: dict[str, tuple[str, str]]
    links: tuple[NetLink, ...]
    junctions: dict[str, Junction]
    crossings: tuple[tuple[np.ndarray, float], ...]
    walking_areas: tuple[np.ndarray, ...]

    def car_lanes(self, edge: str) -> list[NetLane]:
        """Car lanes of a street, left to right."""
        lanes = [self.lanes[i] for i in self.edges[edge]]
        return sorted((lane for lane in lanes if lane.use == CAR), key=lambda lane: -lane.index)


def read_network(path: Path) -> Network:
    """Parse a SUMO `net.xml`."""
    root = ET.parse(path).getroot()
    lanes: dict[str, NetLane] = {}
    inner: dict[str, ET.Element] = {}
    edges: dict[str, tuple[str, ...]] = {}
    arms: dict[str, tuple[str, str]] = {}
    crossings, walking_areas = [], []
    for edge in root.iter("edge"):
        role, name = edge.get("function", "normal"), edge.get("id")
        for lane in edge.iter("lane"):
            if role == "internal":
                inner[lane.get("id")] = lane
            elif role == "crossing":
                crossings.append((_points(lane), float(lane.get("width", "4"))))
            elif role == "walkingarea":
                walking_areas.append(_points(lane))
            else:
                lanes[lane.get("id")] = _lane(lane, name)
        if role == "normal":
            edges[name] = tuple(lane.get("id") for lane in edge.iter("lane"))
            arms[name] = (edge.get("from"), edge.get("to"))
    return Network(
        lanes=lanes,
        edges=edges,
        arms=arms,
        links=tuple(_links(root, lanes, inner)),
        junctions={
            j.get("id"): Junction(
                j.get("id"), _points(j), j.get("type").startswith("traffic_light"), tuple(j.get("incLanes", "").split())
            )
            for j in root.iter("junction")
            if j.get("type") != "internal"
        },
        crossings=tuple(crossings),
        walking_areas=tuple(walking_areas),
    )


def _points(element: ET.Element) -> np.ndarray:
    pairs = [pair.split(",")[:2] for pair in element.get("shape", "").split()]
    return np.array(pairs, np.float64).reshape(-1, 2)


def _lane(element: ET.Element, edge: str) -> NetLane:
    allowed, closed = element.get("allow"), (element.get("disallow") or "").split()
    use = allowed if allowed in (PEDESTRIAN, BICYCLE, PARKING) else CAR
    if use == CAR and (CAR in closed or (allowed is not None and CAR not in allowed.split())):
        use = PARKING
    return NetLane(
        id=element.get("id"),
        edge=edge,
        index=int(element.get("index")),
        use=use,
        shape=_points(element),
        width=float(element.get("width", "3.2")),
        speed=float(element.get("speed")),
        length=float(element.get("length")),
    )


def _links(root: ET.Element, lanes: dict[str, NetLane], inner: dict[str, ET.Element]) -> list[NetLink]:
    onward = {
        f"{c.get('from')}_{c.get('fromLane')}": c.get("via")
        for c in root.iter("connection")
        if c.get("from").startswith(":") and c.get("via")
    }
    links = []
    for c in root.iter("connection"):
        start, end = f"{c.get('from')}_{c.get('fromLane')}", f"{c.get('to')}_{c.get('toLane')}"
        if start not in lanes or end not in lanes or lanes[start].use != CAR or lanes[end].use != CAR:
            continue
        parts, speeds, via = [lanes[start].shape[-1:]], [], c.get("via")
        while via:
            parts.append(_points(inner[via]))
            speeds.append(float(inner[via].get("speed")))
            via = onward.get(via)
        parts.append(lanes[end].shape[:1])
        signal = (c.get("tl"), int(c.get("linkIndex"))) if c.get("tl") else None
        speed = min(speeds, default=lanes[start].speed)
        links.append(NetLink(start, end, np.concatenate(parts), speed, c.get("dir"), c.get("state"), signal))
    return links
