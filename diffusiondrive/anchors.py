"""Anchors: k-means of human trajectories, the points around which the truncated diffusion starts.

The published file holds 20 trajectories of 8 xy poses; how it was clustered was never published. Here: Lloyd's
iterations from k-means++ starts on the plain 16 coordinates, the best of several restarts. The result depends on
nothing but the trajectories and the seed. `coverage` tells how far human plans lie from their nearest anchor, which
bounds what the planner has to correct.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.table import Table

from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.files import atomic_write
from navsim_eval.scene import COMMANDS

NUM_POSES = 8
SPEED_BINS = (0.0, 0.5, 2.0, 5.0, 10.0, 15.0, np.inf)  # m/s, lower edges belong to the bin
_MAX_ITERATIONS = 300
_ROUGH = 1e-3  # restarts are compared once they improve by less than this share an iteration; the best then goes on


@dataclass
class AnchorConfig:
    """What to cluster.

    num: number of anchors;  restarts: independent k-means++ starts, the best counts;  seed: of all of them
    workers: processes that scan the logs (more than one pays off for hundreds of large logs)
    output_dir: gets anchors.npy (float32 (num, 8, 2)) and coverage.json
    """

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "train"
    num: int = 20
    restarts: int = 10
    seed: int = 0
    workers: int = 1
    output_dir: str = "outputs/anchors"


@dataclass(frozen=True)
class HumanPlans:
    """What humans did in the scenes of a split, ego frame.

    trajectories: (N, 8, 2) float64 x, y at 0.5 … 4 s [m];  commands: (N,) int index into COMMANDS
    speeds:       (N,) float64 speed now [m/s]
    """

    trajectories: np.ndarray
    commands: np.ndarray
    speeds: np.ndarray


def human_plans(scenes: SceneDataset, progress: Callable[[int], None] | None = None) -> HumanPlans:
    """Collect them from the logs alone; no sensor file is opened. Scenes that end too early raise DataError."""
    trajectories, commands, speeds = [], [], []
    for scene in scenes:
        if len(scene.future) < NUM_POSES:
            problem = f"is followed by {len(scene.future)} frames, {NUM_POSES} are needed"
            raise DataError(f"log {scene.log_name}, frame {scene.token}", problem, remedy="use a split with a future")
        trajectories.append(scene.human_trajectory(NUM_POSES)[:, :2])
        commands.append(int(np.argmax(scene.current.driving_command)))
        speeds.append(float(np.linalg.norm(scene.current.ego_velocity)))
        if progress:
            progress(1)
    return HumanPlans(np.array(trajectories).reshape(-1, NUM_POSES, 2), np.array(commands, int), np.array(speeds))


# --- clustering ------------------------------------------------------------------------------------------------------


def cluster_anchors(trajectories: np.ndarray, num: int = 20, seed: int = 0, restarts: int = 10) -> np.ndarray:
    """Anchors (num, T, 2) float32 of trajectories (N, T, 2): k-means++ starts, Lloyd's iterations, best of restarts.

    Anchors are ordered by the distance that they travel forward, then to the left. Raises UserError when there are
    fewer different trajectories than anchors, or non-finite values.
    """
    points = np.asarray(trajectories, np.float64).reshape(len(trajectories), -1)
    if not np.isfinite(points).all():
        raise UserError("anchors: the trajectories hold values that are not finite")
    distinct = len(np.unique(points, axis=0))
    if num < 1 or restarts < 1:
        raise UserError(f"anchors: num={num} and restarts={restarts} must be at least 1")
    if distinct < num:
        raise UserError(
            f"anchors: {num} clusters of {distinct} different trajectories; use more scenes or num={distinct}"
        )
    starts = [_plus_plus(points, num, np.random.default_rng([seed, run])) for run in range(restarts)]
    roughly, _ = min((_lloyd(points, start, _ROUGH) for start in starts), key=lambda run: run[1])
    centers, _ = _lloyd(points, roughly)
    anchors = centers.reshape(num, *np.shape(trajectories)[1:])
    return anchors[np.lexsort((anchors[:, -1, 1], anchors[:, -1, 0]))].astype(np.float32)


def _plus_plus(points: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur & Vassilvitskii 2007): each next centre drawn with probability ∝ squared distance so far."""
    chosen = [int(rng.integers(len(points)))]
    nearest = np.square(points - points[chosen[0]]).sum(axis=1)  # by differences: exactly zero for equal points
    for _ in range(num - 1):
        chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(axis=1))
    return points[chosen]


def _lloyd(points: np.ndarray, centers: np.ndarray, tolerance: float = 0.0) -> tuple[np.ndarray, float]:
    """Assign and average until assignments stay, or the mean squared distance falls by less than the share `tolerance`.

    Returns centres (K, D) and the mean squared distance of the last assignment.
    """
    owner, before = None, np.inf
    rows, squares = np.arange(len(points)), np.square(points).sum(axis=1)
    for _ in range(_MAX_ITERATIONS):
        distance = np.square(centers).sum(axis=1) - 2.0 * points @ centers.T  # without |point|², equal for all centres
        new_owner = _fill_empty(distance.argmin(axis=1), distance + squares[:, None], len(centers))
        now = float((distance[rows, new_owner] + squares).mean())
        if owner is not None and (np.array_equal(owner, new_owner) or before - now < tolerance * before):
            break
        owner, before = new_owner, now
        counts = np.bincount(owner, minlength=len(centers))
        sums = np.stack([np.bincount(owner, column, len(centers)) for column in points.T], axis=1)
        centers = sums / counts[:, None]
    return centers, now


def _fill_empty(owner: np.ndarray, distance: np.ndarray, num: int) -> np.ndarray:
    """Give every empty cluster the point that lies furthest from its centre (out of a cluster with company)."""
    counts = np.bincount(owner, minlength=num)
    for cluster in np.flatnonzero(counts == 0):
        own = np.where(counts[owner] > 1, distance[np.arange(len(owner)), owner], -np.inf)
        furthest = own.argmax()
        counts[owner[furthest]] -= 1
        owner[furthest], counts[cluster] = cluster, 1
    return owner


# --- coverage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoverageRow:
    """Distances [m] of the human plans of one group to their nearest anchor (mean over the eight poses)."""

    command: str
    speed: str
    count: int
    mean: float
    median: float
    p90: float
    worst: float


def anchor_distance(trajectories: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(N,) mean distance over poses [m] to the nearest anchor: the measure by which training assigns modes."""
    distances = [np.linalg.norm(trajectories - anchor, axis=-1).mean(axis=-1) for anchor in np.asarray(anchors, float)]
    return np.min(distances, axis=0)


def coverage(plans: HumanPlans, anchors: np.ndarray, speed_bins: Sequence[float] = SPEED_BINS) -> list[CoverageRow]:
    """How well the anchors cover human plans: overall, by command, and by command and speed (groups that occur)."""
    distance = anchor_distance(plans.trajectories, anchors)
    rows = [_row("all", "all", distance)]
    for index, command in enumerate(COMMANDS):
        of_command = plans.commands == index
        rows.append(_row(command, "all", distance[of_command]))
        for low, high in pairwise(speed_bins):
            group = of_command & (plans.speeds >= low) & (plans.speeds < high)
            rows.append(
                _row(command, f"{low:g}–{high:g} m/s" if np.isfinite(high) else f"≥ {low:g} m/s", distance[group])
            )
    return [row for row in rows if row.count]


def _row(command: str, speed: str, distance: np.ndarray) -> CoverageRow:
    if not len(distance):
        return CoverageRow(command, speed, 0, np.nan, np.nan, np.nan, np.nan)
    median, p90 = np.percentile(distance, [50, 90])
    return CoverageRow(
        command, speed, len(distance), *(float(v) for v in (distance.mean(), median, p90, distance.max()))
    )


def read_anchors(path: Path | str) -> np.ndarray:
    """Anchors (M, 8, 2) float32 from a .npy file (ours or the published one). Raises DataError for anything else."""
    remedy = "make it with tools/cluster_anchors.py"
    try:
        anchors = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(path, "no such anchor file", remedy=remedy) from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(path, "is not a .npy file of numbers", remedy=remedy) from error
    if not isinstance(anchors, np.ndarray) or anchors.ndim != 3 or anchors.shape[2] != 2 or anchors.dtype.kind != "f":
        found = f"{anchors.dtype} {anchors.shape}" if isinstance(anchors, np.ndarray) else type(anchors).__name__
        raise DataError(path, f"holds {found}, expected floats of shape (modes, poses, 2)", remedy=remedy)
    if not np.isfinite(anchors).all():
        raise DataError(path, "holds values that are not finite", remedy=remedy)
    return anchors.astype(np.float32)


def write_anchors(folder: Path, anchors: np.ndarray, rows: Sequence[CoverageRow], config: AnchorConfig) -> Path:
    """Write anchors.npy and coverage.json (rows and the settings they come from); returns the path of the anchors."""

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, anchors)

    report = {
        "split": config.split,
        "num": config.num,
        "seed": config.seed,
        "restarts": config.restarts,
        "measure": "mean distance over eight poses to the nearest anchor [m]",
        "rows": [asdict(row) for row in rows],
    }
    atomic_write(folder / "coverage.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return atomic_write(folder / "anchors.npy", save)


def coverage_table(rows: Sequence[CoverageRow]) -> Table:
    """The coverage for a terminal."""
    table = Table("command", "speed", title="distance of human plans to the nearest anchor [m]")
    for name in ("plans", "mean", "median", "p90", "worst"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (f"{value:.2f}" for value in (row.mean, row.median, row.p90, row.worst))
        table.add_row(row.command, row.speed, str(row.count), *numbers)
    return table
