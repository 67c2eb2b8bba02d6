"""HyperFormer makes its adapters out of embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import disturbed, experiment, logits_of, names_moved, tuned_of
from support.rows import SENTENCES, task_sentence
from torch import Tensor
from torch.nn import functional

from unipelt_cli import methods
from unipelt_cli.backbones.pretrained import BERT_BASE
from unipelt_cli.methods.additive.hyperformer import HyperAdapters, HyperNetwork, Table
from unipelt_cli.models.build import build, count
from unipelt_cli.models.evaluation import compute_logits, encode_rows
from unipelt_cli.models.tuned import TunedModel

# HyperFormer


def adapters_of(tuned: TunedModel) -> HyperAdapters:
    adapters = tuned.classifier.backbone.hyperformer
    assert isinstance(adapters, HyperAdapters)
    return adapters


NORMS = 25 * 2 * 768  # of BERT-base: the embeddings' and two a layer, scale and shift
PER_BLOCK = {"generators": "per_block", "train_layer_norms": False}


@pytest.mark.parametrize(
    ("options", "tasks", "trainable", "stored"),
    [
        ({}, 1, 2_581_528 + NORMS, 940_608 + NORMS),
        ({}, 2, 2_581_592 + NORMS, 1_881_216 + NORMS),
        ({}, 8, 2_581_976 + NORMS, 2_581_976 + NORMS),
        ({"train_layer_norms": False}, 1, 2_581_528, 940_608),
        (PER_BLOCK, 1, 5_120_688, 940_608),
        (PER_BLOCK, 5, 5_120_944, 4_703_040),
        (PER_BLOCK, 8, 5_121_136, 5_121_136),
    ],
)
def test_counts_on_bert_base_are_the_references(
    options: dict[str, Any], tasks: int, trainable: int, stored: int
) -> None:
    method = experiment(Path("minilm"), "hyperformer", options=options).method
    assert count(method, BERT_BASE, 1538, tasks) == (trainable, stored)
    bottleneck, hidden, embedding = 24, 768, 64
    generators = (2 * bottleneck * hidden + bottleneck + 3 * hidden) * (embedding + 1)
    is_shared = "generators" not in options
    read = 3 * embedding if is_shared else 2 * embedding
    mlp = (read + 1) * 128 + (128 + 1) * 64 + 2 * 64
    vectors = 12 + tasks + (2 if is_shared else 0)
    norms = 0 if options else NORMS
    expected = generators * (1 if is_shared else 2) + mlp + vectors * embedding
    assert trainable == expected + norms


def test_the_share_of_t5_base_that_eight_tasks_train_is_the_papers() -> None:
    # Encoder and decoder have a network each, 12 layers, and T5-base has 222,903,552 numbers.
    sizes = methods.get("hyperformer").method.sizes(768)
    network = HyperNetwork(sizes, (8, 12), (64, 128), True, torch.Generator())
    numbers = sum(p.numel() for name, p in network.named_parameters() if "tasks" not in name)
    per_task = (2 * numbers + 8 * 64) / 8 / 222_903_552
    assert round(100 * per_task, 2) == 0.29


def test_every_layer_norm_of_the_backbone_trains_or_none(bert: Path) -> None:
    own = {name for name, _ in tuned_of(bert, "head").classifier.backbone.named_parameters()}
    norms = {name for name in own if "LayerNorm" in name}
    assert len(norms) == 2 * (1 + 2 * 2)
    tuned = tuned_of(bert, "hyperformer")
    moved = {name.removeprefix("backbone.") for name in names_moved(tuned, epochs=1)}
    assert moved & own == norms
    assert norms <= {name.removeprefix("backbone.") for name in tuned.stored()}
    frozen = tuned_of(bert, "hyperformer", options={"train_layer_norms": False})
    moved = {name.removeprefix("backbone.") for name in names_moved(frozen, epochs=1)}
    assert not moved & own


def test_blocks_share_generators_and_differ_by_their_embeddings_alone(bert: Path) -> None:
    network = adapters_of(disturbed(tuned_of(bert, "hyperformer"))).source
    assert isinstance(network, HyperNetwork)
    made = network(0)
    names = [name.removeprefix("output-") for name in made if name.startswith("output-")]
    assert len(names) == len(network.generators) == 6
    for name in names:
        assert not torch.allclose(made[f"attention-{name}"], made[f"output-{name}"], atol=1e-3)
    with torch.no_grad():
        network.blocks[0] = network.blocks[1]
        made = network(0)
    for name in names:
        assert torch.equal(made[f"attention-{name}"], made[f"output-{name}"])


def by_hand(network: HyperNetwork, task: int, layer: int, place: str, x: Tensor) -> Tensor:
    """Compute one adapter from the embeddings: y = x + LN_e(up(gelu(down(x))))."""
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    block = ("attention", "output").index(place)
    is_shared = "blocks" in state
    vectors = [state[f"tasks.{task}"], state["layers"][layer]]
    read = torch.cat([*vectors, state["blocks"][block]] if is_shared else vectors)
    embedded = state["down.weight"] @ read + state["down.bias"]
    embedded = state["up.weight"] @ embedded.clamp(min=0) + state["up.bias"]
    embedded = (embedded - embedded.mean()) / (embedded.var(correction=0) + 1e-6).sqrt()
    embedded = embedded * state["norm.weight"] + state["norm.bias"]

    def made(name: str) -> Tensor:
        where = f"generators.{name}" if is_shared else f"generators.{place}-{name}"
        return state[f"{where}.weight"] @ embedded + state[f"{where}.bias"]

    x = x.double()
    bottleneck, hidden = len(made("down_bias")), x.shape[-1]
    low = x @ made("down_weight").view(bottleneck, hidden).T + made("down_bias")
    up = functional.gelu(low) @ made("up_weight").view(hidden, bottleneck).T + made("up_bias")
    up = (up - up.mean(-1, keepdim=True)) / (up.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    return x + up * made("norm_scale") + made("norm_shift")


@pytest.mark.parametrize("options", [{}, PER_BLOCK, {"reduction": 8, "embedding": 6, "width": 10}])
def test_an_adapter_is_what_its_embeddings_make_it(bert: Path, options: dict[str, Any]) -> None:
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
    norms = 2 * 32 * (1 + 2 * 2)
    made = len(outputs) * 2 * 2 * (2 * 32 + 1 + 96)
    assert stored == norms + min(counts["trainable_parameters"] - norms, made)
    rows = encode_rows(tuned, [SENTENCES], 128)
    for place in range(len(outputs)):
        assert (compute_logits(tuned, rows, place) == compute_logits(fresh, rows, place)).all()
