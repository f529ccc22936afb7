"""The full-size planner against the reference implementation: same weights, same inputs, same noise."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusiondrive.decoder import point_embedding
from diffusiondrive.losses import planner_loss, validation_loss
from diffusiondrive.official import official_names, planner_from_official
from diffusiondrive.planner import DiffusionDrive, Plan
from diffusiondrive.sampler import Chain
from diffusiondrive.variants import diffusiondrive
from tests.golden import model as golden
from tests.golden import needs_golden

pytestmark = [needs_golden, pytest.mark.golden]
TOLERANCE = {"point_embed": 2e-4}  # a sine of 2π · metres amplifies rounding

LAYER_ARRAYS = (
    "bev_weight_logits", "after_bev", "agent_attn", "after_agent", "after_ego", "after_ffn", "after_mod"
)  # fmt: skip


@dataclass
class Run:
    """One evaluation of the batch of two, with what hooks saw on the way."""

    planner: DiffusionDrive
    plan: Plan
    chain: Chain
    seen: dict[str, list[Tensor]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return golden.official_weights()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return golden.features()


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(golden.FOLDER / "forward.npz"))


@pytest.fixture(scope="module")
def planner(weights) -> DiffusionDrive:
    return planner_from_official({f"agent._transfuser_model.{n}": t for n, t in weights.items()}, diffusiondrive())[0]


@pytest.fixture(scope="module")
def run(planner, inputs, expected) -> Run:
    noise = torch.from_numpy(expected["noise"])
    seen: dict[str, list[Tensor]] = {}
    handles = list(_watch(planner, seen))
    with torch.no_grad():
        plan = planner(inputs, noise=noise)
        for handle in handles:
            handle.remove()
        chain = planner.propose(planner.perceive(inputs), noise, complete=True)
    return Run(planner, plan, chain, seen)


def _watch(planner: DiffusionDrive, seen: dict[str, list[Tensor]]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Record outputs (and the query decoder's memory) of the modules that correspond to stored intermediates."""

    def keep(name: str, module: nn.Module):
        return module.register_forward_hook(lambda _m, _i, out: seen.setdefault(name, []).append(out))

    backbone = planner.perception.backbone
    for branch in ("image", "lidar"):
        encoder = getattr(backbone, f"{branch}_encoder")
        yield keep(f"{branch}.stem", encoder.act1)
        for k in range(1, 5):
            yield keep(f"{branch}.stage{k}", encoder[f"layer{k}"])
    for k, fusion in enumerate(backbone.fusions, 1):
        yield keep(f"fusion{k}", fusion.norm)
    yield keep("bev_feature_upscale", backbone.neck)
    yield keep("status_encoding", planner.perception.status_projection)
    yield keep("query_out", planner.perception.query_decoder)
    yield planner.perception.query_decoder.register_forward_pre_hook(
        lambda _m, args: seen.setdefault("keyval", []).append(args[1])
    )
    yield keep("traj_feature", planner.decoder.point_encoder)
    yield keep("time_embed", planner.decoder.time_encoder)
    for q, layer in enumerate(planner.decoder.layers):
        yield keep(f"L{q}.value_map", layer.lookup.value)
        yield keep(f"L{q}.bev_weight_logits", layer.lookup.point_weights)
        yield keep(f"L{q}.after_bev", layer.lookup)
        yield keep(f"L{q}.agent_attn", layer.agents)
        yield keep(f"L{q}.after_agent", layer.agents_norm)
        yield keep(f"L{q}.after_ego", layer.ego_norm)
        yield keep(f"L{q}.after_ffn", layer.feed_forward_norm)
        yield keep(f"L{q}.after_mod", layer.time)
        yield keep(f"L{q}.scale_shift", layer.time.scale_shift)
        yield keep(f"L{q}.ego_attn", layer.ego.output)


def _close(name: str, ours: Tensor, theirs: np.ndarray) -> None:
    tolerance = next((t for key, t in TOLERANCE.items() if key in name), 1e-4)
    assert tuple(ours.shape) == theirs.shape, name
    gap = np.abs(ours.double().numpy() - theirs).max()
    assert gap <= tolerance, f"{name}: differs by {gap:.2e}"


def test_recipe_reproduces_the_stored_checksums(weights, inputs) -> None:
    check = golden.read_json("recipe_check.json")
    for name, crc in check["weights"].items():
        assert zlib.crc32(weights[name].numpy().tobytes()) == crc, name
    for name in ("camera_feature", "lidar_feature"):
        assert zlib.crc32(inputs[name].numpy().tobytes()) == check["inputs"][name]["crc32"], name


def test_state_dict_is_the_published_one(planner) -> None:
    spec = {entry["name"]: entry for entry in golden.state_dict_spec()}
    state, names = planner.state_dict(), official_names(planner)
    parameters = dict(planner.named_parameters())
    assert sorted(names.values()) == sorted(spec)
    for ours, official in names.items():
        assert list(state[ours].shape) == spec[official]["shape"], official
        assert str(state[ours].dtype).removeprefix("torch.") == spec[official]["dtype"], official
        assert (ours in parameters) == (spec[official]["kind"] == "parameter"), official
        if ours in parameters:
            assert parameters[ours].requires_grad == spec[official]["trainable"], official
    assert sum(p.numel() for p in planner.parameters()) == 60_715_727
    assert sum(p.numel() for p in planner.parameters() if p.requires_grad) == 60_715_407


def test_branches_and_fusions(run, expected) -> None:
    def moments(name: str, value: Tensor) -> None:
        _close(f"{name}.chmean", value.mean((2, 3)), expected[f"{name}.chmean"])
        _close(f"{name}.chstd", value.std((2, 3), correction=0), expected[f"{name}.chstd"])

    grids = {"image": (8, 32), "lidar": (8, 8)}
    for branch, grid in grids.items():
        moments(f"{branch}.stem", run.seen[f"{branch}.stem"][0])
        for k in range(1, 5):
            value = run.seen[f"{branch}.stage{k}"][0]
            moments(f"{branch}.stage{k}", value)
            pooled = F.adaptive_avg_pool2d(value[:, :8], grid)
            _close(f"{branch}.stage{k}.grid", pooled, expected[f"{branch}.stage{k}.grid"])
    for k in range(1, 5):
        tokens = run.seen[f"fusion{k}"][0].transpose(1, 2)  # (B, C, 320)
        for branch, part in {"image": tokens[:, :, :256], "lidar": tokens[:, :, 256:]}.items():
            name = f"fusion{k}.{branch}_tokens"
            _close(f"{name}.ch8", part[:, :8].unflatten(2, grids[branch]), expected[f"{name}.ch8"])
            _close(f"{name}.chmean", part.mean(2), expected[f"{name}.chmean"])


def test_tokens_queries_and_maps(run, inputs, expected) -> None:
    for name in ("bev_feature_upscale", "status_encoding", "keyval", "query_out"):
        _close(name, run.seen[name][0], expected[name])
    with torch.no_grad():
        coarse, _ = run.planner.perception.backbone(inputs["camera_feature"], inputs["lidar_feature"])
        context = run.planner.perceive(inputs)
    _close("bev_feature", coarse, expected["bev_feature"])
    _close("cross_bev_feature.s4", context.map[:, :, ::4, ::4], expected["cross_bev_feature.s4"])
    _close("cross_bev_feature.chmean", context.map.mean((2, 3)), expected["cross_bev_feature.chmean"])
    chstd = context.map.std((2, 3), correction=0)
    _close("cross_bev_feature.chstd", chstd, expected["cross_bev_feature.chstd"])


def test_decoder_layers_in_both_passes(run, expected) -> None:
    for q in range(2):
        assert len(run.seen[f"L{q}.value_map"]) == 1, "value maps are computed once a scene"
        value = run.seen[f"L{q}.value_map"][0]
        _close(f"L{q}.value_map.s8", value[:, :, ::8, ::8], expected[f"L{q}.value_map.s8"])
        _close(f"L{q}.value_map.chmean", value.mean((2, 3)), expected[f"L{q}.value_map.chmean"])
        _close(f"L{q}.ego_attn", run.seen[f"L{q}.ego_attn"][0][:, 0], expected[f"L{q}.ego_attn"])
    for s in range(2):
        _close(f"step{s}.traj_feature", run.seen["traj_feature"][s], expected[f"step{s}.traj_feature"])
        _close(f"step{s}.time_embed", run.seen["time_embed"][s][0], expected[f"step{s}.time_embed"])
        for q in range(2):
            for part in LAYER_ARRAYS:
                _close(f"step{s}.L{q}.{part}", run.seen[f"L{q}.{part}"][s], expected[f"step{s}.L{q}.{part}"])
            scale_shift = run.seen[f"L{q}.scale_shift"][s].flatten()
            _close(f"step{s}.L{q}.scale_shift", scale_shift, expected[f"step{s}.L{q}.scale_shift"])


def test_samples_and_outputs_of_each_pass(run, expected) -> None:
    space = run.planner.space
    for s, (label, result) in enumerate(zip(run.planner.schedule.labels, run.chain.passes, strict=True)):
        assert label == expected[f"step{s}.t"].item()
        clean = space.normalise(result.poses[-1][..., :2])
        _close(f"step{s}.sample_in", run.chain.samples[s], expected[f"step{s}.sample_in"])
        _close(f"step{s}.sample_out", run.chain.samples[s + 1], expected[f"step{s}.sample_out"])
        _close(f"step{s}.noisy_points", result.points, expected[f"step{s}.noisy_points"])
        _close(f"step{s}.x0_norm", clean, expected[f"step{s}.x0_norm"])
        _close(f"step{s}.point_embed", point_embedding(result.points, 32), expected[f"step{s}.point_embed"])
        for q in range(2):
            _close(f"step{s}.L{q}.poses_reg", result.poses[q], expected[f"step{s}.L{q}.poses_reg"])
            _close(f"step{s}.L{q}.poses_cls", result.logits[q], expected[f"step{s}.L{q}.poses_cls"])


def test_final_outputs(run, expected) -> None:
    plan = run.plan
    assert plan.mode.tolist() == expected["mode_idx"].tolist()
    _close("out.trajectory", plan.trajectory, expected["out.trajectory"])
    _close("candidates", plan.candidates, expected["step1.L1.poses_reg"])
    _close("logits", plan.logits, expected["step1.L1.poses_cls"])
    _close("out.agent_states", plan.agents.states, expected["out.agent_states"])
    _close("out.agent_labels", plan.agents.logits, expected["out.agent_labels"])
    _close("out.bev_semantic_map", plan.bev_semantic_map, expected["out.bev_semantic_map"])


def test_every_stored_array_is_compared(expected) -> None:
    """The names below are what the tests above read; an array nobody compares would show here."""
    layer = (*LAYER_ARRAYS, "scale_shift", "poses_reg", "poses_cls")
    step = ("t", "sample_in", "noisy_points", "point_embed", "traj_feature", "time_embed", "x0_norm", "sample_out")
    names = {"noise", "status_feature", "mode_idx", "bev_feature", "bev_feature_upscale", "status_encoding", "keyval",
             "query_out", "out.trajectory", "out.agent_states", "out.agent_labels", "out.bev_semantic_map"}  # fmt: skip
    names |= {f"cross_bev_feature.{part}" for part in ("s4", "chmean", "chstd")}
    for branch in ("image", "lidar"):
        names |= {f"{branch}.stem.{part}" for part in ("chmean", "chstd")}
        for k in range(1, 5):
            names |= {f"{branch}.stage{k}.{part}" for part in ("chmean", "chstd", "grid")}
            names |= {f"fusion{k}.{branch}_tokens.{part}" for part in ("ch8", "chmean")}
    for q in range(2):
        names |= {f"L{q}.{part}" for part in ("value_map.s8", "value_map.chmean", "ego_attn")}
        names |= {f"step{s}.L{q}.{part}" for s in range(2) for part in layer}
    names |= {f"step{s}.{part}" for s in range(2) for part in step}
    assert names == set(expected)


def test_validation_loss_of_the_evaluation_pass(run) -> None:
    stored, terms = _loss_inputs(), golden.read_json("losses.json")["eval_style"]["terms_weighted"]
    ours = validation_loss(run.plan, _targets(stored, "frozen_bn"))
    for name in ("loss", "trajectory_loss", "agent_class_loss", "agent_box_loss", "bev_semantic_loss"):
        assert ours[name].item() == pytest.approx(terms[name], rel=1e-4), name


@pytest.mark.parametrize(("variant", "gradient_tolerance"), [("frozen_bn", 1e-3), ("batch_bn", 5e-3)])
def test_training_losses_and_gradients(weights, inputs, variant, gradient_tolerance) -> None:
    """Through the whole network, dropout off; `batch_bn` with batch statistics, last because it changes them."""
    planner = planner_from_official(weights, diffusiondrive())[0]
    for module in planner.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(variant == "batch_bn")
    stored, reference = _loss_inputs(), golden.read_json("losses.json")[variant]
    outputs = planner.training_outputs(inputs, torch.from_numpy(stored["noise"]), torch.from_numpy(stored["timesteps"]))
    losses = planner_loss(outputs, _targets(stored, variant))
    losses["loss"].backward()

    _close("noisy_points", outputs.points.detach(), stored[f"{variant}.pred.noisy_points"])
    for name, value in reference["terms_weighted"].items():
        if name != "diffusion_loss":  # wired but always absent in the published code
            assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    ours = {official: planner.get_parameter(name) for name, official in official_names(planner).items()
            if name in dict(planner.named_parameters())}  # fmt: skip
    for name, norm in reference["grad_l2_norms"].items():
        if name.startswith("[rows"):  # query and key rows of the ego attention: below
            continue
        assert ours[name].grad.norm().item() == pytest.approx(norm, rel=gradient_tolerance, abs=1e-6), name
    without = sorted(name for name, p in ours.items() if p.grad is None)
    assert without == sorted(reference["params_without_grad"])
    for layer in planner.decoder.layers:  # one key: queries and keys of the ego attention cannot matter
        assert not layer.ego.in_proj_weight.grad[:512].any()
    if variant == "batch_bn":
        state = {official: planner.state_dict()[name] for name, official in official_names(planner).items()}
        after = reference["bn_after_step"]
        assert state["_backbone.image_encoder.bn1.num_batches_tracked"].item() == after.pop("num_batches_tracked")
        for name, values in after.items():
            assert state[name][:4].tolist() == pytest.approx(values, rel=1e-5), name


def _loss_inputs() -> dict[str, np.ndarray]:
    return dict(np.load(golden.FOLDER / "loss_inputs.npz"))


def _targets(stored: dict[str, np.ndarray], variant: str) -> dict[str, Tensor]:
    return {
        "trajectory": torch.from_numpy(stored["trajectory"]),
        "bev_semantic_map": torch.from_numpy(stored["bev_semantic_map"]),
        "agent_states": torch.from_numpy(stored[f"{variant}.agent_states"]),
        "agent_labels": torch.from_numpy(stored[f"{variant}.agent_labels"]),
    }
