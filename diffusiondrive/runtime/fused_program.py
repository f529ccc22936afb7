"""The rewritten planner made of fused kernels: about a quarter of the launches of `PlanProgram`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusiondrive.runtime.device import HALF
from diffusiondrive.runtime.fused_backbone import FusedBackbone
from diffusiondrive.runtime.fused_context import FusedContext
from diffusiondrive.runtime.fused_denoiser import FusedDenoiser
from diffusiondrive.runtime.program import PlanProgram
from diffusiondrive.runtime.stages import BACKBONE, CONTEXT, HEAD


class FusedProgram:
    """Made from a rewritten program on its device; made for one batch size."""

    def __init__(self, program: PlanProgram, batch: int, precision: str):
        """precision: float32 (products in three TF32 parts, which is float32 to rounding), tf32, bf16 or fp16. The last
        two are the backbone's. What follows stores float32; with half precision its products take fp16 factors, which
        have as many bits as TF32's, and float32 sums."""
        half = HALF.get(precision)
        behind = {"dtype": torch.float16 if half else torch.float32}
        behind["precision"] = "tf32x3" if precision == "float32" else "tf32"
        of_backbone = behind | {"dtype": half or torch.float32}
        self.backbone = FusedBackbone(program.encoder, of_backbone)
        self.context = FusedContext(program.encoder, batch, of_backbone, behind)
        self.denoiser = FusedDenoiser(program.denoiser, behind)
        self.agent_head, self.semantic_head = program.agent_head, program.semantic_head

    @torch.inference_mode()
    def __call__(self, camera: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> Tensor:
        """Features as in `DiffusionDrive`, noise (B, M, T, 2) -> (B, length)."""
        coarse = self.backbone(camera, lidar)
        scene, queries, neck = self.context(coarse, status)
        rows = self.denoiser(scene, noise)
        if self.agent_head is None:
            return rows
        agents, semantic = self.agent_head(queries[:, 1:]), self.semantic_head(neck.float())
        return torch.cat([rows, agents.states.flatten(1), agents.logits, semantic.flatten(1)], dim=1)

    @torch.inference_mode()
    def stages(self, camera: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> dict[str, Callable[[], object]]:
        """The parts of a plan, each ready to run on what the parts before it gave; names as in stages.py."""
        coarse = self.backbone(camera, lidar)
        scene, _, _ = self.context(coarse, status)
        return {
            BACKBONE: lambda: self.backbone(camera, lidar),
            CONTEXT: lambda: self.context(coarse, status),
            HEAD: lambda: self.denoiser(scene, noise),
        }
