"""Image encoders by timm's name, cut into the four stages between which camera and LiDAR exchange information.

Convolutional encoders (ResNet, RegNet, ConvNeXt, …) are cut after each of their last four feature levels. A plain ViT
has one resolution: its blocks are cut into four equal groups, and its tokens are laid out as a map between them.
Channels and strides are what timm's feature_info says.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import timm
from timm.layers import Format
from timm.models import VisionTransformer
from torch import Tensor, nn

from navsim_eval.errors import UserError

if TYPE_CHECKING:
    from diffusiondrive.backbone import BackboneConfig

log = logging.getLogger(__name__)

STAGES = 4
NO_WEIGHTS, TIMM_WEIGHTS = "none", "timm"


class HasImageEncoder(Protocol):
    image_encoder: nn.Module


class ViTEncoder(nn.Module):
    """A timm ViT without class token and head, as four stages of maps (B, C, h, w)."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.channels, self.stride = vit.embed_dim, vit.patch_embed.patch_size[0]
        count = len(vit.blocks) // STAGES
        groups = [vit.blocks[k * count : (k + 1) * count if k < STAGES - 1 else None] for k in range(STAGES)]
        self.stages = nn.ModuleList(ViTStage(blocks) for blocks in groups)
        self.stages[0].patches = vit.patch_embed
        if vit.pos_embed is not None:  # of the patches only
            self.stages[0].positions = nn.Parameter(vit.pos_embed.detach()[:, -vit.patch_embed.num_patches :].clone())
        self.stages[0].norm_before = vit.norm_pre
        self.stages[-1].norm_after = vit.norm


class ViTStage(nn.Module):
    """Some of the blocks: map in, map out. The first stage cuts the image into patches, the last one ends in a norm."""

    def __init__(self, blocks: nn.Sequential):
        super().__init__()
        self.patches: nn.Module | None = None
        self.positions: nn.Parameter | None = None
        self.norm_before, self.blocks, self.norm_after = nn.Identity(), blocks, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w), the first stage an image -> (B, C', h', w')."""
        grid = x.shape[-2:]
        if self.patches is None:
            tokens = x.flatten(2).transpose(1, 2)  # (B, N, C)
        else:
            tokens, grid = self.patches(x), self.patches.grid_size
            tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # some are (B, h, w, C)
        if self.positions is not None:
            tokens = tokens + self.positions
        tokens = self.norm_after(self.blocks(self.norm_before(tokens)))
        return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def build_encoder(
    config: BackboneConfig, in_channels: int, size: tuple[int, int], pretrained: bool = False
) -> nn.Module:
    """The encoder for images (in_channels, *size); random weights, or timm's.

    Raises UserError for an unknown name (with the nearest known ones), for options that it does not take, and for
    encoders that cannot be cut into four stages of maps.
    """
    name, options = config.encoder, _options(config)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
        raise UserError(f"backbone.encoder: timm has no model '{name}'; {hint}")
    is_vit = timm.models.model_entrypoint(name).__module__.endswith(".vision_transformer")
    options |= {"img_size": size, "num_classes": 0} if is_vit else {"features_only": True}
    try:
        encoder = timm.create_model(name, pretrained=pretrained, in_chans=in_channels, **options)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"backbone.encoder: timm cannot build '{name}' with {options}: {error}") from error
    if is_vit and isinstance(encoder, VisionTransformer) and len(encoder.blocks) >= STAGES:
        return ViTEncoder(encoder)
    staged = hasattr(encoder, "return_layers") and getattr(encoder, "output_fmt", Format.NCHW) == Format.NCHW
    if not staged or len(encoder.return_layers) < STAGES:
        raise UserError(
            f"backbone.encoder: '{name}' cannot be cut into four stages of maps; ResNets, RegNets, ConvNeXts and plain "
            "ViTs can (resnet18, resnet34, resnet50, regnety_008, convnext_tiny, vit_small_patch16_224, …)"
        )
    return encoder


def _options(config: BackboneConfig) -> dict[str, object]:
    """What the configuration asks of timm beyond the name."""
    options: dict[str, object] = {}
    if config.stage_channels:
        options["channels"] = config.stage_channels
    if config.stage_blocks:
        options["layers"] = config.stage_blocks
    if config.stem_width:
        options |= {"stem_type": "deep", "stem_width": config.stem_width}
    if config.output_stride != 32:
        options["output_stride"] = config.output_stride
    return options


def encoder_channels(encoder: nn.Module) -> tuple[int, ...]:
    """Channels of the map after each of the four stages."""
    if isinstance(encoder, ViTEncoder):
        return (encoder.channels,) * STAGES
    return tuple(encoder.feature_info.channels()[-STAGES:])


def encoder_stride(encoder: nn.Module) -> int:
    """Pixels per cell of the last map, along each axis."""
    return encoder.stride if isinstance(encoder, ViTEncoder) else encoder.feature_info.reduction()[-1]


def encoder_stages(encoder: nn.Module) -> list[list[nn.Module]]:
    """The encoder's modules in order, cut after each of its last four feature levels; the first part holds the stem."""
    if isinstance(encoder, ViTEncoder):
        return [[stage] for stage in encoder.stages]
    ends = list(encoder.return_layers)[-STAGES:]
    stages: list[list[nn.Module]] = [[]]
    for name, module in encoder.items():
        stages[-1].append(module)
        if name in ends and len(stages) < STAGES:
            stages.append([])
    return stages


def load_image_weights(backbone: HasImageEncoder, config: BackboneConfig) -> str:
    """Start the camera branch from `config.image_weights`; returns (and logs) one line that says what it got.

    Raises UserError when the weights cannot be had or do not fit; never falls back to a random start by itself.
    """
    source = config.image_weights
    if source == NO_WEIGHTS:
        message = f"camera branch ({config.encoder}) starts from random weights (backbone.image_weights=none)"
        log.warning(message)
        return message
    state = _hub_weights(config) if source == TIMM_WEIGHTS else _file_weights(Path(source))
    wanted = backbone.image_encoder.state_dict()
    missing = [name for name in wanted if name not in state]
    misfits = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or misfits:
        shown = ", ".join((missing + misfits)[:3])
        raise UserError(
            f"backbone.image_weights={source}: {len(missing)} tensors missing and {len(misfits)} of another shape for "
            f"encoder '{config.encoder}' (first: {shown}); use weights of that very encoder, or none"
        )
    backbone.image_encoder.load_state_dict({name: state[name] for name in wanted})
    rest = len(state) - len(wanted)
    message = f"camera branch ({config.encoder}) starts from {source}: {len(wanted)} tensors, {rest} more not needed"
    log.info(message)
    return message


def _hub_weights(config: BackboneConfig) -> dict[str, Tensor]:
    try:
        return build_encoder(config, config.image_channels, config.image_size, pretrained=True).state_dict()
    except UserError:
        raise
    except Exception as error:  # the hub raises whatever its transport raises
        raise UserError(
            f"backbone.image_weights=timm: weights of '{config.encoder}' are not in the hub cache and could not be "
            f"fetched ({type(error).__name__}); give a file, backbone.image_weights=FILE.safetensors, or start at "
            "random: none"
        ) from error


def _file_weights(path: Path) -> dict[str, Tensor]:
    from diffusiondrive.checkpoint import read_tensors

    return read_tensors(path)
