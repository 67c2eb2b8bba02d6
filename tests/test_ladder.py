"""LST, side-tuning and conditional adapters, against brute force and their own definitions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    SENTENCES,
    bert_base_counts,
    by_the_hooks,
    disturbed,
    experiment,
    logits_of,
    save_backbone,
)
from torch import Tensor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.methods.additive.coda import soft_top_k
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import Tuned

PLACES = [
    (model_type, attention)
    for model_type in ("bert", "roberta", "electra", "distilbert")
    for attention in BACKBONES[model_type].attentions
]
LAYER = 7_087_872  # of BERT-base


def batch_of(tuned: Tuned) -> dict[str, Tensor]:
    return encode_rows(tuned, [SENTENCES], 128).batch(range(len(SENTENCES)), tuned.device)


def plain_states(directory: Path, attention: str = "eager") -> tuple[Tensor, ...]:
    """Return the embeddings' output and every layer's, of the backbone without a method."""
    head = build(experiment(directory, "head", model={"attention": attention}), 2)
    with torch.no_grad():
        output = head.classifier.backbone(**batch_of(head), output_hidden_states=True)
    states: tuple[Tensor, ...] = output.hidden_states
    return states


def last_state(tuned: Tuned) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = tuned.classifier.backbone(**batch_of(tuned)).last_hidden_state
    return hidden


def worst(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Return the largest difference at real tokens: nothing else is ever read."""
    return float((one - other)[mask.bool()].abs().max())


@pytest.mark.parametrize(
    ("name", "options", "counted"),
    [
        ("lst", {}, 2_376_492),
        ("lst", {"drop": "0,4,8"}, 1_819_497),
        ("side-tuning", {}, 2 * LAYER + 1),
        ("side-tuning", {"layers": 4}, 4 * LAYER + 1),
        ("coda", {}, 12 * (768 + 2 * 64 * 768 + 64 + 768)),
    ],
)
def test_counts_on_bert_base(name: str, options: dict[str, Any], counted: int) -> None:
    assert bert_base_counts(name, **options) == (counted, counted)


def narrow_bert_layer(own: Any, width: int, inner: int, heads: int) -> BertLayer:
    """Make the library's own layer, as narrow as the side's and with its weights."""
    config = BertConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        layer_norm_eps=1e-5,
        attn_implementation="eager",
    )
    layer = BertLayer(config).eval()
    layout = BACKBONES["bert"]
    for name in own._modules.keys() - {"dropout"}:
        layer.get_submodule(getattr(layout, name)).load_state_dict(getattr(own, name).state_dict())
    return layer


@pytest.mark.parametrize(("model_type", "attention"), PLACES)
@pytest.mark.parametrize("drop", [(), (0,), (1,)])
def test_the_ladder_is_the_papers_recursion_over_the_plain_states(
    backbone_dir: Callable[[str], Path], model_type: str, attention: str, drop: tuple[int, ...]
) -> None:
    directory = backbone_dir(model_type)
    settings = experiment(
        directory, "lst", model={"attention": attention}, options={"drop": list(drop)}
    )
    tuned = disturbed(build(settings, 2), 0.3)
    ladder: Any = tuned.classifier.backbone.ladder
    states = plain_states(directory, attention)
    mask = batch_of(tuned)["attention_mask"]
    closed = (1.0 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
    with torch.no_grad():
        side = ladder.embedded(states[0])
        for place, index in enumerate(i for i in range(2) if i not in drop):
            mu = torch.sigmoid(ladder.alpha[place] / 0.1)
            mixed = mu * side + (1 - mu) * ladder.down[place](states[index + 1])
            side = narrow_bert_layer(ladder.layers[place], 8, 8, 4)(mixed, closed)[0]
        expected = ladder.up(ladder.norm(side))
    assert worst(last_state(tuned), expected, mask) < 1e-5


def test_the_ladder_pools_its_own_output_through_the_backbones_pooler(
    backbone_dir: Callable[[str], Path],
) -> None:
    for name in ("lst", "side-tuning"):
        settings = experiment(backbone_dir("bert"), name, model={"pooling": "native"})
        backbone = disturbed(build(settings, 2)).classifier.backbone
        with torch.no_grad():
            output = backbone(**batch_of(build(settings, 2)))
            expected = torch.tanh(backbone.pooler.dense(output.last_hidden_state[:, 0]))
        assert torch.allclose(output.pooler_output, expected, atol=1e-6)


def saved_by(tuned: Tuned, training: bool = True) -> list[Tensor]:
    """Return what autograd keeps for the backward pass of one batch, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {p.untyped_storage().data_ptr() for p in tuned.classifier.parameters()}
    tuned.classifier.train(training)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tuned.classifier(**batch_of(tuned)).square().sum()
    loss.backward()
    return [tensor for place, tensor in kept.items() if place not in own]


def test_the_ladder_keeps_nothing_of_the_backbone_but_what_it_reads(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = disturbed(build(experiment(backbone_dir("bert"), "lst"), 2))
    backbone: Any = tuned.classifier.backbone
    read: list[Tensor] = []
    backbone.encoder.layer[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    for layer in backbone.encoder.layer:
        layer.register_forward_hook(lambda _, args, output: read.append(output[0]))
    kept = saved_by(tuned)
    tokens = batch_of(tuned)["input_ids"].numel()
    wide = {t.data_ptr() for t in kept if t.numel() in (tokens * 32, tokens * 64)}
    assert wide == {tensor.data_ptr() for tensor in read}
    assert len(wide) == 3
    assert not any(tensor.requires_grad for tensor in read)
    frozen = [p for n, p in backbone.named_parameters() if not n.startswith("ladder.")]
    assert len(frozen) > 20
    assert all(parameter.grad is None for parameter in frozen)
    assert all(p.grad is not None for p in backbone.ladder.parameters())


def test_the_ladder_needs_less_memory_than_lora(tmp_path: Path) -> None:
    directory = save_backbone(
        tmp_path / "bert", "bert", hidden_size=64, intermediate_size=256, num_hidden_layers=4
    )
    size = {
        name: sum(tensor.numel() * tensor.element_size() for tensor in saved_by(tuned))
        for name, tuned in (
            ("lst", build(experiment(directory, "lst"), 2)),
            ("lora", by_the_hooks(build(experiment(directory, "lora"), 2))),
            ("full", build(experiment(directory, "full"), 2)),
        )
    }
    assert size["lst"] < size["lora"] / 2 < size["full"] / 2


@pytest.mark.parametrize(("model_type", "attention"), PLACES)
def test_as_wide_as_the_backbone_the_ladder_starts_as_the_backbones_own_layers(
    backbone_dir: Callable[[str], Path], model_type: str, attention: str
) -> None:
    directory = backbone_dir(model_type)
    settings = experiment(
        directory, "lst", model={"attention": attention}, options={"reduction": 1}
    )
    tuned = build(settings, 2)
    ladder: Any = tuned.classifier.backbone.ladder
    states = plain_states(directory, attention)
    mask = batch_of(tuned)["attention_mask"]
    with torch.no_grad():
        assert torch.equal(ladder.down[0](states[1]), states[1])
        for index in range(2):
            own = ladder.layers[index](states[index], mask.bool()[:, None, None])
            assert worst(own, states[index + 1], mask) < 1e-3  # the side's epsilon is its own


def test_a_narrow_ladder_keeps_the_heaviest_hidden_units(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = build(experiment(backbone_dir("bert"), "lst"), 2)
    backbone: Any = tuned.classifier.backbone
    mass = [0.0] * 32
    for layer in backbone.encoder.layer:
        own = layer.attention.self
        for unit in range(32):
            for reader in (own.query, own.key, own.value, layer.intermediate.dense):
                mass[unit] += float(reader.weight[:, unit].abs().sum())
            for writer in (layer.attention.output.dense, layer.output.dense):
                mass[unit] += float(writer.weight[unit].abs().sum())
    heaviest = sorted(sorted(range(32), key=lambda unit: -mass[unit])[:8])
    assert backbone.ladder.embedded.weight.argmax(1).tolist() == heaviest
    value, query = backbone.ladder.layers[0].value, backbone.ladder.layers[0].query
    there = backbone.encoder.layer[0].attention.self
    for narrow, wide in ((value, there.value), (query, there.query)):
        for row, of_head in enumerate(narrow.weight.view(4, 2, 8)):
            choices = wide.weight[row * 8 : row * 8 + 8, heaviest]
            assert all(any(torch.equal(one, choice) for choice in choices) for one in of_head)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("lst", {"drop": "0,1"}, "drop leaves none of its 2 layers"),
        ("lst", {"drop": "0,7"}, r"drop names \[7\], and it has 2 layers"),
        ("side-tuning", {"layers": 3}, "layers = 3, and it has 2 to copy"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    backbone_dir: Callable[[str], Path], name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BackboneError, match=reason):
        build(experiment(backbone_dir("bert"), name, options=options), 2)


def test_a_negative_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers count from 0"):
        experiment(Path("minilm"), "lst", options={"drop": [-1]})


@pytest.mark.parametrize(("model_type", "attention"), PLACES)
@pytest.mark.parametrize("start", [-1.0, 0.0, 2.0])
def test_side_tuning_starts_as_a_blend_of_two_of_the_backbones_own_states(
    backbone_dir: Callable[[str], Path], model_type: str, attention: str, start: float
) -> None:
    directory = backbone_dir(model_type)
    options = {"layers": 1, "start": start}
    settings = experiment(directory, "side-tuning", model={"attention": attention}, options=options)
    tuned = build(settings, 2)
    _, lower, upper = plain_states(directory, attention)
    share = 1 / (1 + torch.exp(torch.tensor(-start)))
    mask = batch_of(tuned)["attention_mask"]
    assert worst(last_state(tuned), share * upper + (1 - share) * lower, mask) < 1e-6
    assert worst(last_state(disturbed(tuned)), share * upper + (1 - share) * lower, mask) > 1e-3


def test_side_tuning_sends_no_gradient_into_the_backbone(
    backbone_dir: Callable[[str], Path],
) -> None:
    tuned = build(experiment(backbone_dir("bert"), "side-tuning"), 2)
    saved_by(tuned)
    gradients = {
        name: parameter.grad is not None
        for name, parameter in tuned.classifier.backbone.named_parameters()
    }
    assert all(has == name.startswith("side.") for name, has in gradients.items())
    assert gradients["side.a"]


def test_the_copied_layers_train_slower_than_the_share_and_the_head(
    backbone_dir: Callable[[str], Path],
) -> None:
    settings = experiment(backbone_dir("bert"), "side-tuning", options={"copy_rate": 0.25})
    tuned = build(settings, 2)
    names = {name for name, p in tuned.classifier.backbone.named_parameters() if p.requires_grad}
    slow = {name for name in names if tuned.method.rate(name) == 0.25}
    assert names - slow == {"side.a"}
    assert tuned.method.rate("side.a") == 1.0


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


@pytest.mark.parametrize(("model_type", "attention"), PLACES)
@pytest.mark.parametrize("attends", ["routed", "all"])
def test_with_every_token_routed_and_no_adapter_coda_is_the_backbone(
    backbone_dir: Callable[[str], Path], model_type: str, attention: str, attends: str
) -> None:
    directory = backbone_dir(model_type)
    model = {"attention": attention}
    options = {"reduction": 1, "attends": attends}
    tuned = build(experiment(directory, "coda", model=model, options=options), 2)
    mask = batch_of(tuned)["attention_mask"]
    assert worst(last_state(tuned), plain_states(directory, attention)[-1], mask) < 1e-5


@pytest.mark.parametrize(("model_type", "attention"), PLACES)
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


def first_layer(tuned: Tuned) -> tuple[Tensor, Tensor, Any]:
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
