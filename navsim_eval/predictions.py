"""Plans on disk: the file that joins inference and scoring.

An npz with `tokens` (S,) str, `trajectories` (S, 1, 8, 3), optionally `candidates` (S, M, 8, 3) and `logits` (S, M),
`scene_*` (S,) what reports group by, and `manifest`, a JSON text. `tools/score.py` reads the same file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write, read_npz
from navsim_eval.scene import COMMANDS, Scene

FORMAT_VERSION = 1
_FACT = "scene_"


@dataclass(frozen=True)
class Predictions:
    """One planner's plans for S scenes (ego frame, metres and radians, 2 Hz, first pose at 0.5 s).

    tokens:       (S,) str
    trajectories: (S, 8, 3)     what is judged
    candidates:   (S, M, 8, 3)  or None;  logits: (S, M) or None
    facts:        what reports group scenes by: log, map, command (S,) str, speed (S,) [m/s]
    manifest:     planner, split, seed, what the split held, failures {token: reason}, environment
    """

    tokens: np.ndarray
    trajectories: np.ndarray
    candidates: np.ndarray | None = None
    logits: np.ndarray | None = None
    facts: dict[str, np.ndarray] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path | str) -> Path:
        """Write atomically; returns the path."""
        arrays = {"tokens": np.asarray(self.tokens, str), "trajectories": self.trajectories[:, None]}
        arrays |= {k: v for k, v in (("candidates", self.candidates), ("logits", self.logits)) if v is not None}
        arrays |= {_FACT + name: values for name, values in self.facts.items()}
        manifest = json.dumps({"format_version": FORMAT_VERSION, **self.manifest})

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, manifest=np.array(manifest), **arrays)

        return atomic_write(path, write)

    @classmethod
    def load(cls, path: Path | str) -> Predictions:
        """Read a file that `save` wrote. Raises DataError where it is absent, damaged or of another version."""
        remedy = "make it with stage=infer"
        try:
            arrays = read_npz(path, remedy)
        except FileNotFoundError as error:
            raise DataError(path, "no predictions here", remedy=remedy) from error
        for name in ("tokens", "trajectories", "manifest"):
            if name not in arrays:
                raise DataError(path, "missing", field=name, remedy=remedy)
        manifest = json.loads(str(arrays["manifest"]))
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(path, f"format {manifest.get('format_version')}, this code reads {FORMAT_VERSION}")
        tokens, trajectories = arrays["tokens"], arrays["trajectories"]
        expected = (len(tokens), 1, 8, 3)
        if trajectories.shape != expected:
            raise DataError(path, f"shape {trajectories.shape}, expected {expected}", field="trajectories")
        facts = {name.removeprefix(_FACT): values for name, values in arrays.items() if name.startswith(_FACT)}
        return cls(tokens, trajectories[:, 0], arrays.get("candidates"), arrays.get("logits"), facts, manifest)


def scene_facts(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """`Predictions.facts` of scenes."""
    frames = [scene.current for scene in scenes]
    return {
        "log": np.array([frame.log_name for frame in frames], str),
        "map": np.array([frame.map_name for frame in frames], str),
        "command": np.array([COMMANDS[int(np.argmax(frame.driving_command))] for frame in frames], str),
        "speed": np.array([np.hypot(*frame.ego_velocity) for frame in frames]),
    }
