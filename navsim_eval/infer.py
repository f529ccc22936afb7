"""Stage one of an evaluation: a planner and a split's scenes in, predictions out.

A scene whose files are broken is left out of the predictions and named in their manifest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import DataError, UserError
from navsim_eval.planners import Planner, Plans
from navsim_eval.predictions import Predictions, scene_facts
from navsim_eval.scene import Scene
from navsim_eval.two_stage_dataset import TwoStageDataset


def infer(
    planner: Planner,
    dataset: SceneDataset | TwoStageDataset,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Plans for every readable scene. A scene whose files are broken is left out and named in the manifest."""
    started = time.perf_counter()
    tokens: list[str] = []
    plans: list[Plans] = []
    facts: list[dict[str, np.ndarray]] = []
    failures: dict[str, str] = {}
    for scenes, unreadable in _batches(dataset, batch_size):
        failures |= unreadable
        for part, planned in _plan(planner, scenes, failures):
            tokens += [scene.token for scene in part]
            plans.append(planned)
            facts.append(scene_facts(part))
        if progress:
            progress(len(scenes) + len(unreadable))
    if not plans:
        raise UserError(f"{planner.name}: no scene could be planned; first reason: {next(iter(failures.values()))}")
    manifest = {
        "planner": {"name": planner.name, **planner.describe()},
        "split": dataset.split.name,
        "seed": seed,
        "expected": expected_scenes(dataset),
        "failures": failures,
        "seconds": round(time.perf_counter() - started, 2),
        "environment": describe_environment(),
    }
    return Predictions(
        np.array(tokens, str),
        np.concatenate([part.trajectory for part in plans]),
        _joined([part.candidates for part in plans]),
        _joined([part.logits for part in plans]),
        {name: np.concatenate([part[name] for part in facts]) for name in facts[0]},
        manifest,
    )


def _batches(dataset: SceneDataset | TwoStageDataset, size: int) -> Iterator[tuple[list[Scene], dict[str, str]]]:
    """Scenes in the order of the split, `size` tokens at a time, and those that cannot be read with the reason."""
    for start in range(0, len(dataset), size):
        scenes, unreadable = [], {}
        for token in dataset.tokens[start : start + size]:
            try:
                scenes.append(dataset[token])
            except DataError as error:
                unreadable[token] = str(error)
        yield scenes, unreadable


def _plan(planner: Planner, scenes: list[Scene], failures: dict[str, str]) -> Iterator[tuple[list[Scene], Plans]]:
    """Plan a batch; where a scene's files are broken, plan the others one by one and note the failure."""
    if not scenes:
        return
    try:
        yield scenes, planner.plan(scenes)
        return
    except DataError as error:
        if len(scenes) == 1:
            failures[scenes[0].token] = str(error)
            return
    for scene in scenes:
        yield from _plan(planner, [scene], failures)


def load_predictions(path: Path, split: str, dataset: SceneDataset | TwoStageDataset) -> Predictions:
    """Read predictions and make sure that they are of this split. Raises DataError otherwise."""
    predictions = Predictions.load(path)
    made_for = predictions.manifest.get("split")
    if made_for != split:
        raise DataError(path, f"made for split '{made_for}', not '{split}'", remedy="run with stage=all")
    if strangers := [token for token in predictions.tokens if token not in dataset]:
        problem = f"{len(strangers)} tokens are not in split {split} (first: {strangers[0]})"
        raise DataError(path, problem, remedy="the data changed or max_scenes is smaller; run with stage=all")
    return predictions


def expected_scenes(dataset: SceneDataset | TwoStageDataset) -> int:
    """How many scenes the split should have: those that it lists, else those that are there."""
    listed = dataset.coverage.scenes_expected
    return len(dataset) if listed is None else listed


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    return None if any(part is None for part in parts) else np.concatenate(parts)
