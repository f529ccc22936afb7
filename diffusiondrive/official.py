"""The published DiffusionDrive checkpoint layout, in and out.

A published file is a Lightning checkpoint whose `state_dict` holds every tensor of the network under a wrapper's
prefix (`agent._transfuser_model.`) and the published module names. Tensors have our shapes; only names differ, and
`RULES` translates them. Every entry of the file is accounted for, or the import fails and says which were not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffusiondrive.checkpoint import compare, config_text, read_tensors, save_planner, save_weights
from diffusiondrive.planner import DiffusionDrive, PlannerConfig
from navsim_eval.errors import DataError, UserError
from navsim_eval.files import atomic_write

PREFIX = "agent._transfuser_model."
ANCHORS = "_trajectory_head.plan_anchor"

_FUSION = r"perception\.backbone\.fusions\.(\d+)\."
_LAYER = r"decoder\.layers\.(\d+)\."
_OFFICIAL_LAYER = r"_trajectory_head.diff_decoder.layers.\1."
RULES: tuple[tuple[str, str], ...] = (  # (our name, official name); the first rule that matches from the start applies
    (r"perception\.backbone\.(image|lidar)_encoder\.", r"_backbone.\1_encoder."),
    (_FUSION + r"lidar_in\.", r"_backbone.lidar_channel_to_img.\1."),
    (_FUSION + r"lidar_out\.", r"_backbone.img_channel_to_lidar.\1."),
    (_FUSION + r"positions", r"_backbone.transformers.\1.pos_emb"),
    (_FUSION + r"norm\.", r"_backbone.transformers.\1.ln_f."),
    (_FUSION + r"blocks\.(\d+)\.norm(\d)\.", r"_backbone.transformers.\1.blocks.\2.ln\3."),
    (_FUSION + r"blocks\.(\d+)\.attention\.output\.", r"_backbone.transformers.\1.blocks.\2.attn.proj."),
    (_FUSION + r"blocks\.(\d+)\.attention\.", r"_backbone.transformers.\1.blocks.\2.attn."),
    (_FUSION + r"blocks\.(\d+)\.mlp\.", r"_backbone.transformers.\1.blocks.\2.mlp."),
    (r"perception\.backbone\.neck\.reduce\.", r"_backbone.c5_conv."),
    (r"perception\.backbone\.neck\.middle\.", r"_backbone.up_conv5."),
    (r"perception\.backbone\.neck\.fine\.", r"_backbone.up_conv4."),
    (r"perception\.positions", r"_keyval_embedding.weight"),
    (r"perception\.queries", r"_query_embedding.weight"),
    (r"perception\.token_projection\.", r"_bev_downscale."),
    (r"perception\.status_projection\.", r"_status_encoding."),
    (r"perception\.query_decoder\.", r"_tf_decoder."),
    (r"perception\.map_projection\.", r"bev_proj."),
    (r"agent_head\.states\.", r"_agent_head._mlp_states."),
    (r"agent_head\.logit\.", r"_agent_head._mlp_label.0."),
    (r"semantic_head\.layers\.", r"_bev_semantic_head."),
    (r"initial\.anchors", ANCHORS),
    (r"decoder\.point_encoder\.", r"_trajectory_head.plan_anchor_encoder."),
    (r"decoder\.time_encoder\.0\.", r"_trajectory_head.time_mlp.1."),
    (r"decoder\.time_encoder\.2\.", r"_trajectory_head.time_mlp.3."),
    (_LAYER + r"lookup\.value\.", _OFFICIAL_LAYER + r"cross_bev_attention.value_proj."),
    (_LAYER + r"lookup\.point_weights\.", _OFFICIAL_LAYER + r"cross_bev_attention.attention_weights."),
    (_LAYER + r"lookup\.output\.", _OFFICIAL_LAYER + r"cross_bev_attention.output_proj."),
    (_LAYER + r"(agent|ego)s?\.output\.", _OFFICIAL_LAYER + r"cross_\2_attention.out_proj."),
    (_LAYER + r"(agent|ego)s?\.in_proj", _OFFICIAL_LAYER + r"cross_\2_attention.in_proj"),
    (_LAYER + r"agents_norm\.", _OFFICIAL_LAYER + r"norm1."),
    (_LAYER + r"ego_norm\.", _OFFICIAL_LAYER + r"norm2."),
    (_LAYER + r"feed_forward_norm\.", _OFFICIAL_LAYER + r"norm3."),
    (_LAYER + r"feed_forward\.", _OFFICIAL_LAYER + r"ffn."),
    (_LAYER + r"time\.scale_shift\.", _OFFICIAL_LAYER + r"time_modulation.scale_shift_mlp.1."),
    (_LAYER + r"classification\.", _OFFICIAL_LAYER + r"task_decoder.plan_cls_branch."),
    (_LAYER + r"regression\.", _OFFICIAL_LAYER + r"task_decoder.plan_reg_branch."),
)
_COMPILED = tuple((re.compile(ours), official) for ours, official in RULES)


@dataclass
class ImportConfig:
    """`tools/import_checkpoint.py`.

    source: the published file: a Lightning checkpoint, a bare state dict, or .safetensors with official names
    out: folder to write, or a .safetensors file (its configuration goes beside it, as .json)
    model: the planner that the weights belong to; default the published one
    """

    source: str = ""
    out: str = ""
    model: PlannerConfig = field(default_factory=PlannerConfig)


@dataclass(frozen=True)
class ImportReport:
    """What an import did: entries taken, prefix found in front of their names, tensors converted to float32."""

    path: Path
    entries: int
    parameters: int
    prefix: str
    converted: int

    def __str__(self) -> str:
        cast = f", {self.converted} converted to float32" if self.converted else ""
        return (
            f"{self.entries} of {self.entries} entries imported ({self.parameters:,} parameters, prefix "
            f"'{self.prefix}'{cast}), none missing, none left over; written to {self.path}"
        )


def import_checkpoint(config: ImportConfig) -> ImportReport:
    """Convert an official checkpoint into one of ours. Raises UserError listing every entry that does not fit."""
    for name in ("source", "out"):
        if not getattr(config, name):
            raise UserError(f"{name} is not set; usage: import_checkpoint.py source=FILE.ckpt out=FOLDER")
    source, out = Path(config.source), Path(config.out)
    planner, prefix, converted = planner_from_official(read_tensors(source), config.model, source)
    if out.suffix == ".safetensors":
        save_weights(planner, out)
        atomic_write(out.with_suffix(".json"), config_text(config.model))
    else:
        save_planner(planner, out, origin=f"Weights converted from the official layout (`{source.name}`).")
    parameters = sum(parameter.numel() for parameter in planner.parameters())
    return ImportReport(out, len(planner.state_dict()), parameters, prefix, converted)


def planner_from_official(
    tensors: Mapping[str, Tensor], config: PlannerConfig, source: Path | str = "checkpoint"
) -> tuple[DiffusionDrive, str, int]:
    """A planner with official weights, the prefix that their names had, and how many were not float32.

    Any prefix is accepted as long as all entries share it. Raises DataError unless entries fit one to one.
    """
    prefix = _find_prefix(tensors, source)
    given = {name.removeprefix(prefix) if name.startswith(prefix) else name: t for name, t in tensors.items()}
    expected = (config.modes, config.poses, 2)
    anchors = given[ANCHORS] if tuple(given[ANCHORS].shape) == expected else torch.zeros(expected)
    planner = DiffusionDrive(config, anchors)
    names = official_names(planner)
    own = planner.state_dict()
    if mismatch := compare({official: own[name] for name, official in names.items()}, given):
        raise DataError(source, f"does not account for every entry of the planner '{config.name}': {mismatch}")
    converted = sum(given[official].dtype != own[name].dtype for name, official in names.items())
    planner.load_state_dict({name: given[official].to(own[name].dtype) for name, official in names.items()})
    return planner.eval(), prefix, converted


def official_state_dict(planner: DiffusionDrive, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The planner's weights under their official names, ready for the published code's loader."""
    own = planner.state_dict()
    return {prefix + official: own[name] for name, official in official_names(planner).items()}


def official_names(planner: DiffusionDrive) -> dict[str, str]:
    """Our name -> official name (without prefix) of every entry of the state dict."""
    return {name: official_name(name) for name in planner.state_dict()}


def official_name(name: str) -> str:
    """Official name of one of our state-dict entries. Raises KeyError for a name that no rule covers."""
    for ours, official in _COMPILED:
        if match := ours.match(name):
            return match.expand(official) + name[match.end() :]
    raise KeyError(f"no official name is known for '{name}'")


def _find_prefix(tensors: Mapping[str, Tensor], source: Path | str) -> str:
    ends = [name for name in tensors if name == ANCHORS or name.endswith("." + ANCHORS)]
    if len(ends) != 1:
        raise DataError(
            source,
            f"{len(ends)} entries are called {ANCHORS}, expected one among {len(tensors)}",
            remedy="not a DiffusionDrive checkpoint? names look like " + ", ".join(list(tensors)[:2]),
        )
    return ends[0].removesuffix(ANCHORS)
