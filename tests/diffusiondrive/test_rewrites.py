"""Every exact rewrite against the plain published computation: 1e-5 in float32, on weights without symmetries."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusiondrive.backbone import FusionBackbone
from diffusiondrive.decoder import CrossAttention, MapLookup, TimeModulation, time_embedding
from diffusiondrive.encoders import build_encoder
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.denoiser import CornerLookup, Denoiser
from diffusiondrive.runtime.encoder import BORDER, Encoder, LastFusion, QueryDecoder, fold_batch_norms
from diffusiondrive.runtime.program import PlanLayout, PlanProgram, ReferenceProgram, pack
from diffusiondrive.runtime.reference import ReferencePlanner, plain_attention
from diffusiondrive.runtime.winograd import WinogradConvolution, use_winograd
from diffusiondrive.schedule import ScheduleConfig
from diffusiondrive.variants import city_nano, planner_config, tiny
from tests.diffusiondrive.planners import make_features, make_planner

EXACT = {"rtol": 1e-5, "atol": 1e-5}


def lively_planner(name: str, **schedule: object) -> DiffusionDrive:
    """Random weights, and batch norms whose statistics are not those of a fresh start."""
    config = planner_config(name)
    config.schedule = ScheduleConfig(**schedule)
    planner = make_planner(config)
    enliven(planner)
    return planner


def enliven(module: nn.Module) -> None:
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.3, 0.3)
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.3, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)


def inputs(planner: DiffusionDrive, batch: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = make_features(planner.config, batch, seed)
    noise = torch.randn(batch, *planner.noise_shape, generator=torch.Generator().manual_seed(seed))
    return (*features.values(), noise)


# ---------------------------------------------------------------------------------------------------------- whole plans


@pytest.mark.parametrize("schedule", [{}, {"preset": "consistent", "steps": 4}, {"steps": 1}])
@pytest.mark.parametrize("name", ["tiny", "city_nano"])
@torch.inference_mode()
def test_rewritten_planner_and_planner_give_the_plain_plan(name: str, schedule: dict) -> None:
    planner = lively_planner(name, **schedule)
    arguments = inputs(planner, 2)
    camera, lidar, status, noise = arguments
    plain = ReferenceProgram(planner)(*arguments)
    rewritten = PlanProgram(planner, auxiliary=True)(*arguments)
    own = planner({"camera_feature": camera, "lidar_feature": lidar, "status_feature": status}, noise=noise)
    torch.testing.assert_close(rewritten, plain, **EXACT)
    torch.testing.assert_close(pack(own), plain, **EXACT)
    assert plain.std() > 0.1


@torch.inference_mode()
def test_auxiliary_heads_run_only_when_asked_for() -> None:
    planner = lively_planner("tiny")
    arguments = inputs(planner, 1)
    with_heads, without = (PlanProgram(planner, auxiliary=wanted)(*arguments) for wanted in (True, False))
    short, long = (PlanLayout.of(planner.config, wanted) for wanted in (False, True))
    assert without.shape == (1, short.length) and with_heads.shape == (1, long.length)
    torch.testing.assert_close(with_heads[:, : short.length], without)
    assert short.unpack(without).agents is None and long.unpack(with_heads).bev_semantic_map.shape == (1, 7, 16, 32)


def test_program_copies_and_leaves_the_planner_alone() -> None:
    planner = lively_planner("tiny")
    before = copy.deepcopy(planner.state_dict())
    program = PlanProgram(planner)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in program.modules())
    for parameter in program.parameters():
        assert not parameter.requires_grad
        parameter.zero_()
    assert all(torch.equal(planner.state_dict()[name], tensor) for name, tensor in before.items())
    assert any(p.requires_grad for p in planner.parameters())


# ---------------------------------------------------------------------------------------------------------- one by one


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 32.0, 1e4]), st.integers(3, 9), st.integers(3, 9))
@torch.inference_mode()
def test_convolution_at_the_corners_equals_the_value_map(seed: int, reach: float, rows: int, columns: int) -> None:
    """Points inside, on the border and far outside, maps that are not square."""
    torch.manual_seed(seed)
    lookup = MapLookup(width=6, poses=4, range_m=32.0, dropout=0.0)
    for parameter in lookup.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    plane, query = torch.randn(2, 6, rows, columns), torch.randn(2, 5, 6)
    points = reach * (2 * torch.rand(2, 5, 4, 2) - 1)
    points[0, 0, :, 0] = torch.tensor([-32.0, 32.0, 32 * (1 - 1 / rows), -32 * (1 + 1 / rows)])  # edges, half a cell
    plain = lookup(query, points, lookup.value(plane))
    padded = F.pad(plane.permute(0, 2, 3, 1), (0, 0, BORDER, BORDER, BORDER, BORDER))
    torch.testing.assert_close(CornerLookup(lookup)(query, points, padded), plain, **EXACT)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.booleans())
@torch.inference_mode()
def test_winograd_convolution(seed: int, rows: int, columns: int, bias: bool) -> None:
    torch.manual_seed(seed)
    conv, image = nn.Conv2d(5, 3, 3, padding=1, bias=bias), torch.randn(2, 5, 2 * rows, 2 * columns)
    torch.testing.assert_close(WinogradConvolution(conv)(image), conv(image), **EXACT)


@torch.inference_mode()
def test_winograd_replaces_only_what_it_fits() -> None:
    planner = lively_planner("city_nano")
    arguments = inputs(planner, 1)
    program, changed = PlanProgram(planner), PlanProgram(planner)
    count = use_winograd(changed.encoder, min_channels=32)
    convolutions = [m for m in program.encoder.modules() if isinstance(m, nn.Conv2d) and min(m.weight.shape[:2]) >= 32]
    fitting = [m for m in convolutions if m.kernel_size == (3, 3) and m.stride == m.dilation == (1, 1)]
    assert 0 < count == len(fitting) < len(convolutions)
    torch.testing.assert_close(changed(*arguments), program(*arguments), **EXACT)


@torch.inference_mode()
def test_points_that_are_no_numbers_do_not_become_an_index() -> None:
    lookup = CornerLookup(MapLookup(width=4, poses=2, range_m=32.0, dropout=0.0))
    points = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).view(1, 2, 1, 2).expand(1, 2, 2, 2)
    assert lookup(torch.zeros(1, 2, 4), points, torch.ones(1, 9, 9, 4)).shape == (1, 2, 4)


@torch.inference_mode()
def test_attention_to_one_key_is_a_linear_map() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(16, 4)
    nn.init.normal_(attention.in_proj_bias)
    x, ego = torch.randn(3, 5, 16), torch.randn(3, 1, 16)
    plain = plain_attention(attention, x, ego)
    torch.testing.assert_close(attention.attend_single(ego).expand_as(plain), plain, **EXACT)
    planner = lively_planner("tiny")
    ego = torch.randn(3, 1, 16)
    joined = Encoder(planner).to_ego(ego).unflatten(-1, (2, -1)).squeeze(1)
    for number, layer in enumerate(planner.decoder.layers):
        plain = plain_attention(layer.ego, torch.randn(3, 5, 16), ego)
        torch.testing.assert_close(joined[:, number, None].expand_as(plain), plain, **EXACT)


@pytest.mark.parametrize("label", [0, 10, 37])
@torch.inference_mode()
def test_time_modulation_merges_into_the_norm_before_it(label: int) -> None:
    planner = lively_planner("tiny")
    x, level = torch.randn(2, 6, 16), torch.tensor([label])
    gains_shifts = Denoiser(planner).time_modulation(level)[0]
    time = planner.decoder.time_encoder(time_embedding(level, 16))[:, None]
    for layer, (gain, shift) in zip(planner.decoder.layers, gains_shifts, strict=True):
        nn.init.uniform_(layer.feed_forward_norm.weight, 0.5, 1.5)
        norm, modulation = layer.feed_forward_norm, layer.time
        assert isinstance(modulation, TimeModulation)
        merged = Denoiser(planner).time_modulation(level)[0][list(planner.decoder.layers).index(layer)]
        torch.testing.assert_close(F.layer_norm(x, (16,), *merged), modulation(norm(x), time), **EXACT)
        assert gain.shape == shift.shape == (16,)


def test_modulation_of_the_plans_labels_is_stored() -> None:
    denoiser = Denoiser(lively_planner("tiny"))
    assert denoiser.modulation.shape == (2, 2, 2, 16)
    torch.testing.assert_close(denoiser.modulation, denoiser.time_modulation(torch.tensor([10, 0])))


@pytest.mark.parametrize("config", [tiny().backbone, city_nano().backbone], ids=["tiny", "city_nano"])
@torch.inference_mode()
def test_folded_batch_norms(config) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(config, 3, config.image_size).eval()
    enliven(encoder)
    image = torch.rand(2, 3, *config.image_size)
    plain = encoder(image)
    fold_batch_norms(encoder)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
    for folded, expected in zip(encoder(image), plain, strict=True):
        torch.testing.assert_close(folded, expected, **EXACT)


@torch.inference_mode()
def test_a_norm_before_its_convolution_stays() -> None:
    """Only where children run in the order they are registered may neighbours be merged."""

    class Unordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    block = Unordered()
    fold_batch_norms(block)
    assert isinstance(block.norm, nn.BatchNorm2d)


@torch.inference_mode()
def test_last_fusion_leaves_out_only_what_nobody_reads() -> None:
    config = city_nano().backbone
    config.fusion_blocks = 2
    torch.manual_seed(0)
    fusion = FusionBackbone(config).eval().fusions[-1]
    nn.init.normal_(fusion.positions)
    image, lidar = torch.randn(2, 128, 4, 16), torch.randn(2, 128, 8, 8)
    torch.testing.assert_close(LastFusion(fusion)(image, lidar)[1], fusion(image, lidar)[1], **EXACT)


@torch.inference_mode()
def test_query_decoder_with_a_constant_start() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    decoder, queries = nn.TransformerDecoder(layer, 3).eval(), torch.randn(5, 16)
    for parameter in decoder.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    memory = torch.randn(2, 7, 16)
    plain = decoder(queries.expand(2, -1, -1), memory)
    torch.testing.assert_close(QueryDecoder(decoder, queries)(memory), plain, **EXACT)


@torch.inference_mode()
def test_the_plain_path_really_is_the_long_way() -> None:
    """It convolves the value map in every layer of every pass and asks for the time embedding in every pass."""
    planner = lively_planner("tiny")
    calls = {"value": 0, "time": 0, "norm": 0}

    def count(name: str):
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    for layer in planner.decoder.layers:
        layer.lookup.value.register_forward_hook(count("value"))
    planner.decoder.time_encoder.register_forward_hook(count("time"))
    norms = [m for m in planner.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(count("norm"))
    ReferencePlanner(planner)(*inputs(planner, 1))
    assert calls == {"value": 4, "time": 2, "norm": len(norms)}
