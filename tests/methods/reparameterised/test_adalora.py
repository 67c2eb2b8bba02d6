"""AdaLoRA spends its budget of ranks on the most important ones."""

from pathlib import Path

import pytest
import torch
from support.backbones import Backbones
from support.models import disturbed, experiment, train_on_sixteen, tuned_of
from torch import nn

from unipelt_cli.errors import ConfigError
from unipelt_cli.methods.base import Moment
from unipelt_cli.methods.reparameterised.adalora import AdaLoRA, Contest, Triplets


def test_adaloras_penalty_and_importance_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(3)
    triplets = Triplets(nn.Linear(5, 4), 3, 1.0, generator)
    contest = Contest(triplets)
    expected = 0.0
    p, q = triplets.p.detach(), triplets.q.detach()
    for i in range(3):
        for j in range(3):
            expected += (float(p[:, i] @ p[:, j]) - float(i == j)) ** 2
            expected += (float(q[i] @ q[j]) - float(i == j)) ** 2
    assert triplets.penalty().item() == pytest.approx(expected, rel=1e-5)

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


def test_adaloras_budget_falls_to_its_target_before_an_epoch_can_be_chosen(
    backbone_dir: Backbones,
) -> None:
    method = AdaLoRA()
    budgets = [method.budget(Moment(0, step, 40)) for step in range(40)]
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
    method.after_step(tuned.classifier.backbone, Moment(0, 9, 10))
    kept = [contest.kept.tolist() for contest in updates.contests]
    assert kept == [[0.0, 0.0]] * 6 + [[1.0, 1.0]] * 6
    assert [bool(update.values.any()) for update in updates] == [False] * 6 + [True] * 6
    with pytest.raises(ConfigError, match=r"method\.target_rank = 9: more than rank = 8"):
        experiment(Path("minilm"), "adalora", options={"rank": 8, "target_rank": 9})
