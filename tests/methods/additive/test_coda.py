"""CoDA routes exactly k tokens of each row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import (
    ATTENTIONS,
    batch_of,
    disturbed,
    experiment,
    largest_difference,
    last_state,
    logits_of,
    plain_states,
    saved_by,
)
from support.rows import SENTENCES
from torch import Tensor

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.methods.additive.coda import soft_top_k
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel


def best_weights(scores: list[float], count: int, epsilon: float) -> list[float]:
    """Maximise sum(w s) + epsilon * entropy(w), 0 <= w <= 1, sum(w) = count, by bisection."""
    low, high = -1e3, 1e3

    def weights(shift: float) -> list[float]:
        return [min(1.0, float(torch.tensor((s + shift) / epsilon).exp())) for s in scores]

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) < count else (low, middle)
    return weights(low)


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_soft_top_k_is_the_entropic_optimum(epsilon: float, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(5, 9, generator=generator)
    is_open = torch.ones(5, 9, dtype=torch.bool)
    is_open[1, 7:] = False
    is_open[2, 0] = False
    counts = torch.full((5,), count)
    long = soft_top_k(scores, counts, is_open, epsilon, iterations=2000)
    short = soft_top_k(scores, counts, is_open, epsilon)
    assert ((short >= 0) & (short <= 1)).all()
    assert (short.sum(1) <= count + 1e-4).all()
    assert (short.sum(1) >= 0.6 * count).all()  # twenty steps are few where the choice is sharp
    for row in range(5):
        places = is_open[row].nonzero()[:, 0].tolist()
        best = torch.tensor(best_weights(scores[row, places].tolist(), count, epsilon))
        assert (long[row, places] - best).abs().max() < 1e-3
        if epsilon == 1.0:
            assert (short[row, places] - best).abs().max() < 0.05
        assert (long[row][~is_open[row]] == 0).all()


def test_soft_top_k_at_the_corners_and_in_low_precision() -> None:
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    is_open = torch.tensor([[True] * 6, [True] * 3 + [False] * 3, [False] * 6])
    scores.requires_grad_(True)
    weights = soft_top_k(scores, torch.tensor([6, 4, 1]), is_open, 0.03)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, is_open.float())
    weights = soft_top_k(scores, torch.tensor([2, 1, 1]), is_open, 0.03)
    (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("model_type", "attention"), ATTENTIONS)
@pytest.mark.parametrize("attends", ["routed", "all"])
def test_with_every_token_routed_and_no_adapter_coda_is_the_backbone(
    backbone_dir: Callable[[str], Path], model_type: str, attention: str, attends: str
) -> None:
    directory = backbone_dir(model_type)
    model = {"attention": attention}
    options = {"reduction": 1, "attends": attends}
    tuned = build(experiment(directory, "coda", model=model, options=options), 2)
    mask = batch_of(tuned)["attention_mask"]
    assert (
        largest_difference(last_state(tuned), plain_states(directory, attention)[-1], mask) < 1e-5
    )


@pytest.mark.parametrize(("model_type", "attention"), ATTENTIONS)
@pytest.mark.parametrize("attends", ["routed", "all"])
@pytest.mark.parametrize("reduction", [2, 3, 5])
def test_exactly_k_real_tokens_of_each_row_pass_a_layer(
    backbone_dir: Callable[[str], Path],
    model_type: str,
    attention: str,
    attends: str,
    reduction: int,
) -> None:
    options = {"reduction": reduction, "attends": attends}
    settings = experiment(
        backbone_dir(model_type), "coda", model={"attention": attention}, options=options
    )
    tuned = build(settings, 2)  # its adapters are zero, so what skips a layer stays as it was
    layout, backbone = BACKBONES[model_type], tuned.classifier.backbone
    before: list[Tensor] = []
    after: list[Tensor] = []
    inside: list[int] = []
    for layer in layout.layer_list(backbone):
        layer.register_forward_pre_hook(lambda _, a: before.append(a[0]), prepend=True)
        layer.register_forward_pre_hook(lambda _, a: inside.append(a[0].shape[1]))
        layer.register_forward_hook(lambda _, a, output: after.append(output[0]))
    last_state(tuned)
    mask = batch_of(tuned)["attention_mask"].bool()
    counts = [-(-int(length) // reduction) for length in mask.sum(1)]
    assert len(before) == len(after) == 2
    assert inside == [max(counts)] * 2  # the frozen layer sees no more than that
    for start, end in zip(before, after, strict=True):
        changed = (start != end).any(2)
        assert changed.sum(1).tolist() == counts
        assert not (changed & ~mask).any()
        assert changed[:, 0].all()


def first_layer(tuned: TunedModel) -> tuple[Tensor, Tensor, Any]:
    """Run one batch; return the first layer's input and output, and the layer's own extras."""
    backbone: Any = tuned.classifier.backbone
    layer = backbone.encoder.layer[0]
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, a: seen.append(a[0]), prepend=True),
        layer.register_forward_hook(lambda _, a, output: seen.append(output[0])),
    ]
    last_state(tuned)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1], backbone.conditional.layers[0]


def test_a_routed_tokens_change_is_its_weight_times_the_layers(
    backbone_dir: Callable[[str], Path],
) -> None:
    directory = backbone_dir("bert")
    states = plain_states(directory)
    options = {"reduction": 2, "attends": "all", "epsilon": 1.0}
    tuned = disturbed(build(experiment(directory, "coda", options=options), 2))
    before, after, own = first_layer(tuned)
    mask = batch_of(tuned)["attention_mask"].bool()
    with torch.no_grad():
        adapted = torch.relu(before @ own.down.weight.T + own.down.bias) @ own.up.weight.T
        change = after - before - adapted - own.up.bias
    for row in range(len(SENTENCES)):
        length = int(mask[row].sum())
        count = -(-length // 2)
        scores = (before[row, :length] @ own.router.detach()).tolist()
        ranked = sorted(range(1, length), key=lambda place: -scores[place])
        routed = [0, *ranked[: count - 1]]
        best = best_weights(scores[1:], count - 1, 1.0)
        for place in range(length):
            weight = 0.0 if place not in routed else 1.0 if place == 0 else best[place - 1]
            full = weight * (states[1][row, place] - states[0][row, place])
            assert (change[row, place] - full).abs().max() < 0.05
        assert change[row, length:].abs().max() < 1e-5 if length < mask.shape[1] else True


def test_routed_tokens_see_each_other_as_if_the_others_were_not_there(
    backbone_dir: Callable[[str], Path],
) -> None:
    directory = backbone_dir("bert")
    tuned = build(experiment(directory, "coda", options={"reduction": 2}), 2)
    before, after, _ = first_layer(tuned)
    changed = (before != after).any(2)
    plain: Any = build(experiment(directory, "head"), 2).classifier.backbone
    with torch.no_grad():
        for row in range(len(SENTENCES)):
            alone = plain.encoder.layer[0](before[row : row + 1, changed[row]])[0]
            assert (after[row, 0] - alone[0, 0]).abs().max() < 1e-5  # [CLS] has weight 1


def test_the_skip_rate_counts_real_tokens_since_the_last_report(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = build(experiment(backbone_dir("bert"), "coda", options={"reduction": 3}), 2)
    backbone = tuned.classifier.backbone
    assert tuned.method.report(backbone) == {}
    for sentences in (SENTENCES, SENTENCES[:2]):
        logits_of(tuned, sentences, 100)
        rows = encode_rows(tuned, [sentences], 128)
        routed = sum(-(-int(length) // 3) for length in rows.lengths)
        expected = 1 - routed / int(rows.lengths.sum())
        assert tuned.method.report(backbone)["skip_rate"] == pytest.approx(expected)
    assert tuned.method.report(backbone) == {}


def test_every_router_learns_where_all_tokens_are_read(
    backbone_dir: Callable[[str], Path],
) -> None:
    settings = experiment(backbone_dir("bert"), "coda", model={"pooling": "mean"})
    tuned = build(settings, 2)
    saved_by(tuned)
    conditional: Any = tuned.classifier.backbone.conditional
    assert all(own.router.grad.abs().max() > 0 for own in conditional.layers)
