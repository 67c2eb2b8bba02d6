"""The laws of wrapping, for every backbone, part and attention implementation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.backbones import KINDS, save_backbone
from support.models import disturbed, experiment, logits_of
from support.rows import SENTENCES
from torch import Tensor, nn

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import find
from unipelt_cli.errors import BackboneError
from unipelt_cli.methods.base import AttachContext
from unipelt_cli.methods.unipelt.container import Container
from unipelt_cli.methods.unipelt.inspection import closed, record_gates
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.models.build import build
from unipelt_cli.models.tuned import merge

PARTS = ("lora", "prefix", "adapter", "bias", "all")
ALL = ("adapter", "prefix", "lora", "bias")


def parts_of(kind: str, named: str) -> tuple[str, ...]:
    """Return the parts of a name that an architecture can have; `all` is their union."""
    there = KINDS[kind].parts
    return there if named == "all" else tuple(part for part in (named,) if part in there)


CASES = [
    (model_type, attention)
    for model_type, layout in KINDS.items()
    for attention in layout.attentions
]
SENTENCE = torch.tensor([2, 7, 9, 11, 30, 8, 3])


def attached(
    directory: Path,
    attention: str,
    parts: tuple[str, ...],
    folded: bool = False,
    **options: object,
) -> nn.Module:
    """Load a backbone with gated submodules whose every weight is N(0, 0.3)."""
    pretrained = find(str(directory))
    backbone, _ = pretrained.load_backbone(attention, pooler=False)
    backbone.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    method = Submodules(parts=parts, prefix_length=4, reduction=4, **options)
    method.attach(backbone, AttachContext(pretrained.layout, generator, folded))
    with torch.no_grad():
        for parameter in backbone.submodules.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.3, generator=generator))
    return backbone.eval()


def states(backbone: nn.Module, rows: list[Tensor], length: int | None = None) -> list[Tensor]:
    """Return the real tokens' hidden states of rows padded to one length."""
    length = length or max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    with torch.no_grad():
        output = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    return [output[place, : len(row)] for place, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        (name, parts)
        for name, row in KINDS.items()
        for parts in PARTS
        if len(row.attentions) > 1 and parts_of(name, parts)
    ],
)
def test_attention_implementations_agree(
    backbone_dir: Callable[[str], Path], model_type: str, parts: str
) -> None:
    rows = [SENTENCE, torch.arange(5, 17)]
    eager, fused = (
        states(attached(backbone_dir(model_type), attention, parts_of(model_type, parts)), rows)
        for attention in ("eager", "sdpa")
    )
    assert max((a - b).abs().max() for a, b in zip(eager, fused, strict=True)) < 1e-5


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_closed_prefix_is_no_prefix(
    backbone_dir: Callable[[str], Path],
    model_type: str,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masking the prefix columns out must give the plain backbone: catches shifted positions."""
    from torch.nn import functional

    plain, _ = find(str(backbone_dir(model_type))).load_backbone(attention, pooler=False)
    expected = states(plain.eval(), [SENTENCE, torch.arange(5, 17)])
    backbone = attached(backbone_dir(model_type), attention, ("prefix",), gated=False)
    opened = states(backbone, [SENTENCE, torch.arange(5, 17)])
    pad = functional.pad

    def close(mask: Tensor, widths: tuple[int, int], value: float = 0) -> Tensor:
        """Pad what is added to the scores with the least number, and a mask of ones with 0."""
        closed = torch.finfo(mask.dtype).min if mask.is_floating_point() else 0
        return pad(mask, widths, value=closed)

    monkeypatch.setattr(functional, "pad", close)
    closed = states(backbone, [SENTENCE, torch.arange(5, 17)])
    assert max((a - b).abs().max() for a, b in zip(expected, closed, strict=True)) < 1e-5
    assert max((a - b).abs().max() for a, b in zip(expected, opened, strict=True)) > 1e-2


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_what_is_closed_is_as_if_it_were_not_there(
    backbone_dir: Callable[[str], Path],
    model_type: str,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory, rows = backbone_dir(model_type), [SENTENCE, torch.arange(5, 17)]
    plain, _ = find(str(directory)).load_backbone(attention, pooler=False)
    backbone = attached(directory, attention, parts := parts_of(model_type, "all"))
    layers = len(backbone.submodules.layers)
    one = min(1, layers - 1)  # one module may serve all layers
    opened = states(backbone, rows)
    with closed(backbone, [(layer, part) for layer in range(layers) for part in parts]):
        bare = states(backbone, rows)
    expected = states(plain.eval(), rows)
    assert max((a - b).abs().max() for a, b in zip(expected, bare, strict=True)) < 1e-5
    again = states(backbone, rows)
    assert all(torch.equal(a, b) for a, b in zip(opened, again, strict=True))
    for part in parts:
        with closed(backbone, [(one, part)]):
            found = states(backbone, rows)
        assert max((a - b).abs().max() for a, b in zip(opened, found, strict=True)) > 1e-4, part
        if part != "prefix":  # which needs masks, not zeros
            _silence(backbone.submodules.layers[one], part, monkeypatch)
            zeros = states(backbone, rows)
            monkeypatch.undo()
            assert max((a - b).abs().max() for a, b in zip(zeros, found, strict=True)) < 1e-5, part


def _silence(layer: nn.Module, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what a part of one layer adds to zero."""
    added = {
        "adapter": lambda: list(layer.adapter.up.parameters()),
        "lora": lambda: [low_rank.b for low_rank in layer.lora.values()],
        "bias": lambda: list(layer.bias.values()),
    }[part]()
    for parameter in added:
        monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))


@pytest.mark.parametrize(("model_type", "attention"), CASES)
def test_what_is_left_out_is_what_is_closed(
    backbone_dir: Callable[[str], Path], model_type: str, attention: str
) -> None:
    directory, rows = backbone_dir(model_type), [SENTENCE, torch.arange(5, 17)]
    parts = parts_of(model_type, "all")
    whole = attached(directory, attention, parts, folded=True)
    one = min(1, len(whole.submodules.layers) - 1)
    places = [(0, "lora"), (one, "adapter"), (one, "prefix")]
    lesser = attached(
        directory,
        attention,
        parts,
        folded=True,
        leave_out=tuple(f"{part}.{layer}" for layer, part in places),
    )
    tensors = whole.submodules.state_dict()
    prefix = [layer for layer in range(len(whole.submodules.layers)) if layer != one]
    if prefix:
        tensors["prefix.rows"] = tensors["prefix.rows"][prefix]
    own = lesser.submodules.state_dict()
    lesser.submodules.load_state_dict({name: tensors[name] for name in own})
    assert 0 < len(own) < len(tensors)
    with closed(whole, places):
        expected = states(whole, rows)
    found = states(lesser, rows)
    assert max((a - b).abs().max() for a, b in zip(expected, found, strict=True)) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_closed_in_one_layer_is_masked_out_there(
    backbone_dir: Callable[[str], Path], attention: str
) -> None:
    backbone = attached(backbone_dir("bert"), attention, ("prefix", "adapter"))
    rows = [SENTENCE, torch.arange(5, 17)]
    with closed(backbone, [(1, "prefix")]):
        found = states(backbone, rows)

    def hide(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"] if "attention_mask" in kwargs else args[1]
        if mask is None:
            mask = torch.zeros(2, 1, 12, 16)
        mask = mask.clone().float()
        mask[..., :4] = torch.finfo(torch.float32).min
        if "attention_mask" in kwargs:
            return args, {**kwargs, "attention_mask": mask}
        return (args[0], mask, *args[2:]), kwargs

    handle = backbone.encoder.layer[1].attention.self.register_forward_pre_hook(
        hide, with_kwargs=True
    )
    masked = states(backbone, rows)
    handle.remove()
    assert max((a - b).abs().max() for a, b in zip(masked, found, strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("part", "model_type"),
    [
        (part, kind)
        for kind in KINDS
        for part in ("adapter", "lora", "bias")
        if parts_of(kind, part)
    ],
)
def test_submodules_that_add_nothing_change_nothing(
    backbone_dir: Callable[[str], Path], model_type: str, part: str
) -> None:
    attention = KINDS[model_type].attentions[0]
    plain, _ = find(str(backbone_dir(model_type))).load_backbone(attention, pooler=False)
    backbone = attached(backbone_dir(model_type), attention, (part,))
    changed = states(backbone, [SENTENCE])[0]
    with torch.no_grad():
        for name, parameter in backbone.submodules.named_parameters():
            if ".up." in name or name.endswith(".b") or ".bias." in name:
                parameter.zero_()
    (expected,) = states(plain.eval(), [SENTENCE])
    assert torch.allclose(states(backbone, [SENTENCE])[0], expected, atol=1e-6)
    assert (changed - expected).abs().max() > 1e-3


def test_camembert_is_xlm_roberta_class_by_class(backbone_dir: Callable[[str], Path]) -> None:
    """`adapters` refuses camembert, so its parity is with the architecture it copies."""
    parts = ALL
    camembert = attached(backbone_dir("camembert"), "eager", parts)
    twin = attached(backbone_dir("xlm-roberta"), "eager", parts)
    twin.load_state_dict(camembert.state_dict())
    (ours,), (theirs,) = states(camembert, [SENTENCE]), states(twin, [SENTENCE])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [7, 128])
def test_gate_pooling_all_averages_over_padding(
    backbone_dir: Callable[[str], Path], length: int
) -> None:
    """The authors' code: a gate is the plain mean over all positions, padding included."""
    backbone = attached(backbone_dir("bert"), "eager", ("lora",), gate_pooling="all")
    container = backbone.submodules
    assert isinstance(container, Container)
    inputs: list[Tensor] = []
    backbone.encoder.layer[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    states(backbone, [SENTENCE], length)
    layer = container.layers[0]
    by_hand = torch.sigmoid(layer.gates["lora"](inputs[0])).mean(1)[:, 0]
    assert torch.allclose(layer.gate_values["lora"], by_hand, atol=1e-6)
    masked = torch.sigmoid(layer.gates["lora"](inputs[0][:, :7])).mean(1)[:, 0]
    assert torch.allclose(by_hand, masked, atol=1e-6) == (length == 7)


@pytest.mark.filterwarnings("ignore")  # adapters calls what transformers will remove
@pytest.mark.parametrize("parts", [("lora",), ("adapter",), ("lora", "adapter")], ids="+".join)
def test_t5_computes_what_adapters_computes(
    backbone_dir: Callable[[str], Path], parts: tuple[str, ...]
) -> None:
    """Not the prefix: there it is counted as positions (a closed prefix shows it)."""
    import adapters

    directory = backbone_dir("t5")
    ours = attached(directory, "eager", parts, rank=8, lora_gates="separate")
    theirs = transformers.T5EncoderModel.from_pretrained(directory)
    adapters.init(theirs)
    configs = {
        "lora": adapters.LoRAConfig(r=8, use_gating=True),
        "adapter": adapters.SeqBnConfig(reduction_factor=4, use_gating=True),
    }
    union = adapters.ConfigUnion(*(configs[part] for part in parts))
    theirs.add_adapter("x", config=union, set_active=True)
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for own, block in zip(ours.submodules.layers, theirs.encoder.block, strict=True):
        for place, letter in (("query", "q"), ("value", "v")) if "lora" in parts else ():
            lora = block.get_submodule(f"layer.0.SelfAttention.{letter}").loras["x"]
            lora.lora_A.data, lora.lora_B.data = own.lora[place].a.data, own.lora[place].b.data
            pairs.append((own.gates[f"lora_{place}"], lora.gate))
        if "adapter" in parts:
            there = block.layer[1].adapters["x"]
            pairs += [(own.adapter.down, there.adapter_down[0]), (own.adapter.up, there.adapter_up)]
            pairs.append((own.gates["adapter"], there.gate))
    for own, there in pairs:
        there.load_state_dict(own.state_dict())
    plain = states(find(str(directory)).load_backbone("eager", pooler=False)[0].eval(), [SENTENCE])
    expected = states(theirs.eval(), [SENTENCE])[0]
    assert (states(ours, [SENTENCE])[0] - expected).abs().max() < 1e-5
    assert (plain[0] - expected).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("parts", "gated"), [(("prefix", "adapter"), True), (("prefix", "adapter", "lora"), False)]
)
def test_bart_computes_what_adapters_computes(
    backbone_dir: Callable[[str], Path], parts: tuple[str, ...], gated: bool
) -> None:
    """Plain attention only: there the library's other one hides tokens behind the prefix.

    Gated LoRA is not compared: there the gate of a value reads the encoder, here the query's side.
    """
    import adapters

    directory = backbone_dir("bart")
    ours = attached(directory, "eager", parts, rank=8, gated=gated, folded=True)
    theirs = transformers.BartModel.from_pretrained(directory, attn_implementation="eager")
    adapters.init(theirs)
    configs = {
        "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=4),
        "adapter": adapters.SeqBnConfig(reduction_factor=4),
        "lora": adapters.LoRAConfig(r=8, alpha=16),
    }
    union = adapters.ConfigUnion(*(configs[part].replace(use_gating=gated) for part in parts))
    theirs.add_adapter("x", config=union, set_active=True)
    rows = BACKBONES["bart"].sites(theirs)
    assert len(rows) == len(ours.submodules.layers) == 6
    for place, key in enumerate(("encoder", "self", "cross")):
        prefix = ours.submodules.prefix.rows[2 * place : 2 * place + 2]
        table = theirs.prefix_tuning.prefix_tunings["x"][f"{key}_prefix"].control_trans
        table.data = prefix.data.permute(2, 0, 1, 3).flatten()
    for own, (row, layer) in zip(ours.submodules.layers, rows, strict=True):
        for name, low_rank in own.lora.items():
            there = layer.get_submodule(getattr(row, name)).loras["x"]
            there.lora_A.data, there.lora_B.data = low_rank.a.data, low_rank.b.data
        pairs = []
        if own.adapter is not None:
            there = layer.output_adapters.adapters["x"]
            pairs += [(own.adapter.down, there.adapter_down[0]), (own.adapter.up, there.adapter_up)]
            pairs += [(own.gates["adapter"], there.gate)] if gated else []
        if gated:
            attention = layer.get_submodule(row.attention)
            pairs.append((own.gates["prefix"], attention.prefix_tuning.prefix_gates["x"]))
        for mine, yours in pairs:
            yours.load_state_dict(mine.state_dict())
    if not gated:  # gates are float32; elsewhere some processors' roundings grow over the bound
        ours, theirs = ours.double(), theirs.double()
    (expected,) = states(theirs.eval(), [SENTENCE])
    plain = states(find(str(directory)).load_backbone("eager", pooler=False)[0].eval(), [SENTENCE])
    assert (states(ours, [SENTENCE])[0] - expected).abs().max() < 1e-5
    assert (plain[0] - expected).abs().max() > 0.1


def test_bart_has_gates_in_both_stacks(backbone_dir: Callable[[str], Path]) -> None:
    backbone = attached(backbone_dir("bart"), "eager", ("adapter", "prefix", "lora"))
    with record_gates(backbone) as recorded:
        states(backbone, [SENTENCE])
    names = [set(gates) for gates in recorded]
    whole, cross = {"adapter", "prefix", "lora"}, {"prefix", "lora"}
    assert names == [whole, whole, whole, whole, cross, cross]  # as the stored layers are numbered


def test_a_t5_is_read_by_its_mean_and_knows_no_bound(backbone_dir: Callable[[str], Path]) -> None:
    directory = backbone_dir("t5")
    tuned = build(experiment(directory, "unipelt-apl", model={"max_length": 512}), 2)
    assert tuned.pooling == "mean"
    long = [" ".join(["good film"] * 280)]
    assert logits_of(tuned, long).shape == (1, 2)
    with pytest.raises(BackboneError, match=r"model\.pooling = 'native': the library's seq") as no:
        build(experiment(directory, "head", model={"pooling": "native"}), 2)
    assert no.value.hint == "choose one of mean, cls, eos"


def test_parts_that_an_architecture_lacks_are_refused(
    backbone_dir: Callable[[str], Path],
) -> None:
    settings = experiment(backbone_dir("t5"), "lora", options={"parts": "lora,bias"})
    with pytest.raises(BackboneError, match="it has the part 'bias', and a t5 has no bias") as no:
        build(settings, 2)
    assert no.value.hint.startswith("set method.parts to some of adapter, prefix, lora, or")
    with pytest.raises(BackboneError, match=r"method 'bitfit' on .*: a t5 has no biases"):
        build(experiment(backbone_dir("t5"), "bitfit"), 2)


def test_a_shared_layer_has_gates_for_every_call(backbone_dir: Callable[[str], Path]) -> None:
    backbone = attached(backbone_dir("albert"), "eager", ("adapter", "lora"))
    (own,) = backbone.submodules.layers
    inputs: list[Tensor] = []
    (layer,) = BACKBONES["albert"].layer_list(backbone)
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with record_gates(backbone) as recorded:
        for _ in range(2):  # only the latest pass is kept
            inputs.clear()
            states(backbone, [SENTENCE])
    assert len(recorded) == len(inputs) == backbone.config.num_hidden_layers == 3
    for gates, hidden in zip(recorded, inputs, strict=True):
        by_hand = torch.sigmoid(own.gates["lora"](hidden)).mean(1)[:, 0]
        assert gates.keys() == {"adapter", "lora"}
        assert torch.allclose(gates["lora"], by_hand, atol=1e-6)


def test_albert_may_have_several_groups_of_layers(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}
    directory = save_backbone(tmp_path / "albert", "albert", **sizes)
    backbone = attached(directory, "eager", ALL)
    assert len(backbone.submodules.layers) == 4
    with record_gates(backbone) as recorded:
        (alone,) = states(backbone, [SENTENCE])
        assert len(recorded) == 8  # each of four layers runs both modules of its group
    (padded,) = states(backbone, [SENTENCE], 64)
    assert (alone - padded).abs().max() < 1e-5


NATIVE = [name for name, layout in KINDS.items() if layout.native]


@pytest.mark.parametrize("model_type", NATIVE)
def test_bitfit_trains_every_bias(backbone_dir: Callable[[str], Path], model_type: str) -> None:
    settings = experiment(backbone_dir(model_type), "bitfit", model={"pooling": "native"})
    backbone = build(settings, 2).classifier.backbone
    biases = {name for name, _ in backbone.named_parameters() if name.endswith("bias")}
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == biases


@pytest.mark.parametrize("parts", [("lora",), ("bias",), ("lora", "bias")], ids="+".join)
@pytest.mark.parametrize("model_type", NATIVE)
def test_merged_equals_unmerged(
    backbone_dir: Callable[[str], Path], model_type: str, parts: tuple[str, ...]
) -> None:
    settings = experiment(
        backbone_dir(model_type), "lora", model={"pooling": "native"}, options={"parts": parts}
    )
    tuned = disturbed(build(settings, 2))
    before = logits_of(tuned, SENTENCES)
    merge(tuned)
    assert not hasattr(tuned.classifier.backbone, "submodules")
    assert torch.allclose(logits_of(tuned, SENTENCES), before, atol=1e-5)


@pytest.mark.parametrize("model_type", [name for name, row in KINDS.items() if not row.native])
def test_backbones_without_a_native_head_merge_too(
    backbone_dir: Callable[[str], Path], model_type: str
) -> None:
    backbone = attached(backbone_dir(model_type), "eager", ("lora",), gated=False)
    (before,) = states(backbone, [SENTENCE])
    Submodules(parts=("lora",), gated=False).merge(backbone)
    plain, _ = find(str(backbone_dir(model_type))).load_backbone("eager", pooler=False)
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    assert (states(backbone, [SENTENCE])[0] - before).abs().max() < 1e-5
    assert (states(plain.eval(), [SENTENCE])[0] - before).abs().max() > 0.1


def test_modernberts_loras_change_the_rows_of_query_and_value(
    backbone_dir: Callable[[str], Path],
) -> None:
    backbone = attached(backbone_dir("modernbert"), "sdpa", ("lora",), gated=False, lora_scale=0.7)
    plain, _ = find(str(backbone_dir("modernbert"))).load_backbone("sdpa", pooler=False)
    with torch.no_grad():
        for own, layer in zip(backbone.submodules.layers, plain.layers, strict=True):
            for place, start in (("query", 0), ("value", 64)):
                change = 0.7 * own.lora[place].b @ own.lora[place].a
                layer.attn.Wqkv.weight[start : start + 32] += change
    by_hand = states(plain.eval(), [SENTENCE])[0]
    assert (states(backbone, [SENTENCE])[0] - by_hand).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"chunk_size_feed_forward": 8}, "chunk_size_feed_forward = 8"),
        ({"is_decoder": True}, "is_decoder = True"),
    ],
)
def test_unsound_configs_are_refused(
    backbone_dir: Callable[[str], Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    import json
    import shutil

    directory = shutil.copytree(backbone_dir("bert"), tmp_path / "unsound")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(BackboneError, match=message):
        find(str(directory))
