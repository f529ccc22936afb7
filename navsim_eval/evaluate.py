"""Evaluate planners on a split, in two stages joined by a file.

    split ─► infer (batches) ─► predictions.npz ─► score (process pool) ─► scores.csv, summary.json ─► report.html
                                                     ▲
                                    metric caches (built once, shared by all planners)

Either stage can be run alone. Nothing is dropped in silence: a scene that cannot be read, planned or scored is counted,
named in the summary, and takes the headline away.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval import selfcheck
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.executor import Workers
from navsim_eval.infer import expected_scenes, infer, load_predictions
from navsim_eval.metric_caches import MetricCaches, store_folder
from navsim_eval.modes.judge import METRIC as MODES_METRIC
from navsim_eval.modes.judge import JudgedModes, judge_modes
from navsim_eval.pdm.types import MetricCache
from navsim_eval.planners import NUM_POSES, Planner, make_baseline
from navsim_eval.predictions import Predictions
from navsim_eval.pseudo_simulation import Protocol, choose_protocols, open_split, score_two_stages, split_of
from navsim_eval.report.build import Run, write_report
from navsim_eval.results import FORMATS, Coverage, Results, headline, make_summary, save_json
from navsim_eval.scene import Scene
from navsim_eval.score_scenes import score_scenes
from navsim_eval.traffic import NON_REACTIVE
from navsim_eval.two_stage_dataset import TwoStageDataset

STAGES = ("all", "infer", "score")
_SCENES_PER_WORKER = 32  # fewer are done sooner than a process starts

# Opens a progress display: (title, total) → context manager that gives a function to be told how many items are done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
CacheOf = Callable[[Scene], MetricCache]
PlannerFactory = Callable[[str, "EvaluateConfig", CacheOf], Planner]


@dataclass
class EvaluateConfig:
    """What to evaluate, and where results go.

    planner:      name or checkpoint folder, or a list of them
    split:        a published split, or a folder under navsim_logs/
    metric:       pdms_v1, epdms_v2, epdms_v2_unfixed_filter (as published before its filter was mended), or a list
    stages:       1, 2, or 0: two under EPDMS where the split lists second-stage scenes
    traffic:      non_reactive (replayed), reactive (EPDMS only), or empty: reactive in two stages, else replayed
    stage:        all; infer (write predictions only); score (read them again)
    output_dir:   results; one folder per planner (and per metric) below it where several are asked for
    metric_cache: folder of metric caches, one sub-folder a metric; empty: <output_dir>/metric_cache
    cache:        feature cache (tools/cache.py) for planners that see; empty: straight from the sensors
    max_scenes:   stop after so many scenes (0: all)
    workers:      processes that build metric caches and score (0: as many as cores and scenes allow)
    executor:     local, or ray for several machines;  ray_address: see `navsim_eval.executor.Workers`
    batch_size, seed, device: of inference; a plan depends on (seed, token) only, never on the batch
    modes:        also score every candidate of every planner (pdms_v1): modes.csv, mode_scenes.csv, more in the summary
    report:       write report.html;  report_scenes: how many scenes are drawn for each gallery
    """

    data: DataConfig = field(default_factory=DataConfig)
    planner: Any = "constant_velocity"
    split: str = "test"
    metric: Any = "pdms_v1"
    stages: int = 0
    traffic: str = ""
    stage: str = "all"
    output_dir: str = ""
    metric_cache: str = ""
    cache: str = ""
    max_scenes: int = 0
    workers: int = 0
    executor: str = "local"
    ray_address: str = ""
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"
    modes: bool = False
    report: bool = True
    report_scenes: int = 3

    def __post_init__(self) -> None:
        self.planner, self.metric = _as_list(self.planner), _as_list(self.metric)
        self.output_dir = self.output_dir or os.environ.get("NAVSIM_EXP_ROOT", "outputs") + "/evaluate"
        self.metric_cache = self.metric_cache or str(Path(self.output_dir) / "metric_cache")
        Workers.of(self)
        if self.stage not in STAGES:
            raise UserError(f"stage='{self.stage}' is none of {', '.join(STAGES)}")
        if not self.planner or len(set(self.planner)) < len(self.planner):
            raise UserError(f"planner={self.planner}: name at least one, and each once")
        for metric in self.metric:
            if metric not in FORMATS:
                raise UserError(f"metric='{metric}' is unknown; choose from {', '.join(FORMATS)}")
        if self.modes and MODES_METRIC not in self.metric:
            raise UserError(f"modes=true scores candidates under {MODES_METRIC}; metric={self.metric} lacks it")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: must be at least 1")


def silent(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A `Progress` that shows nothing."""
    return nullcontext(lambda done: None)


def baseline(name: str, config: EvaluateConfig, cache_of: CacheOf) -> Planner:
    """A `PlannerFactory` that knows the baselines only."""
    return make_baseline(name, cache_of)


def evaluate(
    config: EvaluateConfig, planner_factory: PlannerFactory = baseline, progress: Progress = silent
) -> list[Run]:
    """Run the stages asked for; returns one `Run` per planner and metric (none for stage=infer).

    Raises UserError for a wrong configuration, an empty split, missing predictions, or when the numeric self-check
    fails. Broken scenes do not raise: they are counted in the summaries.
    """
    protocols = choose_protocols(config.metric, split_of(config.data, config.split), config.stages, config.traffic)
    stages, limit = protocols[config.metric[0]].stages, config.max_scenes or None
    dataset = open_split(config.data, config.split, stages, max_scenes=limit, progress=progress is not silent)
    caches = {
        metric: MetricCaches(config.data, dataset, metric, store_folder(config.metric_cache, metric))
        for metric in config.metric
    }
    first = caches[config.metric[0]]
    planners = [planner_factory(name, config, lambda scene: first[scene.token]) for name in config.planner]
    if len({planner.name for planner in planners}) < len(planners):
        for planner, name in zip(planners, _short_names(config.planner), strict=True):
            planner.name = name
    folders = planner_folders(config)

    workers = Workers.of(config).unless_given(-(-len(dataset) // _SCENES_PER_WORKER))

    if config.stage != "infer":
        selfcheck.require_sound()
        for metric, store in caches.items():
            with progress(f"metric caches ({metric})", len(dataset)) as advance:
                store.build(workers, advance)
    if config.stage != "score":
        for planner, folder in zip(planners, folders, strict=True):
            with progress(f"plans of {planner.name}", len(dataset)) as advance:
                predictions = infer(planner, dataset, config.batch_size, config.seed, advance)
            predictions.save(folder / "predictions.npz")
    if config.stage == "infer":
        return []

    made = [load_predictions(folder / "predictions.npz", config.split, dataset) for folder in folders]
    runs = []
    for metric, store in caches.items():
        started = time.perf_counter()
        with progress(f"scores ({metric})", len(dataset)) as advance:
            scored = score_predictions(made, store, workers, advance, protocols[metric])
        seconds = round(time.perf_counter() - started, 2)
        for predictions, results, folder in zip(made, scored, folders, strict=True):
            target = folder if len(caches) == 1 else folder / metric
            modes = None
            if config.modes and metric == MODES_METRIC:
                with progress(f"candidates of {predictions.manifest['planner']['name']}", len(dataset)) as advance:
                    modes = judge_modes(predictions, store, workers, advance)
            runs.append(_write_run(predictions, results, dataset, target, seconds, protocols[metric], modes))
    if len(runs) > 1:
        save_json(Path(config.output_dir) / "summary.json", {"runs": [_line(run, config.output_dir) for run in runs]})
    if config.report:
        path = Path(config.output_dir) / "report.html"
        write_report(path, runs, first, config.report_scenes, workers, progress)
    return runs


def _write_run(
    predictions: Predictions,
    results: Results,
    dataset: SceneDataset | TwoStageDataset,
    folder: Path,
    seconds: float,
    protocol: Protocol,
    modes: JudgedModes | None = None,
) -> Run:
    """Write `scores.csv` and `summary.json` of one planner under one metric; with its judged candidates, theirs too."""
    manifest = predictions.manifest
    more: dict[str, Any] = {}
    if modes is not None:
        modes.save(folder)
        more["modes"] = modes.summary()
    summary = make_summary(
        results, coverage_of(dataset, predictions, results), planner=manifest["planner"], split=dataset.split.name,
        seed=manifest["seed"], stages=protocol.stages, traffic=protocol.traffic,
        seconds={"infer": manifest["seconds"], "score_all_planners": seconds}, environment=describe_environment(),
        **more,
    )  # fmt: skip
    results.save_csv(folder / "scores.csv")
    save_json(folder / "summary.json", summary)
    return Run(results, summary, predictions, folder)


def _line(run: Run, root: str) -> dict[str, Any]:
    """A run in the summary of several."""
    metric, coverage = run.results.metric, run.summary["coverage"]
    return {
        "planner": run.planner,
        "metric": metric,
        FORMATS[metric].headline: headline(run.summary),
        "verdict": run.summary["verdict"],
        "scenes": coverage["scored"],
        "folder": str(run.folder.relative_to(root)),
    }


def planner_folders(config: EvaluateConfig) -> list[Path]:
    """Where each planner's files go: the output folder itself, or a folder each where there are several."""
    root = Path(config.output_dir)
    return [root] if len(config.planner) == 1 else [root / name for name in _short_names(config.planner)]


# --- stage 2: score --------------------------------------------------------------------------------------------------


def score_predictions(
    predictions: Sequence[Predictions],
    caches: MetricCaches,
    workers: int | Workers = 0,
    progress: Callable[[int], None] | None = None,
    protocol: Protocol | None = None,
) -> list[Results]:
    """Score the plans of several planners together, so that each scene is prepared once.

    protocol: default: the metric of the caches in one stage, with replayed traffic
    Results hold one row for every scene of the split, failed ones included, in split order.
    """
    protocol = protocol or Protocol(caches.metric, 1, NON_REACTIVE)
    dataset, tokens = caches.dataset, caches.dataset.tokens
    place = {token: index for index, token in enumerate(tokens)}
    trajectories = np.full((len(tokens), len(predictions), NUM_POSES, 3), np.nan)
    for index, made in enumerate(predictions):
        trajectories[[place[token] for token in made.tokens.tolist()], index] = made.trajectories
    stages: list[dict] = [{} for _ in predictions]
    second = None
    if protocol.stages == 2:
        columns, unscored, scored = score_two_stages(caches, trajectories, protocol, workers, progress)
        stages = [item.as_dict() for item in scored]
        second = np.array([dataset.is_second_stage(token) for token in tokens])
    else:
        columns, unscored = score_scenes(caches, list(tokens), trajectories, workers, progress, protocol.judging)
    return [
        Results(
            protocol.metric,
            np.array(tokens, str),
            {name: columns[name][:, index] for name in FORMATS[protocol.metric].columns},
            _reasons(made, tokens, columns["score"][:, index], unscored),
            stages[index],
            second,
        )
        for index, made in enumerate(predictions)
    ]


def _reasons(
    predictions: Predictions, tokens: Sequence[str], scores: np.ndarray, unscored: dict[str, str]
) -> dict[str, str]:
    """Why each scene without a score has none."""
    unplanned, reasons = predictions.manifest["failures"], {}
    for token, value in zip(tokens, scores, strict=True):
        if not np.isfinite(value):
            why = unplanned.get(token) or unscored.get(token)
            reasons[token] = why or "the plan, or its simulation, has poses that are not finite"
    return reasons


def coverage_of(dataset: SceneDataset | TwoStageDataset, predictions: Predictions, results: Results) -> Coverage:
    """Expected against found, planned and scored scenes, with every reason."""
    account = dataset.coverage
    reasons = dict(account.logs_broken)
    reasons |= dict.fromkeys(account.logs_missing, "log is not on disk")
    reasons |= dict.fromkeys(account.tokens_missing, "token is in no log on disk")
    return Coverage(
        expected=expected_scenes(dataset),
        found=len(dataset),
        planned=len(predictions.tokens),
        scored=int(results.valid.sum()),
        lost_logs=len(account.logs_broken) + len(account.logs_missing),
        reasons=reasons | dict(results.failures),
    )


def _as_list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _short_names(planners: list[str]) -> list[str]:
    """Last part of each path where that tells them apart, else the whole path in one word."""
    names = [Path(name).name for name in planners]
    if len(set(names)) == len(names):
        return names
    return [name.strip(os.sep).replace(os.sep, "_") for name in planners]
