"""Loss terms against the reference's numbers, and against hand-made cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusiondrive.losses import (
    LossConfig,
    agent_losses,
    focal_loss,
    match_agents,
    mode_labels,
    mode_shares,
    nearest_anchor,
    planner_loss,
    semantic_loss,
    validation_loss,
)
from diffusiondrive.perception import Agents
from diffusiondrive.planner import Plan, TrainingOutputs
from navsim_eval.errors import UserError
from tests.golden import model as golden
from tests.golden import needs_golden


@needs_golden
@pytest.mark.golden
@pytest.mark.parametrize("variant", ["frozen_bn", "batch_bn"])
def test_terms_from_stored_predictions(variant) -> None:
    stored = {k: torch.from_numpy(v) for k, v in np.load(golden.FOLDER / "loss_inputs.npz").items()}
    reference = golden.read_json("losses.json")[variant]
    prediction = {name.rsplit(".", 1)[-1]: v for name, v in stored.items() if name.startswith(f"{variant}.pred")}
    raw, weighted = reference["terms_raw"], reference["terms_weighted"]
    # The predicted map is not stored; any map with the stored cross entropy gives the same total.
    labels = stored["bev_semantic_map"]
    outputs = TrainingOutputs(
        poses=(prediction["poses_reg0"], prediction["poses_reg1"]),
        logits=(prediction["poses_cls0"], prediction["poses_cls1"]),
        anchors=torch.from_numpy(golden.weight("_trajectory_head.plan_anchor", (20, 8, 2))),
        points=prediction["noisy_points"],
        agents=Agents(prediction["agent_states"], prediction["agent_labels"]),
        bev_semantic_map=_map_with_cross_entropy(labels, raw["bev_ce"]),
    )
    targets = {
        "trajectory": stored["trajectory"].double(),  # data sets keep it in float64
        "agent_states": stored[f"{variant}.agent_states"],
        "agent_labels": stored[f"{variant}.agent_labels"],
        "bev_semantic_map": labels,
    }
    terms = planner_loss(outputs, targets)
    for name, value in weighted.items():
        if name != "diffusion_loss":
            assert terms[name].item() == pytest.approx(value, rel=1e-5), name
    ours = {
        "layer0.focal": "raw/focal_0", "layer0.l1": "raw/l1_0", "layer1.focal": "raw/focal_1", "layer1.l1": "raw/l1_1",
        "agent_ce": "raw/agent_class", "agent_l1": "raw/agent_box",
    }  # fmt: skip
    for theirs, name in ours.items():
        assert terms[name].item() == pytest.approx(raw[theirs], rel=1e-5), name
    assert nearest_anchor(outputs.anchors, stored["trajectory"]).tolist() == raw["anchor_idx"]
    assert outputs.trajectory.numpy() == pytest.approx(prediction["trajectory"].numpy())
    agents, labels = outputs.agents, targets["agent_labels"]
    order = match_agents(agents.logits, agents.states, targets["agent_states"], labels.float(), LossConfig())
    for row, valid, expected in zip(order, labels, raw["hungarian_pred_of_valid_gt"], strict=True):
        assert row.argsort()[valid].tolist() == expected


def _map_with_cross_entropy(labels: torch.Tensor, value: float) -> torch.Tensor:
    """Seven-class logits whose cross entropy is `value` in every cell: a lower logit for the right class."""
    lead = math.log(6 / (math.exp(value) - 1))
    logits = torch.zeros(len(labels), 7, *labels.shape[1:])
    return logits.scatter(1, labels.long()[:, None], lead)


def test_focal_loss_by_hand() -> None:
    loss = focal_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), alpha=0.25, gamma=2.0)
    by_hand = (0.25 * 0.5**2 * math.log(2) + 0.75 * 0.5**2 * math.log(2)) / 2
    assert loss.item() == pytest.approx(by_hand)


def test_focal_loss_of_a_label_between_is_least_at_that_probability() -> None:
    probabilities = torch.linspace(0.01, 0.99, 99)
    losses = [focal_loss(p.logit().view(1, 1), torch.tensor([[0.7]]), 0.25, 2.0).item() for p in probabilities]
    assert probabilities[int(np.argmin(losses))].item() == pytest.approx(0.7, abs=0.006)


def test_judged_labels_lie_between_the_human_and_the_evaluator() -> None:
    anchors = torch.tensor([[0.0, 0.0], [10.0, 0.0]])[:, None].expand(2, 8, 2)
    targets = {"trajectory": torch.zeros(1, 8, 3), "mode_scores": torch.tensor([[0.2, 0.9]])}
    torch.testing.assert_close(mode_labels(anchors, targets, 0.0), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(mode_labels(anchors, targets, 0.5), torch.tensor([[0.6, 0.45]]))
    torch.testing.assert_close(mode_labels(anchors, targets, 1.0), torch.tensor([[0.2, 0.9]]))


def test_positive_mode_is_the_nearest_clean_anchor_and_only_it_is_regressed() -> None:
    anchors = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])[:, None].expand(3, 8, 2)
    target = torch.zeros(2, 8, 3)
    target[0, :, 0], target[1, :, 1] = 9.0, 6.0
    assert nearest_anchor(anchors, target).tolist() == [1, 2]
    outputs, targets = _example(anchors, target)
    planner_loss(outputs, targets)["trajectory_loss"].backward()
    touched = outputs.poses[0].grad.abs().sum((2, 3)) > 0
    assert touched.tolist() == [[False, True, False], [False, False, True]]


def test_total_is_the_weighted_sum() -> None:
    outputs, targets = _example(torch.rand(3, 8, 2), torch.rand(2, 8, 3))
    terms = planner_loss(outputs, targets, LossConfig(trajectory=2.0, agent_class=3.0, agent_box=5.0, semantic=7.0))
    trajectory = 10 * terms["raw/focal_0"] + 8 * terms["raw/l1_0"]
    rest = 3 * terms["raw/agent_class"] + 5 * terms["raw/agent_box"] + 7 * terms["raw/bev_semantic"]
    assert terms["loss"].item() == pytest.approx((2 * trajectory + rest).item())


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_matching_is_the_best_of_all_permutations(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, boxes = torch.randn(1, 4, generator=generator), 10 * torch.randn(1, 4, 5, generator=generator)
    states, labels = 10 * torch.randn(1, 4, 5, generator=generator), torch.rand(1, 4, generator=generator).round()
    config = LossConfig()

    def cost(order: list[int]) -> float:
        total = 0.0
        for i, j in enumerate(order):
            bce = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, i], labels[0, j])
            total += config.agent_class * bce.item()
            total += config.agent_box * labels[0, j].item() * (boxes[0, i, :2] - states[0, j, :2]).abs().sum().item()
        return total

    found = cost(match_agents(logits, boxes, states, labels, config)[0].tolist())
    assert found == pytest.approx(min(cost(list(order)) for order in itertools.permutations(range(4))), rel=1e-5)


def test_agent_losses_do_not_depend_on_the_order_of_targets_or_predictions() -> None:
    agents = Agents(10 * torch.randn(2, 5, 5), torch.randn(2, 5))
    states, labels = 10 * torch.randn(2, 5, 5), torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 0]]).bool()
    order, other = torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 4, 0, 3, 1])
    plain = agent_losses(agents, states, labels, LossConfig())
    mixed = agent_losses(
        Agents(agents.states[:, other], agents.logits[:, other]), states[:, order], labels[:, order], LossConfig()
    )
    torch.testing.assert_close(plain, mixed)


def test_no_agents_at_all_costs_no_box_and_stays_finite() -> None:
    agents = Agents(torch.randn(2, 5, 5, requires_grad=True), torch.randn(2, 5))
    classes, box = agent_losses(agents, torch.zeros(2, 5, 5), torch.zeros(2, 5).bool(), LossConfig())
    assert box.item() == 0.0 and math.isfinite(classes.item())
    box.backward()
    assert not agents.states.grad.any()


def test_diverged_predictions_reach_the_caller_as_a_loss_that_is_not_finite() -> None:
    outputs, targets = _example(torch.rand(3, 8, 2), torch.rand(2, 8, 3))
    outputs.agents.states.data[0, 0] = float("nan")
    targets["agent_labels"][:] = True
    assert not torch.isfinite(planner_loss(outputs, targets)["loss"])


def test_semantic_map_may_be_coarser_than_its_target() -> None:
    labels = torch.randint(0, 7, (2, 8, 16))
    logits = torch.randn(2, 7, 4, 8)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, ::2, ::2])
    torch.testing.assert_close(semantic_loss(logits, labels), expected)
    with pytest.raises(UserError, match=r"\(8, 16\).*\(3, 8\)"):
        semantic_loss(logits[:, :, :3], labels)


def test_target_slots_that_do_not_fit_are_named() -> None:
    agents = Agents(torch.randn(2, 5, 5), torch.randn(2, 5))
    with pytest.raises(UserError, match=r"\(2, 30, 5\).*\(2, 5, 5\).*perception.agents"):
        agent_losses(agents, torch.zeros(2, 30, 5), torch.zeros(2, 30).bool(), LossConfig())


def test_validation_needs_auxiliary_outputs() -> None:
    _, targets = _example(torch.rand(3, 8, 2), torch.rand(2, 8, 3))
    plan = Plan(torch.rand(2, 8, 3), torch.rand(2, 3, 8, 3), torch.rand(2, 3), torch.zeros(2).long())
    with pytest.raises(UserError, match="auxiliary"):
        validation_loss(plan, targets)


def _example(anchors: torch.Tensor, target: torch.Tensor) -> tuple[TrainingOutputs, dict[str, torch.Tensor]]:
    """One cascade layer, three modes, two scenes."""
    outputs = TrainingOutputs(
        poses=(torch.randn(2, 3, 8, 3, requires_grad=True),),
        logits=(torch.randn(2, 3, requires_grad=True),),
        anchors=anchors,
        points=torch.rand(2, 3, 8, 2),
        agents=Agents(torch.randn(2, 5, 5, requires_grad=True), torch.randn(2, 5)),
        bev_semantic_map=torch.randn(2, 7, 4, 8),
    )
    targets = {
        "trajectory": target,
        "agent_states": torch.randn(2, 5, 5),
        "agent_labels": torch.rand(2, 5) > 0.5,
        "bev_semantic_map": torch.randint(0, 7, (2, 8, 16)),
    }
    return outputs, targets


def test_modes_share_the_regression_by_how_near_their_anchors_are() -> None:
    """Hard assignment at sharing 0; else exp(-distance / sharing), normalised, which tends to it."""
    seconds = torch.arange(1, 9) / 2
    anchors = torch.stack([torch.stack([v * seconds, 0 * seconds], -1) for v in (2.0, 4.0, 8.0)])  # (3, 8, 2)
    target = torch.cat([anchors[1:2], torch.zeros(1, 8, 1)], dim=-1)
    assert mode_shares(anchors, target, 0.0).tolist() == [[0.0, 1.0, 0.0]]
    gap = (2.0 * seconds).mean()  # of the first anchor; the third is twice as far away
    expected = torch.tensor([-gap, 0.0, -2 * gap]).exp()
    torch.testing.assert_close(mode_shares(anchors, target, 1.0)[0], expected / expected.sum())
    torch.testing.assert_close(mode_shares(anchors, target, 1e-3), mode_shares(anchors, target, 0.0))
