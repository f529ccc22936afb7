"""Losses of the planner: which mode should have been chosen, how far it was off, and what the scene looked like.

    total = 12 · trajectory + 10 · agent class + 1 · agent box + 14 · semantic map
    trajectory = Σ over cascade layers of (10 · focal + 8 · L1 of the positive mode)

The positive mode is the one whose clean anchor lies nearest to the human plan. Planners without anchors have nothing to
choose: each of their trajectories is to be the human plan, and there is no focal term. Source: DiffusionDrive
(arXiv 2411.15139) and its published code for the weights; focal loss arXiv 1708.02002; matching arXiv 2005.12872.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusiondrive.assignment import assign
from diffusiondrive.perception import Agents
from diffusiondrive.planner import Plan, TrainingOutputs
from diffusiondrive.targets import UNLABELLED
from navsim_eval.errors import UserError


@dataclass
class LossConfig:
    """Weights of the terms.

    trajectory, agent_class, agent_box, semantic: of the four terms in the total (class and box also in the matching)
    focal, regression: of the two parts of the trajectory term in each cascade layer
    sharing: distance [m] over which modes share the regression: a mode whose anchor lies d further from the human plan
        than the nearest one weighs exp(-d / sharing). 0: the nearest mode alone (published); more lets every scene
        teach several modes, which few scenes need
    judged: share of the evaluator in a mode's label: (1 - judged) · [nearest anchor] + judged · PDMS of the mode's
        trajectory, which `mode_scores` among the targets holds. 0: the human alone (published)
    heading: of an error of one radian against one metre in the regression (published: 1)
    focal_alpha, focal_gamma: positive modes weigh alpha, negative ones 1 - alpha
    """

    trajectory: float = 12.0
    agent_class: float = 10.0
    agent_box: float = 1.0
    semantic: float = 14.0
    focal: float = 10.0
    regression: float = 8.0
    heading: float = 1.0
    sharing: float = 0.0
    judged: float = 0.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


def planner_loss(
    outputs: TrainingOutputs, targets: Mapping[str, Tensor], config: LossConfig | None = None
) -> dict[str, Tensor]:
    """Training loss and all its terms.

    targets: trajectory (B, T, 3), agent_states (B, A, 5), agent_labels (B, A) bool, bev_semantic_map (B, H, W) labels,
    and, where `config.judged` asks for it, mode_scores (B, M) in [0, 1].
    Returns scalars: `loss`; weighted as summed into it `trajectory_loss`, `agent_class_loss`, `agent_box_loss`,
    `bev_semantic_loss`; `trajectory_loss_<layer>` before the trajectory weight; unweighted means under `raw/`.
    """
    config = config or LossConfig()
    target = targets["trajectory"].to(outputs.poses[0].dtype)
    anchored = outputs.anchors is not None
    labels = mode_labels(outputs.anchors, targets, config.judged) if anchored else None
    shares = mode_shares(outputs.anchors, target, config.sharing) if anchored else even_shares(outputs.logits[0])
    scale = F.pad(target.new_ones(2), (0, 1), value=config.heading)  # made on the device: a copy would wait for it
    terms: dict[str, Tensor] = {}
    trajectory = target.new_zeros(())
    for layer, (poses, logits) in enumerate(zip(outputs.poses, outputs.logits, strict=True)):
        error = ((poses - target[:, None]).abs() * scale).mean(dim=(2, 3))  # (B, M)
        regression = (torch.where(shares > 0, error, 0.0) * shares).sum(dim=1).mean()
        terms[f"raw/l1_{layer}"] = regression
        terms[f"trajectory_loss_{layer}"] = config.regression * regression
        if anchored:
            focal = focal_loss(logits, labels, config.focal_alpha, config.focal_gamma)
            terms[f"raw/focal_{layer}"] = focal
            terms[f"trajectory_loss_{layer}"] = config.focal * focal + config.regression * regression
        trajectory = trajectory + terms[f"trajectory_loss_{layer}"]
    terms["trajectory_loss"] = config.trajectory * trajectory
    if outputs.visible_deg < 180:
        targets = {**targets, "agent_labels": visible(targets, outputs.visible_deg)}
    return _with_scene_terms(terms, outputs.agents, outputs.bev_semantic_map, targets, config)


def visible(targets: Mapping[str, Tensor], degrees: float) -> Tensor:
    """Labels (B, A) bool of the agents whose centre lies within `degrees` of the heading, to either side."""
    states = targets["agent_states"]
    bearing = torch.atan2(states[..., 1], states[..., 0]).abs()
    return targets["agent_labels"].bool() & (bearing <= math.radians(degrees))


def even_shares(logits: Tensor) -> Tensor:
    """Weights (B, M) of interchangeable samples in the regression: the same for all, summing to 1."""
    return torch.full_like(logits, 1 / logits.shape[1])


def validation_loss(plan: Plan, targets: Mapping[str, Tensor], config: LossConfig | None = None) -> dict[str, Tensor]:
    """Loss of a finished plan, as the published code logs it in validation: the trajectory term is the plain mean L1 of
    the chosen trajectory (times its weight), so totals do not compare with `planner_loss`. Needs auxiliary outputs."""
    config = config or LossConfig()
    if plan.agents is None or plan.bev_semantic_map is None:
        raise UserError("validation_loss: the plan was made with auxiliary=False; plan again with auxiliary=True")
    distance = F.l1_loss(plan.trajectory, targets["trajectory"].to(plan.trajectory.dtype))
    terms = {"raw/l1": distance, "trajectory_loss": config.trajectory * distance}
    return _with_scene_terms(terms, plan.agents, plan.bev_semantic_map, targets, config)


def nearest_anchor(anchors: Tensor, target: Tensor) -> Tensor:
    """Mode whose anchor (M, T, 2) has the smallest mean distance to the target (B, T, 3): (B,) int64."""
    return anchor_distances(anchors, target).argmin(dim=-1)


def anchor_distances(anchors: Tensor, target: Tensor) -> Tensor:
    """Mean distance over the poses [m] of every anchor (M, T, 2) to the target (B, T, 3): (B, M)."""
    return torch.linalg.vector_norm(target[:, None, :, :2] - anchors.to(target.dtype), dim=-1).mean(dim=-1)


def mode_shares(anchors: Tensor, target: Tensor, sharing: float) -> Tensor:
    """Weights (B, M) of the modes in the regression, summing to 1; see `LossConfig.sharing`."""
    distance = anchor_distances(anchors, target)
    if sharing == 0:
        return F.one_hot(distance.argmin(dim=-1), distance.shape[1]).to(distance.dtype)
    return (-distance / sharing).softmax(dim=-1)


def mode_labels(anchors: Tensor, targets: Mapping[str, Tensor], judged: float) -> Tensor:
    """Labels (B, M) in [0, 1] of the modes in the classification; see `LossConfig.judged`."""
    nearest = F.one_hot(nearest_anchor(anchors, targets["trajectory"].to(anchors.dtype)), len(anchors))
    if judged == 0:
        return nearest.to(anchors.dtype)
    return (1 - judged) * nearest + judged * targets["mode_scores"].to(anchors.dtype)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss of logits (B, M) against labels (B, M) in [0, 1]; mean over B × M.

    Labels between 0 and 1 are weighed by |label - probability|^γ (quality focal loss, arXiv 2006.04388), which is the
    plain focal loss at 0 and 1.
    """
    logits = logits.float()
    labels = labels.to(logits.dtype)
    miss = (labels - logits.sigmoid()).abs()
    weight = (alpha * labels + (1 - alpha) * (1 - labels)) * miss**gamma
    return (weight * F.binary_cross_entropy_with_logits(logits, labels, reduction="none")).mean()


def agent_losses(agents: Agents, states: Tensor, labels: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Class and box loss of agents after the best one-to-one matching.

    states: (B, A, 5) targets, labels: (B, A) bool, false where a row is empty.
    Class: mean over B × A. Box: sum of |differences| of all five numbers over the number of valid agents in the batch.
    """
    logits, boxes = agents.logits.float(), agents.states.float()
    if states.shape != boxes.shape:
        raise UserError(
            f"agent_states: targets have shape {tuple(states.shape)}, predictions {tuple(boxes.shape)}; build the "
            "targets with as many slots as the planner has agent queries (perception.agents)"
        )
    states, labels = states.to(boxes.dtype), labels.to(boxes.dtype)
    order = match_agents(logits, boxes, states, labels, config)
    states = states.gather(1, order[..., None].expand_as(states))  # targets in the order of the predictions
    labels = labels.gather(1, order)
    classes = F.binary_cross_entropy_with_logits(logits, labels)
    box = ((boxes - states).abs().sum(dim=-1) * labels).sum() / labels.sum().clamp(min=1)
    return classes, box


@torch.no_grad()
def match_agents(logits: Tensor, boxes: Tensor, states: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    """Exact assignment: for each prediction (B, A) the index of its target.

    Cost of (prediction i, target j) = class weight · BCE(logit_i, label_j) + box weight · label_j · |Δ(x, y)|₁; empty
    target rows take part, so every prediction gets one.
    """
    count = logits.shape[1]
    classes = F.binary_cross_entropy_with_logits(
        logits[:, :, None].expand(-1, -1, count), labels[:, None, :].expand(-1, count, -1), reduction="none"
    )
    distance = (boxes[:, :, None, :2] - states[:, None, :, :2]).abs().sum(dim=-1)
    cost = config.agent_class * classes + config.agent_box * labels[:, None, :] * distance
    return assign(cost)


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, C, H, W) and labels (B, kH, kW), of which every k-th is read.

    Cells marked `UNLABELLED` (scenes without a map) are left out; zero where there is no other.
    """
    rows, columns = labels.shape[-2] // logits.shape[-2], labels.shape[-1] // logits.shape[-1]
    if (logits.shape[-2] * rows, logits.shape[-1] * columns) != tuple(labels.shape[-2:]):
        raise UserError(
            f"bev_semantic_map: targets of {tuple(labels.shape[-2:])} cells are no multiple of the predicted "
            f"{tuple(logits.shape[-2:])} (perception.semantic_size)"
        )
    labels = labels[..., ::rows, ::columns].long()
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def _with_scene_terms(
    terms: dict[str, Tensor], agents: Agents, semantic: Tensor, targets: Mapping[str, Tensor], config: LossConfig
) -> dict[str, Tensor]:
    classes, box = agent_losses(agents, targets["agent_states"], targets["agent_labels"], config)
    cells = semantic_loss(semantic, targets["bev_semantic_map"])
    terms |= {"raw/agent_class": classes, "raw/agent_box": box, "raw/bev_semantic": cells}
    terms["agent_class_loss"] = config.agent_class * classes
    terms["agent_box_loss"] = config.agent_box * box
    terms["bev_semantic_loss"] = config.semantic * cells
    weighted = ("trajectory_loss", "agent_class_loss", "agent_box_loss", "bev_semantic_loss")
    terms["loss"] = torch.stack([terms[name] for name in weighted]).sum()
    return terms
