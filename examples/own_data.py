"""Own driving data, worked through: three drives as plain arrays → NAVSIM logs, sensor files and a map.

    python examples/own_data.py data/mine

Everything above `main` stands for what you have: poses, pictures, point clouds, boxes, lanes. Here they are computed (a
vehicle follows a road with a left curve behind another one; pictures are plain, this is about formats). `main` is what
you would write. Two splits come out: `mine`, on a map, and `mine_without_map`, the same drives as if there were none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from navsim_eval.geometry import to_global, to_local
from navsim_eval.lane_map import Connector, Lane, write_lane_map
from navsim_eval.own_data import Calibration, Moment, Recording, write_recordings
from navsim_eval.scene import Annotations

ORIGIN = np.array([500_000.0, 5_400_000.0])  # UTM metres
EPSG = 32632  # UTM zone 32 north
LOCATION = "my-town"
WIDTH = 3.5
STRAIGHT, RADIUS, ANGLE = 90.0, 40.0, np.radians(60)  # m before the curve; its radius; how far it turns
IMAGE = (270, 480)


def centre_line(offset: float, start: float, end: float) -> np.ndarray:
    """(n, 2) line `offset` metres left of the road's reference line, between two of that line's lengths [m]."""
    return np.array([road_pose(s, offset)[:2] for s in np.linspace(start, end, max(int(end - start), 2))])


def road_pose(s: float, offset: float = 0.0) -> np.ndarray:
    """(3,) pose at length s: straight to the east, a curve to the left, straight on."""
    arc = RADIUS * ANGLE
    turned = np.clip(s - STRAIGHT, 0, arc) / RADIUS
    x = min(s, STRAIGHT) + RADIUS * np.sin(turned)
    y = RADIUS * (1 - np.cos(turned))
    rest = max(s - STRAIGHT - arc, 0.0)
    pose = np.array([x + rest * np.cos(turned), y + rest * np.sin(turned), turned])
    return np.array([*(ORIGIN + to_global(pose, np.array([[0.0, offset, 0.0]]))[0, :2]), turned])


def write_town(maps: Path) -> Path:
    """Two lanes before and behind the curve, and the connectors through it."""
    curve, end = STRAIGHT + RADIUS * ANGLE, 400.0
    lanes = [
        Lane(1, 100, centre_line(WIDTH, 0, STRAIGHT), index=0, speed_limit=13.9),
        Lane(2, 100, centre_line(0, 0, STRAIGHT), index=1, speed_limit=13.9),
        Lane(3, 200, centre_line(WIDTH, curve, end), index=0, speed_limit=13.9),
        Lane(4, 200, centre_line(0, curve, end), index=1, speed_limit=13.9),
    ]
    connectors = [
        Connector(11, 300, 1, 3, centre_line(WIDTH, STRAIGHT, curve), speed_limit=11.0),
        Connector(12, 300, 2, 4, centre_line(0, STRAIGHT, curve), speed_limit=11.0),
    ]
    return write_lane_map(maps, LOCATION, lanes, connectors, epsg=EPSG)


def cameras() -> dict[str, Calibration]:
    """Front, left and right camera, 55° apart."""
    forward = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # camera axes (right, down, ahead) → ego
    intrinsics = np.array([[386.0, 0.0, IMAGE[1] / 2], [0.0, 386.0, IMAGE[0] / 2], [0.0, 0.0, 1.0]])
    rig = {}
    for name, degrees in (("CAM_L0", 55), ("CAM_F0", 0), ("CAM_R0", -55)):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
        rig[name] = Calibration(intrinsics, turn @ forward, np.array([1.6, 0.0, 1.5]))
    return rig


def drive(number: int, moments: int = 24) -> list[Moment]:
    """A drive of 0.5 s steps in the right lane, each at another speed, with braking or speeding up."""
    rng = np.random.default_rng(number)
    speeds = np.clip(6.0 + 1.5 * number + np.cumsum(rng.normal(0, 0.25, moments)), 2.0, 12.0)
    lengths = 20.0 + np.concatenate([[0.0], np.cumsum(0.5 * (speeds[1:] + speeds[:-1]) / 2)])
    return [moment(0.5 * i, s, v, rng) for i, (s, v) in enumerate(zip(lengths, speeds, strict=True))]


def moment(seconds: float, length: float, speed: float, rng: np.random.Generator) -> Moment:
    """What the vehicle measured `length` metres along its road."""
    pose = road_pose(length)
    lead = to_local(pose, road_pose(length + 18.0)[None])[0]
    boxes = np.array([[lead[0], lead[1], 0.8, 4.6, 1.9, 1.6, lead[2]]])
    heading = np.array([np.cos(lead[2]), np.sin(lead[2])])
    return Moment(
        time_s=seconds,
        pose=pose,
        images={name: picture(rng) for name in cameras()},
        points=sweep(boxes, rng),
        objects=Annotations(boxes, np.array(["vehicle"]), speed * heading[None], np.array(["lead"])),
        route=("100", "300", "200"),
    )


def picture(rng: np.random.Generator) -> np.ndarray:
    """Sky above, road below."""
    image = np.zeros((*IMAGE, 3), np.uint8)
    image[: IMAGE[0] // 2] = (150, 180, 220)
    image[IMAGE[0] // 2 :] = 90
    return np.clip(image + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)


def sweep(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, 3) points on the ground and on the vehicle ahead."""
    ground = np.column_stack([rng.uniform(-40, 40, (500, 2)), np.zeros(500)])
    on_box = boxes[0, :3] + rng.uniform(-0.5, 0.5, (60, 3)) * boxes[0, 3:6]
    return np.concatenate([ground, on_box])


def main(root: Path) -> None:
    write_town(root / "maps")
    on_map = [Recording(f"drive_{n:02d}", cameras(), drive(n), LOCATION) for n in range(3)]
    write_recordings(root, "mine", on_map)

    off_map = [Recording(f"drive_{n:02d}", cameras(), [without_route(m) for m in drive(n)]) for n in range(3)]
    write_recordings(root, "mine_without_map", off_map)
    print(f"written: {root}/navsim_logs, sensor_blobs, maps. What now works (see docs/your_data.md):")
    for command in (
        f"tools/data.py verify data.root={root} split=mine",
        f"tools/train.py data.root={root} split=mine val_split= pretrained=checkpoints/city_nano trainer.epochs=2",
        f"tools/evaluate.py data.root={root} split=mine planner=[human,constant_velocity,outputs/train/planner]",
        f"tools/evaluate.py data.root={root} split=mine_without_map planner=outputs/train/planner stage=infer",
    ):
        print(f"  python {command}")


def without_route(m: Moment) -> Moment:
    return Moment(m.time_s, m.pose, m.images, m.points, objects=m.objects)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/mine"))
