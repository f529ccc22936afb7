"""Configurations of training: every experiment composes, every model file holds its variant's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusiondrive.losses import LossConfig
from diffusiondrive.training.config import TrainConfig
from diffusiondrive.variants import VARIANTS
from navsim_eval.config import CONFIG_ROOT, load_config
from navsim_eval.errors import UserError


@pytest.mark.parametrize("path", sorted((CONFIG_ROOT / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes(path: Path) -> None:
    load_config(TrainConfig, "train", [f"experiment={path.stem}"])


@pytest.mark.parametrize("name", list(VARIANTS))
def test_model_file_holds_the_numbers_of_its_variant(name: str) -> None:
    assert load_config(TrainConfig, "train", [f"model={name}"]).model == VARIANTS[name]()


def test_published_recipe_states_the_published_settings() -> None:
    config = load_config(TrainConfig, "train", ["experiment=navtrain_reference"])
    assert config.model.name == "diffusiondrive" and config.split == "navtrain:train"
    assert (config.trainer.global_batch, config.trainer.largest_per_device, config.trainer.epochs) == (512, 64, 100)
    assert (config.optimizer.rate, config.optimizer.weight_decay) == (6e-4, 1e-4)
    assert config.loss == LossConfig()
    assert config.optimizer.clip_norm == 0.0 and config.optimizer.ema_decay == 0.0


def test_an_experiment_may_be_overridden() -> None:
    config = load_config(TrainConfig, "train", ["experiment=navtrain_reference", "trainer.epochs=3"])
    assert config.trainer.epochs == 3 and config.trainer.global_batch == 512


def test_impossible_settings_are_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="is none of warmup_cosine, published"):
        load_config(TrainConfig, "train", ["optimizer.schedule=linear"])
    with pytest.raises(UserError, match=r"did you mean .trainer\.global_batch"):
        load_config(TrainConfig, "train", ["trainer.globalbatch=3"])
