"""Properties of the planner that hold for any weights; small variants, random inputs."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diffusiondrive as package
from diffusiondrive.backbone import BackboneConfig, FusionBackbone
from diffusiondrive.decoder import ANCHORS, POINTS, DecoderConfig, point_embedding, time_embedding
from diffusiondrive.losses import planner_loss
from diffusiondrive.noise import scene_noise, training_draw
from diffusiondrive.perception import PerceptionConfig, SceneContext
from diffusiondrive.planner import DiffusionDrive, PlannerConfig, choose
from diffusiondrive.schedule import ScheduleConfig
from diffusiondrive.variants import tiny
from navsim_eval.errors import UserError
from tests.diffusiondrive.planners import make_features, make_planner


@pytest.fixture(scope="module")
def planner() -> DiffusionDrive:
    return make_planner(tiny())


# ---------------------------------------------------------------------------------------------------------- properties


@given(st.permutations(range(6)))
@settings(max_examples=10, deadline=None)
def test_permuting_the_modes_permutes_the_proposals(order) -> None:
    planner = make_planner(tiny())
    features, noise = make_features(planner.config, 2), scene_noise(["a", "b"], 0, planner.noise_shape)
    other = copy.deepcopy(planner)
    other.initial.anchors.data = planner.initial.anchors.data[list(order)]
    with torch.no_grad():
        plan, mixed = planner(features, noise), other(features, noise[:, list(order)])
    torch.testing.assert_close(mixed.candidates, plan.candidates[:, list(order)], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed.logits, plan.logits[:, list(order)], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed.trajectory, plan.trajectory, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base", [POINTS, ANCHORS])
def test_decoding_some_modes_equals_some_of_decoding_all(base) -> None:
    config = tiny()
    config.decoder.base = base
    planner = make_planner(config)
    decoder, anchors = planner.decoder, planner.initial.anchors
    with torch.no_grad():
        context = planner.perceive(make_features(config, 2))
        sample, label = torch.randn(2, 6, 8, 2), torch.tensor([10])
        everything = decoder.denoise(sample, label, decoder.prepare(context, anchors))
        some = decoder.denoise(sample[:, [4, 1]], label, decoder.prepare(context, anchors[[4, 1]]))
    torch.testing.assert_close(some.poses[-1], everything.poses[-1][:, [4, 1]], atol=1e-5, rtol=0)
    torch.testing.assert_close(some.logits[-1], everything.logits[-1][:, [4, 1]], atol=1e-5, rtol=0)


def test_a_scene_does_not_notice_its_batch(planner) -> None:
    tokens = ["t0", "t1", "t2"]
    features, shape = make_features(planner.config, 3), planner.noise_shape
    with torch.no_grad():
        together = planner(features, scene_noise(tokens, 7, shape))
        for row in (2, 0, 1):
            alone = planner({k: v[row : row + 1] for k, v in features.items()}, scene_noise([tokens[row]], 7, shape))
            torch.testing.assert_close(alone.candidates[0], together.candidates[row], atol=1e-5, rtol=0)
            assert alone.mode[0] == together.mode[row]


def test_same_input_same_plan_and_chance_only_through_arguments(planner) -> None:
    features = make_features(planner.config, 2)
    twice = {k: v[:1].repeat(2, *[1] * (v.ndim - 1)) for k, v in features.items()}
    with torch.no_grad():
        state = torch.get_rng_state()
        first, second = planner(features), planner(features)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.candidates, second.candidates)
        assert torch.equal(*planner(twice).candidates)  # without noise every scene gets the same draw
        seeded = [planner(features, generator=torch.Generator().manual_seed(s)).candidates for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert not torch.equal(seeded[0], first.candidates)


@pytest.mark.parametrize("base", [POINTS, ANCHORS])
def test_correction_is_added_to_its_base(base) -> None:
    """With silent regression heads the plan is the base itself: the noisy points, or the clean anchors."""
    config = tiny()
    config.decoder.base = base
    planner = make_planner(config)
    for layer in planner.decoder.layers:
        nn.init.zeros_(layer.regression[-1].weight)
        nn.init.zeros_(layer.regression[-1].bias)
    with torch.no_grad():
        chain = planner.propose(planner.perceive(make_features(config, 1)), planner.default_noise)
    expected = chain.passes[0].points if base == POINTS else planner.initial.anchors[None]
    torch.testing.assert_close(chain.passes[0].poses[-1][..., :2], expected, atol=1e-5, rtol=0)


def test_status_reaches_the_ego_query_directly_where_asked(planner) -> None:
    config = tiny()
    config.perception.status_to_ego = True
    other = DiffusionDrive(config, planner.initial.anchors).eval()
    other.load_state_dict(planner.state_dict())  # no parameters of its own
    features = make_features(config, 2)
    with torch.no_grad():
        plain, direct = planner.perceive(features), other.perceive(features)
        token = planner.perception.status_projection(features["status_feature"]) + planner.perception.positions[-1]
    torch.testing.assert_close(direct.ego - plain.ego, token[:, None], atol=1e-5, rtol=0)
    assert torch.equal(direct.agents, plain.agents)


def test_auxiliary_outputs_can_be_skipped_without_changing_the_plan(planner) -> None:
    features = make_features(planner.config, 2)
    with torch.no_grad():
        full, bare = planner(features), planner(features, auxiliary=False)
    assert bare.agents is None and bare.bev_semantic_map is None
    assert torch.equal(full.trajectory, bare.trajectory)


def test_plan_is_the_most_likely_candidate(planner) -> None:
    with torch.no_grad():
        plan = planner(make_features(planner.config, 4))
    for row in range(4):
        assert torch.equal(plan.trajectory[row], plan.candidates[row, plan.logits[row].argmax()])


@pytest.mark.parametrize("preset", ["reference", "consistent"])
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_any_schedule_plans(preset, steps) -> None:
    planner = make_planner(tiny())
    planner.set_schedule(ScheduleConfig(preset=preset, steps=steps))
    features = make_features(planner.config, 1)
    with torch.no_grad():
        plan = planner(features)
        chain = planner.propose(planner.perceive(features), planner.default_noise, complete=True)
    assert len(chain.passes) == steps and len(chain.samples) == steps + 1
    assert torch.equal(plan.candidates, chain.passes[-1].poses[-1])
    assert torch.isfinite(plan.candidates).all()
    clean = planner.space.normalise(plan.candidates[..., :2]).clamp(-1, 1)
    torch.testing.assert_close(chain.samples[-1], clean, atol=1e-6, rtol=0)  # the last update ends at the clean sample


def test_training_pass_and_planning_pass_are_one_code(planner) -> None:
    """A training pass at the label and noise of planning's first pass gives that pass."""
    planner = copy.deepcopy(planner)
    planner.set_schedule(ScheduleConfig(preset="consistent"))
    features, noise = make_features(planner.config, 2), scene_noise(["a", "b"], 3, planner.noise_shape)
    with torch.no_grad():
        outputs = planner.training_outputs(features, noise, torch.tensor([10, 10]))
        chain = planner.propose(planner.perceive(features), noise)
    first = chain.passes[0]
    for ours, theirs in zip(outputs.poses + outputs.logits, first.poses + first.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.equal(outputs.trajectory, choose(outputs.poses[-1], outputs.logits[-1].argmax(1)))


def test_every_trainable_parameter_gets_a_gradient() -> None:
    """Plain data-parallel training relies on it."""
    planner = make_planner(tiny()).train()
    config, batch = planner.config, 2
    noise, levels = training_draw(["a", "b"], 0, planner.noise_shape, config.schedule.train_levels)
    outputs = planner.training_outputs(make_features(config, batch), noise, levels)
    targets = {
        "trajectory": torch.rand(batch, 8, 3) * 10,
        "agent_states": torch.randn(batch, 30, 5),
        "agent_labels": torch.ones(batch, 30).bool(),
        "bev_semantic_map": torch.randint(0, 7, (batch, 128, 256)),
    }
    planner_loss(outputs, targets)["loss"].backward()
    without = [name for name, p in planner.named_parameters() if p.grad is None]
    assert without == ["initial.anchors"]


def test_planning_never_looks_at_its_data(planner) -> None:
    """Tracing without values succeeds, so no branch and no shape depends on a tensor: nothing waits for the device."""

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.planner = planner

        def forward(self, camera: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            names = ("camera_feature", "lidar_feature", "status_feature")
            plan = self.planner(dict(zip(names, (camera, lidar, status), strict=True)), noise)
            return plan.trajectory, plan.candidates, plan.logits, plan.agents.states, plan.bev_semantic_map

    arguments = (*make_features(planner.config, 2).values(), scene_noise(["a", "b"], 0, planner.noise_shape))
    with torch.no_grad():
        traced = torch.export.export(Positional(), arguments, strict=False).module()
        for ours, theirs in zip(traced(*arguments), Positional()(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_few_steps_fit_a_handful_of_scenes() -> None:
    """The parts learn together: speed in the status decides how far the human drives."""
    torch.manual_seed(0)
    config, batch = tiny(), 8
    config.width, config.perception.status_to_ego, config.decoder.base = 64, True, ANCHORS
    speed = torch.linspace(1, 12, batch)
    seconds = torch.arange(1, 9) / 2
    straight = torch.stack([torch.linspace(2, 12, 6)[:, None] * seconds, torch.zeros(6, 8)], -1)
    planner = DiffusionDrive(config, straight).train()
    features = make_features(config, batch)
    features["status_feature"] = torch.cat([torch.zeros(batch, 4), speed[:, None], torch.zeros(batch, 3)], 1)
    along = speed[:, None] * seconds
    targets = {
        "trajectory": torch.stack([along, torch.zeros_like(along), torch.zeros_like(along)], -1),
        "agent_states": torch.zeros(batch, 30, 5),
        "agent_labels": torch.zeros(batch, 30).bool(),
        "bev_semantic_map": torch.zeros(batch, 16, 32).long(),
    }
    optimizer = torch.optim.AdamW(planner.parameters(), lr=1e-3)
    for step in range(150):
        noise, levels = training_draw([str(i) for i in range(batch)], step, planner.noise_shape, 50)
        terms = planner_loss(planner.training_outputs(features, noise, levels), targets)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        plan = planner.eval()(features)
    planned, driven = plan.trajectory[:, -1, 0], along[:, -1]
    agreement = torch.corrcoef(torch.stack([planned, driven]))[0, 1]
    assert agreement > 0.7, f"planned {planned}, driven {driven}"


def test_points_keep_their_precision_under_autocast(planner) -> None:
    features = make_features(planner.config, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        context = planner.perceive(features)
        chain = planner.propose(context, planner.default_noise)
    assert chain.passes[0].points.dtype == chain.passes[-1].poses[-1].dtype == torch.float32


# ------------------------------------------------------------------------------------------------ rewrites stay exact


def test_single_key_attention_is_full_attention(planner) -> None:
    ego, x = torch.randn(2, 1, 16), torch.randn(2, 6, 16)
    attention = planner.decoder.layers[0].ego
    full = _torch_attention(attention)(x, ego, ego)[0]
    torch.testing.assert_close(attention.attend_single(ego).expand(-1, 6, -1), full, atol=1e-5, rtol=0)


def test_prepared_keys_and_values_are_full_attention(planner) -> None:
    agents, x = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    attention = planner.decoder.layers[1].agents
    full = _torch_attention(attention)(x, agents, agents)[0]
    torch.testing.assert_close(attention(x, *attention.keys_values(agents)), full, atol=1e-5, rtol=0)


def test_planning_map_is_the_mlp_of_the_stacked_maps(planner) -> None:
    perception = planner.perception
    tokens, neck = torch.randn(2, 5, 16), torch.randn(2, 8, 16, 16)
    coarse = tokens[:, :4].transpose(1, 2).reshape(2, 16, 2, 2)
    resized = nn.functional.interpolate(coarse, (16, 16), mode="bilinear", align_corners=False)
    plain = perception.map_projection(torch.cat([resized, neck], 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(perception.planning_map(tokens, neck), plain, atol=1e-5, rtol=0)


def test_map_look_up_reads_the_cell_under_the_point(planner) -> None:
    """A point 10 m ahead and 5 m to the left reads there: rows run forward, columns leftward; beyond 32 m nothing."""
    lookup = copy.deepcopy(planner.decoder.layers[0].lookup)
    nn.init.eye_(lookup.output.weight)
    nn.init.zeros_(lookup.output.bias)
    centres = (torch.arange(64) + 0.5) - 32.0
    value_map = torch.zeros(1, 16, 64, 64)
    value_map[0, 0] = centres[:, None]  # x of each cell
    value_map[0, 1] = centres[None, :]  # y of each cell
    points = torch.tensor([[10.0, 5.0], [40.0, 0.0]])[None, :, None].expand(1, 2, 8, 2)
    with torch.no_grad():
        read = lookup(torch.zeros(1, 2, 16), points, value_map)
    torch.testing.assert_close(read[0, :, :2], torch.tensor([[10.0, 5.0], [0.0, 0.0]]), atol=1e-5, rtol=0)


def _torch_attention(attention: nn.Module) -> nn.MultiheadAttention:
    reference = nn.MultiheadAttention(16, 2, batch_first=True)
    reference.in_proj_weight, reference.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
    reference.out_proj.weight, reference.out_proj.bias = attention.output.weight, attention.output.bias
    return reference


# ----------------------------------------------------------------------------------------------------------- embeddings


def test_point_embedding_by_hand() -> None:
    """Per point: sines and cosines of y first, then of x; periods 10000^(2j/dims) metres."""
    embedded = point_embedding(torch.tensor([0.1, 0.2]).view(1, 1, 1, 2), 4)[0, 0]
    slow = 2 * math.pi / 10000**0.5
    by_hand = [f(2 * math.pi * 0.2) for f in (math.sin, math.cos)] + [f(slow * 0.2) for f in (math.sin, math.cos)]
    by_hand += [f(2 * math.pi * 0.1) for f in (math.sin, math.cos)] + [f(slow * 0.1) for f in (math.sin, math.cos)]
    assert embedded.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_time_embedding_by_hand() -> None:
    assert time_embedding(torch.tensor([0]), 8)[0].tolist() == [0.0] * 4 + [1.0] * 4
    rates = [10000 ** (-i / 3) for i in range(4)]
    by_hand = [math.sin(10 * r) for r in rates] + [math.cos(10 * r) for r in rates]
    assert time_embedding(torch.tensor([10]), 8)[0].tolist() == pytest.approx(by_hand, abs=1e-6)


# --------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlannerConfig(width=100), ("8", "100", "heads")),
        (lambda: PlannerConfig(width=7, decoder=DecoderConfig(heads=1), perception=PerceptionConfig(heads=1)), ("7",)),
        (lambda: PlannerConfig(modes=0), ("0", "modes")),
        (lambda: DecoderConfig(base="ancors"), ("ancors", "anchors", "points")),
        (lambda: DecoderConfig(layers=0), ("layers", "0")),
        (lambda: DecoderConfig(point_dims=5), ("point_dims", "5")),
        (lambda: PerceptionConfig(range_m=-1.0), ("range_m", "-1.0")),
        (lambda: PerceptionConfig(semantic_size=(1, 2, 3)), ("semantic_size", "(1, 2, 3)")),
        (lambda: FusionBackbone(BackboneConfig(image_tokens=(7, 32))), ("image_tokens", "(7, 32)", "(8, 32)")),
        (lambda: FusionBackbone(BackboneConfig(lidar_size=(250, 256))), ("lidar_size", "(250, 256)", "32")),
        (lambda: BackboneConfig(stage_channels=(1, 2)), ("stage_channels", "(1, 2)", "4")),
        (lambda: FusionBackbone(BackboneConfig(stage_channels=(30, 60, 120, 240))), ("fusion_heads", "4", "30")),
        (lambda: BackboneConfig(map_size=(64,)), ("map_size", "(64,)")),
    ],
)
def test_bad_sizes_are_refused_with_both_sides(make, words) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_encoder_is_refused() -> None:
    config = dataclasses.replace(tiny().backbone, encoder="resnet35")
    with pytest.raises(UserError, match="resnet35"):
        FusionBackbone(config)


def test_anchors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(20, 8, 2\).*modes=6"):
        DiffusionDrive(tiny(), torch.rand(20, 8, 2))


def test_features_that_do_not_fit_are_refused(planner) -> None:
    features = make_features(planner.config, 1)
    with pytest.raises(UserError, match=r"camera_feature.*\(1, 3, 64, 64\).*3, 64, 128"):
        planner({**features, "camera_feature": features["camera_feature"][..., :64]})
    with pytest.raises(UserError, match="lidar_feature"):
        planner({k: v for k, v in features.items() if k != "lidar_feature"})
    with pytest.raises(UserError, match=r"noise.*\(2, 6, 8, 2\).*\(1, 6, 8, 2\)"):
        planner(features, noise=torch.zeros(2, 6, 8, 2))


def test_scene_context_is_what_the_seams_expect(planner) -> None:
    with torch.no_grad():
        context = planner.perceive(make_features(planner.config, 2))
    assert isinstance(context, SceneContext)
    shapes = {name: tuple(getattr(context, name).shape) for name in ("map", "agents", "ego", "neck")}
    assert shapes == {"map": (2, 16, 16, 16), "agents": (2, 30, 16), "ego": (2, 1, 16), "neck": (2, 8, 16, 16)}


def test_nothing_in_the_core_imports_a_framework() -> None:
    """Lightning, Hydra and Ray stay at the edges."""
    folder = Path(package.__file__).parent
    for name in ("backbone", "perception", "space", "schedule", "decoder", "sampler", "planner", "losses", "noise"):
        text = (folder / f"{name}.py").read_text()
        assert not any(word in text for word in ("lightning", "import hydra", "import ray", "omegaconf")), name
