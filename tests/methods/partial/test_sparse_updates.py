"""FISH mask and child-tuning choose entries by their gradients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.partial import (
    TWELVE,
    TWELVE_LABELS,
    flat,
    goes_on,
    largest,
    made,
    prepared,
    pristine,
    training,
)
from torch import Tensor

from unipelt_cli.methods.base import StagePosition
from unipelt_cli.methods.partial.overlay import top
from unipelt_cli.methods.partial.sparse_updates import sparse
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel, merge
from unipelt_cli.training.step import train_losses


def gradients(tuned: TunedModel, rows: list[int]) -> dict[str, Tensor]:
    """Return the gradient of the mean loss of some rows, worked out without the loop."""
    tuned.classifier.zero_grad()
    batch = encode_rows(tuned, [[TWELVE[row] for row in rows]], 128)
    logits = tuned.classifier(**batch.batch(range(len(rows)), tuned.device))
    chances = logits.softmax(1)[torch.arange(len(rows)), torch.as_tensor(TWELVE_LABELS[rows])]
    (-chances.log().mean()).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in tuned.classifier.backbone.named_parameters()
    }


@pytest.mark.parametrize("count", range(1, 31))
def test_the_largest_win_and_of_equal_ones_the_first(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(0, 4, (30,), generator=generator).float()
    found = top(scores, count)
    assert found.dtype == torch.int32
    assert found.tolist() == largest(scores, count)


@pytest.mark.parametrize("samples", [1024, 3])
def test_the_mask_is_the_fisher_information_example_by_example(calm: Path, samples: int) -> None:
    tuned = prepared(made(calm, "fish-mask", samples=samples))
    reference = made(calm, "full")
    used = range(min(samples, len(TWELVE)))
    fisher = sum(flat(gradients(reference, [row])).double() ** 2 for row in used)
    assert isinstance(fisher, Tensor)
    own = sparse(tuned.classifier.backbone)
    count = int(0.005 * (len(fisher) + 66)) - 66
    assert own.entries.places.tolist() == largest(fisher, count)
    batch = flat(gradients(reference, list(used))).double() ** 2
    assert own.entries.places.tolist() != largest(batch, count)


def test_the_fisher_information_is_taken_without_dropout(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = prepared(made(backbone_dir("bert"), "fish-mask"))
    reference = made(backbone_dir("bert"), "full")
    assert not reference.classifier.training
    fisher = sum(flat(gradients(reference, [row])).double() ** 2 for row in range(len(TWELVE)))
    assert isinstance(fisher, Tensor)
    places = sparse(tuned.classifier.backbone).entries.places.tolist()
    assert places == largest(fisher, len(places))


@pytest.mark.parametrize("method", ["fish-mask", "diff-pruning"])
def test_what_was_not_chosen_stays_to_the_bit_and_the_rest_is_pretrained_plus_delta(
    calm: Path, method: str
) -> None:
    tuned = made(calm, method)
    list(training(tuned, weight_decay=0.5).events())
    before = pristine(calm)
    backbone = tuned.classifier.backbone
    now = dict(backbone.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    own = sparse(backbone)
    places, deltas = own.entries.places.clone(), own.deltas.detach().clone()
    assert (places.diff() > 0).all()
    expected = flat(before)
    expected[places.long()] += deltas
    merge(tuned)
    assert torch.equal(flat(dict(backbone.named_parameters())), expected)
    moved = (expected != flat(before)).nonzero()[:, 0]
    assert len(moved) > 0.9 * len(places)


def test_an_entry_of_the_gradient_is_kept_or_dropped_so_that_its_mean_stays(calm: Path) -> None:
    tuned = made(calm, "child-tuning-f", kept=0.3)
    backbone = tuned.classifier.backbone
    torch.manual_seed(5)
    gradient = {name: torch.randn_like(p) for name, p in backbone.named_parameters()}
    total = {name: torch.zeros_like(g) for name, g in gradient.items()}
    draws = 400
    for _ in range(draws):
        for name, parameter in backbone.named_parameters():
            parameter.grad = gradient[name].clone()
        tuned.method.after_backward(backbone, StagePosition(0, 0, 1))
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None
            total[name] += parameter.grad
    last = flat({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    whole = flat(gradient)
    kept = last != 0
    assert torch.allclose(last[kept], whole[kept] / 0.3)
    assert abs(float(kept.float().mean()) - 0.3) < 0.01
    ratio = flat(total) / draws / whole
    assert abs(float(ratio.mean()) - 1) < 0.005
    # one entry's mean of 400 draws has the deviation sqrt(0.7 / 0.3 / 400) = 0.076
    assert abs(float(ratio.std()) - 0.0764) < 0.005


def test_the_child_is_the_layers_largest_mean_square_of_clipped_gradients(calm: Path) -> None:
    tuned = prepared(made(calm, "child-tuning-d", batch_size=5))
    reference = made(calm, "full")
    total: dict[str, Tensor] = {}
    for rows in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]):
        for name, gradient in gradients(reference, rows).items():
            if name.startswith("encoder.layer."):
                clipped = gradient / max(1.0, float(gradient.norm()) + 1e-6)
                total[name] = total.get(name, torch.zeros(())) + clipped**2 / 3
    child = tuned.classifier.backbone.child
    assert child.places.tolist() == largest(flat(total), int(0.3 * len(flat(total))))


def test_the_child_is_chosen_with_dropout(calm: Path) -> None:
    tuned = made(calm, "child-tuning-d")
    loop = training(tuned)
    seen: list[bool] = []

    def losses(*arguments: Any, **options: Any) -> Iterator[Tensor]:
        for loss in train_losses(tuned, loop.courses, 42, *arguments, **options):
            seen.append(tuned.classifier.training)
            yield loss

    tuned.method.prepare(tuned.classifier.backbone, losses)
    assert seen == [True]


def test_outside_the_child_nothing_moves_whatever_decays(calm: Path) -> None:
    tuned = made(calm, "child-tuning-d")
    list(training(tuned, weight_decay=0.5).events())
    backbone, before = tuned.classifier.backbone, pristine(calm)
    layers = {n: p for n, p in backbone.named_parameters() if n.startswith("encoder.layer.")}
    old = flat({name: before[name] for name in layers})
    chosen = torch.zeros(len(old), dtype=torch.bool)
    chosen[backbone.child.places.long()] = True
    moved = flat(layers) != old
    assert not moved[~chosen].any()
    assert moved[chosen].float().mean() > 0.99
    others = {n: p for n, p in backbone.named_parameters() if n not in layers}
    assert {"pooler.dense.weight", "embeddings.LayerNorm.weight"} <= others.keys()
    whole = [n for n in others if "position" not in n and "word" not in n and "type" not in n]
    assert all((others[name] != before[name]).all() for name in whole)
    # decay alone moves what no row names
    assert (
        others["embeddings.word_embeddings.weight"][99]
        != before["embeddings.word_embeddings.weight"][99]
    ).all()


@pytest.mark.parametrize("method", ["fish-mask", "child-tuning-f", "child-tuning-d"])
@pytest.mark.parametrize("stop_after", [1, 4, 6])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    backbone_dir: Callable[[str], Path], method: str, stop_after: int
) -> None:
    goes_on(backbone_dir("bert"), method, stop_after)
