"""HyperFormer makes its adapters out of embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import disturbed, experiment, logits_of
from support.rows import SENTENCES, task_sentence
from torch import Tensor
from torch.nn import functional

from unipelt_cli import methods
from unipelt_cli.backbones.pretrained import BERT_BASE
from unipelt_cli.methods.additive.hyperformer import HyperAdapters, HyperNetwork, Table
from unipelt_cli.models.build import build, count
from unipelt_cli.models.evaluation import compute_logits, encode_rows
from unipelt_cli.models.tuned import Tuned

# HyperFormer


def adapters_of(tuned: Tuned) -> HyperAdapters:
    adapters = tuned.classifier.backbone.hyperformer
    assert isinstance(adapters, HyperAdapters)
    return adapters


@pytest.mark.parametrize(
    ("tasks", "trainable", "stored"),
    [(8, 5_121_136, 5_121_136), (1, 5_120_688, 940_608), (5, 5_120_944, 4_703_040)],
)
def test_counts_on_bert_base_are_the_references(tasks: int, trainable: int, stored: int) -> None:
    method = methods.get("hyperformer").method
    assert count(method, BERT_BASE, 1538, tasks) == (trainable, stored)
    bottleneck, hidden, embedding = 24, 768, 64
    generators = 2 * (2 * bottleneck * hidden + bottleneck + 3 * hidden) * (embedding + 1)
    mlp = (128 + 1) * 128 + (128 + 1) * 64 + 2 * 64
    assert trainable == generators + mlp + 12 * embedding + tasks * embedding


def by_hand(network: HyperNetwork, task: int, layer: int, place: str, x: Tensor) -> Tensor:
    """Compute one adapter from the embeddings: y = x + LN_e(up(gelu(down(x))))."""
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    pair = torch.cat([state[f"tasks.{task}"], state["layers"][layer]])
    embedded = state["down.weight"] @ pair + state["down.bias"]
    embedded = state["up.weight"] @ embedded.clamp(min=0) + state["up.bias"]
    embedded = (embedded - embedded.mean()) / (embedded.var(correction=0) + 1e-6).sqrt()
    embedded = embedded * state["norm.weight"] + state["norm.bias"]

    def made(name: str) -> Tensor:
        where = f"generators.{place}-{name}"
        return state[f"{where}.weight"] @ embedded + state[f"{where}.bias"]

    x = x.double()
    bottleneck, hidden = len(made("down_bias")), x.shape[-1]
    low = x @ made("down_weight").view(bottleneck, hidden).T + made("down_bias")
    up = functional.gelu(low) @ made("up_weight").view(hidden, bottleneck).T + made("up_bias")
    up = (up - up.mean(-1, keepdim=True)) / (up.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return x + up * made("norm_scale") + made("norm_shift")


@pytest.mark.parametrize("options", [{}, {"reduction": 8, "embedding": 6, "width": 10}])
def test_an_adapter_is_what_its_embeddings_make_it(bert: Path, options: dict[str, int]) -> None:
    tuned = disturbed(build(experiment(bert, "hyperformer", options=options), [2, 1, 3]), 0.05)
    network = adapters_of(tuned).source
    assert isinstance(network, HyperNetwork)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layout, found = tuned.pretrained.layout, {}
    layers = layout.layer_list(tuned.classifier.backbone)
    for task in range(3):
        tuned.classifier.select(task)
        logits_of(tuned, SENTENCES)
        for layer in range(2):
            for place, path in (("attention", layout.attention_output), ("output", layout.output)):
                linear = layers[layer].get_submodule(path)
                hook = next(iter(linear._forward_hooks.values()))
                with torch.no_grad():
                    made = hook(linear, (), x)
                expected = by_hand(network, task, layer, place, x)
                assert torch.allclose(made.double(), expected, atol=1e-5)
                found[task, layer, place] = made
    for key, made in found.items():
        assert not any(
            torch.allclose(made, b, atol=1e-3) for other, b in found.items() if other != key
        )


def test_two_tasks_read_one_sentence_through_different_adapters(bert: Path) -> None:
    tuned = build(experiment(bert, "hyperformer"), [2, 2])
    tuned.classifier.other_heads[0].load_state_dict(tuned.classifier.head.state_dict())
    first = logits_of(tuned, SENTENCES)
    tuned.classifier.select(1)
    assert (logits_of(tuned, SENTENCES) - first).abs().max() > 1e-3
    with torch.no_grad():
        vectors = list(adapters_of(tuned).source.tasks)
        vectors[1].copy_(vectors[0])
    assert torch.equal(logits_of(tuned, SENTENCES), first)


def test_evaluation_makes_a_tasks_weights_once(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = build(experiment(bert, "hyperformer"), [2, 2])
    made = []
    forward = HyperNetwork.forward

    def counted(self: HyperNetwork, task: int) -> Any:
        made.append(task)
        return forward(self, task)

    monkeypatch.setattr(HyperNetwork, "forward", counted)
    rows = encode_rows(tuned, [[task_sentence(row, "good") for row in range(900)]], 128)
    compute_logits(tuned, rows, 1)
    assert made == [1]
    before = compute_logits(tuned, rows, 0)
    assert made == [1, 0]
    disturbed(tuned)
    assert abs(compute_logits(tuned, rows, 0) - before).max() > 1e-3, "the weights were stale"


@pytest.mark.parametrize("outputs", [[2], [2, 1], [2] * 100])
def test_what_is_stored_is_the_smaller_form_and_computes_the_same(
    bert: Path, outputs: list[int]
) -> None:
    settings = experiment(bert, "hyperformer")
    tuned = disturbed(build(settings, outputs))
    fresh = build(settings, outputs, folded=True)
    fresh.load(tuned.stored())
    assert isinstance(adapters_of(fresh).source, HyperNetwork if len(outputs) == 100 else Table)
    counts = tuned.parameter_counts()
    stored = counts["stored_parameters"]
    assert stored == min(counts["trainable_parameters"], len(outputs) * 2 * 2 * (2 * 32 + 1 + 96))
    rows = encode_rows(tuned, [SENTENCES], 128)
    for place in range(len(outputs)):
        assert (compute_logits(tuned, rows, place) == compute_logits(fresh, rows, place)).all()
