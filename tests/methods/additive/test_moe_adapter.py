"""A router chooses adapters, and spreads its choices."""

import math
from itertools import product
from pathlib import Path
from typing import cast

import pytest
import torch
from support.backbones import HIDDEN, LAYERS
from support.models import as_pass, built, disturbed, experiment, logits_of, training_logits
from support.rows import SENTENCES
from torch import Tensor, nn

from unipelt_cli.errors import ConfigError
from unipelt_cli.methods.additive.moe_adapter import (
    NOISE_FLOOR,
    RoutedAdapters,
    Router,
    smooth_load,
    squared_variation,
)
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel


@pytest.mark.parametrize("method", ["adamix", "moe-adapter"])
def test_adapters_stand_at_the_feed_forward_output_before_its_dropout(
    still_bert: Path, method: str
) -> None:
    backbone = built(still_bert, method).classifier.backbone
    for layer, adapter in zip(backbone.encoder.layer, backbone.experts, strict=True):
        dense = layer.output.dense
        assert list(dense._forward_hooks.values()) == [adapter.adapt]


# Routed adapters


def routed(tuned: TunedModel) -> list[RoutedAdapters]:
    return [cast(RoutedAdapters, a) for a in cast(nn.ModuleList, tuned.classifier.backbone.experts)]


def dense_mixture(layer: RoutedAdapters, x: Tensor, router_input: Tensor, active: int) -> Tensor:
    """Add to one token's x (D) every expert's output by its gate, zero for all but the largest."""
    scores = (layer.router.gate @ router_input).tolist()
    largest = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:active]
    total = sum(math.exp(scores[i]) for i in largest)
    gates = [math.exp(scores[i]) / total if i in largest else 0.0 for i in range(len(scores))]
    return x + sum(g * e(x) for g, e in zip(gates, layer.experts, strict=True))


@pytest.mark.parametrize("routing", ["token", "sentence"])
@pytest.mark.parametrize("active", [1, 2, 4])
def test_sparse_dispatch_equals_the_dense_weighted_sum(
    still_bert: Path, routing: str, active: int
) -> None:
    tuned = disturbed(built(still_bert, "moe-adapter", routing=routing, active=active), 0.5)
    layer = routed(tuned)[0]
    x = torch.randn(3, 6, HIDDEN, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4]])).long()
    with torch.no_grad():
        layer.state.begin(nn.Identity(), (), {"attention_mask": mask})
        output = layer.adapt(nn.Identity(), (), x)
        for row, token in product(range(3), range(6)):
            expected = x[row, token]
            if mask[row, token]:
                seen = x[row, mask[row].bool()].mean(0) if routing == "sentence" else expected
                expected = dense_mixture(layer, expected, seen, active)
            assert torch.allclose(output[row, token], expected, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_each_real_token_is_computed_by_exactly_so_many_experts(
    still_bert: Path, active: int, training: bool
) -> None:
    tuned = disturbed(built(still_bert, "moe-adapter", active=active), 0.5)
    given: list[int] = []
    chosen: list[Tensor] = []
    for layer in routed(tuned):
        layer.router.register_forward_hook(lambda module, args, out: chosen.append(out[1]))
        for expert in layer.experts:
            expert.register_forward_hook(lambda module, args, out: given.append(len(args[0])))
    if training:
        training_logits(tuned, pad_to=40)
    else:
        logits_of(tuned, SENTENCES, pad_to=40)
    tokens = int(encode_rows(tuned, [SENTENCES], 128).lengths.sum())
    assert sum(given) == LAYERS * tokens * active
    assert [tuple(c.shape) for c in chosen] == [(tokens, active)] * LAYERS
    assert all(len(set(row)) == active for c in chosen for row in c.tolist())


def brute_force_load(clean: Tensor, spread: Tensor, scores: Tensor, active: int) -> list[float]:
    load = [0.0] * clean.shape[1]
    for unit, expert in product(range(len(clean)), range(len(load))):
        others = [s for i, s in enumerate(scores[unit].tolist()) if i != expert]
        bar = sorted(others, reverse=True)[active - 1]
        z = (clean[unit, expert].item() - bar) / spread[unit, expert].item()
        load[expert] += (1 + math.erf(z / 2**0.5)) / 2
    return load


def variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


@pytest.mark.parametrize("active", [1, 2, 3])
def test_imbalance_equals_brute_force(active: int) -> None:
    router = Router(HIDDEN, 4, active, folded=False)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, HIDDEN, generator=generator)
    with torch.no_grad():
        router.gate.normal_(0, 0.2, generator=generator)
        router.noise.normal_(0, 0.2, generator=generator)
        torch.manual_seed(11)
        weights, chosen, imbalance = router(x)
        torch.manual_seed(11)
        clean = x @ router.gate.T
        spread = (1 + (x @ router.noise.T).exp()).log() + NOISE_FLOOR
        scores = clean + torch.randn(7, 4) * spread
    importance = [0.0] * 4
    for unit in range(7):
        largest = scores[unit].topk(active)
        assert chosen[unit].tolist() == largest.indices.tolist()
        assert torch.allclose(weights[unit], largest.values.softmax(-1), atol=1e-6)
        for expert, weight in zip(chosen[unit].tolist(), weights[unit].tolist(), strict=True):
            importance[expert] += weight
    load = brute_force_load(clean, spread, scores, active)
    assert smooth_load(clean, spread, scores, active).tolist() == pytest.approx(load, rel=1e-4)
    assert imbalance.item() == pytest.approx(variation(importance) + variation(load), rel=1e-4)


def test_load_is_the_chance_to_be_chosen_again_with_fresh_noise_on_one_expert() -> None:
    generator = torch.Generator().manual_seed(2)
    clean, spread = torch.randn(1, 4, generator=generator), torch.rand(1, 4, generator=generator)
    scores = clean + torch.randn(1, 4, generator=generator) * spread
    expected = []
    for expert in range(4):
        again = scores.repeat(40_000, 1)
        fresh = torch.randn(40_000, generator=generator)
        again[:, expert] = clean[0, expert] + fresh * spread[0, expert]
        chosen = again.topk(2).indices
        expected.append((chosen == expert).any(1).float().mean().item())
    assert min(expected) < 0.5 < max(expected)
    assert smooth_load(clean, spread, scores, 2).tolist() == pytest.approx(expected, abs=0.01)


def test_balanced_routing_has_no_imbalance_and_lopsided_routing_has() -> None:
    router = Router(4, 4, 2, folded=False).train()
    with torch.no_grad():
        router.gate.copy_(torch.eye(4) * 3)
    rotated = torch.stack([torch.tensor([4.0, 3.0, 2.0, 1.0]).roll(i) for i in range(4)])
    importance = torch.zeros(4, 4).scatter(1, *reversed(router._choose(rotated))).sum(0)
    assert squared_variation(importance).item() == pytest.approx(0, abs=1e-12)
    load = smooth_load(rotated, torch.full((4, 4), 0.5), rotated, 2)
    assert squared_variation(load).item() == pytest.approx(0, abs=1e-12)
    assert squared_variation(torch.tensor([4.0, 0.0, 0.0, 0.0])).item() == pytest.approx(3)
    _, _, lopsided = router(rotated[:1].repeat(50, 1))
    assert lopsided > 0.5


@pytest.mark.parametrize("routing", ["token", "sentence"])
def test_padding_changes_neither_training_nor_imbalance(still_bert: Path, routing: str) -> None:
    tuned = disturbed(built(still_bert, "moe-adapter", routing=routing))
    found = []
    for pad_to in (0, 60):
        torch.manual_seed(4)
        logits = training_logits(tuned, pad_to)
        imbalances = routed(tuned)[0].state.imbalances
        assert len(imbalances) == LAYERS
        found.append(torch.cat([logits.flatten(), torch.stack(imbalances)]))
    assert torch.allclose(*found, atol=1e-5)


def test_moe_loss_adds_the_imbalance_of_all_layers(still_bert: Path) -> None:
    tuned = disturbed(built(still_bert, "moe-adapter", balance=0.3))
    logits = training_logits(tuned)
    expected = sum(i.item() for i in routed(tuned)[0].state.imbalances)
    assert expected > 0
    loss = tuned.method.loss(as_pass(tuned, iter([logits])))
    assert loss.item() == pytest.approx(logits.mean().item() + 0.3 * expected, rel=1e-5)
    loss.backward()
    assert all(layer.router.noise.grad.any() for layer in routed(tuned))


def test_tied_gates_choose_the_first_experts(still_bert: Path) -> None:
    weights, chosen, _ = Router(HIDDEN, 4, 2, folded=True).eval()(torch.randn(5, HIDDEN))
    assert chosen.tolist() == [[0, 1]] * 5
    assert weights.tolist() == [[0.5, 0.5]] * 5


def test_moe_reports_how_its_experts_were_used(still_bert: Path) -> None:
    tuned = built(still_bert, "moe-adapter")
    logits_of(tuned, SENTENCES)
    backbone = tuned.classifier.backbone
    assert tuned.method.report(backbone) == {"most_used_expert": 0.5, "least_used_expert": 0.0}
    assert tuned.method.report(backbone) == {"most_used_expert": 0.0, "least_used_expert": 0.0}


def test_more_active_experts_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="active = 5: there are 4 experts"):
        experiment(Path("minilm"), "moe-adapter", options={"active": 5})
