"""Training runs: they learn, survive kills and bad samples, and do not depend on how many processes share a batch."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from diffusiondrive import DiffusionDrive
from diffusiondrive.losses import LossConfig
from diffusiondrive.schedule import ScheduleConfig
from diffusiondrive.training.callbacks import WeightEma
from diffusiondrive.training.config import OptimizerConfig, TrainConfig, TrainerConfig
from diffusiondrive.training.data import PlanningData
from diffusiondrive.training.judge import ModeJudge
from diffusiondrive.training.logger import read_metrics
from diffusiondrive.training.module import parameter_groups
from diffusiondrive.training.train import train, write_description
from diffusiondrive.training.validation import METRIC
from diffusiondrive.variants import tiny
from navsim_eval import score
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.metric_caches import MetricCaches
from navsim_eval.shards import ShardReader
from tests.diffusiondrive.test_baselines import tiny_diffusion_policy, tiny_ltf
from tests.worlds import World, write_world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"train": 3, "val": 1})  # 12 and 4 scenes


@pytest.fixture(scope="module")
def anchors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seconds = np.arange(1, 9) / 2
    straight = np.stack([np.stack([v * seconds, 0 * seconds], -1) for v in (1, 4, 7, 8, 9, 12)])
    path = tmp_path_factory.mktemp("anchors") / "anchors.npy"
    np.save(path, straight.astype(np.float32))
    return path


def configuration(world: World, anchors: Path, output: Path, **trainer: object) -> TrainConfig:
    """Three optimiser steps an epoch, each of two micro-batches."""
    settings = {
        "epochs": 3, "global_batch": 4, "largest_per_device": 2, "workers": 0, "validate_every_epochs": 3,
        "checkpoint_every_steps": 2, "log_every_steps": 1, "accelerator": "cpu", "devices": "1", "progress_bar": False,
    } | trainer  # fmt: skip
    return TrainConfig(
        data=world.data,
        model=tiny(),
        trainer=TrainerConfig(**settings),
        anchors=str(anchors),
        output_dir=str(output),
    )


def silent(_: str) -> None:
    """Swallow what a run says."""


def assert_same(one: object, other: object, name: str = "") -> None:
    """Nested containers of tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{name}[{index}]")
    else:
        assert one == other, name


def test_a_run_leaves_everything_that_is_needed_to_understand_and_use_it(world, anchors, tmp_path) -> None:
    folder = train(configuration(world, anchors, tmp_path, epochs=6), silent)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 18 and np.mean(losses[-3:]) < np.mean(losses[:3]), "the loss falls"
    assert any(0.0 <= row.get("val/pdms", -1.0) <= 1.0 for row in rows)
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"]
    assert "global_batch: 4" in (tmp_path / "config.yaml").read_text()
    assert {"last.ckpt", "best.ckpt", "tensorboard"} <= {path.name for path in tmp_path.iterdir()}
    planner = DiffusionDrive.from_pretrained(folder)
    np.testing.assert_array_equal(planner.initial.anchors.numpy(), np.load(anchors))


def test_averages_live_where_the_planner_will_be_trained() -> None:
    """When Lightning sets callbacks up, the planner is on the CPU still; averages left there cost a copy a step."""
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    averaging = WeightEma(0.9)
    module = pl.LightningModule()
    module.layer = torch.nn.Linear(2, 2)
    averaging.setup(trainer, module, "fit")
    assert averaging._average_model.module.layer.weight.device.type == "meta"


KILLED = """
import os, sys
from diffusiondrive.training import callbacks
from diffusiondrive.training.train import train
from diffusiondrive.training.config import *
from navsim_eval.config import from_mapping
from omegaconf import OmegaConf
count = 0
def end(self, trainer, *rest):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os._exit(9)
callbacks.Throughput.on_train_batch_end = end
train(from_mapping(TrainConfig, OmegaConf.load(sys.argv[1])), lambda text: None)
"""


@pytest.fixture(scope="module")
def uninterrupted(world, anchors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    train(configuration(world, anchors, output), silent)
    return output


@pytest.mark.parametrize("batches", [5, 13])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    world, anchors, tmp_path, uninterrupted, batches: int
) -> None:
    """Weights, optimiser, averages, schedule and sampler position; killed within the first and the third epoch."""
    config = configuration(world, anchors, tmp_path)
    write_description(config, tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(batches)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr[-2000:]
    assert (tmp_path / "last.ckpt").exists() and not (tmp_path / "best.ckpt").exists()
    train(config, silent)
    one, other = (torch.load(path / "last.ckpt", weights_only=True) for path in (uninterrupted, tmp_path))
    assert one["global_step"] == other["global_step"] == 9
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_same(one[key], other[key], key)


def test_two_processes_give_the_result_of_one(world, anchors, tmp_path) -> None:
    """Plain DDP over gloo, no unused parameters. Batch statistics are frozen and dropout is off, because both are
    defined per process; everything else must agree to rounding, validation PDMS included. Some biases (of attention
    keys) have zero gradient but for rounding, which AdamW would blow up to whole steps: hence the large epsilon."""
    results, scores = {}, {}
    for devices in (1, 2):
        output = tmp_path / str(devices)
        command = [
            sys.executable, "tools/train.py", *world.overrides, "model=tiny", f"anchors={anchors}",
            "model.decoder.dropout=0", "model.backbone.fusion_dropout=0", "optimizer.freeze_batch_norm=true",
            "optimizer.rate=1e-3", "optimizer.epsilon=1e-3", "trainer.epochs=2", "trainer.global_batch=4",
            "trainer.workers=0",
            f"trainer.largest_per_device={4 // devices}", f"trainer.devices={devices}", "trainer.accelerator=cpu",
            f"trainer.strategy={'auto' if devices == 1 else 'ddp'}", "trainer.validate_every_epochs=2",
            "trainer.progress_bar=false", "trainer.log_every_steps=1", f"output_dir={output}",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[devices] = torch.load(output / "last.ckpt", weights_only=True)["current_model_state"]
        scores[devices] = [row for row in read_metrics(output / "metrics.jsonl") if "val/pdms" in row][-1]
    assert results[1].keys() == results[2].keys()
    for name, value in results[1].items():
        torch.testing.assert_close(results[2][name], value, atol=2e-5, rtol=1e-4, msg=name)
    assert scores[1]["val/pdms"] == pytest.approx(scores[2]["val/pdms"], abs=1e-3)
    assert scores[1]["val/ade"] == pytest.approx(scores[2]["val/ade"], rel=1e-3)


def test_non_finite_gradients_are_skipped_and_named(world, anchors, tmp_path, monkeypatch) -> None:
    from diffusiondrive.training import module

    whole_loss = module.planner_loss
    poisoned: list[str] = []

    def poison(outputs, targets, config):
        terms = whole_loss(outputs, targets, config)
        if len(poisoned) < 1:
            poisoned.append("once")
            terms["loss"] = terms["loss"] * float("nan")
        return terms

    monkeypatch.setattr(module, "planner_loss", poison)
    folder = train(configuration(world, anchors, tmp_path), silent)
    lines = [json.loads(line) for line in (tmp_path / "non_finite.jsonl").read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["step"] == 0 and len(lines[0]["tokens"]) == 4
    weights = DiffusionDrive.from_pretrained(folder).state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())


def test_a_run_that_only_meets_nan_stops_and_says_where(world, anchors, tmp_path, monkeypatch) -> None:
    from diffusiondrive.training import module

    whole_loss = module.planner_loss

    def poison(outputs, targets, config):
        terms = whole_loss(outputs, targets, config)
        return terms | {"loss": terms["loss"] * float("nan")}

    monkeypatch.setattr(module, "planner_loss", poison)
    with pytest.raises(UserError, match="2 steps in a row with non-finite gradients"):
        train(configuration(world, anchors, tmp_path, max_bad_steps=2), silent)


def test_refusals_name_the_remedy(world, anchors, tmp_path) -> None:
    config = configuration(world, anchors, tmp_path, global_batch=64)
    with pytest.raises(UserError, match="64 is more than the split has training scenes"):
        train(config, silent)
    config = configuration(world, anchors, tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"")
    config.resume = "never"
    with pytest.raises(UserError, match="choose another output_dir"):
        train(config, silent)
    config.resume = str(tmp_path / "nothing.ckpt")
    with pytest.raises(UserError, match="is no file"):
        train(config, silent)


def test_every_parameter_is_in_exactly_one_optimiser_group(anchors) -> None:
    planner = DiffusionDrive(tiny(), torch.from_numpy(np.load(anchors)))
    groups = parameter_groups(planner, OptimizerConfig(rate=1.0))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in planner.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert {group["name"] for group in groups} == {"camera", "camera, no decay", "rest", "rest, no decay"}
    assert {group["lr"] for group in groups if group["name"].startswith("camera")} == {0.5}


def test_runs_share_a_finished_metric_cache_without_waiting_for_each_other(world, tmp_path) -> None:
    caches = MetricCaches(world.data, SceneDataset.from_config(world.data, "val"), METRIC, tmp_path / "cache")
    data = PlanningData([], None, plan=None, workers=0, seed=0, stores=[caches])
    data.prepare_data()
    assert len(ShardReader(tmp_path / "cache")) == len(caches.dataset)
    with (tmp_path / "cache" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run is writing
        data.prepare_data()


def test_the_judge_scores_every_mode_as_the_evaluator_does(world, tmp_path) -> None:
    dataset = SceneDataset.from_config(world.data, "train")
    caches = MetricCaches(world.data, dataset, METRIC, tmp_path / "cache")
    tokens = list(dataset.tokens[:3])
    human = np.stack([dataset[token].human_trajectory(8) for token in tokens])
    modes = np.stack([human, np.zeros_like(human), human * np.array([1.0, -3.0, 1.0]), human], axis=1)
    modes[:, 3, 4] = np.nan
    judged = ModeJudge(caches).scores(tokens, modes)
    for row, token in enumerate(tokens):
        for mode in range(3):
            alone = score([caches[token]], modes[row : row + 1, mode : mode + 1], metric=METRIC).columns["score"]
            assert judged[row, mode] == pytest.approx(alone.item(), abs=1e-12)
    assert (judged[:, 3] == 0).all() and judged[:, 0].min() > judged[:, 1].max()


def test_judges_in_processes_give_what_one_gives(world, tmp_path) -> None:
    dataset = SceneDataset.from_config(world.data, "train")
    caches = MetricCaches(world.data, dataset, METRIC, tmp_path / "cache")
    tokens = list(dataset.tokens[:5])
    human = np.stack([dataset[token].human_trajectory(8) for token in tokens])
    modes = np.stack([human, human * np.array([1.0, -3.0, 1.0])], axis=1)
    alone, judge = ModeJudge(caches).scores(tokens, modes), ModeJudge(caches, workers=2)
    try:
        np.testing.assert_array_equal(judge.scores(tokens, modes), alone)
        np.testing.assert_array_equal(judge.scores(tokens[::-1], modes[::-1]), alone[::-1])  # each scene at its home
        copy.deepcopy(judge).close()  # Lightning copies the module with all it holds
        with pytest.raises(RuntimeError, match="nowhere"):
            judge.scores(["nowhere"], modes[:1])
    finally:
        judge.close()


def test_labels_of_the_evaluator_enter_the_training(world, anchors, tmp_path) -> None:
    config = configuration(world, anchors, tmp_path, epochs=1)
    config.loss = LossConfig(judged=0.5)
    train(config, silent)
    steps = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/raw/focal_1" in line]
    plain = configuration(world, anchors, tmp_path / "plain", epochs=1)
    train(plain, silent)
    first = next(line for line in read_metrics(tmp_path / "plain" / "metrics.jsonl") if "train/raw/focal_1" in line)
    assert steps[0]["train/raw/focal_1"] != pytest.approx(first["train/raw/focal_1"], rel=1e-3)
    assert steps[0]["train/raw/l1_1"] == pytest.approx(first["train/raw/l1_1"])  # the regression is the human's alone


@pytest.mark.parametrize("make", [tiny_ltf, tiny_diffusion_policy], ids=lambda make: make.__name__)
def test_baselines_train_as_the_planner_does(world: World, anchors: Path, tmp_path: Path, make) -> None:
    """An epoch, a validation, a published folder; no labels by the evaluator where nothing is to be chosen."""
    config = configuration(world, anchors, tmp_path / "run", epochs=1, validate_every_epochs=1)
    config.model = make()
    config.loss = LossConfig(judged=0.5)
    planner = DiffusionDrive.from_pretrained(train(config, silent))
    assert planner.config == config.model
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("train/raw/l1_0" in step for step in steps) and any("val/pdms" in step for step in steps)
    assert not any("train/raw/focal_0" in step for step in steps)
    assert not (tmp_path / "run" / "train_metrics").exists()


def test_human_plans_can_be_diffused(world: World, anchors: Path, tmp_path: Path) -> None:
    config = configuration(world, anchors, tmp_path / "run", epochs=1, max_steps=1)
    config.val_split, config.model = "", tiny()
    config.model.schedule = ScheduleConfig(noise_source="mixed")
    assert DiffusionDrive.from_pretrained(train(config, silent)).config.schedule.noise_source == "mixed"
