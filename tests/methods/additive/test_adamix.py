"""AdaMix draws experts, holds them together, and stores their mean."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from support.backbones import HIDDEN, LAYERS
from support.models import as_pass, built, disturbed, logits_of, training_logits
from support.rows import SENTENCES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unipelt_cli.methods.additive.adamix import AdaMix, AveragedAdapter, divergence
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel

# AdaMix


def drawn_adapters(tuned: TunedModel) -> list[AveragedAdapter]:
    return [
        cast(AveragedAdapter, a) for a in cast(nn.ModuleList, tuned.classifier.backbone.experts)
    ]


def test_adamix_stores_the_mean_of_its_experts_and_evaluates_with_it(still_bert: Path) -> None:
    tuned = disturbed(built(still_bert, "adamix"))
    adapters = drawn_adapters(tuned)
    stored = tuned.stored()
    with torch.no_grad():
        for index, adapter in enumerate(adapters):
            mean = sum(adapter.down[i] for i in range(4)) / 4
            assert torch.allclose(stored[f"backbone.experts.{index}.down"][0], mean, atol=1e-6)
            mean = sum(adapter.down_bias[i] for i in range(4)) / 4
            assert torch.allclose(stored[f"backbone.experts.{index}.down_bias"][0], mean, atol=1e-6)
        expected = logits_of(tuned, SENTENCES)
        for adapter in adapters:
            adapter.down.copy_(adapter.down.mean(0, keepdim=True).expand(4, -1, -1))
            adapter.down_bias.copy_(adapter.down_bias.mean(0, keepdim=True).expand(4, -1))
    # with equal experts the draw does not matter
    assert torch.allclose(training_logits(tuned), expected, atol=1e-6)


def test_adamix_adds_a_gelu_bottleneck_to_its_input(still_bert: Path) -> None:
    adapter = drawn_adapters(disturbed(built(still_bert, "adamix", folded=True), 0.3))[0]
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    low = x @ adapter.down[0].T + adapter.down_bias[0]
    bent = low * (1 + torch.erf(low / 2**0.5)) / 2
    expected = x + bent @ adapter.up.weight.T + adapter.up.bias
    assert torch.allclose(adapter.adapt(nn.Identity(), (), x), expected, atol=1e-6)


def test_adamix_training_draws_every_combination_of_experts_over_the_layers(
    still_bert: Path,
) -> None:
    tuned = disturbed(built(still_bert, "adamix", experts=3))
    alone = built(still_bert, "adamix", folded=True)
    stored = tuned.stored()
    combinations = []
    for chosen in product(range(3), repeat=LAYERS):
        for index, expert in enumerate(chosen):
            adapter = drawn_adapters(tuned)[index]
            stored[f"backbone.experts.{index}.down"] = adapter.down[expert : expert + 1]
            stored[f"backbone.experts.{index}.down_bias"] = adapter.down_bias[expert : expert + 1]
        alone.load(stored)
        combinations.append(logits_of(alone, SENTENCES))
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [training_logits(tuned) for _ in range(120)]
    found = [
        [torch.allclose(logits, expected, atol=1e-6) for expected in combinations]
        for logits in drawn
    ]
    assert all(sum(matches) == 1 for matches in found)
    assert np.array(found).any(0).all()


def test_adamix_inference_costs_what_one_adapter_costs(still_bert: Path) -> None:
    flops = {}
    for name, tuned in {
        "none": built(still_bert, "head"),
        "experts": built(still_bert, "adamix", experts=4),
        "one": built(still_bert, "adamix", experts=1),
        "stored": built(still_bert, "adamix", folded=True),
    }.items():
        with FlopCounterMode(display=False) as counter:
            logits_of(tuned, SENTENCES)
        flops[name] = counter.get_total_flops()
    assert flops["experts"] == flops["one"] == flops["stored"]
    tokens = np.prod(
        encode_rows(tuned, [SENTENCES], 128).batch(range(4), tuned.device)["input_ids"].shape
    )
    assert flops["one"] - flops["none"] == LAYERS * tokens * 2 * (2 * HIDDEN * (HIDDEN // 16))


def test_adamix_loss_is_the_first_passes_and_the_symmetric_divergence(still_bert: Path) -> None:
    tuned = built(still_bert, "adamix", consistency=0.7)
    first, second = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    p, q = first.softmax(-1), second.softmax(-1)
    apart = [
        sum(a * math.log(a / b) for a, b in zip(x, y, strict=True))
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    back = [
        sum(b * math.log(b / a) for a, b in zip(x, y, strict=True))
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    expected = sum(a + b for a, b in zip(apart, back, strict=True)) / 2 / 5
    for stops in (True, False):
        assert divergence(first, second, False, stops).item() == pytest.approx(expected, rel=1e-5)
        assert divergence(second, first, False, stops).item() == pytest.approx(expected, rel=1e-5)
        assert divergence(first, first, False, stops).item() == 0
    loss = tuned.method.loss(as_pass(tuned, iter([first, second])))
    assert loss.item() == pytest.approx(first.mean().item() + 0.7 * expected, rel=1e-5)


def test_each_half_of_the_divergence_moves_one_pass_as_in_the_release_or_both(
    still_bert: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    passes = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)

    def gradients(**options: object) -> list[torch.Tensor]:
        method = built(still_bert, "adamix", **options).method
        moved = [logits.clone().requires_grad_() for logits in passes]
        step = as_pass(built(still_bert, "adamix"), iter(moved))
        method.loss(replace(step, criterion=lambda logits: 0 * logits.sum())).backward()
        return [cast(torch.Tensor, logits.grad) for logits in moved]

    # The gradient of KL(t | q) with a constant t to the logits of q is q - t.
    p, q = passes.softmax(-1)
    first, second = gradients()
    assert torch.allclose(first, (p - q) / 2 / 5)
    assert torch.allclose(second, (q - p) / 2 / 5)
    # The paper's formula is differentiated as it stands: compared with finite differences.
    first, second = gradients(stop_gradient=False)
    for place, found in enumerate((first, second)):
        for row, column in product(range(5), range(3)):
            ends = []
            for way in (1e-5, -1e-5):
                near = passes.clone()
                near[place, row, column] += way
                a, b = near.softmax(-1)
                ends.append(float(((a - b) * (a.log() - b.log())).sum() / 2 / 5))
            slope = (ends[0] - ends[1]) / 2e-5
            assert found[row, column].item() == pytest.approx(slope, abs=1e-8)


def test_adamix_holds_a_regressions_passes_together_by_the_squared_difference(
    still_bert: Path,
) -> None:
    tuned = built(still_bert, "adamix")
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [0.0]])
    loss = tuned.method.loss(as_pass(tuned, iter([first, second]), is_regression=True))
    assert loss.item() == pytest.approx(1.5 + (0.25 + 4.0) / 2)


def test_adamix_without_consistency_passes_once(still_bert: Path) -> None:
    tuned = built(still_bert, "adamix", consistency=0.0)
    passes = iter([torch.ones(2, 2), torch.zeros(2, 2)])
    assert tuned.method.loss(as_pass(tuned, passes)).item() == 1
    assert len(list(passes)) == 1


def test_adamix_decays_its_matrices_and_not_its_stacked_biases() -> None:
    method = AdaMix()
    assert method.decays("experts.0.down")
    assert not method.decays("experts.0.down_bias")
