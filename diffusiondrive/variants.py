"""Named planners: the published one and those that it is compared with; each also in a size that trains on two CPU
cores in minutes; and one for tests.

`configs/model/<name>.yaml` holds the same numbers for the command line. docs/baselines.md says what each one is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from diffusiondrive.backbone import BackboneConfig
from diffusiondrive.baselines.regression import RegressionConfig
from diffusiondrive.baselines.unet import ORIGIN, UNetConfig
from diffusiondrive.decoder import ANCHORS, DecoderConfig
from diffusiondrive.encoders import NO_WEIGHTS
from diffusiondrive.perception import PerceptionConfig
from diffusiondrive.planner import REGRESSION, UNET, PlannerConfig
from diffusiondrive.schedule import FULL, LEVELS, TARGET, ScheduleConfig
from navsim_eval.errors import UserError


def diffusiondrive() -> PlannerConfig:
    """The published planner: two ResNet-34, 60.7 M parameters."""
    return PlannerConfig()


def city_nano() -> PlannerConfig:
    """For the synthetic city on CPU cores: the same code with 1.4 M parameters, about 16 ms a training sample."""
    return PlannerConfig(
        name="city_nano",
        width=64,
        backbone=BackboneConfig(
            image_weights=NO_WEIGHTS,
            stage_blocks=(1, 1, 1, 1),
            stage_channels=(16, 32, 64, 128),
            stem_width=8,
            output_stride=16,
            image_size=(64, 256),
            lidar_size=(128, 128),
            image_tokens=(4, 16),
            lidar_tokens=(8, 8),
            fusion_blocks=1,
            fusion_expansion=2,
            fusion_dropout=0.0,
            neck_channels=32,
            map_size=(32, 32),
            channels_last=True,
        ),
        perception=PerceptionConfig(
            decoder_layers=2, heads=4, hidden=256, agent_hidden=256, semantic_size=(64, 128), status_to_ego=True
        ),
        decoder=DecoderConfig(heads=4, hidden=256, base=ANCHORS),
    )


def transfuser() -> PlannerConfig:
    """TransFuser: the same perception without planning map, one regressed trajectory; 56.0 M parameters."""
    return regressing(diffusiondrive(), "transfuser", RegressionConfig())


def ltf() -> PlannerConfig:
    """Latent TransFuser: camera only, a learned image in the place of the LiDAR's."""
    return without_lidar(transfuser(), "ltf")


def truncated_unet() -> PlannerConfig:
    """The paper's intermediate planner (Transfuser_TD): anchors and two passes, but a U-Net that sees the ego query."""
    return replace(diffusiondrive(), name="truncated_unet", denoiser=UNET)


def diffusion_policy() -> PlannerConfig:
    """The paper's vanilla diffusion policy (Transfuser_DP): 20 passes from pure noise; samples without a preference."""
    return untruncated(truncated_unet(), "diffusion_policy")


def city_nano_transfuser() -> PlannerConfig:
    return regressing(city_nano(), "city_nano_transfuser", RegressionConfig(hidden=256))


def city_nano_ltf() -> PlannerConfig:
    return without_lidar(city_nano_transfuser(), "city_nano_ltf")


def city_nano_truncated_unet() -> PlannerConfig:
    unet = UNetConfig(channels=(64, 128, 256), base=ANCHORS)
    return replace(city_nano(), name="city_nano_truncated_unet", denoiser=UNET, unet=unet)


def city_nano_diffusion_policy() -> PlannerConfig:
    return untruncated(city_nano_truncated_unet(), "city_nano_diffusion_policy")


def regressing(config: PlannerConfig, name: str, regression: RegressionConfig) -> PlannerConfig:
    """The same perception with TransFuser's head."""
    return replace(
        config, name=name, denoiser=REGRESSION, modes=1, regression=regression, schedule=ScheduleConfig(steps=1)
    )


def without_lidar(config: PlannerConfig, name: str) -> PlannerConfig:
    """Camera only; agents that the three cameras do not see are not asked for."""
    return replace(
        config,
        name=name,
        backbone=replace(config.backbone, lidar=False),
        perception=replace(config.perception, visible_deg=80.0),
    )


def untruncated(config: PlannerConfig, name: str) -> PlannerConfig:
    """The same U-Net as a plain diffusion policy: trained on noised human plans of all levels, no anchors."""
    schedule = ScheduleConfig(preset=FULL, steps=20, train_levels=LEVELS, noise_source=TARGET)
    return replace(config, name=name, unet=replace(config.unet, base=ORIGIN), schedule=schedule)


def tiny() -> PlannerConfig:
    """For tests: every part of the real one, milliseconds a pass."""
    return PlannerConfig(
        name="tiny",
        width=16,
        modes=6,
        backbone=BackboneConfig(
            image_weights=NO_WEIGHTS,
            stage_blocks=(1, 1, 1, 1),
            stage_channels=(8, 8, 16, 16),
            stem_width=4,
            image_size=(64, 128),
            lidar_size=(64, 64),
            image_tokens=(2, 4),
            lidar_tokens=(2, 2),
            fusion_blocks=1,
            fusion_heads=2,
            fusion_expansion=2,
            neck_channels=8,
            map_size=(16, 16),
        ),
        perception=PerceptionConfig(decoder_layers=1, heads=2, hidden=32, agent_hidden=32, semantic_size=(16, 32)),
        decoder=DecoderConfig(heads=2, hidden=32, point_dims=8),
    )


_NAMED = (
    diffusiondrive, transfuser, ltf, diffusion_policy, truncated_unet,
    city_nano, city_nano_transfuser, city_nano_ltf, city_nano_diffusion_policy, city_nano_truncated_unet,
    tiny,
)  # fmt: skip
VARIANTS: dict[str, Callable[[], PlannerConfig]] = {function.__name__: function for function in _NAMED}


def planner_config(name: str) -> PlannerConfig:
    """Configuration of a named planner. Raises UserError that lists the names."""
    if name not in VARIANTS:
        raise UserError(f"no planner is called '{name}'; there are {', '.join(VARIANTS)}")
    return VARIANTS[name]()
