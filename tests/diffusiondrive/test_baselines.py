"""The planners that DiffusionDrive is compared with: what each one is, and that all share one code."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusiondrive import DiffusionDrive
from diffusiondrive.backbone import BackboneConfig, FusionBackbone
from diffusiondrive.baselines.unet import POINTS, PoseConv, PoseGrow, PoseNorm, UNet, UNetConfig, UNetDenoiser
from diffusiondrive.decoder import ANCHORS, DecoderConfig
from diffusiondrive.encoders import ViTEncoder
from diffusiondrive.losses import LossConfig, planner_loss, visible
from diffusiondrive.noise import scene_noise, training_coin, training_draw
from diffusiondrive.planner import PlannerConfig
from diffusiondrive.runtime.benchmark import load
from diffusiondrive.runtime.runtime import Runtime
from diffusiondrive.schedule import FULL, ScheduleConfig
from diffusiondrive.space import SpaceConfig, TrajectorySpace
from diffusiondrive.variants import (
    diffusion_policy,
    ltf,
    regressing,
    tiny,
    transfuser,
    truncated_unet,
    untruncated,
    without_lidar,
)
from navsim_eval.errors import UserError

UNET = UNetConfig(channels=(8, 16, 16), groups=4)


def tiny_transfuser() -> PlannerConfig:
    return regressing(tiny(), "tiny_transfuser", transfuser().regression)


def tiny_ltf() -> PlannerConfig:
    return without_lidar(tiny_transfuser(), "tiny_ltf")


def tiny_truncated_unet() -> PlannerConfig:
    return replace(tiny(), name="tiny_truncated_unet", denoiser="unet", unet=UNET)


def tiny_diffusion_policy() -> PlannerConfig:
    return untruncated(tiny_truncated_unet(), "tiny_diffusion_policy")


BASELINES = (tiny_transfuser, tiny_ltf, tiny_truncated_unet, tiny_diffusion_policy)
every_baseline = pytest.mark.parametrize("make", BASELINES, ids=lambda make: make.__name__)


def build(config: PlannerConfig, seed: int = 0) -> DiffusionDrive:
    torch.manual_seed(seed)
    return DiffusionDrive(config, torch.rand(config.modes, config.poses, 2) * 30 if config.anchored else None).eval()


def features_of(config: PlannerConfig, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = {
        "camera_feature": torch.rand(batch, 3, *config.backbone.image_size, generator=generator),
        "lidar_feature": torch.rand(batch, 1, *config.backbone.lidar_size, generator=generator),
        "status_feature": torch.randn(batch, 8, generator=generator),
    }
    if not config.backbone.lidar:
        del features["lidar_feature"]
    return features


def targets_of(batch: int) -> dict[str, Tensor]:
    return {
        "trajectory": torch.rand(batch, 8, 3) * 10,
        "agent_states": torch.randn(batch, 30, 5),
        "agent_labels": torch.ones(batch, 30).bool(),
        "bev_semantic_map": torch.randint(0, 7, (batch, 16, 32)),
    }


# --------------------------------------------------------------------------------------------------- published sizes


def test_parameters_are_those_of_the_published_planners() -> None:
    """TransFuser 55,970,149 (counted in its code); the paper's table has 101 M and 102 M for the two U-Nets."""
    counts = {}
    for make in (transfuser, ltf, diffusion_policy, truncated_unet):
        config = make()
        with torch.device("meta"):
            anchors = torch.zeros(config.modes, 8, 2) if config.anchored else None
            counts[config.name] = sum(p.numel() for p in DiffusionDrive(config, anchors).parameters())
    assert counts["transfuser"] == 55_970_149
    assert counts["ltf"] == counts["transfuser"] + 256 * 256  # the learned image
    assert round(counts["truncated_unet"] / 1e6) == 102 and 101e6 < counts["diffusion_policy"] < 102e6


@pytest.mark.parametrize(("scale", "millions"), [(False, 42.5), (True, 46.2)])
def test_unet_has_the_published_size(scale: bool, millions: float) -> None:
    """With three input channels and a 256-wide condition, level embedding included."""
    with torch.device("meta"):
        network = UNet(3, 3, 512, UNetConfig(scale=scale))
        time = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256))
    count = sum(p.numel() for module in (network, time) for p in module.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    "layer",
    [
        PoseConv(12, 6, 3, padding=1),
        PoseConv(12, 6, 3, stride=2, padding=1),
        PoseConv(12, 6, 1),
        PoseNorm(4, 12),
        PoseGrow(12, 6, 4, stride=2, padding=1),
    ],
    ids=repr,
)
def test_layers_over_poses_are_the_librarys_with_channels_last(layer) -> None:
    x = torch.randn(5, 8, 12)
    library = type(layer).__base__.forward
    torch.testing.assert_close(layer(x), library(layer, x.mT).mT, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- properties


@every_baseline
def test_plan_has_the_shape_of_every_plan(make) -> None:
    planner = build(make())
    config = planner.config
    with torch.no_grad():
        plan = planner(features_of(config, 2))
    assert plan.trajectory.shape == (2, 8, 3) and plan.candidates.shape == (2, config.modes, 8, 3)
    assert plan.logits.shape == (2, config.modes) and torch.isfinite(plan.candidates).all()
    assert torch.equal(plan.trajectory, plan.candidates[torch.arange(2), plan.mode])
    assert plan.candidates[..., 2].abs().max() <= math.pi
    if not config.anchored:
        assert not plan.mode.any() and not plan.logits.any()  # nothing to choose by


@every_baseline
def test_a_scene_does_not_notice_its_batch(make) -> None:
    planner = build(make())
    tokens, shape = ["t0", "t1", "t2"], planner.noise_shape
    features = features_of(planner.config, 3)
    with torch.no_grad():
        together = planner(features, scene_noise(tokens, 7, shape))
        alone = planner({k: v[1:2] for k, v in features.items()}, scene_noise(["t1"], 7, shape))
    torch.testing.assert_close(alone.candidates[0], together.candidates[1], atol=1e-4, rtol=0)


@every_baseline
def test_checkpoint_round_trip(make, tmp_path) -> None:
    planner = build(make())
    folder = planner.save_pretrained(tmp_path / "planner")
    again = DiffusionDrive.from_pretrained(folder)
    assert again.config == planner.config
    features = features_of(planner.config, 1)
    with torch.no_grad():
        assert torch.equal(again(features).candidates, planner(features).candidates)
    card = (folder / "README.md").read_text()
    assert ("anchors" in card) == planner.config.anchored
    assert ("no LiDAR" in card) == (not planner.config.backbone.lidar)


@every_baseline
def test_every_trainable_parameter_gets_a_gradient(make) -> None:
    """Plain data-parallel training relies on it."""
    planner = build(make()).train()
    tokens = ["a", "b"]
    targets = targets_of(2)
    noise, levels = training_draw(tokens, 0, planner.noise_shape, planner.config.schedule.train_levels)
    human = targets["trajectory"][..., :2]
    outputs = planner.training_outputs(features_of(planner.config, 2), noise, levels, human)
    terms = planner_loss(outputs, targets, LossConfig(sharing=1.0, judged=0.0))
    terms["loss"].backward()
    without = [name for name, p in planner.named_parameters() if p.grad is None]
    assert without == (["initial.anchors"] if planner.config.anchored else [])
    assert ("raw/focal_0" in terms) == planner.config.anchored


def test_regression_reads_neither_noise_nor_level() -> None:
    planner = build(tiny_transfuser())
    features = features_of(planner.config, 1)
    with torch.no_grad():
        one, other = (planner(features, torch.full((1, 1, 8, 2), value)).trajectory for value in (0.0, 5.0))
    assert torch.equal(one, other)


def test_regression_loss_is_the_mean_distance() -> None:
    planner = build(tiny_transfuser())
    targets = targets_of(2)
    with torch.no_grad():
        features, human = features_of(planner.config, 2), targets["trajectory"][..., :2]
        outputs = planner.training_outputs(features, torch.zeros(2, 1, 8, 2), torch.zeros(2).long(), human)
        terms = planner_loss(outputs, targets, LossConfig(trajectory=10.0, regression=1.0))
    expected = 10 * (outputs.trajectory - targets["trajectory"]).abs().mean()
    assert terms["trajectory_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_samples_of_the_diffusion_policy_follow_their_noise() -> None:
    """Samples differ because their noise does, and in nothing else."""
    planner = build(tiny_diffusion_policy())
    features = features_of(planner.config, 1)
    noise = scene_noise(["a"], 0, planner.noise_shape)
    noise[:, 3] = noise[:, 0]
    with torch.no_grad():
        plan = planner(features, noise)
    torch.testing.assert_close(plan.candidates[:, 3], plan.candidates[:, 0], atol=1e-5, rtol=0)
    assert (plan.candidates[:, 1] - plan.candidates[:, 0]).abs().max() > 1e-3


def test_diffusion_policy_runs_ddim_with_leading_spacing() -> None:
    schedule = build(tiny_diffusion_policy()).schedule
    assert schedule.labels == tuple(range(950, -1, -50)) and schedule.next_labels == (*range(900, -1, -50), -1)


def test_training_and_planning_pass_of_the_policy_are_one_code() -> None:
    """A noised human plan at label 950 is denoised in training as a sample at 950 is when planning."""
    planner = build(tiny_diffusion_policy())
    features, human = features_of(planner.config, 1), torch.rand(1, 8, 2) * 20
    noise = scene_noise(["a"], 0, planner.noise_shape)
    with torch.no_grad():
        outputs = planner.training_outputs(features, noise, torch.tensor([950]), human)
        clean = planner.space.normalise(human)[:, None]
        sample = planner.schedule.add_noise(clean, noise, 950)
        cache = planner.decoder.prepare(planner.perceive(features), None)
        denoised = planner.decoder.denoise(sample, torch.tensor([950]), cache)
    torch.testing.assert_close(outputs.poses[-1], denoised.poses[-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("base", [POINTS, ANCHORS])
def test_unet_correction_is_added_to_its_base(base) -> None:
    config = tiny_truncated_unet()
    config.unet = replace(UNET, base=base)
    planner = build(config)
    torch.nn.init.zeros_(planner.decoder.network.output.weight)
    torch.nn.init.zeros_(planner.decoder.network.output.bias)
    with torch.no_grad():
        chain = planner.propose(planner.perceive(features_of(config, 1)), planner.default_noise)
    expected = chain.passes[0].points if base == POINTS else planner.initial.anchors[None]
    torch.testing.assert_close(chain.passes[0].poses[-1][..., :2], expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ camera only


def test_camera_only_planner_ignores_a_lidar() -> None:
    planner = build(tiny_ltf())
    features = features_of(planner.config, 2)
    given = {**features, "lidar_feature": torch.rand(2, 1, *planner.config.backbone.lidar_size)}
    with torch.no_grad():
        assert torch.equal(planner(features).candidates, planner(given).candidates)
    assert "perception.backbone.latent" in planner.state_dict()


def test_agents_out_of_sight_are_not_asked_for() -> None:
    states = torch.tensor([[[10.0, 0.0], [0.0, 10.0], [1.0, 8.0], [-5.0, 0.0], [10.0, -1.0]]])
    targets = {
        "agent_states": torch.cat([states, torch.zeros(1, 5, 3)], dim=-1),
        "agent_labels": torch.tensor([[True, True, True, True, False]]),
    }
    assert visible(targets, 80.0).tolist() == [[True, False, False, False, False]]
    assert visible(targets, 85.0).tolist() == [[True, False, True, False, False]]


# -------------------------------------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("off", ["see_map", "see_agents", "see_ego"])
def test_looks_of_the_cascade_can_be_left_out(off) -> None:
    config = tiny()
    config.decoder = replace(config.decoder, **{off: False})
    planner = build(config)
    whole = build(tiny())
    assert sum(p.numel() for p in planner.parameters()) < sum(p.numel() for p in whole.parameters())
    targets = targets_of(2)
    noise, levels = training_draw(["a", "b"], 0, planner.noise_shape, 50)
    outputs = planner.train().training_outputs(features_of(config, 2), noise, levels)
    planner_loss(outputs, targets)["loss"].backward()
    assert [name for name, p in planner.named_parameters() if p.grad is None] == ["initial.anchors"]
    with torch.no_grad():
        planner.eval()
        features, other = features_of(config, 1), features_of(config, 1)
        context, changed = planner.perceive(features), planner.perceive(other)
        part = {"see_map": "map", "see_agents": "agents", "see_ego": "ego"}[off]
        if getattr(context, part) is not None:
            changed = replace(changed, **{part: torch.randn_like(getattr(changed, part))})
        same = [planner.propose(c, planner.default_noise).passes[-1].poses[-1] for c in (context, changed)]
    torch.testing.assert_close(*same, atol=1e-5, rtol=0)  # what is not looked at cannot matter


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_any_depth_of_the_cascade_plans(layers) -> None:
    config = tiny()
    config.decoder = DecoderConfig(heads=2, hidden=32, point_dims=8, layers=layers)
    planner = build(config)
    with torch.no_grad():
        chain = planner.propose(planner.perceive(features_of(config, 1)), planner.default_noise)
    assert len(chain.passes[-1].poses) == layers


def test_human_plan_takes_the_place_of_the_nearest_anchor() -> None:
    planner = build(tiny())
    anchors = planner.initial.anchors
    human = anchors[[4, 2]] + 0.01
    clean = planner.initial.clean(human, torch.tensor([True, False]))
    metres = planner.space.denormalise(clean)
    torch.testing.assert_close(metres[0, 4], human[0], atol=1e-4, rtol=0)
    untouched = [row for row in range(6) if row != 4]
    torch.testing.assert_close(metres[0, untouched], anchors[untouched], atol=1e-4, rtol=0)
    torch.testing.assert_close(metres[1], anchors.data, atol=1e-4, rtol=0)


def test_coin_of_a_scene_is_fair_and_its_own() -> None:
    tokens = [str(number) for number in range(4000)]
    coins = training_coin(tokens, 3)
    assert coins.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(training_coin(tokens[::-1], 3), coins.flip(0))
    assert not torch.equal(training_coin(tokens, 4), coins)


@pytest.mark.parametrize("modes", [2, 3, 6, 12])
def test_more_or_fewer_modes_of_a_trained_planner(modes) -> None:
    planner = build(tiny())
    features, noise = features_of(planner.config, 1), torch.zeros(1, 6, 8, 2)
    with torch.no_grad():
        before = planner(features, noise).candidates
        planner.set_modes(modes)
        after = planner(features, torch.zeros(1, modes, 8, 2)).candidates
    rows = [row % 6 for row in range(modes)] if modes > 6 else [row * 6 // modes for row in range(modes)]
    torch.testing.assert_close(after, before[:, rows], atol=1e-5, rtol=0)
    assert planner(features).candidates.shape[1] == modes


def test_any_number_of_samples_of_a_policy() -> None:
    planner = build(tiny_diffusion_policy())
    planner.set_modes(7)
    assert planner(features_of(planner.config, 1)).candidates.shape == (1, 7, 8, 3)


# --------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit"])
def test_any_staged_encoder_by_name(name) -> None:
    """timm's models for tests: the structure of the real ones at a fraction of their size."""
    config = tiny()
    config.backbone = replace(
        config.backbone, encoder=name, stage_blocks=(), stage_channels=(), stem_width=0,
        image_tokens=(2, 4), lidar_tokens=(2, 2),
    )  # fmt: skip
    planner = build(config).train()
    backbone = planner.perception.backbone
    stride = 16 if name == "test_vit" else 32
    assert backbone.coarse_size == (64 // stride, 64 // stride)
    assert isinstance(backbone.image_encoder, ViTEncoder) == (name == "test_vit")
    noise, levels = training_draw(["a", "b"], 0, planner.noise_shape, 50)
    outputs = planner.training_outputs(features_of(config, 2), noise, levels)
    planner_loss(outputs, targets_of(2))["loss"].backward()
    without = [name for name, p in planner.named_parameters() if p.grad is None and p.requires_grad]
    assert without == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet35", "resnet34"),
        ("convnext_tinny", "convnext_tiny"),
        ("swin_tiny_patch4_window7_224", "four stages"),
        ("test_efficientnet", "four stages"),
    ],
)
def test_encoders_that_do_not_exist_or_do_not_fit(name, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        FusionBackbone(BackboneConfig(encoder=name))
    assert name in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- runtime


@every_baseline
def test_plain_backend_runs_any_planner(make) -> None:
    planner = build(make())
    features = features_of(planner.config, 1)
    runtime = Runtime(planner, backend="plain", device="cpu")
    with torch.no_grad():
        expected = planner(features)
    torch.testing.assert_close(runtime.plan(features).candidates, expected.candidates, atol=1e-5, rtol=0)
    for backend in ("eager", "reference"):
        with pytest.raises(UserError, match="backend=plain"):
            Runtime(planner, backend=backend, device="cpu")


def test_looks_left_out_are_refused_by_the_rewrites() -> None:
    config = tiny()
    config.decoder = replace(config.decoder, see_agents=False)
    with pytest.raises(UserError, match=r"look.*backend=plain"):
        Runtime(build(config), backend="eager", device="cpu")


def test_random_baselines_can_be_timed() -> None:
    assert load("random:city_nano_transfuser", 0).config.modes == 1


# -------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlannerConfig(denoiser="unett"), ("unett", "cascade", "unet", "regression")),
        (lambda: PlannerConfig(denoiser="regression"), ("modes", "20", "steps", "2")),
        (lambda: PlannerConfig(schedule=ScheduleConfig(FULL, 20, 1000, "target")), ("cascade", "full", "unet")),
        (lambda: ScheduleConfig(FULL, 20, 1000), ("noise_source", "anchor", "target")),
        (lambda: ScheduleConfig(FULL, 20, 50, "target"), ("train_levels", "50", "1000")),
        (lambda: ScheduleConfig(FULL, 3, 1000, "target"), ("steps", "3", "1000")),
        (lambda: ScheduleConfig(noise_source="targets"), ("targets", "mixed")),
        (lambda: UNetConfig(base="ancors"), ("ancors", "origin", "anchors")),
        (lambda: UNetConfig(channels=(12, 24)), ("groups", "8", "12")),
        (lambda: UNetDenoiser(TrajectorySpace(SpaceConfig()), 16, 6, True, UNET), ("multiple of 4", "6")),
        (lambda: build(replace(tiny_diffusion_policy(), unet=replace(UNET, base=ANCHORS))), ("base", "noise")),
        (lambda: DiffusionDrive(tiny_transfuser(), torch.rand(1, 8, 2)), ("tiny_transfuser", "no anchors")),
        (lambda: DiffusionDrive(tiny()), ("None", "(6, 8, 2)")),
        (lambda: build(tiny()).set_modes(7), ("modes", "7", "6 anchors")),
        (lambda: build(tiny()).set_schedule(ScheduleConfig(FULL, 20, 1000, "target")), ("full",)),
        (lambda: build(tiny_truncated_unet()).set_schedule(ScheduleConfig(FULL, 20, 1000, "target")), ("full", "fit")),
    ],
)
def test_what_does_not_fit_together_is_refused(make, words) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_seams_do_not_change_the_published_planner() -> None:
    """The fields that baselines added leave a published configuration what it was."""
    published = PlannerConfig()
    assert published.anchored and published.denoiser == "cascade" and published.schedule.noise_source == "anchor"
    looks = {field.name for field in dataclasses.fields(DecoderConfig) if field.default is True}
    assert looks == {"see_map", "see_agents", "see_ego"}
