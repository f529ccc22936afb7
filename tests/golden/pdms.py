"""Scenes, map and reference outputs of the PDM score, for tests marked `needs_golden`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

import numpy as np

from navsim_eval.formats.logs import read_log
from navsim_eval.formats.map_store import MapStore
from navsim_eval.formats.maps import RoadMap
from navsim_eval.scene import Scene
from tests.golden import GOLDEN

PDMS = GOLDEN / "pdms"
WINDOW = 14  # 4 history frames (the last is now) + 10 future frames


@dataclass(frozen=True)
class GoldenScene:
    """A scored scene: its row in the score arrays, its window, and whether v2 scored it."""

    row: int
    name: str
    scene: Scene
    v2: bool

    @property
    def road_map(self) -> RoadMap:
        return MapStore(PDMS / "maps").get(self.scene.map_name)

    @property
    def has_debug(self) -> bool:
        return (PDMS / "debug" / f"{self.name}.npz").is_file()

    @property
    def debug(self) -> dict[str, np.ndarray]:
        """Intermediate results of the reference implementation, where `has_debug`."""
        return load(f"debug/{self.name}")


@cache
def scenes() -> tuple[GoldenScene, ...]:
    """All scored scenes in the order of the score arrays' axis S."""
    with open(PDMS / "scenes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    logs = {log: read_log(PDMS / "logs" / f"{log}.pkl") for log in sorted({row["log"] for row in rows})}
    return tuple(
        GoldenScene(
            row=int(row["scene"]),
            name=f"{row['log']}_{row['start']}",
            scene=Scene(tuple(logs[row["log"]][int(row["start"]) : int(row["start"]) + WINDOW])),
            v2=row["v2"] == "True",
        )
        for row in rows
    )


def debug_scenes() -> list[GoldenScene]:
    """The few scenes with intermediate results."""
    return [scene for scene in scenes() if scene.has_debug]


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.npz`."""
    with np.load(PDMS / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
