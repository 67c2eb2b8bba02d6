"""A folder for the adapters library computes what the run does."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.backbones import Backbones
from support.exported import LABELS, difference, hidden, logits, make_run, rows_of
from support.models import experiment
from torch import Tensor

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.layout import Layout
from unipelt_cli.errors import CheckError
from unipelt_cli.exports import adapters_folder, export
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.models.build import build

# Method and settings of ours, by what they are called in the paper.
UNIONS = {
    "apl": ("unipelt-apl", {}),
    "apl-separate-gates": ("unipelt-apl", {"lora_gates": "separate"}),
    "apl-scaled": ("unipelt-apl", {"lora_scale": 3.0}),
    "ap": ("unipelt-ap", {}),
    "apl-ungated": ("apl-ungated", {"lora_scale": 0.7}),
    "adapter": ("adapter", {}),
    "prefix": ("prefix", {}),
    "lora": ("lora", {}),
}
BOTH = "use --to adapters or --to onnx"
KNOWN = sorted(BACKBONES.keys() - adapters_folder.UNKNOWN - adapters_folder.UNWRITTEN.keys())


# The submodules themselves, against the library that the export writes for.


def adapters_config(adapters: Any, method: Submodules) -> Any:
    """The library's own config of a union; built here once more, not by the export."""
    parts, gated = set(method.parts), method.gated
    prefix = adapters.PrefixTuningConfig(
        prefix_length=method.prefix_length, bottleneck_size=method.prefix_width
    )
    adapter = adapters.SeqBnConfig(reduction_factor=method.reduction)
    # Gated, alpha has no effect there; ungated, it is the scale times the rank.
    scale = 50.0 if gated else method.lora_scale or 2.0
    lora = adapters.LoRAConfig(r=method.rank, alpha=scale * method.rank)
    if parts == {"adapter", "prefix", "lora"} and gated:
        return adapters.UniPELTConfig(prefix, adapter, lora)
    named = {"prefix": prefix, "adapter": adapter, "lora": lora}
    configs = [named[part].replace(use_gating=gated) for part in named if part in parts]
    return configs[0] if len(configs) == 1 else adapters.ConfigUnion(*configs)


def copy_into(ours: Any, theirs: Any, layout: Layout, name: str, shared: bool) -> set[int]:
    """Copy the weights of a library adapter into our submodules, and its gate to be shared."""
    submodules = ours.submodules
    pairs = []
    if submodules.prefix is not None:
        (prefix,) = theirs.prefix_tuning.prefix_tunings[name].values()
        pairs += [(submodules.prefix.table, prefix.wte.weight)]
        pairs += pair_linear(submodules.prefix.down, prefix.control_trans[0])
        pairs += pair_linear(submodules.prefix.up, prefix.control_trans[2])
    for own, layer in zip(submodules.layers, layout.layer_list(theirs), strict=True):
        for place in own.lora:
            lora = layer.get_submodule(getattr(layout, place)).loras[name]
            # A gate takes the place of the scale there.
            factor = own.scale if len(own.gates) else 1.0
            pairs += [(own.lora[place].a, lora.lora_A), (own.lora[place].b, lora.lora_B / factor)]
            if len(own.gates) and shared:
                query = layer.get_submodule(layout.query).loras[name].gate
                lora.gate.load_state_dict(query.state_dict())
                pairs += pair_linear(own.gates["lora"], query)
            elif len(own.gates):
                pairs += pair_linear(own.gates[f"lora_{place}"], lora.gate)
        if own.adapter is not None:
            holder = getattr(layer, "output_adapters", None) or layer.output
            bottleneck = holder.adapters[name]
            pairs += pair_linear(own.adapter.down, bottleneck.adapter_down[0])
            pairs += pair_linear(own.adapter.up, bottleneck.adapter_up)
            if len(own.gates):
                pairs += pair_linear(own.gates["adapter"], bottleneck.gate)
        if "prefix" in own.gates:
            gate = layer.get_submodule(layout.attention).prefix_tuning.prefix_gates[name]
            pairs += pair_linear(own.gates["prefix"], gate)
    with torch.no_grad():
        for own, their in pairs:
            own.copy_(their)
    return {id(own) for own, _ in pairs}


def pair_linear(ours: Any, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    return [(ours.weight, theirs.weight), (ours.bias, theirs.bias)]


@pytest.mark.parametrize("union", UNIONS)
@pytest.mark.parametrize("model_type", [*KNOWN, "deberta-v2-separate"])
def test_submodules_compute_what_adapters_computes(
    adapters: Any, backbone_dir: Backbones, model_type: str, union: str
) -> None:
    directory = backbone_dir(model_type)
    _, tuned = make_run(directory, *UNIONS[union], folded=False, pooling="cls")
    ours, method, layout = tuned.classifier.backbone, tuned.method, tuned.pretrained.layout
    theirs = adapters.AutoAdapterModel.from_pretrained(directory).eval()
    rows = rows_of(tuned)
    bare = [hidden(theirs)(**row) for row in rows]
    theirs.add_adapter("x", config=adapters_config(adapters, method), set_active=True)
    theirs.eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if ".x." in key:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    copied = copy_into(ours, theirs.base_model, layout, "x", method.lora_gates == "shared")

    assert copied == {id(own) for own in ours.submodules.parameters()}
    # Ungated noise saturates the attention, which magnifies rounding: double precision decides.
    bound = 1e-5 if method.gated else 1e-12
    if not method.gated:
        ours.double(), theirs.double()
    assert difference(hidden(ours), hidden(theirs), rows) <= bound
    moved = max(
        float((hidden(theirs)(**row) - before).abs().max())
        for row, before in zip(rows, bare, strict=True)
    )
    assert moved > 0.05


# --to adapters


def load_as_a_user(adapters: Any, backbone: Path, folder: Path) -> Any:
    model = adapters.AutoAdapterModel.from_pretrained(backbone)
    model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    return model.eval()


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("model_type", "pooling"), [*((name, "native") for name in KNOWN), ("bert", "cls")]
)
def test_adapters_folder_has_same_hidden_states_and_logits(
    adapters: Any, backbone_dir: Backbones, tmp_path: Path, model_type: str, pooling: str
) -> None:
    paper = {"lora_scale": 1.0}  # at ours, 4, the noise on LoRA counts four times
    run, tuned = make_run(backbone_dir(model_type), "unipelt-apl", paper, pooling=pooling)
    report = export.export_run(run, tuned, "adapters", tmp_path / "out")

    assert report.holds
    assert report.parity.label_flips == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.load_adapter('out', use_safetensors=True, set_active=True)" in card
    assert any("padding" in note for note in report.notes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    ]
    model = load_as_a_user(adapters, backbone_dir(model_type), tmp_path / "out")
    rows = rows_of(tuned)
    assert difference(tuned.classifier, logits(model), rows) <= 1e-5
    assert difference(hidden(tuned.classifier.backbone), hidden(model.base_model), rows) <= 1e-5
    assert list(model.get_labels()) == list(LABELS)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *UNIONS.values(),
        ("unipelt-apl", {"gate_pooling": "all"}),
        ("unipelt-apl", {"reduction": 100, "rank": 3}),
        ("unipelt-apl", {"parts": "lora,prefix"}),
        ("lora", {"lora_scale": 0.1, "rank": 3}),
    ],
)
def test_adapters_holds_every_union(
    backbone_dir: Backbones, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    run, tuned = make_run(backbone_dir("bert"), method, settings, pooling="cls")
    before = {name: tensor.clone() for name, tensor in tuned.stored().items()}
    report = export.export_run(run, tuned, "adapters", tmp_path / "out")

    assert report.parity.max_abs_logit_diff <= 1e-5
    padded = [note for note in report.notes if "padding" in note]
    assert bool(padded) == tuned.method.gated
    if settings.get("gate_pooling") == "all":
        assert "every row to 32 tokens" in padded[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.stored().items())


def test_prefix_is_stored_once_and_flat(backbone_dir: Backbones, tmp_path: Path) -> None:
    run, tuned = make_run(backbone_dir("bert"), "prefix", folded=False, pooling="cls")
    export.export_run(run, tuned, "adapters", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter.safetensors")

    assert [tensor.numel() for tensor in stored.values()] == [2 * 2 * 4 * 32]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["config"]["flat"] is True
    assert config["version"] == "adapters.1.3.0"


@pytest.mark.parametrize("pooling", ["mean", "eos"])
def test_without_a_head_the_parity_is_of_hidden_states(
    adapters: Any, backbone_dir: Backbones, tmp_path: Path, pooling: str
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", pooling=pooling)
    report = export.export_run(run, tuned, "adapters", tmp_path / "out")

    assert report.holds
    assert any("hidden states" in note for note in report.notes)
    assert not (tmp_path / "out" / "head_config.json").exists()
    model = load_as_a_user(adapters, backbone_dir("bert"), tmp_path / "out")
    assert difference(hidden(tuned.classifier.backbone), hidden(model), rows_of(tuned)) <= 1e-5


def test_adapters_holds_a_regression(
    adapters: Any, backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("roberta"), "unipelt-ap", labels=(), pooling="native")
    report = export.export_run(run, tuned, "adapters", tmp_path / "out")

    assert report.holds
    model = load_as_a_user(adapters, backbone_dir("roberta"), tmp_path / "out")
    assert logits(model)(**rows_of(tuned)[0]).shape == (1, 1)


def test_bf16_run_is_exported_in_float32_and_says_so(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", {"precision": "bf16"}, pooling="cls")
    report = export.export_run(run, tuned, "adapters", tmp_path / "out")

    assert report.parity.max_abs_logit_diff <= 1e-5
    assert any("bf16" in note for note in report.notes)


@pytest.mark.parametrize("lost", ["gates.lora", "adapter.up", "lora.value.b"])
def test_tensor_that_adapters_does_not_read_is_found(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", pooling="cls")
    names = adapters_folder.LAYER_NAMES
    monkeypatch.setattr(adapters_folder, "LAYER_NAMES", {**names, lost: names[lost][1:]})

    with pytest.raises(CheckError, match="disagree about the tensor"):
        export.export_run(run, tuned, "adapters", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_swapped_tensors_break_the_parity(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", pooling="cls")
    names = dict(adapters_folder.LAYER_NAMES)
    for kind in "ab":
        query, value = names[f"lora.query.{kind}"], names[f"lora.value.{kind}"]
        names |= {f"lora.query.{kind}": value, f"lora.value.{kind}": query}
    monkeypatch.setattr(adapters_folder, "LAYER_NAMES", names)

    report = export.export_run(run, tuned, "adapters", tmp_path / "out")
    assert not report.written
    assert list(tmp_path.iterdir()) == []
    report = export.export_run(run, tuned, "adapters", tmp_path / "out", tolerance=1e3)
    assert report.written
    assert report.parity.max_abs_logit_diff > 0.01
    parity = replace(report.parity, max_abs_logit_diff=float("nan"))
    assert not replace(report, parity=parity).holds


def test_adapters_has_the_architectures_that_are_not_refused(adapters: Any) -> None:
    for model_type, layout in BACKBONES.items():
        has = hasattr(adapters, f"{layout.classes}AdapterModel")
        assert has == (model_type not in adapters_folder.UNKNOWN)
    assert adapters_folder.UNWRITTEN.keys() <= BACKBONES.keys()


@pytest.mark.parametrize(
    ("method", "message", "remedy"),
    [
        ("mam", "has the part 'parallel', and adapters has no such", "method.parts=prefix)"),
        ("parallel-adapter", "has the part 'parallel'", "method.parts=adapter,prefix,lora"),
        ("houlsby", "method 'houlsby' adds what adapters has not", "--method unipelt-apl"),
        ("sparse-adapter", "method 'sparse-adapter' adds what", "--method unipelt-apl"),
        ("ia3", "method 'ia3' adds no submodules", "use --to hf"),
    ],
)
def test_adapters_is_not_given_what_it_cannot_hold(
    backbone_dir: Backbones, method: str, message: str, remedy: str
) -> None:
    settings = experiment(backbone_dir("bert"), method)
    run: Any = SimpleNamespace(directory="runs/x", experiment=settings)
    problem = adapters_folder.problem(run, build(settings, 2))
    assert problem is not None
    said, hint = problem
    assert message in said
    assert remedy in hint
