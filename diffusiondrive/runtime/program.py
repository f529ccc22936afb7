"""A planner as one function of tensors: features and noise in, one row of numbers a scene out.

What a compiler, a CUDA graph or an exporter can take whole: fixed shapes, no host value, no dictionary. The results of
a scene lie side by side in one row, so that they leave the device in one copy; `PlanLayout` knows what lies where.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusiondrive.perception import Agents
from diffusiondrive.planner import CASCADE, DiffusionDrive, Plan, PlannerConfig, choose
from diffusiondrive.runtime.denoiser import Denoiser
from diffusiondrive.runtime.encoder import Encoder
from diffusiondrive.runtime.reference import ReferencePlanner
from navsim_eval.errors import UserError


@dataclass(frozen=True)
class PlanLayout:
    """Where the parts of a plan lie in a row of float32 numbers (a mode's index is exact in it)."""

    parts: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: PlannerConfig, auxiliary: bool) -> PlanLayout:
        parts: dict[str, tuple[int, ...]] = {
            "trajectory": (config.poses, 3),
            "candidates": (config.modes, config.poses, 3),
            "logits": (config.modes,),
            "mode": (1,),
        }
        if auxiliary:
            perception = config.perception
            parts |= {
                "agent_states": (perception.agents, 5),
                "agent_logits": (perception.agents,),
                "bev_semantic_map": (perception.semantic_classes, *perception.semantic_size),
            }
        return cls(parts)

    @property
    def length(self) -> int:
        return sum(math.prod(shape) for shape in self.parts.values())

    def unpack(self, rows: Tensor) -> Plan:
        """(B, length) -> Plan of views into it."""
        pieces = rows.split([math.prod(shape) for shape in self.parts.values()], dim=1)
        named = {
            name: piece.reshape(len(rows), *shape)
            for piece, (name, shape) in zip(pieces, self.parts.items(), strict=True)
        }
        auxiliary = "agent_states" in named
        return Plan(
            trajectory=named["trajectory"],
            candidates=named["candidates"],
            logits=named["logits"],
            mode=named["mode"][:, 0].long(),
            agents=Agents(named["agent_states"], named["agent_logits"]) if auxiliary else None,
            bev_semantic_map=named["bev_semantic_map"] if auxiliary else None,
        )


def pack(plan: Plan) -> Tensor:
    """Plan of B scenes -> (B, length), in the order of `PlanLayout`."""
    parts = [plan.trajectory, plan.candidates, plan.logits, plan.mode[:, None]]
    if plan.agents is not None:
        parts += [plan.agents.states, plan.agents.logits, plan.bev_semantic_map]
    return torch.cat([part.float().flatten(1) for part in parts], dim=1)


def require_published_form(planner: DiffusionDrive) -> None:
    """Raise UserError for a planner that the rewrites do not cover: another denoiser, no LiDAR, a look left out."""
    config = planner.config
    looks = (config.decoder.see_map, config.decoder.see_agents, config.decoder.see_ego)
    departures = {
        f"denoiser={config.denoiser}": config.denoiser != CASCADE,
        "no LiDAR": not config.backbone.lidar,
        "a look of the decoder left out": config.denoiser == CASCADE and not all(looks),
    }
    if found := [name for name, holds in departures.items() if holds]:
        raise UserError(
            f"planner '{config.name}' ({', '.join(found)}) is not of the published form, for which this backend and "
            "exports are written; use backend=plain, which runs any planner as it is"
        )


class PlainProgram(nn.Module):
    """The planner itself, as it is: any planner, at the speed of its own code."""

    def __init__(self, planner: DiffusionDrive, auxiliary: bool = False):
        super().__init__()
        self.planner, self.auxiliary = copy.deepcopy(planner).eval(), auxiliary
        self.requires_grad_(False)

    def forward(self, camera: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> Tensor:
        """Features as in `DiffusionDrive`, noise (B, M, T, 2) -> (B, length)."""
        features = {"camera_feature": camera, "lidar_feature": lidar, "status_feature": status}
        return pack(self.planner(features, noise, auxiliary=self.auxiliary))


class PlanProgram(nn.Module):
    """The rewritten planner (encoder.py, denoiser.py); copies the planner's weights."""

    def __init__(self, planner: DiffusionDrive, auxiliary: bool = False, dtype: torch.dtype = torch.float32):
        """auxiliary: also predict agents and the semantic map. dtype: of the backbone."""
        super().__init__()
        require_published_form(planner)
        self.encoder, self.denoiser = Encoder(planner, dtype), Denoiser(planner)
        self.agent_head = copy.deepcopy(planner.agent_head).eval() if auxiliary else None
        self.semantic_head = copy.deepcopy(planner.semantic_head).eval() if auxiliary else None
        self.requires_grad_(False)

    def forward(self, camera: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> Tensor:
        """Features as in `DiffusionDrive`, noise (B, M, T, 2) -> (B, length)."""
        scene, agents, neck = self.encoder(camera, lidar, status)
        poses, logits = self.denoiser(scene, noise)
        mode = self.denoiser.selector.select(poses, logits)
        return pack(
            Plan(
                trajectory=choose(poses, mode),
                candidates=poses,
                logits=logits,
                mode=mode,
                agents=None if self.agent_head is None else self.agent_head(agents),
                bev_semantic_map=None if self.semantic_head is None else self.semantic_head(neck),
            )
        )


class ReferenceProgram(nn.Module):
    """The plain published computation (reference.py) behind the same interface; auxiliary heads always on."""

    def __init__(self, planner: DiffusionDrive):
        super().__init__()
        require_published_form(planner)
        self.planner = ReferencePlanner(planner)

    def forward(self, camera: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> Tensor:
        return pack(self.planner(camera, lidar, status, noise))
