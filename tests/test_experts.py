"""What defines AdaMix, routed adapters and ProPETL, each against brute force."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import SENTENCES, bert_base_counts, disturbed, experiment, logits_of, save_backbone
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import ConfigError
from unipelt_cli.methods import Moment, Pass
from unipelt_cli.methods.additive.adamix import AdaMix, AveragedAdapter, divergence
from unipelt_cli.methods.additive.moe_adapter import (
    NOISE_FLOOR,
    RoutedAdapters,
    Router,
    smooth_load,
    squared_variation,
)
from unipelt_cli.methods.additive.propetl import LayerMask, SharedAdapter, pack, top_share, unpack
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.tasks import get_task
from unipelt_cli.training.loop import Training

HIDDEN, LAYERS = 32, 2


@pytest.fixture(scope="session")
def still_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone without dropout: in training only the method draws."""
    directory = tmp_path_factory.mktemp("still") / "bert"
    return save_backbone(
        directory, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def built(directory: Path, method: str, folded: bool = False, **options: Any) -> Tuned:
    return build(experiment(directory, method, options=options), 2, folded=folded)


def training_logits(tuned: Tuned, pad_to: int = 0) -> Tensor:
    """Return the logits of one pass in training mode, with whatever noise that has."""
    inputs = encode_rows(tuned, [SENTENCES], 128).batch(range(len(SENTENCES)), tuned.device)
    short = max(0, pad_to - inputs["input_ids"].shape[1])
    inputs = {name: functional.pad(tensor, (0, short)) for name, tensor in inputs.items()}
    logits: Tensor = tuned.classifier.train()(**inputs)
    return logits


def as_pass(tuned: Tuned, logits: Iterator[Tensor], is_regression: bool = False) -> Pass:
    """Return a step whose passes give these logits, with the mean of the logits as criterion."""
    return Pass(
        tuned.classifier.backbone,
        {},
        Moment(0, 0, 1),
        is_regression,
        lambda: next(logits),
        lambda given: given.mean(),
    )


@pytest.mark.parametrize(
    ("name", "options", "trainable", "stored"),
    [
        ("adamix", {}, 2_223_360, 894_528),
        ("adamix", {"experts": 1}, 894_528, 894_528),
        ("moe-adapter", {}, 12 * (4 * 19_212 + 2 * 4 * 768), 12 * (4 * 19_212 + 4 * 768)),
        ("propetl", {}, 99_136 + 1_179_648, 136_000),
    ],
)
def test_counts_on_bert_base(
    name: str, options: dict[str, object], trainable: int, stored: int
) -> None:
    assert bert_base_counts(name, **options) == (trainable, stored)


# AdaMix


def drawn_adapters(tuned: Tuned) -> list[AveragedAdapter]:
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


@pytest.mark.parametrize("method", ["adamix", "moe-adapter"])
def test_adapters_stand_at_the_feed_forward_output_before_its_dropout(
    still_bert: Path, method: str
) -> None:
    backbone = built(still_bert, method).classifier.backbone
    for layer, adapter in zip(backbone.encoder.layer, backbone.experts, strict=True):
        dense = layer.output.dense
        assert list(dense._forward_hooks.values()) == [adapter.adapt]


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
    assert divergence(first, second, False).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(second, first, False).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(first, first, False).item() == 0
    loss = tuned.method.loss(as_pass(tuned, iter([first, second])))
    assert loss.item() == pytest.approx(first.mean().item() + 0.7 * expected, rel=1e-5)


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


# Routed adapters


def routed(tuned: Tuned) -> list[RoutedAdapters]:
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


# ProPETL


def shared(tuned: Tuned) -> SharedAdapter:
    return cast(SharedAdapter, tuned.classifier.backbone.shared)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_the_kept_share_is_exact_and_a_tie_goes_to_the_first(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for scores in (
        torch.randn(9, 7, generator=generator),
        torch.randint(-2, 3, (9, 7), generator=generator).float(),
        torch.zeros(9, 7),
    ):
        flat = scores.flatten().tolist()
        count = max(1, round(share * 63))
        largest = sorted(range(63), key=lambda place: (-abs(flat[place]), place))[:count]
        expected = torch.zeros(63, dtype=torch.bool)
        expected[largest] = True
        assert torch.equal(top_share(scores, share), expected.view(9, 7))


@pytest.mark.parametrize("count", [1, 7, 8, 64, 1001])
def test_masks_cost_one_bit_a_weight(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack(bits)
    assert packed.tolist() == np.packbits(bits.numpy(), bitorder="little").tolist()
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack(packed, bits.shape), bits)


def test_each_layer_computes_a_plain_adapter_with_its_part_of_the_prototype(
    still_bert: Path,
) -> None:
    tuned = disturbed(built(still_bert, "propetl", share=0.3, reduction=4))
    plain = built(still_bert, "adapter", reduction=4)
    tensors = plain.stored() | {n: t for n, t in tuned.stored().items() if n.startswith("head.")}
    prototype = shared(tuned).prototype
    keeps = []
    for name, mask, part in shared(tuned).each_mask():
        layer, linear = name.split(".")[2], getattr(prototype, part)
        kept = top_share(getattr(mask, part), 0.3)
        keeps.append(kept.flatten())
        own = torch.where(kept, linear.weight, 0.0)
        tensors[f"backbone.submodules.layers.{layer}.adapter.{part}.weight"] = own
        tensors[f"backbone.submodules.layers.{layer}.adapter.{part}.bias"] = linear.bias
    assert not torch.equal(keeps[0], keeps[2])  # the layers keep different parts
    plain.load(tensors)
    expected = logits_of(plain, SENTENCES)
    assert torch.allclose(logits_of(tuned, SENTENCES), expected, atol=1e-6)
    assert not torch.allclose(logits_of(built(still_bert, "head"), SENTENCES), expected, atol=1e-3)


def test_scores_get_the_gradient_of_the_mask_through_their_magnitude(still_bert: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = shared(built(still_bert, "propetl", reduction=4))
    prototype, mask = parts.prototype, cast(LayerMask, parts.masks[0])
    x = torch.randn(5, HIDDEN, generator=generator)
    norm = nn.LayerNorm(HIDDEN)
    (output,) = mask.adapt(norm, (x,))
    target = torch.randn(5, HIDDEN, generator=generator)
    (output * target).sum().backward()
    real = {
        part: top_share(getattr(mask, part), 0.5).float().requires_grad_()
        for part in ("down", "up")
    }
    down, up = prototype.down, prototype.up
    low = (norm(x) @ (down.weight * real["down"]).T + down.bias).relu()
    expected = x + low @ (up.weight * real["up"]).T + up.bias
    assert torch.allclose(output, expected, atol=1e-6)
    gradients = torch.autograd.grad((expected * target).sum(), list(real.values()))
    for part, gradient in zip(real, gradients, strict=True):
        scores = getattr(mask, part)
        assert torch.allclose(scores.grad, gradient * scores.sign(), atol=1e-6)
        dropped = ~top_share(scores, 0.5)
        assert scores.grad[dropped].any()  # what is masked out can come back


def test_scores_train_faster_and_never_decay(still_bert: Path) -> None:
    tuned = built(still_bert, "propetl", mask_rate=20.0)
    rows = encode_rows(tuned, [SENTENCES], 128)
    labels = np.array([0, 1, 0, 1])
    settings = resolve([("", {"data": {"task": "sst2"}, "train": {"weight_decay": 0.1}})]).train
    loop = Training(tuned, get_task("sst2"), (rows, labels), (rows, labels), settings)
    names = {id(p): name for name, p in tuned.classifier.named_parameters()}
    found = {
        names[id(p)]: (group["factor"], group["weight_decay"])
        for group in loop.optimizer.param_groups
        for p in group["params"]
    }
    scores = {name for name, _, _ in shared(tuned).each_mask()}
    assert len(scores) == 2 * LAYERS
    assert {found[f"backbone.{name}"] for name in scores} == {(20.0, 0.0)}
    assert found["backbone.shared.prototype.down.weight"] == (1.0, 0.1)
    assert found["backbone.shared.prototype.down.bias"] == (1.0, 0.0)


def test_propetl_stores_one_prototype_and_bits_and_reads_them_back(
    still_bert: Path, tmp_path: Path
) -> None:
    tuned = disturbed(built(still_bert, "propetl", reduction=5))  # 6 x 32 bits: 24 bytes
    stored = {n: t for n, t in tuned.stored().items() if not n.startswith("head.")}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == (
        4 * (2 * 6 * HIDDEN + 6 + HIDDEN) + LAYERS * 2 * 6 * HIDDEN // 8
    )
    fresh = built(still_bert, "propetl", folded=True, reduction=5)
    fresh.load(tuned.stored())
    for (_, mask, part), (_, again, _) in zip(
        shared(tuned).each_mask(), shared(fresh).each_mask(), strict=True
    ):
        assert torch.equal(mask.kept(part), again.kept(part))
        assert again.kept(part).sum() == 6 * HIDDEN // 2
    assert torch.equal(logits_of(tuned, SENTENCES), logits_of(fresh, SENTENCES))
