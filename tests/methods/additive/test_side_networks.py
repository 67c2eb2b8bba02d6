"""Ladder and side-tuning: no gradient reaches the backbone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbones import save_backbone
from support.models import (
    ATTENTIONS,
    batch_of,
    by_the_hooks,
    disturbed,
    experiment,
    largest_difference,
    last_state,
    loop_on_sixteen,
    plain_states,
    saved_by,
)
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.models.build import build


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


@pytest.mark.parametrize(("model_type", "attention"), ATTENTIONS)
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
    assert largest_difference(last_state(tuned), expected, mask) < 1e-5


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


@pytest.mark.parametrize(("model_type", "attention"), ATTENTIONS)
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
            assert (
                largest_difference(own, states[index + 1], mask) < 1e-3
            )  # the side's epsilon is its own


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


@pytest.mark.parametrize(("model_type", "attention"), ATTENTIONS)
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
    assert largest_difference(last_state(tuned), share * upper + (1 - share) * lower, mask) < 1e-6
    assert (
        largest_difference(last_state(disturbed(tuned)), share * upper + (1 - share) * lower, mask)
        > 1e-3
    )


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


@pytest.mark.parametrize("initial_down", ["selected", "random"])
def test_a_ladder_by_fisher_keeps_the_units_of_the_largest_squared_gradients(
    backbone_dir: Callable[[str], Path], initial_down: str
) -> None:
    """Counted apart: one row at a time through a backbone without a ladder, same head."""
    directory = backbone_dir("bert")
    options = {"initial": "fisher", "initial_down": initial_down, "samples": 5}
    tuned = build(experiment(directory, "lst", options=options), 2)
    plain = build(experiment(directory, "head", model={"normalise": False}), 2)
    plain.classifier.head.load_state_dict(tuned.classifier.head.state_dict())
    layers: Any = plain.classifier.backbone.encoder.layer.requires_grad_(True)
    loop = loop_on_sixteen(tuned)
    start = {name: tensor.clone() for name, tensor in tuned.classifier.state_dict().items()}
    encoded, labels = loop.courses[0].train
    fisher: dict[str, Tensor] = {}
    for row in range(5):
        plain.classifier.zero_grad()
        logits = plain.classifier.eval()(**encoded.batch([row], tuned.device))
        functional.cross_entropy(logits, torch.tensor([int(labels[row])])).backward()
        for name, parameter in layers.named_parameters():
            fisher[name] = fisher.get(name, 0) + parameter.grad**2
    mass = torch.zeros(32)
    for index in range(2):
        for reader in ("attention.self.query", "attention.self.key", "attention.self.value"):
            mass += fisher[f"{index}.{reader}.weight"].sum(0)
        mass += fisher[f"{index}.intermediate.dense.weight"].sum(0)
        for writer in ("attention.output.dense", "output.dense"):
            mass += fisher[f"{index}.{writer}.weight"].sum(1)
    heaviest = sorted(sorted(range(32), key=lambda unit: -float(mass[unit]))[:8])

    loop._prepare()
    ladder: Any = tuned.classifier.backbone.ladder
    for index, layer in enumerate(ladder.layers):
        inner = fisher[f"{index}.intermediate.dense.weight"].sum(1)
        inner = inner + fisher[f"{index}.output.dense.weight"].sum(0)
        kept = sorted(sorted(range(64), key=lambda unit: -float(inner[unit]))[:8])
        there = layers[index].intermediate.dense.weight[kept][:, heaviest]
        assert torch.equal(layer.intermediate.weight, there)
    if initial_down == "selected":
        assert ladder.embedded.weight.argmax(1).tolist() == heaviest
        assert int(ladder.down[1].weight.count_nonzero()) == 8
    else:
        own = tuned.classifier.state_dict()
        downs = [name for name in own if ".down." in name or ".embedded." in name]
        assert len(downs) == 6
        assert all(torch.equal(own[name], start[name]) for name in downs)
    frozen = [p for n, p in tuned.classifier.backbone.named_parameters() if "ladder." not in n]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert not torch.allclose(last_state(tuned), plain_states(directory)[-1], atol=1e-2)
