"""Traffic of a district: who drives and walks where, simulated by Eclipse SUMO at 10 Hz and recorded.

Cars, lorries, buses and bicycles drive random walks through the network that prefer turning to going straight and end
where the streets leave the district; pedestrians walk along sidewalks and over crossings. Some cars have the size of
the ego vehicle: any of them may become the ego of a log. Everything follows from the seed.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from navsim_eval.city.network import BICYCLE, CAR, PEDESTRIAN, Style, run_sumo_tool
from navsim_eval.city.sumo_net import Network
from navsim_eval.geometry import Vehicle

STEP_S = 0.1
WARM_UP_S = 15.0
TRIP_S = 110.0  # typical time of a trip through a district, to keep the density up
TURN_PREFERENCE = 3.0  # weight of a turn against going straight on
BICYCLES_PER_STREET = 0.9  # of the streets with a bicycle lane, at a time
EGO_KIND = "ego_car"


@dataclass(frozen=True)
class Kind:
    """A kind of road user: class of its annotation, size [m], SUMO attributes, share among its like."""

    name: str
    annotation: str
    length: float
    width: float
    height: float
    attributes: dict[str, str]
    share: float = 0.0


def _car(name: str, length: float, width: float, height: float, share: float, **attributes: str) -> Kind:
    """Brisk but smooth drivers: close to the limit, no dawdling, comfortable braking."""
    basic = {"accel": "2.0", "decel": "3.0", "emergencyDecel": "6.0", "sigma": "0", "tau": "1.3", "minGap": "2.5"}
    basic |= {"speedFactor": "normc(1.0,0.03,0.92,1.08)", "vClass": "passenger", "jmDriveAfterYellowTime": "1.2"}
    return Kind(name, "vehicle", length, width, height, basic | attributes, share)


KINDS = {
    kind.name: kind
    for kind in (
        _car(EGO_KIND, Vehicle.LENGTH, Vehicle.WIDTH, Vehicle.HEIGHT, 0.4),
        _car("hatchback", 4.1, 1.78, 1.48, 0.18),
        _car("saloon", 4.75, 1.85, 1.45, 0.2),
        _car("offroader", 4.85, 1.95, 1.75, 0.12),
        _car("lorry", 8.2, 2.45, 3.3, 0.06, vClass="truck", accel="1.3", decel="2.8"),
        _car("bus", 12.0, 2.55, 3.2, 0.04, vClass="bus", accel="1.2", decel="2.5"),
        Kind(
            "bicycle",
            "bicycle",
            1.8,
            0.65,
            1.75,
            {"vClass": "bicycle", "maxSpeed": "5.5", "accel": "1.0", "decel": "2.5", "sigma": "0", "minGap": "0.8"},
        ),
        Kind("pedestrian", "pedestrian", 0.55, 0.6, 1.75, {"vClass": "pedestrian", "maxSpeed": "1.4"}),
    )
}


@dataclass(frozen=True)
class Track:
    """One road user, recorded every STEP_S from step `first` on. Local coordinates of the district.

    poses:    (K, 3) float64 front centre x, y [m] and heading [rad] as SUMO reports them
    speed:    (K,) float64 [m/s];  lanes: K lane ids (inner lanes of junctions start with a colon)
    route:    street ids in driving order (empty for pedestrians)
    """

    id: str
    kind: Kind
    first: int
    poses: np.ndarray
    speed: np.ndarray
    lanes: tuple[str, ...]
    route: tuple[str, ...]

    @property
    def last(self) -> int:
        return self.first + len(self.poses) - 1


@dataclass(frozen=True)
class Traffic:
    """Recorded traffic. steps: number of steps; signals: traffic light → (first step, state), by time."""

    steps: int
    tracks: tuple[Track, ...]
    signals: dict[str, tuple[tuple[int, str], ...]]

    def signal_state(self, light: str, step: int) -> str:
        """State letters of a traffic light at a step, one a link (r red, y yellow, g or G green)."""
        state = self.signals[light][0][1]
        for first, letters in self.signals[light]:
            if first > step:
                break
            state = letters
        return state


def simulate(network: Network, style: Style, seed: int, folder: Path, duration_s: float) -> Traffic:
    """Traffic over `duration_s`, after an unrecorded warm-up, in the district whose `net.xml` lies in `folder`."""
    rng = np.random.default_rng([seed, 1])
    folder = folder.resolve()  # SUMO reads relative output paths as relative to the file that names them
    end = WARM_UP_S + duration_s
    routes = _write_demand(folder / "demand.rou.xml", network, style, rng, end)
    record, signals = folder / "record.xml", folder / "signals.xml"
    _write_signal_recorder(folder / "recorder.add.xml", network, signals)
    run_sumo_tool(
        "sumo",
        [
            *("--net-file", str(folder / "net.xml"), "--route-files", str(folder / "demand.rou.xml")),
            *("--additional-files", str(folder / "recorder.add.xml"), "--seed", str(seed % 2**31)),
            *("--step-length", str(STEP_S), "--end", str(end), "--precision", "4"),
            *("--fcd-output", str(record), "--fcd-output.attributes", "x,y,angle,type,speed,lane,edge"),
            *("--device.fcd.begin", str(WARM_UP_S), "--lanechange.duration", "3.5"),
            *("--collision.action", "warn", "--collision.check-junctions", "--time-to-teleport", "-1"),
            *("--no-step-log", "--no-warnings", "--xml-validation", "never", "--ignore-route-errors"),
        ],
    )
    first_step = round(WARM_UP_S / STEP_S)
    steps = round(duration_s / STEP_S)
    tracks = _read_tracks(record, routes, first_step)
    traffic = Traffic(steps, tracks, _read_signals(signals, first_step))
    for path in (record, signals):
        path.unlink()
    return traffic


# --- demand ----------------------------------------------------------------------------------------------------------


def _write_demand(path: Path, network: Network, style: Style, rng: np.random.Generator, end: float) -> dict:
    """Route file; returns vehicle id → its streets."""
    onward = _onward_streets(network, CAR)
    exits = [edge for edge in onward if not onward[edge]]
    entries = sorted(set(onward) - {edge for targets in onward.values() for edge in targets})
    length = sum(lane.length for lane in network.lanes.values() if lane.use == CAR) / 1000.0
    present = max(4, round(style.cars * length))
    to_exit = _steps_to(onward, exits)
    streets = sorted(edge for edge in onward if to_exit.get(edge, 0) >= 1)
    kinds = [kind for kind in KINDS.values() if kind.share]
    shares = np.array([kind.share for kind in kinds])
    rows = []
    for depart in np.sort(rng.uniform(0, WARM_UP_S, present)):
        rows.append((depart, str(rng.choice(streets)), "random_free"))
    for depart in np.sort(rng.uniform(WARM_UP_S / 2, end, round(present * end / TRIP_S))):
        rows.append((depart, str(rng.choice(entries)), "base"))
    rows.sort(key=lambda row: row[0])

    root, routes = ET.Element("routes"), {}
    for kind in KINDS.values():
        size = {"length": f"{kind.length}", "width": f"{kind.width}", "height": f"{kind.height}"}
        ET.SubElement(root, "vType", id=kind.name, attrib=size | kind.attributes)
    moving = []
    for number, (depart, start, position) in enumerate(rows):
        kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
        route = _random_walk(start, onward, to_exit, rng)
        moving.append((depart, f"v{number}", kind.name, route, position))
    moving += _bicycle_trips(network, style, rng, end)
    people = _walks(network, style, rng, end)
    for depart, name, kind, route, position in sorted([*moving, *people], key=lambda row: (row[0], row[1])):
        if kind == "pedestrian":
            person = ET.SubElement(root, "person", id=name, depart=f"{depart:.2f}", type=kind, departPos=position)
            ET.SubElement(person, "walk", edges=" ".join(route))
            continue
        vehicle = ET.SubElement(root, "vehicle", id=name, type=kind, depart=f"{depart:.2f}", departLane="best")
        vehicle.set("departSpeed", "avg" if position == "random_free" else "max")
        vehicle.set("departPos", position)
        ET.SubElement(vehicle, "route", edges=" ".join(route))
        routes[name] = tuple(route)
    ET.ElementTree(root).write(path)
    return routes


Graph = dict[str, list[tuple[str, bool]]]  # street → (next street, is a turn)


def _onward_streets(network: Network, use: str) -> dict[str, dict[str, bool]]:
    """Street → reachable next street → whether that is a turn; for cars."""
    onward: dict[str, dict[str, bool]] = {edge: {} for edge in network.edges if network.car_lanes(edge)}
    for link in network.links:
        start, end = network.lanes[link.from_lane].edge, network.lanes[link.to_lane].edge
        onward[start][end] = link.direction != "s"
    return onward


def _steps_to(onward: dict[str, dict[str, bool]], goals: Sequence[str]) -> dict[str, int]:
    """Streets from each street to the nearest goal."""
    backward = defaultdict(list)
    for start, targets in onward.items():
        for end in targets:
            backward[end].append(start)
    steps, queue = dict.fromkeys(goals, 0), deque(goals)
    while queue:
        edge = queue.popleft()
        for before in backward[edge]:
            if before not in steps:
                steps[before] = steps[edge] + 1
                queue.append(before)
    return steps


def _random_walk(start: str, onward, to_exit: dict[str, int], rng: np.random.Generator, wander: int = 7) -> list[str]:
    """A route that turns often: `wander` free choices, then the shortest way out of the district."""
    route = [start]
    while onward[route[-1]]:
        choices = {edge: turn for edge, turn in sorted(onward[route[-1]].items()) if edge in to_exit}
        fresh = {edge: turn for edge, turn in choices.items() if edge not in route} or choices
        if len(route) < wander and (inner := {e: t for e, t in fresh.items() if to_exit[e] > 0}):
            weights = np.array([TURN_PREFERENCE if turn else 1.0 for turn in inner.values()])
            route.append(str(rng.choice(list(inner), p=weights / weights.sum())))
        else:
            route.append(min(choices, key=lambda edge: (to_exit[edge], edge)))
    return route


def _bicycle_trips(network: Network, style: Style, rng: np.random.Generator, end: float) -> list[tuple]:
    """Bicycles keep to streets with a bicycle lane, one street a trip or several that follow straight on."""
    ways = sorted({lane.edge for lane in network.lanes.values() if lane.use == BICYCLE})
    onward = _onward_streets(network, CAR)
    trips = []
    for number in range(round(len(ways) * BICYCLES_PER_STREET * (1 + end / TRIP_S))):
        route = [str(rng.choice(ways))]
        while following := [e for e, turn in sorted(onward[route[-1]].items()) if e in ways and not turn]:
            if following[0] in route:
                break
            route.append(following[0])
        depart = rng.uniform(0, WARM_UP_S) if number < len(ways) * BICYCLES_PER_STREET else rng.uniform(WARM_UP_S, end)
        trips.append((float(depart), f"b{number}", "bicycle", route, "random_free"))
    return trips


def _walks(network: Network, style: Style, rng: np.random.Generator, end: float) -> list[tuple]:
    """Pedestrians walk along a few streets that touch each other."""
    sidewalks = {lane.edge: lane.length for lane in network.lanes.values() if lane.use == PEDESTRIAN}
    touching = defaultdict(list)
    for edge in sorted(sidewalks):
        for junction in network.arms[edge]:
            touching[junction].append(edge)
    kilometres = sum(sidewalks.values()) / 1000.0
    count = round(style.people * kilometres * (1 + end / (3 * TRIP_S)))
    names = sorted(sidewalks)
    weights = np.array([sidewalks[name] for name in names])
    trips = []
    for number in range(count):
        edge = str(rng.choice(names, p=weights / weights.sum()))
        corner = network.arms[edge][int(rng.integers(2))]
        neighbours = [other for other in touching[corner] if other != edge]
        route = [edge] + ([str(rng.choice(neighbours))] if neighbours else [])
        depart = rng.uniform(0, WARM_UP_S) if number < style.people * kilometres else rng.uniform(WARM_UP_S, end)
        position = f"{rng.uniform(0.05, 0.95) * sidewalks[edge]:.1f}"
        trips.append((float(depart), f"p{number}", "pedestrian", route, position))
    return trips


# --- recording -------------------------------------------------------------------------------------------------------


def _write_signal_recorder(path: Path, network: Network, output: Path) -> None:
    root = ET.Element("additional")
    for light in sorted({link.signal[0] for link in network.links if link.signal}):
        ET.SubElement(root, "timedEvent", type="SaveTLSStates", source=light, dest=str(output))
    ET.ElementTree(root).write(path)
    if not len(root):
        output.write_text("")


_TIME_STEP = re.compile(r'<timestep time="([\d.]+)"')
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')
_NUMBERS = ("x", "y", "angle", "speed")


def _read_tracks(path: Path, routes: dict[str, tuple[str, ...]], first_step: int) -> tuple[Track, ...]:
    """Tracks from SUMO's floating car data, which holds one element a line, its attributes always in one order."""
    rows: dict[str, list[list[str]]] = defaultdict(list)
    steps: dict[str, list[int]] = defaultdict(list)
    place: dict[str, dict[str, int]] = {}  # by element: attribute → its part of a line that is cut at quotation marks
    step = 0
    with open(path) as file:
        for line in file:
            if match := _TIME_STEP.search(line):
                step = round(float(match[1]) / STEP_S) - first_step
                continue
            parts = line.split('"')
            element = parts[0]
            if not element.endswith(("<vehicle id=", "<person id=")):
                continue
            if element not in place:
                place[element] = {part.strip(" ="): k for k, part in enumerate(parts[2::2], start=1)}
            rows[parts[1]].append(parts)
            steps[parts[1]].append(step)
    return tuple(_track(name, steps[name], rows[name], place, routes.get(name, ())) for name in sorted(rows))


def _track(
    id_: str, steps: list[int], rows: list[list[str]], place: dict[str, dict[str, int]], route: tuple[str, ...]
) -> Track:
    if steps[-1] - steps[0] != len(steps) - 1:
        raise ValueError(f"{id_}: recorded with gaps")
    columns = {attribute: 2 * k + 1 for attribute, k in place[rows[0][0]].items()}
    x, y, angle, speed = (np.array([float(row[columns[name]]) for row in rows]) for name in _NUMBERS)
    heading = np.radians(90.0 - angle)
    poses = np.column_stack([x, y, np.arctan2(np.sin(heading), np.cos(heading))])
    lane = columns.get("lane", columns.get("edge"))
    return Track(id_, KINDS[rows[0][columns["type"]]], steps[0], poses, speed, tuple(row[lane] for row in rows), route)


def _read_signals(path: Path, first_step: int) -> dict[str, tuple[tuple[int, str], ...]]:
    """Changes of state of each traffic light."""
    changes: dict[str, list[tuple[int, str]]] = defaultdict(list)
    with open(path) as file:
        for line in file:
            if "<tlsState " not in line:
                continue
            values = dict(_ATTRIBUTE.findall(line))
            step = round(float(values["time"]) / STEP_S) - first_step
            history = changes[values["id"]]
            if not history or history[-1][1] != values["state"]:
                history.append((step, values["state"]))
    return {light: tuple(history) for light, history in changes.items()}
