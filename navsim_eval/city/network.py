"""Road networks of the synthetic city: districts drawn with Eclipse SUMO's netgenerate and netconvert.

A district is a square kilometre or less of one character (`STYLES`): a signalised grid, a multi-lane arterial with
turn lanes and bicycle lanes, winding side streets without signals, a ring of streets around a centre. netgenerate
draws the topology; we bend the streets, choose lanes, signals, sidewalks, bicycle lanes and parking strips; netconvert
builds the junctions, crossings and signal programmes. Everything follows from (style, seed).

Coordinates of a district are local metres; `Location` says where its districts stand in the UTM plane.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from navsim_eval.errors import UserError

PEDESTRIAN, BICYCLE, PARKING, CAR = "pedestrian", "bicycle", "custom1", "passenger"
SHAPE_STEP_M = 6.0  # spacing of the vertices that bend a street
SIDEWALK_WIDTH, BIKE_LANE_WIDTH, PARKING_WIDTH = 2.5, 1.8, 2.4
TURN_LANE_LENGTH = 45.0


@dataclass(frozen=True)
class Location:
    """Where a city stands: a map name other NAVSIM readers accept, its version, UTM zone and origin [m]."""

    name: str
    version: str
    utm_zone: int
    origin: tuple[float, float]
    spacing: float = 1600.0

    def offset(self, index: int) -> np.ndarray:
        """(2,) UTM position of the local origin of district `index`; districts stand side by side, eight in a row."""
        return np.array(self.origin) + self.spacing * np.array([index % 8, index // 8], np.float64)


LOCATIONS = {
    "train": Location("us-ma-boston", "9.12.1817", 19, (322000.0, 4686000.0)),
    "val": Location("us-nv-las-vegas-strip", "9.15.1915", 11, (662000.0, 3994000.0)),
    "test": Location("us-pa-pittsburgh-hazelwood", "9.17.1937", 17, (584000.0, 4472000.0)),
}


@dataclass(frozen=True)
class Style:
    """Character of a district.

    topology:    options for netgenerate
    lanes:       (number of car lanes, probability) of an ordinary street
    main_lanes:  car lanes of streets that run mainly east-west, or None for none apart
    speed:       speed limits to choose from [m/s]
    signals:     share of junctions (three or more arms) with traffic lights
    parking, bicycle: share of streets with a parking strip, a bicycle lane
    bend:        amplitude [m] and wave length [m] of the field that bends streets
    turn_lanes:  share of multi-lane approaches widened by a lane for turning
    cars, people: vehicles and pedestrians under way per kilometre of street
    """

    topology: tuple[str, ...]
    lanes: tuple[tuple[int, float], ...]
    speed: tuple[float, ...]
    signals: float
    parking: float
    bicycle: float
    bend: tuple[float, float]
    main_lanes: int | None = None
    turn_lanes: float = 0.0
    cars: float = 4.5
    people: float = 7.0


STYLES = {
    "grid": Style(
        topology=("--grid", "--grid.number", "4", "--grid.length", "125", "--grid.attach-length", "150"),
        lanes=((1, 0.6), (2, 0.4)),
        speed=(9.0, 11.11),
        signals=0.7,
        parking=0.6,
        bicycle=0.2,
        bend=(9.0, 380.0),
    ),
    "arterial": Style(
        topology=(
            *("--grid", "--grid.x-number", "4", "--grid.y-number", "3", "--grid.x-length", "190"),
            *("--grid.y-length", "165", "--grid.attach-length", "180"),
        ),
        lanes=((1, 0.6), (2, 0.4)),
        main_lanes=3,
        speed=(11.11, 13.89),
        signals=0.9,
        parking=0.15,
        bicycle=0.5,
        bend=(12.0, 520.0),
        turn_lanes=0.7,
        cars=4.5,
    ),
    "irregular": Style(
        topology=(
            *("--rand", "--rand.iterations", "70", "--rand.min-distance", "95", "--rand.max-distance", "170"),
            *("--rand.min-angle", "60", "--rand.connectivity", "0.97", "--rand.neighbor-dist1", "0"),
            *("--rand.neighbor-dist5", "0", "--rand.neighbor-dist6", "0"),
        ),
        lanes=((1, 0.85), (2, 0.15)),
        speed=(9.0, 11.11),
        signals=0.2,
        parking=0.35,
        bicycle=0.15,
        bend=(14.0, 300.0),
        cars=5.0,
    ),
    "ring": Style(
        topology=(
            *("--spider", "--spider.arm-number", "6", "--spider.circle-number", "3", "--spider.space-radius", "125"),
            *("--spider.attach-length", "140", "--spider.omit-center"),
        ),
        lanes=((1, 0.6), (2, 0.4)),
        speed=(11.11,),
        signals=0.45,
        parking=0.4,
        bicycle=0.3,
        bend=(10.0, 340.0),
    ),
}


@dataclass(frozen=True)
class District:
    """One piece of a city: style and seed decide everything in it, `index` where it stands in its location."""

    split: str
    index: int
    style: str
    seed: int

    @property
    def location(self) -> Location:
        return LOCATIONS[self.split]

    @property
    def offset(self) -> np.ndarray:
        return self.location.offset(self.index)


def district_seed(seed: int, split: str, index: int) -> int:
    """Seed of a district: distinct for every (city seed, split, index)."""
    return int(np.random.SeedSequence([seed, list(LOCATIONS).index(split), index]).generate_state(1)[0] % (2**31 - 1))


def sumo_home() -> Path:
    """Folder of the Eclipse SUMO installation. Raises UserError with the remedy where there is none."""
    try:
        import sumo
    except ImportError as error:
        raise UserError("the synthetic city needs Eclipse SUMO: pip install -e '.[city]'") from error
    return Path(sumo.SUMO_HOME)


def run_sumo_tool(name: str, arguments: Sequence[str]) -> None:
    """Run a program of the SUMO suite; a failure raises UserError with its last line."""
    home = sumo_home()
    program = home / "bin" / (name + (".exe" if sys.platform == "win32" else ""))
    environment = {**os.environ, "SUMO_HOME": str(home)}
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        problem = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Quitting")]
        raise UserError(f"SUMO {name} failed: {problem[-1] if problem else f'status {done.returncode}'}")


def build_network(style: Style, seed: int, folder: Path) -> Path:
    """Draw a district into `folder` and return its network file (`net.xml`)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    plain = folder / "topology"
    run_sumo_tool(
        "netgenerate",
        [*style.topology, "--seed", str(seed), "--no-turnarounds", "--plain-output-prefix", str(plain)],
    )
    nodes = _read_nodes(Path(f"{plain}.nod.xml"))
    streets = _read_streets(Path(f"{plain}.edg.xml"))
    bend = _bending_field(style, rng)
    _write_nodes(folder / "streets.nod.xml", nodes, streets, bend, style, rng)
    _write_edges(folder / "streets.edg.xml", nodes, streets, bend, style, rng)
    network = folder / "net.xml"
    run_sumo_tool(
        "netconvert",
        [
            *("--node-files", str(folder / "streets.nod.xml"), "--edge-files", str(folder / "streets.edg.xml")),
            *("--output-file", str(network), "--precision", "3", "--seed", str(seed)),
            *("--no-turnarounds", "--offset.disable-normalization"),
            *("--default.junctions.radius", "9", "--junctions.internal-link-detail", "24"),
            *("--junctions.corner-detail", "8", "--junctions.limit-turn-speed", "2.2"),
            *("--crossings.guess", "--default.crossing-width", "3.2", "--walkingareas"),
            *("--tls.default-type", "static", "--tls.cycle.time", "50", "--tls.yellow.time", "3"),
            *("--tls.left-green.time", "8", "--tls.allred.time", "1", "--geometry.max-angle", "170"),
        ],
    )
    return network


Nodes = dict[str, np.ndarray]
Street = tuple[str, str]  # unordered pair of node names, first one smaller


def _read_nodes(path: Path) -> Nodes:
    return {n.get("id"): np.array([float(n.get("x")), float(n.get("y"))]) for n in ET.parse(path).iter("node")}


def _read_streets(path: Path) -> list[Street]:
    pairs = {tuple(sorted((e.get("from"), e.get("to")))) for e in ET.parse(path).iter("edge")}
    return sorted(pairs)


def _bending_field(style: Style, rng: np.random.Generator):
    """A smooth displacement of the plane: straight streets become gently curved, junctions keep their arms."""
    amplitude, wave = style.bend
    phase = rng.uniform(0, 2 * np.pi, 4)
    scale = rng.uniform(0.8, 1.25, 2)

    def bend(points: np.ndarray) -> np.ndarray:
        x, y = points[..., 0], points[..., 1]
        k = 2 * np.pi / (wave * scale)
        dx = amplitude * np.sin(k[0] * y + phase[0]) + 0.4 * amplitude * np.sin(k[1] * x + phase[1])
        dy = amplitude * np.sin(k[1] * x + phase[2]) + 0.4 * amplitude * np.sin(k[0] * y + phase[3])
        return points + np.stack([dx, dy], -1)

    return bend


def _write_nodes(path, nodes: Nodes, streets: list[Street], bend, style: Style, rng: np.random.Generator) -> None:
    arms = {name: sum(name in street for street in streets) for name in nodes}
    root = ET.Element("nodes")
    for name in sorted(nodes):
        x, y = bend(nodes[name])
        signal = arms[name] >= 3 and rng.random() < style.signals
        kind = "traffic_light" if signal else "priority"
        ET.SubElement(root, "node", id=name, x=f"{x:.3f}", y=f"{y:.3f}", type=kind)
    ET.ElementTree(root).write(path)


def _write_edges(path, nodes: Nodes, streets: list[Street], bend, style: Style, rng: np.random.Generator) -> None:
    root = ET.Element("edges")
    for number, (a, b) in enumerate(streets):
        start, end = nodes[a], nodes[b]
        along = end - start
        length = float(np.hypot(*along))
        t = np.linspace(0.0, 1.0, max(2, int(np.ceil(length / SHAPE_STEP_M)) + 1))[:, None]
        shape = bend(start + t * along)
        main = style.main_lanes is not None and abs(along[0]) > abs(along[1])
        counts, weights = zip(*style.lanes, strict=True)
        lanes = style.main_lanes if main else int(rng.choice(counts, p=weights))
        speed = max(style.speed) if main else float(rng.choice(style.speed))
        width = round(float(rng.uniform(3.3, 3.6)), 2)
        side = rng.random()
        strip = BICYCLE if side < style.bicycle else PARKING if side < style.bicycle + style.parking else None
        widen = lanes >= 2 and length > 120 and rng.random() < style.turn_lanes
        for suffix, first, last, line in (("f", a, b, shape), ("b", b, a, shape[::-1])):
            edge = ET.SubElement(
                root,
                "edge",
                id=f"s{number}{suffix}",
                attrib={"from": first, "to": last},
                numLanes=str(lanes + 1 + (strip is not None)),
                speed=f"{speed:.2f}",
                priority=str(3 if main else lanes),
                spreadType="right",
                shape=" ".join(f"{x:.3f},{y:.3f}" for x, y in line),
            )
            _describe_lanes(edge, lanes, strip, width)
            if widen:
                total = lanes + 1 + (strip is not None)
                indices = " ".join(str(i) for i in range(total + 1))
                ET.SubElement(edge, "split", pos=f"{-TURN_LANE_LENGTH:.1f}", lanes=indices, id=f"t{number}{suffix}")
    ET.ElementTree(root).write(path)


def _describe_lanes(edge: ET.Element, lanes: int, strip: str | None, width: float) -> None:
    """Right to left: sidewalk, perhaps a strip for bicycles or parked cars, car lanes."""
    profile = [(PEDESTRIAN, SIDEWALK_WIDTH)]
    if strip is not None:
        profile.append((strip, BIKE_LANE_WIDTH if strip == BICYCLE else PARKING_WIDTH))
    for index, (allowed, lane_width) in enumerate(profile):
        ET.SubElement(edge, "lane", index=str(index), allow=allowed, width=f"{lane_width}")
    for index in range(len(profile), len(profile) + lanes):
        closed = f"{PEDESTRIAN} {PARKING}" + (f" {BICYCLE}" if strip == BICYCLE else "")
        ET.SubElement(edge, "lane", index=str(index), disallow=closed, width=f"{width}")
