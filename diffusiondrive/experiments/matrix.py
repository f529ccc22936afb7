"""Rows × seeds: trainings that differ in one thing each, and what the tools have to do for them.

    city or NAVSIM ─► feature and metric caches, anchors ─► train (row, seed) ─► evaluate (row, seed) ─► scores by token

Everything is a command of `tools/`, run by `tool_steps`: finished steps are kept, failed trainings do not stop others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusiondrive.tool_steps import Step, StepRunner
from navsim_eval.config import DataConfig
from navsim_eval.errors import UserError
from navsim_eval.planners import BASELINES

HUMAN, EGO_MLP = "human", "ego_mlp"


@dataclass(frozen=True)
class Row:
    """One kind of planner.

    model: file of configs/model without the variant's name before it;  overrides: of tools/train.py
    weights_of: name of the row whose trainings this one shares; it differs in `sampling` (overrides of
                tools/evaluate.py) alone
    """

    name: str
    title: str
    model: str = ""
    overrides: tuple[str, ...] = ()
    weights_of: str = ""
    sampling: tuple[str, ...] = ()


@dataclass
class MatrixConfig:
    """What is trained on what.

    variant:   "city_nano": the small trunk for CPUs; "": full size
    seeds:     one training of every row each
    planners:  row → folder of a trained planner ({seed} in it is replaced), which is loaded and not trained
    train:     overrides of tools/train.py for all rows
    features:  file of configs/features;  camera_codec: of the feature caches, lossless or jpeg (see tools/cache.py)
    parallel:  trainings at a time, each a process of one thread on a CPU
    train_split, val_split, test_split: the epoch is chosen on val, all numbers are of test
    workdir:   caches, checkpoints, evaluations; what is there is kept
    """

    data: DataConfig = field(default_factory=DataConfig)
    variant: str = "city_nano"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    planners: dict[str, str] = field(default_factory=dict)
    train: list[str] = field(default_factory=list)
    features: str = "city_nano"
    camera_codec: str = "lossless"
    parallel: int = 1
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    workdir: str = "outputs/experiments"
    fresh: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds={self.seeds}: name at least one, and each once")
        if self.parallel < 1:
            raise UserError(f"parallel={self.parallel}: must be at least 1")

    @property
    def folder(self) -> Path:
        return Path(self.workdir)

    @property
    def caches(self) -> Path:
        return self.folder / "cache"

    @property
    def test_features(self) -> Path:
        return self.caches / self.test_split / "features"

    def planner_folder(self, row: Row, seed: int) -> Path:
        """Checkpoint folder of a training, or of what is loaded in its place."""
        name = row.weights_of or row.name
        if name in self.planners:
            return Path(self.planners[name].replace("{seed}", str(seed)))
        return self.folder / "runs" / f"{name}_{seed}" / "planner"

    def trains(self, row: Row) -> bool:
        """Whether the row has trainings of its own here."""
        return not row.weights_of and row.name not in self.planners

    def training_folders(self, rows: Sequence[Row]) -> list[Path]:
        """Where the trainings of these rows lie."""
        return [self.planner_folder(row, seed).parent for row in rows if self.trains(row) for seed in self.seeds]

    def evaluation_folder(self, name: str, seed: int | None = None) -> Path:
        """Where the scores of a training, or of an untrained planner, lie."""
        return self.folder / "evaluation" / (name if seed is None else f"{name}_{seed}")

    def evaluation_folders(self, name: str) -> list[Path]:
        """Where the scores of a row lie, a folder a seed."""
        return [self.evaluation_folder(name, seed) for seed in self.seeds]


def choose_rows(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these names, in their own order; all without names. Raises UserError for a name that is none."""
    known = [row.name for row in rows]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"rows={unknown}: choose from {', '.join(known)}")
    return [row for row in rows if not names or row.name in names]


def run_matrix(rows: list[Row], config: MatrixConfig, say: Callable[[str], None] = print) -> StepRunner:
    """Prepare, train and evaluate all rows under all seeds.

    Raises UserError for a planner to load that is not there, before anything runs, and one that names the steps that
    failed, after all that do not need them.
    """
    check_planners(rows, config)
    settings = {key: getattr(config, key) for key in ("variant", "train", "features", "train_split", "val_split")}
    settings |= {"test_split": config.test_split, "root": config.data.root, "camera_codec": config.camera_codec}
    settings |= {"planners": config.planners} if config.planners else {}  # what was evaluated belongs to them
    runner = StepRunner(config.folder, settings, config.fresh, say)
    runner.run(prepare_steps(config))
    failed = runner.run_independent([evaluate_untrained(name, config) for name in BASELINES], config.parallel)
    pairs = [(row, seed) for seed in config.seeds for row in rows]  # so that an early end leaves whole seeds
    trainings = [train_step(row, seed, config) for row, seed in pairs if config.trains(row)]
    failed += runner.run_independent(trainings, config.parallel)
    steps = [evaluate_mlp(seed, config) for seed in config.seeds]
    steps += [
        evaluate_trained(row, seed, config)
        for row, seed in pairs
        if f"train_{row.weights_of or row.name}_{seed}" not in failed
    ]
    failed += runner.run_independent(steps, config.parallel)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see {config.folder / 'logs'}. The same command tries them again")
    return runner


def check_planners(rows: Sequence[Row], config: MatrixConfig) -> None:
    """Raises UserError for a planner to load that is no row's, or has no folder."""
    if strange := [name for name in config.planners if name not in [row.name for row in rows]]:
        raise UserError(f"planners: no row is called {', '.join(strange)}; there are {', '.join(r.name for r in rows)}")
    for row, seed in ((row, seed) for row in rows if row.name in config.planners for seed in config.seeds):
        folder = config.planner_folder(row, seed)
        if not (folder / "config.json").is_file():
            raise UserError(f"planners.{row.name}: {folder} is no folder of a planner (no config.json)")


def prepare_steps(config: MatrixConfig) -> list[Step]:
    """Caches of all splits, anchors, and the blind baselines."""
    steps = [
        Step(
            f"{kind}_{split}",
            f"cache {kind} of {split}",
            _tool("cache", config, f"split={split}", f"kind={kind}", f"features={config.features}",
                  f"camera_codec={config.camera_codec}", f"output_dir={config.caches}"),
        )
        for split in (config.train_split, config.val_split, config.test_split)
        for kind in ("features", "metrics")
    ]  # fmt: skip
    anchors = _tool("cluster_anchors", config, f"split={config.train_split}", f"output_dir={config.folder / 'anchors'}")
    steps.append(Step("anchors", "cluster anchors", anchors))
    for seed in config.seeds:
        folder = config.folder / "runs" / f"{EGO_MLP}_{seed}"
        where = (f"split={config.train_split}", f"output_dir={folder}", f"mlp.seed={seed}")
        title = f"train the blind baseline, seed {seed}"
        steps.append(Step(f"train_{EGO_MLP}_{seed}", title, _tool("train_ego_mlp", config, *where)))
    return steps


def train_step(row: Row, seed: int, config: MatrixConfig) -> Step:
    """One training."""
    model = "_".join(part for part in (config.variant, row.model) if part) or "diffusiondrive"
    command = _tool(
        "train",
        config,
        f"model={model}",
        f"split={config.train_split}",
        f"val_split={config.val_split}",
        f"cache={config.caches / config.train_split / 'features'}",
        f"val_cache={config.caches / config.val_split / 'features'}",
        f"metrics={config.caches / config.train_split / 'pdms_v1'}",
        f"val_metrics={config.caches / config.val_split / 'pdms_v1'}",
        f"anchors={config.folder / 'anchors' / 'anchors.npy'}",
        f"output_dir={config.planner_folder(row, seed).parent}",
        f"seed={seed}",
        "trainer.progress_bar=false",
        *config.train,
        *row.overrides,
    )
    return Step(f"train_{row.name}_{seed}", f"train {row.title}, seed {seed}", command)


def evaluate_trained(row: Row, seed: int, config: MatrixConfig) -> Step:
    """PDMS of a training's best epoch on the test split, and of all its candidates."""
    command = _evaluate(
        str(config.planner_folder(row, seed)), config.evaluation_folder(row.name, seed), config,
        f"cache={config.test_features}", f"seed={seed}", "modes=true", *row.sampling,
    )  # fmt: skip
    return Step(f"evaluate_{row.name}_{seed}", f"evaluate {row.title}, seed {seed}", command)


def evaluate_mlp(seed: int, config: MatrixConfig) -> Step:
    """PDMS of the blind baseline."""
    folder = config.evaluation_folder(EGO_MLP, seed)
    command = _evaluate(str(config.folder / "runs" / f"{EGO_MLP}_{seed}"), folder, config)
    return Step(f"evaluate_{EGO_MLP}_{seed}", f"evaluate the blind baseline, seed {seed}", command)


def evaluate_untrained(name: str, config: MatrixConfig) -> Step:
    """PDMS of a planner that nothing trains."""
    return Step(f"evaluate_{name}", f"evaluate {name}", _evaluate(name, config.evaluation_folder(name), config))


def _evaluate(planner: str, folder: Path, config: MatrixConfig, *arguments: str) -> tuple[str, ...]:
    metric_cache = config.caches / config.test_split
    return _tool(
        "evaluate", config, f"planner={planner}", f"split={config.test_split}", f"output_dir={folder}",
        f"metric_cache={metric_cache}", "report=false", "workers=1", *arguments,
    )  # fmt: skip


def _tool(name: str, config: MatrixConfig, *arguments: str) -> tuple[str, ...]:
    return (f"tools/{name}.py", f"data.root={config.data.root}", f"data.maps={config.data.maps}", *arguments)
