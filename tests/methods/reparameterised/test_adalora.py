"""AdaLoRA spends its budget of ranks on the most important ones."""

from pathlib import Path

import pytest
import torch
from support.backbones import Backbones
from support.models import (
    as_pass,
    disturbed,
    experiment,
    loop_on_sixteen,
    train_on_sixteen,
    tuned_of,
)
from torch import nn

from unipelt_cli.errors import ConfigError
from unipelt_cli.methods.base import StagePosition
from unipelt_cli.methods.reparameterised.adalora import AdaLoRA, Contest, Triplets
from unipelt_cli.training.events import Step
from unipelt_cli.training.loop import Training


def rate_of(loop: Training) -> float:
    """Return the rate of the step that was taken last, of what trains at the run's rate."""
    return float(max(g["lr"] for g in loop.stepper.optimizer.param_groups if g["factor"] == 1.0))


def test_adaloras_penalty_and_importance_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    triplets = Triplets(nn.Linear(5, 4), 3, 1.0, generator)
    contest = Contest(triplets)
    left = right = 0.0
    p, q = triplets.p.detach(), triplets.q.detach()
    for i in range(3):
        for j in range(3):
            left += (float(p[:, i] @ p[:, j]) - float(i == j)) ** 2
            right += (float(q[i] @ q[j]) - float(i == j)) ** 2
    assert triplets.penalty(squared=True).item() == pytest.approx(left + right, rel=1e-5)
    expected = left**0.5 + right**0.5
    assert triplets.penalty(squared=False).item() == pytest.approx(expected, rel=1e-5)

    smoothed = {name: torch.zeros_like(p) for name, p in triplets.named_parameters()}
    uncertain = {name: torch.zeros_like(p) for name, p in triplets.named_parameters()}
    for _ in range(3):
        for name, parameter in triplets.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            now = (parameter.detach() * parameter.grad).abs()
            smoothed[name] = 0.85 * smoothed[name] + 0.15 * now
            far = (now - smoothed[name]).abs()
            uncertain[name] = 0.85 * uncertain[name] + 0.15 * far
        contest.observe(triplets, 0.85)
        assert not contest.smoothed.requires_grad
        with torch.no_grad():
            triplets.values.add_(0.5)
    score = {name: smoothed[name] * uncertain[name] for name in smoothed}
    by_hand = [
        float(score["values"][i] + score["p"][:, i].mean() + score["q"][i].mean()) for i in range(3)
    ]
    assert contest.importance(triplets).tolist() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(("options", "power"), [({}, 0.5), ({"penalty": "squared"}, 1.0)])
def test_the_loss_adds_a_tenth_of_the_mean_penalty_over_all_p_and_q(
    backbone_dir: Backbones, options: dict[str, str], power: float
) -> None:
    tuned = disturbed(tuned_of(backbone_dir("bert"), "adalora", options=options))
    far = []
    for name, t in tuned.stored().items():
        if name.endswith((".p", ".q")):
            gram = (t.T @ t if name.endswith(".p") else t @ t.T).double()
            far.append(float((gram - torch.eye(len(gram))).square().sum()) ** power)
    assert len(far) == 2 * 6 * 2
    loss = tuned.method.loss(as_pass(tuned, iter([torch.zeros(2, 2)])))
    assert loss.item() == pytest.approx(0.1 * sum(far) / len(far), rel=1e-5)


def test_an_orthogonal_start_has_a_finite_gradient() -> None:
    triplets = Triplets(nn.Linear(4, 4), 3, 1.0, torch.Generator())
    with torch.no_grad():
        triplets.p.copy_(torch.eye(4)[:, :3])
        triplets.q.copy_(torch.eye(4)[:3])
    triplets.penalty(squared=False).backward()
    for matrix in (triplets.p, triplets.q):
        assert matrix.grad is not None
        assert not matrix.grad.any()


def test_one_schedule_and_one_optimiser_span_both_stages(backbone_dir: Backbones) -> None:
    tuned = tuned_of(backbone_dir("bert"), "adalora")
    loop = loop_on_sixteen(tuned, epochs=8, learning_rate=1.0e-2, warmup=0.25, patience=99)
    rates = [rate_of(loop) for event in loop.events() if isinstance(event, Step)]
    assert loop.lengths == [2, 6]
    warm, total = 6, 24  # three steps an epoch
    rising = [1e-2 * (step + 1) / warm for step in range(warm)]
    falling = [1e-2 * (total - step) / (total - warm) for step in range(warm, total)]
    assert rates == pytest.approx(rising + falling)
    states = [state["step"].item() for state in loop.stepper.optimizer.state.values()]
    assert states
    assert set(states) == {24.0}


def test_stages_that_train_other_tensors_have_a_schedule_and_an_optimiser_each(
    backbone_dir: Backbones,
) -> None:
    tuned = tuned_of(backbone_dir("bert"), "diff-pruning")
    loop = loop_on_sixteen(tuned, epochs=4, learning_rate=1e-2, warmup=0.0, patience=99)
    rates = [rate_of(loop) for event in loop.events() if isinstance(event, Step)]
    assert rates == pytest.approx([1e-2 * (6 - step) / 6 for step in range(6)] * 2)
    assert {s["step"].item() for s in loop.stepper.optimizer.state.values()} == {6.0}


def test_a_running_mean_begins_anew_once_ranks_are_fixed(backbone_dir: Backbones) -> None:
    tuned = tuned_of(backbone_dir("bert"), "adalora")
    train_on_sixteen(tuned, epochs=8, learning_rate=1e-2, averaging=0.9, patience=99)
    values = [t for n, t in tuned.stored().items() if n.endswith(".values")]
    assert sum(int(v.count_nonzero()) for v in values) == 8 * len(values)


def test_adaloras_budget_falls_to_its_target_before_an_epoch_can_be_chosen(
    backbone_dir: Backbones,
) -> None:
    method = AdaLoRA()
    budgets = [method.budget(StagePosition(0, step, 40)) for step in range(40)]
    assert budgets[:8] == [12.0] * 8
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[23] == pytest.approx(8 + 4 * (1 - 16 / 32) ** 3)
    assert budgets[-1] == 8.0

    tuned = tuned_of(backbone_dir("bert"), "adalora")
    loop, _ = train_on_sixteen(tuned, epochs=8, learning_rate=1e-2, patience=2)
    assert loop.lengths == [2, 6]
    assert loop.progress.best_epoch > 2
    values = [t for n, t in tuned.stored().items() if n.endswith(".values")]
    kept = [int(v.count_nonzero()) for v in values]
    assert sum(kept) == 8 * len(values) == 96
    assert len(set(kept)) > 1  # matrices compete: not each has eight


def test_adalora_keeps_the_most_important_triplets_of_the_whole_backbone(
    backbone_dir: Backbones,
) -> None:
    tuned = tuned_of(backbone_dir("bert"), "adalora", options={"rank": 2, "target_rank": 1})
    updates, method = tuned.classifier.backbone.updates, tuned.method
    for index, contest in enumerate(updates.contests):
        for buffer in (contest.smoothed, contest.uncertainty):
            buffer.fill_(float(index))
    disturbed(tuned)
    method.after_step(tuned.classifier.backbone, StagePosition(0, 9, 10))
    kept = [contest.kept.tolist() for contest in updates.contests]
    assert kept == [[0.0, 0.0]] * 6 + [[1.0, 1.0]] * 6
    assert [bool(update.values.any()) for update in updates] == [False] * 6 + [True] * 6
    with pytest.raises(ConfigError, match=r"method\.target_rank = 9: more than rank = 8"):
        experiment(Path("minilm"), "adalora", options={"rank": 8, "target_rank": 9})
