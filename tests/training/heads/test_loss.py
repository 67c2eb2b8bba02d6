"""The term on a batch's cosines: what it is worth, and what it does to features."""

from pathlib import Path

import pytest
import torch
from support.models import experiment, loop_on_sixteen

from unipelt_cli.models.build import build
from unipelt_cli.training.events import Batch, Step
from unipelt_cli.training.heads.loss import contrast

LABELS = torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]], 0.0),  # lengths do not count
        ([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 1.0),  # labels not told apart
        ([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], 1.0 + 0.5),  # one pair alike, two not
    ],
)
def test_it_is_the_error_of_each_kind_of_pairs(
    features: list[list[float]], expected: float
) -> None:
    assert float(contrast(torch.tensor(features), LABELS)) == pytest.approx(expected)


def test_a_batch_of_one_label_or_of_one_row_has_a_term() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(contrast(features, torch.tensor([1, 1]))) == pytest.approx(1.0)
    assert float(contrast(features[:1], torch.tensor([1]))) == 0.0


def test_free_features_come_apart_by_label() -> None:
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(12) % 3
    descent = torch.optim.SGD([features], lr=1.0)
    for _ in range(300):
        descent.zero_grad()
        contrast(features, labels).backward()
        descent.step()
    assert float(contrast(features.detach(), labels)) < 1e-3


def first_step(backbone: Path, weight: float) -> tuple[float, float]:
    """Return the loss of a loop's first step, and what the term is on its rows."""
    loop = loop_on_sixteen(build(experiment(backbone, "lora"), 2), contrast=weight)
    classifier, (rows, labels) = loop.tuned.classifier, loop.train
    turn = next(loop.turns())
    assert isinstance(turn, Batch)
    with torch.no_grad():
        features = classifier.features(**rows.batch(turn.rows.tolist(), loop.tuned.device))
    term = contrast(features, torch.as_tensor(labels[turn.rows]))
    step = next(event for event in loop.events() if isinstance(event, Step))
    return step.loss, float(term)


def test_a_step_adds_it_to_the_loss(calm_bert: Path) -> None:
    plain, term = first_step(calm_bert, 0.0)
    with_term, _ = first_step(calm_bert, 3.0)
    assert term > 0.1
    assert with_term == pytest.approx(plain + 3 * term, rel=1e-4)
