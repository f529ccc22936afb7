"""NAVSIM's submission file: what it holds, how it is written without the devkit, and how it is read without risk.

    {team_name, authors, email, institution, "country / region",
     v1: predictions: [{token: Trajectory}, …]                     one dict a training seed
     v2: first_stage_predictions: [{token: Trajectory}], second_stage_predictions: [{token: Trajectory}]}

The trajectories are objects of the devkit's classes. Pickles name classes by module and name only, so small stand-ins
that carry those names give a file that the devkit reads into its own classes. Arrays are written under numpy 1's module
names: the devkit pins numpy 1.23, which does not know numpy 2's, while numpy 2 knows both.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write
from navsim_eval.formats.unpickle import load_pickle

LAYOUTS = {"v1": ("predictions",), "v2": ("first_stage_predictions", "second_stage_predictions")}
TEAM_KEYS = {
    "team_name": "team_name",
    "authors": "authors",
    "email": "email",
    "institution": "institution",
    "country": "country / region",
}
_TRAJECTORY = ("navsim.common.dataclasses", "Trajectory")
_SAMPLING = ("nuplan.planning.simulation.trajectory.trajectory_sampling", "TrajectorySampling")
_RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
_PROTOCOL = 4  # the default of the Python that the devkit pins


@dataclass(frozen=True)
class SubmittedPlan:
    """One trajectory: poses (n, 3) x, y [m], heading [rad] in the ego frame, and how they are spaced in time."""

    poses: np.ndarray
    num_poses: int = 8
    time_horizon: float = 4.0
    interval_length: float = 0.5


@dataclass(frozen=True)
class Submission:
    """A whole file.

    team:   the values of TEAM_KEYS, by our names; a key that the file lacks is absent
    stages: the keys of its layout → one dict {token: plan} a seed
    """

    layout: str
    team: Mapping[str, Any]
    stages: Mapping[str, Sequence[Mapping[str, SubmittedPlan]]]


def write_submission(path: Path | str, submission: Submission) -> Path:
    """Write a file that the official evaluation reads. Returns the path."""
    trajectory, sampling, reconstruct = _stand_ins()
    shared: dict[tuple, Any] = {}  # one sampling object for all plans that are alike

    def as_object(plan: SubmittedPlan) -> Any:
        times = (plan.num_poses, plan.time_horizon, plan.interval_length)
        if times not in shared:
            shared[times] = sampling()
            shared[times].__dict__.update(zip(("num_poses", "time_horizon", "interval_length"), times, strict=True))
        made = trajectory()
        made.__dict__.update(poses=np.ascontiguousarray(plan.poses, np.float32), trajectory_sampling=shared[times])
        return made

    content: dict[str, Any] = {key: submission.team[name] for name, key in TEAM_KEYS.items()}
    for key in LAYOUTS[submission.layout]:
        content[key] = [{t: as_object(plan) for t, plan in seed.items()} for seed in submission.stages[key]]
    stream = io.BytesIO()
    with _importable({_TRAJECTORY: trajectory, _SAMPLING: sampling, _RECONSTRUCT: reconstruct}):
        _Pickler(stream, reconstruct).dump(content)
    return atomic_write(path, stream.getvalue())


def read_submission(path: Path | str) -> Submission:
    """Read a file, ours or the devkit's; nothing in it is executed.

    Raises DataError for a file that is no pickle, asks for other classes, or is not built like a submission. Whether
    its content will be accepted is another question: `navsim_eval.submit.check_submission`.
    """
    if not Path(path).is_file():
        raise DataError(path, "no such file", remedy="name a submission.pkl")
    trajectory, sampling, _ = _stand_ins()
    content = load_pickle(path, {_TRAJECTORY: trajectory, _SAMPLING: sampling})
    if not isinstance(content, dict):
        raise DataError(path, f"holds a {type(content).__name__}, not a dict", remedy="write it with tools/submit.py")
    layouts = [layout for layout, keys in LAYOUTS.items() if any(key in content for key in keys)]
    if len(layouts) != 1:
        wanted = " or ".join(" + ".join(keys) for keys in LAYOUTS.values())
        raise DataError(path, f"has the keys {', '.join(map(str, content))}", remedy=f"it needs {wanted}")
    stages = {key: _read_stage(content, key, path, trajectory, sampling) for key in LAYOUTS[layouts[0]]}
    team = {name: content[key] for name, key in TEAM_KEYS.items() if key in content}
    return Submission(layouts[0], team, stages)


# --- writing ---------------------------------------------------------------------------------------------------------


def _stand_ins() -> tuple[type, type, Any]:
    """Classes and a function that carry the devkit's and numpy 1's names. Made afresh: a file may alter them."""

    def reconstruct(*_: Any) -> None: ...

    classes = [type(name, (), {"__module__": module}) for module, name in (_TRAJECTORY, _SAMPLING)]
    reconstruct.__module__, reconstruct.__qualname__ = _RECONSTRUCT
    reconstruct.__name__ = _RECONSTRUCT[1]
    return classes[0], classes[1], reconstruct


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, reconstruct: Any):
        super().__init__(stream, protocol=_PROTOCOL)
        self._reconstruct = reconstruct

    def reducer_override(self, item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return self._reconstruct, *item.__reduce__()[1:]
        return NotImplemented


@contextmanager
def _importable(objects: Mapping[tuple[str, str], Any]) -> Iterator[None]:
    """The pickler looks up every class that it names; meanwhile these modules hold the stand-ins and nothing else."""
    roots = {module.split(".")[0] for module, _ in objects} - set(sys.modules)  # importing a.b looks for a
    before = {module: sys.modules.get(module) for module in (*roots, *(module for module, _ in objects))}
    try:
        for root in roots:
            sys.modules[root] = ModuleType(root)
        for (module, name), item in objects.items():
            sys.modules[module] = ModuleType(module)
            setattr(sys.modules[module], name, item)
        yield
    finally:
        for module, original in before.items():
            if original is None:
                del sys.modules[module]
            else:
                sys.modules[module] = original


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_stage(
    content: dict, key: str, path: Path | str, trajectory: type, sampling: type
) -> list[dict[str, SubmittedPlan]]:
    if key not in content:
        raise DataError(path, "missing", field=key, remedy="a two-stage submission holds both stages")
    seeds = content[key]
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, dict) for seed in seeds):
        raise DataError(path, "not a list of dicts {token: Trajectory}", field=key)
    read = []
    for seed in seeds:
        plans = {}
        for token, item in seed.items():
            where = f"{key}.{token}"
            if not isinstance(token, str):
                raise DataError(path, f"token {token!r} is not a str", field=key)
            if not isinstance(item, trajectory):
                raise DataError(path, f"a {type(item).__name__}, not a Trajectory", field=where)
            plans[token] = _read_plan(item, where, path, sampling)
        read.append(plans)
    return read


def _read_plan(item: Any, where: str, path: Path | str, sampling: type) -> SubmittedPlan:
    poses, times = item.__dict__.get("poses"), item.__dict__.get("trajectory_sampling")
    if not isinstance(poses, np.ndarray) or poses.dtype.kind != "f":
        raise DataError(path, "not an array of floats", field=f"{where}.poses")
    if not isinstance(times, sampling):
        raise DataError(path, "not a TrajectorySampling", field=f"{where}.trajectory_sampling")
    values = [times.__dict__.get(name) for name in ("num_poses", "time_horizon", "interval_length")]
    if not all(isinstance(value, int | float) for value in values):
        raise DataError(path, f"num_poses, time_horizon, interval_length are {values}", field=where)
    return SubmittedPlan(poses, int(values[0]), float(values[1]), float(values[2]))
