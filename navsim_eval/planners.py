"""What a planner is to the evaluator, and the baselines that need no learning.

A planner turns scenes into plans: poses (x [m], y [m], heading [rad]) of the rear axle in its current frame, at 2 Hz,
the first at 0.5 s. Learned planners implement the same protocol in their own package; nothing here knows of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from navsim_eval.errors import DataError, UserError
from navsim_eval.geometry import to_local
from navsim_eval.pdm.types import SIMULATION_DT, MetricCache
from navsim_eval.scene import FRAME_INTERVAL_S, Scene

NUM_POSES = 8  # 4 s at 2 Hz


@dataclass(frozen=True)
class Plans:
    """Plans for a batch of B scenes.

    trajectory: (B, 8, 3)     the plan to be judged
    candidates: (B, M, 8, 3)  what the planner chose from, or None
    logits:     (B, M)        its preference among them, or None
    """

    trajectory: np.ndarray
    candidates: np.ndarray | None = None
    logits: np.ndarray | None = None

    def __post_init__(self) -> None:
        batch, modes = len(self.trajectory), 0 if self.candidates is None else self.candidates.shape[1]
        expected = {
            "trajectory": (batch, NUM_POSES, 3),
            "candidates": (batch, modes, NUM_POSES, 3),
            "logits": (batch, modes),
        }
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{name}: shape {array.shape}, expected {shape}")


class Planner(Protocol):
    """Anything that can be evaluated.

    `name` appears in tables; `describe()` goes into the manifest of the predictions (weights, hashes, options).
    `plan` may raise DataError for a scene whose files are broken; it is then asked again scene by scene.
    """

    name: str

    def plan(self, scenes: Sequence[Scene]) -> Plans: ...

    def describe(self) -> dict[str, Any]: ...


@dataclass
class ScenePlanner:
    """A planner given by a function of one scene: `trajectory_of(scene) -> (8, 3)`."""

    name: str
    trajectory_of: Callable[[Scene], np.ndarray]

    def plan(self, scenes: Sequence[Scene]) -> Plans:
        return Plans(np.stack([self.trajectory_of(scene) for scene in scenes]))

    def describe(self) -> dict[str, Any]:
        return {"kind": "baseline"}


def human(scene: Scene) -> np.ndarray:
    """What the recorded driver did: the future poses of the log. Raises DataError where they are withheld."""
    if len(scene.future) < NUM_POSES:
        problem = f"scene {scene.token} has {len(scene.future)} future frames, a plan needs {NUM_POSES}"
        raise DataError(scene.log_name, problem, remedy="use a split with recorded futures")
    return scene.human_trajectory(NUM_POSES)


def constant_velocity(scene: Scene) -> np.ndarray:
    """Straight on at the current speed (NAVSIM's baseline: float32, Euclidean norm of the velocity)."""
    speed = np.linalg.norm(np.asarray(scene.current.ego_velocity, np.float32))
    poses = np.zeros((NUM_POSES, 3), np.float32)
    poses[:, 0] = np.arange(1, NUM_POSES + 1, dtype=np.float32) * np.float32(FRAME_INTERVAL_S) * speed
    return poses


def stationary(scene: Scene) -> np.ndarray:
    """Zero motion at once, wherever and however fast the vehicle is."""
    return np.zeros((NUM_POSES, 3))


def pdm_closed(cache: MetricCache) -> np.ndarray:
    """The privileged rule-based plan that scores are normalised with: its open-loop poses at 2 Hz."""
    stride = round(FRAME_INTERVAL_S / SIMULATION_DT)
    poses = cache.reference_poses[stride : stride * NUM_POSES + 1 : stride]
    return to_local(cache.initial_state[:3], poses)


BASELINES = ("human", "constant_velocity", "stationary", "pdm_closed")


def make_baseline(name: str, cache_of: Callable[[Scene], MetricCache] | None = None) -> ScenePlanner:
    """The baseline called `name`.

    cache_of: gives the metric cache of a scene; only `pdm_closed` asks for it
    Raises UserError for an unknown name, with the nearest known one.
    """
    if name == "pdm_closed":
        if cache_of is None:
            raise UserError("planner 'pdm_closed' reads the metric cache, and none is available here")
        return ScenePlanner(name, lambda scene: pdm_closed(cache_of(scene)))
    functions = {"human": human, "constant_velocity": constant_velocity, "stationary": stationary}
    if name not in functions:
        raise unknown_planner(name, BASELINES)
    return ScenePlanner(name, functions[name])


def unknown_planner(name: str, known: Iterable[str]) -> UserError:
    """The error for a planner that is neither a known name nor a folder that exists."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}, or the path of a checkpoint folder"
    return UserError(f"planner '{name}': no planner of this name and no such folder; {hint}")
