"""Submissions to NAVSIM's leaderboards: made from predictions or from a planner, and checked before they are sent.

    predictions.npz, or planner + split ─► plans by token ─► all tokens there? ─► submission.pkl

A file that the leaderboard would refuse is not written.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.evaluate import EvaluateConfig, PlannerFactory, Progress, baseline, silent
from navsim_eval.formats.splits import Split, find_split
from navsim_eval.formats.submission import (
    LAYOUTS,
    TEAM_KEYS,
    Submission,
    SubmittedPlan,
    read_submission,
    write_submission,
)
from navsim_eval.formats.synthetic import read_synthetic_scene, select_synthetic_scenes
from navsim_eval.infer import infer
from navsim_eval.predictions import Predictions
from navsim_eval.scene import Scene

HORIZON_S = 4.0
_FARTHEST = 60.0 * HORIZON_S  # metres; nobody drives faster than 60 m/s
_LISTED = 3


@dataclass
class SubmitConfig:
    """What to write, or what to check.

    check:        a submission to check instead of writing one
    predictions:  predictions.npz of tools/evaluate.py, or several (one a training seed, layout v1)
    second_stage: predictions.npz of the second stage's scenes, likewise: makes layout v2
    planner:      instead of predictions: a name or checkpoint folder, planned here on `split`
    split:        whose tokens have to be there, no more and no fewer
    synthetic_scenes, synthetic_sensors: folders of the second stage, where `planner` shall plan it
    team_name, authors, email, institution, country: as the leaderboard shows them
    output_dir:   submission.pkl (empty: $NAVSIM_EXP_ROOT/submit, else outputs/submit)
    batch_size, seed, device: of inference
    """

    data: DataConfig = field(default_factory=DataConfig)
    check: str = ""
    predictions: Any = ""
    second_stage: Any = ""
    planner: str = ""
    split: str = ""
    synthetic_scenes: str = ""
    synthetic_sensors: str = ""
    team_name: str = ""
    authors: str = ""
    email: str = ""
    institution: str = ""
    country: str = ""
    output_dir: str = ""
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or os.environ.get("NAVSIM_EXP_ROOT", "outputs") + "/submit"
        self.predictions, self.second_stage = _as_list(self.predictions), _as_list(self.second_stage)
        sources = [bool(self.check), bool(self.predictions), bool(self.planner)]
        if sum(sources) != 1:
            raise UserError("give one of check=FILE, predictions=FILE.npz, or planner=NAME (with split=NAME)")
        if self.check:
            return
        if self.planner and not self.split:
            raise UserError("planner= needs split=: the scenes to plan")
        if missing := [name for name in TEAM_KEYS if not getattr(self, name).strip()]:
            raise UserError(f"{', '.join(missing)}: a submission without is refused; write {missing[0]}=…")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `problem` is empty when it is fine."""

    what: str
    found: str
    problem: str = ""


def submit(config: SubmitConfig, planner_factory: PlannerFactory = baseline, progress: Progress = silent) -> Path:
    """Write `submission.pkl` and return its path.

    Raises UserError rather than writing a file that would be refused: for missing or unknown tokens, plans that are not
    finite, or empty team fields.
    """
    stages: dict[str, list[Predictions]]
    if config.planner:
        stages = _plan(config, planner_factory, progress)
    else:
        stages = {LAYOUTS["v1"][0]: [Predictions.load(path) for path in config.predictions]}
        if config.second_stage:
            both = (stages.popitem()[1], [Predictions.load(path) for path in config.second_stage])
            stages = dict(zip(LAYOUTS["v2"], both, strict=True))
    layout = next(name for name, keys in LAYOUTS.items() if set(keys) == set(stages))
    team = {name: getattr(config, name) for name in TEAM_KEYS}
    submission = Submission(layout, team, {key: [_plans(made) for made in seeds] for key, seeds in stages.items()})
    for made in (seed for seeds in stages.values() for seed in seeds):
        if failed := made.manifest.get("failures"):
            token, reason = next(iter(failed.items()))
            raise UserError(f"{len(failed)} scenes have no plan, first {token}: {reason}; nothing was written")
    if wrong := [check for check in check_submission(submission, expected_tokens(config, layout)) if check.problem]:
        raise UserError(f"{wrong[0].what}: {wrong[0].problem}; nothing was written ({len(wrong)} problems)")
    return write_submission(Path(config.output_dir) / "submission.pkl", submission)


def check_file(config: SubmitConfig) -> list[Check]:
    """Read `config.check` and look at everything. Raises DataError for a file that is not a submission at all."""
    submission = read_submission(config.check)
    return check_submission(submission, expected_tokens(config, submission.layout))


# --- checking --------------------------------------------------------------------------------------------------------


def check_submission(submission: Submission, expected: Mapping[str, Collection[str]] | None = None) -> list[Check]:
    """Team fields, number of seeds, tokens, shapes, times and numbers of a submission.

    expected: tokens of each stage; None: tokens are only counted
    """
    checks = [Check("layout", f"NAVSIM {submission.layout} ({', '.join(submission.stages)})")]
    checks += [_check_team(name, submission.team.get(name)) for name in TEAM_KEYS]
    for key, seeds in submission.stages.items():
        problem = "" if len(seeds) == 1 or submission.layout == "v1" else "a two-stage submission holds one seed"
        checks.append(Check(f"{key}: seeds", str(len(seeds)), problem))
        for number, plans in enumerate(seeds):
            name = key if len(seeds) == 1 else f"{key}, seed {number}"
            checks.append(_check_tokens(name, plans, None if expected is None else expected[key]))
            checks += _check_plans(name, plans)
    if len(submission.stages) == 2:
        first, second = (set().union(*seeds) for seeds in submission.stages.values())
        shared = first & second
        checks.append(Check("stages", f"{len(shared)} shared tokens", _listing("in both stages", shared)))
    return checks


def _check_team(name: str, value: Any) -> Check:
    if not isinstance(value, str):
        return Check(name, repr(value), f"missing; the file needs the key '{TEAM_KEYS[name]}'")
    problem = "" if value.strip() else "empty"
    if name == "email" and value.strip() and not ("@" in value and "." in value.split("@")[-1]):
        problem = "not an address"
    return Check(name, value, problem)


def _check_tokens(name: str, plans: Mapping[str, SubmittedPlan], expected: Collection[str] | None) -> Check:
    if expected is None:
        return Check(f"{name}: tokens", f"{len(plans)} (no split named to compare with)", "" if plans else "no plans")
    missing, strange = set(expected) - set(plans), set(plans) - set(expected)
    problems = [_listing("missing", missing), _listing("not in the split", strange)]
    return Check(f"{name}: tokens", f"{len(plans)} of {len(set(expected))}", "; ".join(filter(None, problems)))


def _check_plans(name: str, plans: Mapping[str, SubmittedPlan]) -> list[Check]:
    """What must hold of every plan, with the tokens of those of which it does not."""
    odd: dict[str, list[str]] = {"shape": [], "times": [], "numbers": [], "units": []}
    for token, plan in plans.items():
        poses = plan.poses
        if poses.ndim != 2 or poses.shape != (plan.num_poses, 3):
            odd["shape"].append(token)
            continue
        if not np.isclose(plan.num_poses * plan.interval_length, plan.time_horizon) or plan.time_horizon < HORIZON_S:
            odd["times"].append(token)
        if not np.isfinite(poses).all():
            odd["numbers"].append(token)
        elif np.abs(poses[:, :2]).max() > _FARTHEST or np.abs(poses[:, 2]).max() > 2 * np.pi:
            odd["units"].append(token)
    sizes = sorted({f"{plan.num_poses} × {plan.interval_length:g} s" for plan in plans.values()})
    problems = {
        "shape": ("poses (n, 3), n as its sampling says", "another shape"),
        "times": (", ".join(sizes), f"poses × interval is not the horizon, or it is below {HORIZON_S:g} s"),
        "numbers": ("finite", "NaN or infinite"),
        "units": ("metres and radians", f"beyond {_FARTHEST:g} m or 2π rad: other units?"),
    }
    return [Check(f"{name}: {key}", fine, _listing(bad, odd[key])) for key, (fine, bad) in problems.items()]


def _listing(what: str, tokens: Collection[str]) -> str:
    if not tokens:
        return ""
    first = ", ".join(sorted(tokens)[:_LISTED])
    return f"{len(tokens)} {what} (first: {first})"


def expected_tokens(config: SubmitConfig, layout: str) -> dict[str, Collection[str]] | None:
    """Tokens that each stage of the split holds, as its filter or its logs list them; None without a split."""
    if not config.split:
        return None
    split = find_split(config.split, config.data.root, config.data.filters)
    listed = split.scene_filter.tokens
    first = SceneDataset.from_config(config.data, config.split).tokens if listed is None else listed
    if layout == "v1":
        return {LAYOUTS["v1"][0]: first}
    second = _second_stage_tokens(split)
    if not second:
        raise UserError(f"split '{config.split}' has no second stage, but the submission is of two stages")
    return dict(zip(LAYOUTS["v2"], (first, second), strict=True))


def _second_stage_tokens(split: Split) -> tuple[str, ...]:
    if split.scene_filter.reactive_synthetic_initial_tokens is not None:
        return split.scene_filter.reactive_synthetic_initial_tokens
    return tuple(dict.fromkeys(token for _, _, pairs in split.second_stage for pair in pairs for token in pair))


# --- planning --------------------------------------------------------------------------------------------------------


class _SecondStage:
    """Synthetic scenes as `infer` wants them."""

    def __init__(self, config: SubmitConfig, first: SceneDataset):
        self.split, self.coverage, self._sensors = first.split, first.coverage, config.synthetic_sensors or None
        last = [first[token].frames[-1].token for token in first.tokens]
        self._files = select_synthetic_scenes(config.synthetic_scenes, first.split.scene_filter, last)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        return tuple(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, token: str) -> Scene:
        return read_synthetic_scene(self._files[token], self._sensors).scene


def _plan(config: SubmitConfig, factory: PlannerFactory, progress: Progress) -> dict[str, list[Predictions]]:
    options = EvaluateConfig(
        data=config.data, planner=config.planner, split=config.split, batch_size=config.batch_size, seed=config.seed,
        device=config.device,
    )  # fmt: skip
    first = SceneDataset.from_config(config.data, config.split)
    planner = factory(config.planner, options, _no_metric_cache)
    stages: list[Any] = [first]
    if config.synthetic_scenes:
        stages.append(_SecondStage(config, first))
    made = []
    for number, scenes in enumerate(stages, start=1):
        with progress(f"plans of {planner.name}, stage {number}", len(scenes)) as advance:
            made.append([infer(planner, scenes, config.batch_size, config.seed, advance)])
    return dict(zip(LAYOUTS["v1" if len(made) == 1 else "v2"], made, strict=True))


def _no_metric_cache(scene: Scene) -> Any:
    raise UserError("a planner that reads the true state of the world cannot be submitted")


def _plans(predictions: Predictions) -> dict[str, SubmittedPlan]:
    return {
        token: SubmittedPlan(poses)
        for token, poses in zip(predictions.tokens.tolist(), predictions.trajectories, strict=True)
    }


def _as_list(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    return [str(item) for item in values if item]
