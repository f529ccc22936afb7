"""Is this machine's arithmetic fit to score? Two small tests that every evaluation runs before it prints a number.

Some builds of numpy and BLAS return zeros or garbage for tall float64 products on some processors, and scores then turn
out wrong without any error. So: (1) a tall matrix product is compared with the same product taken row by row and column
by column; (2) four plans in a hand-made street are simulated and scored, and every number is compared with the stored
one (`selfcheck.json`, computed by this evaluator after it had reproduced the reference outputs).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import shapely

from navsim_eval.errors import UserError
from navsim_eval.pdm.types import AreaKind, DrivableMap, MetricCache, Observation, StateIndex
from navsim_eval.scoring import score

EXPECTED = Path(__file__).with_name("selfcheck.json")
_TOLERANCE = 1e-6


@functools.cache
def problems() -> tuple[str, ...]:
    """What is wrong with the arithmetic here; empty when all is well. Runs once per process (about 0.1 s)."""
    return tuple(text for text in (check_matmul(), check_scoring()) if text)


def require_sound() -> None:
    """Raise UserError when scores made here could not be trusted."""
    if found := problems():
        raise UserError(
            f"numeric self-check failed, no score is printed: {'; '.join(found)} — install another build of numpy "
            "(python tools/doctor.py shows the versions)"
        )


def check_matmul(rows: int = 20_000) -> str | None:
    """A tall float64 product against the same product by rows and by columns."""
    rng = np.random.default_rng(0)
    tall, square = rng.standard_normal((rows, 40)), rng.standard_normal((40, 40))
    whole = tall @ square
    by_row = np.stack([row @ square for row in tall[:: rows // 200]])
    by_column = np.stack([(tall * column).sum(axis=1) for column in square.T], axis=1)
    error = max(np.abs(whole[:: rows // 200] - by_row).max(), np.abs(whole - by_column).max())
    return None if error < 1e-9 else f"tall float64 matrix product is off by {error:.3g} (numpy {np.__version__})"


def check_scoring() -> str | None:
    """Simulate and score the plans of `street()` and compare with the stored numbers."""
    expected = json.loads(EXPECTED.read_text())
    found = score_street()
    for name, values in expected.items():
        error = np.abs(np.array(values) - np.array(found[name])).max()
        if not error < _TOLERANCE:
            return f"{name} of the hand-made street is off by {error:.3g} (numpy {np.__version__})"
    return None


def score_street() -> dict[str, list[float]]:
    """Sub-scores of the plans and the raw progress behind them, by name."""
    table = score([street()], street_plans()[None], metric="pdms_v1")
    numbers = {**table.columns, "raw_progress": table.details["raw_progress"]}
    numbers |= {"final_x": table.details["final_state"][:, 0], "final_heading": table.details["final_state"][:, 2]}
    return {name: np.asarray(values, np.float64).tolist() for name, values in numbers.items()}


def street_plans() -> np.ndarray:
    """(4, 8, 3): slow down behind the stopped car; pass it in the other lane; leave the road; run into it."""
    time = np.arange(1, 9) * 0.5
    zero = np.zeros(8)
    slow = np.column_stack([8.0 * time - 0.75 * time**2, zero, zero])
    shift = 3.2 / (1.0 + np.exp(-2.5 * (time - 1.8)))
    change = np.column_stack([8.0 * time, shift, np.arctan2(np.gradient(shift, 0.5), 8.0)])
    leave = np.column_stack([8.0 * time, -0.6 * time**2, np.arctan2(-1.2 * time, 8.0)])
    ram = np.column_stack([9.5 * time, zero, zero])
    return np.stack([slow, change, leave, ram])


def street(length: float = 120.0, width: float = 3.5) -> MetricCache:
    """Two lanes along x, the ego in the right one at 8 m/s, a stopped car 30 m ahead, a pedestrian walking up."""
    initial = np.zeros(StateIndex.SIZE)
    initial[[StateIndex.X, StateIndex.Y, StateIndex.VX]] = 600_000.0, 4_600_000.0, 8.0
    origin = initial[:2]

    def strip(bottom: float, top: float) -> shapely.Polygon:
        return shapely.box(origin[0] - 20.0, origin[1] + bottom, origin[0] + length, origin[1] + top)

    half = width / 2.0
    road = DrivableMap(
        ids=np.array(["1", "2", "3"]),
        kinds=np.array([AreaKind.ROADBLOCK, AreaKind.LANE, AreaKind.LANE], np.int8),
        on_route=np.array([False, True, True]),
        polygons=np.array([strip(-half, half + width), strip(-half, half), strip(half, half + width)], object),
    )
    time = np.arange(51) * 0.1
    poses = np.zeros((51, 2, 3))
    poses[:, 0] = [origin[0] + 30.0, origin[1], 0.0]
    poses[:, 1, 0] = origin[0] + 45.0
    poses[:, 1, 1] = origin[1] - 6.0 + 1.2 * time
    poses[:, 1, 2] = np.pi / 2.0
    traffic = Observation(
        tokens=np.array(["car", "pedestrian"]), poses=poses, sizes=np.array([[4.6, 1.9], [0.7, 0.7]]),
        is_agent=np.array([True, True]), speed=np.array([0.0, 1.2]), red_light_ids=np.array([], str),
        red_light_polygons=np.array([], object), red_light_active=np.zeros((51, 0), bool),
    )  # fmt: skip
    along = np.arange(-20.0, length, 5.0)
    centerline = np.column_stack([origin[0] + along, np.full(len(along), origin[1]), np.zeros(len(along))])
    reference = np.column_stack([origin[0] + 8.0 * time - 0.65 * time**2, np.full(51, origin[1]), np.zeros(51)])
    return MetricCache(
        metric="pdms_v1", token="street", log_name="street", map_name="street", start_time_us=0,
        initial_state=initial, centerline=centerline, drivable_map=road, observation=traffic,
        reference_poses=reference,
    )  # fmt: skip
