"""Diff pruning keeps the largest expected differences."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import logits_of
from support.partial import goes_on, largest, made, training
from support.rows import SENTENCES

from unipelt_cli.methods.base import StagePosition, TrainingBatch
from unipelt_cli.methods.partial.diff_pruning import (
    Differences,
    expected_gate,
    open_chance,
    sample_gate,
    sampled_difference,
)
from unipelt_cli.methods.partial.sparse_updates import pack, sparse, unpack
from unipelt_cli.models.evaluation import encode_rows


@pytest.mark.parametrize("total", [1, 8, 21])
def test_bits_are_packed_and_unpacked(total: int) -> None:
    places = torch.arange(0, total, 3, dtype=torch.int32)
    bits = np.zeros(total, dtype=np.uint8)
    bits[places.numpy()] = 1
    packed = pack(places, total)
    assert packed.numpy().tolist() == np.packbits(bits, bitorder="little").tolist()
    assert torch.equal(unpack(packed), places)
    assert unpack(packed).dtype == torch.int32


@pytest.mark.parametrize("alpha", [-30.0, -2.0, 0.0, 0.7, 5.0, 30.0])
def test_a_gate_is_what_its_draws_are_on_average(alpha: float) -> None:
    torch.manual_seed(3)
    draws = sample_gate(torch.full((400_000,), alpha))
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert abs(draws.mean() - expected_gate(torch.tensor([alpha]))) < 2e-3
    assert abs((draws > 0).float().mean() - open_chance(torch.tensor(alpha))) < 2e-3


def test_the_expected_gate_is_the_integral() -> None:
    alpha = torch.tensor([-3.0, 0.0, 1e-4, 5.0, 12.0], dtype=torch.float64)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    exact = (alpha[:, None] - ((t + 1.5) / 3).logit()).sigmoid().mean(1)
    assert (expected_gate(alpha) - exact).abs().max() < 1e-6


def test_a_sampled_difference_is_what_its_parts_give_with_their_gradients() -> None:
    generator = torch.Generator().manual_seed(4)
    start = [torch.randn(5000, generator=generator, dtype=torch.float64) for _ in range(3)]
    results, gradients = [], []
    for fused in (True, False):
        w, alpha = (tensor.clone().requires_grad_() for tensor in start[:2])
        gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(6)
        result = sampled_difference(w, alpha, gate) if fused else w * (sample_gate(alpha) * gate)
        (result * start[2]).sum().backward()
        results.append(result.detach())
        gradients.append([w.grad, alpha.grad, gate.grad])
    assert torch.allclose(*results)
    assert 0.2 < float((results[0] == 0).double().mean()) < 0.8
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain)


def test_the_penalty_is_the_expected_number_of_entries_that_differ(calm: Path) -> None:
    tuned = made(calm, "diff-pruning", penalty=1e-3)
    differences = tuned.classifier.backbone.differences
    assert isinstance(differences, Differences)
    torch.manual_seed(8)
    with torch.no_grad():
        differences.w.fill_(1.0)
        differences.alpha.normal_(0.0, 2.0)
        differences.groups.normal_(0.0, 2.0)
        drawn = torch.stack(
            [
                torch.cat([(part != 0).float() for part in differences.train().gated()]).sum()
                for _ in range(400)
            ]
        )
        count = float(differences.expected_count())
    # the groups' gates open whole tensors at a time, so the mean is rough: 4 deviations
    assert abs(count - float(drawn.mean())) < 4 * float(drawn.std()) / 20
    step = TrainingBatch(
        tuned.classifier.backbone,
        {},
        StagePosition(0, 0, 1),
        is_regression=False,
        forward=lambda: torch.tensor([3.0]),
        criterion=lambda logits: logits.sum(),
    )
    assert float(tuned.method.loss(step).detach()) == pytest.approx(3.0 + 1e-3 * count)


def test_evaluation_sees_expected_gates_and_training_sees_draws(calm: Path) -> None:
    tuned = made(calm, "diff-pruning")
    differences = tuned.classifier.backbone.differences
    with torch.no_grad():
        differences.w.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
        differences.alpha.zero_()
        assert torch.equal(logits_of(tuned, SENTENCES), logits_of(tuned, SENTENCES))
        batch = encode_rows(tuned, [SENTENCES], 128).batch(range(4), tuned.device)
        tuned.classifier.train()
        assert not torch.equal(tuned.classifier(**batch), tuned.classifier(**batch))
        (first,) = list(differences.eval().gated())[:1]
    gate = expected_gate(torch.zeros(1)) * expected_gate(torch.full((1,), 5.0))
    assert torch.allclose(first, differences.w[: len(first)] * gate, atol=1e-6)


def test_pruning_keeps_the_share_of_largest_expected_differences_exactly(calm: Path) -> None:
    tuned = made(calm, "diff-pruning", share=0.01)
    backbone, loop = tuned.classifier.backbone, training(tuned, epochs=4)
    differences = backbone.differences
    assert isinstance(differences, Differences)
    events = loop.events()
    while loop.progress.epoch < 3:
        next(events)
    with torch.no_grad():
        expected = torch.cat(list(differences.eval().gated()))
    next(events)  # the second stage's first step
    own = sparse(backbone)
    count = int(0.01 * len(expected))
    assert len(own.deltas) == count
    assert own.entries.places.tolist() == largest(expected.abs(), count)
    assert not hasattr(backbone, "differences")
    assert sum(p.numel() for p in differences.parameters()) == 0
    trained = {name for name, p in tuned.classifier.named_parameters() if p.requires_grad}
    assert trained == {"backbone.sparse.deltas", "head.out.weight", "head.out.bias"}
    assert set(loop.parameters) == trained
    step = (own.deltas - expected[own.entries.places.long()]).abs()
    assert 0 < step.max() < 0.011  # one step of AdamW from the pruned values


@pytest.mark.parametrize("stop_after", [1, 5, 8, 9, 11])
def test_pruning_goes_on_bit_for_bit_in_either_stage(
    backbone_dir: Callable[[str], Path], stop_after: int
) -> None:
    goes_on(backbone_dir("bert"), "diff-pruning", stop_after)
