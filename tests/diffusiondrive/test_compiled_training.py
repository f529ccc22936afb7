"""The training step through torch.compile and on a GPU: the same losses and gradients, and nobody waits."""

from __future__ import annotations

import copy
import functools
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusiondrive import DiffusionDrive, losses
from diffusiondrive.backbone import Fusion, Pool, Resize
from diffusiondrive.dataset import Sample
from diffusiondrive.features import FeatureConfig
from diffusiondrive.losses import LossConfig
from diffusiondrive.training import module as training_module
from diffusiondrive.training.callbacks import NonFiniteGuard, WeightEma
from diffusiondrive.training.config import OptimizerConfig
from diffusiondrive.training.data import copied_ahead
from diffusiondrive.training.module import PlannerModule, lay_out_for, planned_with_losses
from diffusiondrive.training.train import train
from diffusiondrive.variants import tiny
from navsim_eval.errors import UserError
from tests.diffusiondrive.test_training import anchors, configuration, silent, world  # noqa: F401 (fixtures)

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def steady_tiny():
    """The test planner without dropout, whose masks a compiler draws differently."""
    config = tiny()
    config.backbone.fusion_dropout = config.decoder.dropout = 0.0
    return config


def batch_for(config, count: int = 4, seed: int = 0) -> Sample:
    draw = torch.Generator().manual_seed(seed)
    backbone, perception = config.backbone, config.perception
    features = {
        "camera_feature": torch.randint(0, 256, (count, 3, *backbone.image_size), generator=draw, dtype=torch.uint8),
        "lidar_feature": torch.randint(0, 6, (count, 1, *backbone.lidar_size), generator=draw, dtype=torch.uint8),
        "status_feature": torch.randn(count, perception.status_size, generator=draw),
    }
    targets = {
        "trajectory": 5 * torch.randn(count, config.poses, 3, generator=draw),
        "agent_states": 10 * torch.randn(count, perception.agents, 5, generator=draw),
        "agent_labels": torch.rand(count, perception.agents, generator=draw) < 0.3,
        "bev_semantic_map": torch.randint(0, 7, (count, *perception.semantic_size), generator=draw).to(torch.uint8),
    }
    return Sample(features, targets, [f"{number:016x}" for number in range(count)])


def planner_module(config, compiled: bool = False) -> PlannerModule:
    torch.manual_seed(0)
    planner = DiffusionDrive(config, 10 * torch.randn(config.modes, config.poses, 2)).train()
    features = FeatureConfig.for_planner(config)
    settings = OptimizerConfig(rate=1e-3, warmup_share=0.0)
    return PlannerModule(planner, features, LossConfig(), settings, 100, 100, compiled=compiled)


def gradients(run, module: PlannerModule, batch: Sample) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms of the loss and gradients of one step."""
    planner = module.planner
    noise, levels = torch.ones(4, *planner.noise_shape), torch.arange(4)
    terms = run(module.loss_config, planner, module.features, batch.features, batch.targets, noise, levels, None)
    terms["loss"].backward()
    found = {name: p.grad for name, p in planner.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in terms.items()}, found


def compare_with_eager(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the start all agent queries say nearly the same, so many matchings cost the same but for rounding.
    monkeypatch.setattr(losses, "assign", lambda costs: torch.arange(30).expand(costs.shape[:2]))
    module, batch = planner_module(steady_tiny()), batch_for(steady_tiny())
    other = copy.deepcopy(module)
    other.planner.perception.backbone.channels_last = True
    other.planner.to(memory_format=torch.channels_last)
    compiled = torch.compile(planned_with_losses, dynamic=False, fullgraph=True, backend=backend)
    terms, found = gradients(planned_with_losses, module, batch)
    same_terms, same = gradients(compiled, other, batch)
    torch.testing.assert_close(same_terms, terms, rtol=2e-5, atol=1e-6)
    assert found.keys() == same.keys()
    for name, gradient in found.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(same[name], gradient, rtol=1e-3, atol=2e-4 * scale + 1e-6, msg=name)


def test_a_captured_fusion_has_the_gradients_of_the_eager_one() -> None:
    """Pooling and resizing as a compiler gets them, in the place where they are."""
    config = steady_tiny().backbone
    torch.manual_seed(0)
    fusion = Fusion(8, config)
    maps = [torch.randn(2, 8, 16, 32).requires_grad_(), torch.randn(2, 8, 16, 16).requires_grad_()]
    weights = [torch.randn_like(x) for x in maps]

    def both(run) -> list[Tensor]:
        outputs = run(*maps)
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(loss, [*maps, *fusion.parameters()])]

    captured = torch.compile(fusion, dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(both(captured), both(fusion), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_captured_step_has_the_losses_and_gradients_of_the_eager_one(monkeypatch) -> None:
    """One graph without a break; gradients of resizing and pooling as a compiler gets them; channels-last weights."""
    compare_with_eager("aot_eager", monkeypatch)


@pytest.mark.slow
def test_a_compiled_step_has_the_losses_and_gradients_of_the_eager_one(monkeypatch) -> None:
    compare_with_eager("inductor", monkeypatch)


@pytest.mark.parametrize(("source", "size"), [((2, 4), (16, 32)), ((8, 8), (12, 20)), ((5, 3), (7, 3))])
def test_gradient_of_resizing(source: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *source, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, *size, dtype=torch.float64)
    grown = Resize.apply(x, size)
    torch.testing.assert_close(grown, F.interpolate(x, size, mode="bilinear", align_corners=False), rtol=0, atol=0)
    (expected,) = torch.autograd.grad((F.interpolate(x, size, mode="bilinear") * weight).sum(), x)
    (found,) = torch.autograd.grad((grown * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_pooling() -> None:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Pool.apply(x, (2, 6)), x)


@pytest.mark.slow
def test_a_compiled_run_leaves_the_same_checkpoint(world, anchors, tmp_path, monkeypatch) -> None:  # noqa: F811
    """tools/train.py's way; captured, not compiled, to be quick. Same keys, same weights, and it can be resumed."""
    monkeypatch.setattr(training_module.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    runs = {}
    for compiled in (False, True):
        config = configuration(world, anchors, tmp_path / str(compiled), epochs=1, compile=compiled)
        config.model, config.val_split = steady_tiny(), ""
        config.optimizer = OptimizerConfig(epsilon=1e-3)  # some gradients are rounding only
        folder = train(config, silent)
        runs[compiled] = torch.load(tmp_path / str(compiled) / "last.ckpt", weights_only=True)
        DiffusionDrive.from_pretrained(folder)
    for key in ("state_dict", "current_model_state"):
        assert runs[True][key].keys() == runs[False][key].keys()
        for name, value in runs[False][key].items():
            torch.testing.assert_close(runs[True][key][name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_guard_skips_on_the_device_and_names_later(tmp_path: Path, device: str) -> None:
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = NonFiniteGuard(tmp_path, limit=3)
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, global_rank=0)
    history = [weight.detach().clone()]
    for number, poison in enumerate([0.0, float("nan"), 0.0, float("inf")]):
        trainer.global_step = number
        guard.on_train_batch_start(trainer, None, Sample({}, {}, [f"scene{number}"]), number)
        weight.grad = torch.ones_like(weight) + poison
        guard.on_before_optimizer_step(trainer, None, optimizer)
        optimizer.step()
        history.append(weight.detach().clone())
    guard.on_train_epoch_end(trainer, None)
    moved = [not torch.equal(one, two) for one, two in pairwise(history)]
    assert moved == [True, False, True, False] and torch.isfinite(weight).all()
    lines = [json.loads(line) for line in (tmp_path / "non_finite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(1, ["scene1"]), (3, ["scene3"])]
    assert guard.state_dict() == {"in_a_row": 1, "total": 2}
    with pytest.raises(UserError, match="3 steps in a row"):
        for _ in range(4):
            weight.grad = torch.full_like(weight, float("nan"))
            guard.on_before_optimizer_step(trainer, None, optimizer)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_averages_follow_the_weights(device: str) -> None:
    class Small(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

    model = Small().to(device)
    ema = WeightEma(0.5)
    trainer = SimpleNamespace(global_step=0, strategy=SimpleNamespace(root_device=torch.device(device)))
    ema.setup(trainer, model, "fit")
    values = []
    for step, decay in ((1, None), (2, 2 / 11), (3, 3 / 12)):
        with torch.no_grad():
            model.linear.weight.fill_(float(step))
            model.norm.num_batches_tracked.fill_(step)
        trainer.global_step = step
        ema.on_train_batch_end(trainer, model, None, None, 0)
        values.append(float(step) if decay is None else decay * values[-1] + (1 - decay) * step)
        averaged = ema._average_model
        assert averaged.module.linear.weight[0, 0].item() == pytest.approx(values[-1], rel=1e-6)
        assert averaged.module.norm.num_batches_tracked.item() == step == averaged.n_averaged.item()


@pytest.mark.gpu
def test_batches_copied_ahead_arrive_in_order_and_whole() -> None:
    batches = [batch_for(tiny(), 8, seed) for seed in range(5)]
    pinned = (
        Sample(*({name: x.pin_memory() for name, x in part.items()} for part in batch[:2]), batch.token)
        for batch in batches
    )
    for batch, copied in zip(batches, copied_ahead(pinned, torch.device("cuda")), strict=True):
        for part in (0, 1):
            for name, value in batch[part].items():
                assert torch.equal(copied[part][name].cpu(), value), name


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_on_the_device_learns_and_nobody_waits(compiled: bool) -> None:
    """bf16, channels-last, fused AdamW: the loss of one batch falls; after warm-up nothing synchronises."""
    device = torch.device("cuda")
    module = planner_module(tiny(), compiled).to(device)
    lay_out_for(module.planner, device)
    optimizer = module.configure_optimizers()["optimizer"]
    guard = NonFiniteGuard(Path("/nonexistent"), limit=2)
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, global_rank=0)
    host = batch_for(tiny())
    batch = Sample(*({name: x.to(device) for name, x in part.items()} for part in host[:2]), host.token)
    seen = []

    def step() -> None:
        guard.on_train_batch_start(trainer, module, batch, 0)
        with torch.autocast("cuda", torch.bfloat16):
            loss = module.loss_terms(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        guard.on_before_optimizer_step(trainer, module, optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        seen.append(loss.detach())

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = torch.stack(seen).float().cpu().numpy()
    assert np.isfinite(values).all() and values[-3:].mean() < 0.98 * values[:3].mean()
