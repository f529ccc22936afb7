"""Named planners: the published one, one that trains on two CPU cores in minutes, one for tests.

`configs/model/<name>.yaml` holds the same numbers for the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusiondrive.backbone import NO_WEIGHTS, BackboneConfig
from diffusiondrive.decoder import ANCHORS, DecoderConfig
from diffusiondrive.perception import PerceptionConfig
from diffusiondrive.planner import PlannerConfig
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


VARIANTS: dict[str, Callable[[], PlannerConfig]] = {f.__name__: f for f in (diffusiondrive, city_nano, tiny)}


def planner_config(name: str) -> PlannerConfig:
    """Configuration of a named planner. Raises UserError that lists the names."""
    if name not in VARIANTS:
        raise UserError(f"no planner is called '{name}'; there are {', '.join(VARIANTS)}")
    return VARIANTS[name]()
