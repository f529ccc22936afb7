"""The named variants, and the weights that a planner starts from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import diffusiondrive as package
from diffusiondrive.backbone import BackboneConfig, FusionBackbone
from diffusiondrive.encoders import load_image_weights
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.training.config import TrainConfig
from diffusiondrive.variants import VARIANTS, city_nano, planner_config, tiny
from navsim_eval.config import CONFIG_ROOT, load_config
from navsim_eval.errors import UserError
from tests.diffusiondrive.planners import make_features, make_planner


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_configuration_files_hold_the_same_numbers_as_the_code(name) -> None:
    assert load_config(TrainConfig, "train", [f"model={name}"]).model == planner_config(name)
    assert planner_config(name).name == name


def test_every_model_file_is_a_variant() -> None:
    assert {path.stem for path in (CONFIG_ROOT / "model").glob("*.yaml")} == set(VARIANTS)


def test_nano_fits_in_ten_megabytes_and_plans() -> None:
    planner = make_planner(city_nano())
    assert sum(p.numel() for p in planner.parameters()) * 4 < 9.5e6
    plan = planner(make_features(planner.config, 2))
    assert plan.trajectory.shape == (2, 8, 3) and plan.candidates.shape == (2, 20, 8, 3)
    assert plan.agents.states.shape == (2, 30, 5) and plan.bev_semantic_map.shape == (2, 7, 64, 128)
    assert torch.isfinite(plan.candidates).all()


def test_unknown_variant_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="city_nano"):
        planner_config("city_mega")


def test_package_exports_the_planner() -> None:
    assert package.DiffusionDrive is DiffusionDrive
    with pytest.raises(AttributeError, match="Planner"):
        _ = package.Planner


# ------------------------------------------------------------------------------------------------------ initial weights


def test_fresh_weights_start_as_published() -> None:
    planner = DiffusionDrive(tiny(), torch.rand(6, 8, 2))
    first, second = planner.decoder.layers
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not first.lookup.point_weights.weight.any() and not first.lookup.output.bias.any()
    assert first.classification[-1].bias.item() == pytest.approx(-4.59512, abs=1e-5)
    assert planner.perception.positions.std().item() == pytest.approx(1, abs=0.3)
    backbone = planner.perception.backbone
    for block in (b for k in range(1, 5) for b in backbone.lidar_encoder[f"layer{k}"]):
        assert not block.bn2.weight.any()
    fusion = backbone.fusions[-1]
    assert not fusion.positions.any() and not fusion.blocks[0].attention.query.bias.any()
    assert fusion.blocks[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_query_decoder_layers_start_equal() -> None:
    config = tiny()
    config.perception.decoder_layers = 3
    layers = DiffusionDrive(config, torch.rand(6, 8, 2)).perception.query_decoder.layers
    for layer in layers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(layers[0].parameters(), layer.parameters(), strict=True))


def test_random_camera_branch_is_said_aloud(caplog) -> None:
    planner = DiffusionDrive(tiny(), torch.rand(6, 8, 2))
    assert "random" in planner.load_image_weights()
    assert "random" in caplog.text


def test_camera_weights_from_a_file(tmp_path) -> None:
    config = tiny().backbone
    source, target = FusionBackbone(config), FusionBackbone(config)
    state = {**source.image_encoder.state_dict(), "fc.weight": torch.zeros(10, 16)}
    save_file(state, str(tmp_path / "resnet.safetensors"))
    config.image_weights = str(tmp_path / "resnet.safetensors")
    assert f"{len(state) - 1} tensors, 1 more" in load_image_weights(target, config)
    assert torch.equal(target.image_encoder.conv1[0].weight, source.image_encoder.conv1[0].weight)


def test_camera_weights_of_another_network_are_refused(tmp_path) -> None:
    config = tiny().backbone
    config.image_weights = str(tmp_path / "other.safetensors")
    save_file({"conv1.weight": torch.zeros(3)}, config.image_weights)
    with pytest.raises(UserError, match=r"tensors missing.*conv1\.0\.weight"):
        load_image_weights(FusionBackbone(config), config)


def test_camera_weights_that_cannot_be_fetched_name_the_remedy(monkeypatch) -> None:
    def offline(*_args, **_kwargs):
        raise OSError("no route to host")

    backbone = FusionBackbone(tiny().backbone)
    monkeypatch.setattr("diffusiondrive.encoders.timm.create_model", offline)
    with pytest.raises(UserError, match=r"backbone.image_weights=FILE"):
        load_image_weights(backbone, BackboneConfig())
