"""What a run becomes in `adapters` and in transformers, and that it computes the same there."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported import LABELS, TINY, difference, hidden, logits, make_run, rows_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.layout import Layout
from unipelt_cli.cli import app
from unipelt_cli.config.experiment import resolve
from unipelt_cli.data import preparation
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.exports import adapters_folder, export, formats, job, transformers_model
from unipelt_cli.exports.parity import compare, unpadded
from unipelt_cli.exports.parity import padded as parity_padded
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.models.batches import Encoded
from unipelt_cli.runs.probe import probe_rows
from unipelt_cli.runs.run import read_run
from unipelt_cli.training import execution

Backbones = Callable[[str], Path]
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
NATIVE = sorted(name for name, row in BACKBONES.items() if row.native)


@pytest.fixture(scope="module")
def adapters() -> Iterator[Any]:
    """The library of that name; it warns where this project's tests allow no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import adapters

        yield adapters


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Rows of a few tokens, one by one: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a few rows where many exports are made: all rows take most of their time."""
    monkeypatch.setattr(job, "ROWS", 8)


@pytest.fixture
def without_pooler(backbone_dir: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose checkpoint holds no pooler."""
    directory = tmp_path_factory.mktemp("backbone") / "bert"
    shutil.copytree(backbone_dir("bert"), directory)
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


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
    run, tuned = make_run(backbone_dir(model_type), "unipelt-apl", pooling=pooling)
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert export.holds(report)
    assert report["parity"]["label_flips"] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.load_adapter('out', use_safetensors=True, set_active=True)" in card
    assert any("padding" in note for note in report["notes"])
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
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert report["parity"]["max_abs_logit_diff"] <= 1e-5
    padded = [note for note in report["notes"] if "padding" in note]
    assert bool(padded) == tuned.method.gated
    if settings.get("gate_pooling") == "all":
        assert "every row to 32 tokens" in padded[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.stored().items())


def test_prefix_is_stored_once_and_flat(backbone_dir: Backbones, tmp_path: Path) -> None:
    run, tuned = make_run(backbone_dir("bert"), "prefix", folded=False, pooling="cls")
    export.export(run, tuned, "adapters", tmp_path / "out")
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
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert export.holds(report)
    assert any("hidden states" in note for note in report["notes"])
    assert not (tmp_path / "out" / "head_config.json").exists()
    model = load_as_a_user(adapters, backbone_dir("bert"), tmp_path / "out")
    assert difference(hidden(tuned.classifier.backbone), hidden(model), rows_of(tuned)) <= 1e-5


def test_adapters_holds_a_regression(
    adapters: Any, backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("roberta"), "unipelt-ap", labels=(), pooling="native")
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert export.holds(report)
    model = load_as_a_user(adapters, backbone_dir("roberta"), tmp_path / "out")
    assert logits(model)(**rows_of(tuned)[0]).shape == (1, 1)


def test_bf16_run_is_exported_in_float32_and_says_so(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", {"precision": "bf16"}, pooling="cls")
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert report["parity"]["max_abs_logit_diff"] <= 1e-5
    assert any("bf16" in note for note in report["notes"])


@pytest.mark.parametrize("lost", ["gates.lora", "adapter.up", "lora.value.b"])
def test_tensor_that_adapters_does_not_read_is_found(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", pooling="cls")
    names = adapters_folder.LAYER_NAMES
    monkeypatch.setattr(adapters_folder, "LAYER_NAMES", {**names, lost: names[lost][1:]})

    with pytest.raises(CheckError, match="disagree about the tensor"):
        export.export(run, tuned, "adapters", tmp_path / "out")
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

    report = export.export(run, tuned, "adapters", tmp_path / "out")
    assert not report["written"]
    assert list(tmp_path.iterdir()) == []
    report = export.export(run, tuned, "adapters", tmp_path / "out", tolerance=1e3)
    assert report["written"]
    assert report["parity"]["max_abs_logit_diff"] > 0.01
    parity = {"max_abs_logit_diff": float("nan")}
    assert not export.holds({"parity": parity, "tolerance": 1e3})


def test_adapters_has_the_architectures_that_are_not_refused(adapters: Any) -> None:
    for model_type, layout in BACKBONES.items():
        has = hasattr(adapters, f"{layout.classes}AdapterModel")
        assert has == (model_type not in adapters_folder.UNKNOWN)
    assert adapters_folder.UNWRITTEN.keys() <= BACKBONES.keys()


# --to hf


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("method", ["full", "bitfit", "head", "lora"])
@pytest.mark.parametrize("model_type", NATIVE)
def test_hf_folder_has_same_logits(
    backbone_dir: Backbones, tmp_path: Path, model_type: str, method: str
) -> None:
    run, tuned = make_run(backbone_dir(model_type), method, pooling="native")
    rows = rows_of(tuned)
    with torch.inference_mode():
        before = [tuned.classifier(**row) for row in rows]
    report = export.export(run, tuned, "hf", tmp_path / "out")

    assert export.holds(report)
    assert report["parity"]["label_flips"] == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert difference(tuned.classifier, logits(model), rows) <= 1e-5
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: place for place, label in enumerate(LABELS)}
    assert not list((tmp_path / "out").glob("*.bin"))
    with torch.inference_mode():  # the model that was given is not the one that was merged
        after = [tuned.classifier(**row) for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_hf_folder_has_the_tokenizer_and_works_in_a_pipeline(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    export.export(run, tuned, "hf", tmp_path / "out")
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    text = "the film was not bad"
    row = tuned.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        label = LABELS[int(tuned.classifier(**row).argmax())]

    assert classify(text)[0]["label"] == label


def test_hf_folder_holds_a_regression_and_a_trained_pooler(
    without_pooler: Path, tmp_path: Path
) -> None:
    run, tuned = make_run(without_pooler, "bitfit", labels=(), pooling="native")
    assert tuned.untrained
    report = export.export(run, tuned, "hf", tmp_path / "out")

    assert export.holds(report)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_labels == 1


# What is refused, and what stays behind


@pytest.mark.parametrize(
    ("to", "model_type", "method", "pooling", "said", "hint"),
    [
        ("adapters", "bert", "full", "native", "method 'full' adds no submodules", "use --to hf"),
        (
            "adapters",
            "bert",
            "head",
            "mean",
            "method 'head' adds no submodules",
            "train with --set model.pooling=native and use --to hf",
        ),
        (
            "adapters",
            "bert",
            "unipelt-aplb",
            "cls",
            "the part 'bias', and adapters has no such part",
            "(--set method.parts=adapter,prefix,lora), or try --to hf",
        ),
        (
            "adapters",
            "camembert",
            "unipelt-apl",
            "cls",
            "is a camembert",
            "xlm-roberta, or try --to hf",
        ),
        ("adapters", "t5", "unipelt-apl", "mean", "the encoder of a t5", "such as a bert"),
        ("adapters", "t5", "head", "mean", "the encoder of a t5", "and use --to hf"),
        ("hf", "t5", "lora", "mean", "does not read mean pooling", "use --to onnx"),
        (
            "hf",
            "bert",
            "unipelt-apl",
            "native",
            "gates depend on the input",
            "use --to adapters or --to onnx, "
            "or see with --static-gates what constant gates would cost",
        ),
        (
            "hf",
            "bert",
            "adapter",
            "native",
            "what its adapter does",
            "use --to adapters or --to onnx",
        ),
        (
            "hf",
            "bert",
            "full",
            "mean",
            "does not read mean pooling",
            "train with --set model.pooling=native",
        ),
        (
            "hf",
            "bert",
            "lora",
            "mean",
            "does not read mean pooling",
            "use --to adapters or --to onnx, or train with --set model.pooling=native",
        ),
        (
            "hf",
            "bert",
            "unipelt-apl",
            "mean",
            "does not read mean pooling",
            "use --to adapters or --to onnx",
        ),
        (
            "hf",
            "bert",
            "unipelt-aplb",
            "native",
            "gates depend on the input",
            "use --to onnx, or see with --static-gates what constant gates would cost",
        ),
    ],
)
def test_refusals(
    backbone_dir: Backbones,
    tmp_path: Path,
    to: str,
    model_type: str,
    method: str,
    pooling: str,
    said: str,
    hint: str,
) -> None:
    run, tuned = make_run(backbone_dir(model_type), method, pooling=pooling)
    with pytest.raises(RunError) as refused:
        export.export(run, tuned, to, tmp_path / "new" / "out")

    assert "the-run" in refused.value.message
    assert said in refused.value.message
    assert refused.value.hint.endswith(hint)
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_pooler_that_the_run_trained_is_refused_by_adapters(
    without_pooler: Path, tmp_path: Path
) -> None:
    run, tuned = make_run(without_pooler, "unipelt-apl", pooling="native")
    with pytest.raises(RunError, match="trained one") as refused:
        export.export(run, tuned, "adapters", tmp_path / "out")
    assert "model.pooling=cls" in refused.value.hint


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_target_that_exists_is_refused_and_kept(
    backbone_dir: Backbones, tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "out"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    with pytest.raises(RunError, match="exists already"):
        export.export(run, tuned, "hf", target)
    assert list(tmp_path.iterdir()) == [target]


def test_target_that_cannot_be_written_is_refused(backbone_dir: Backbones, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    with pytest.raises(RunError, match="cannot be written"):
        export.export(run, tuned, "hf", tmp_path / "file" / "out")


def test_failure_leaves_nothing_behind(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path) -> None:
        raise CheckError("failed", "")

    monkeypatch.setattr(transformers_model, "_load", fail)
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    with pytest.raises(CheckError):
        export.export(run, tuned, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# A run that was really trained


@pytest.mark.parametrize(("to", "method"), [("adapters", "unipelt-apl"), ("hf", "lora")])
def test_trained_run_is_exported(
    backbone_dir: Backbones, rows_file: Path, tmp_path: Path, to: str, method: str
) -> None:
    rows = {"train_file": str(rows_file), "text": "text", "label": "label"}
    settings = {
        "data": rows,
        "model": {"backbone": str(backbone_dir("bert"))},
        "method": {"name": method, **TINY},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32"},
    }
    for _ in execution.execute(resolve([("", settings)]), tmp_path / "run"):
        pass
    run = read_run(tmp_path / "run")
    report = export.export(run, run.build(), to, tmp_path / "out")

    assert export.holds(report)
    assert report["parity"]["rows"] == 256
    assert 0 < report["parity"]["test_rows"] == run.environment["data"]["splits"]["test"]["rows"]
    assert report["format"] == to
    assert report["path"] == str(tmp_path / "out")
    json.dumps(report)


def test_rows_are_the_runs_own_and_made_up_where_they_are_too_few(
    backbone_dir: Backbones, rows_file: Path
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl")
    lost = job.find_rows(run, tuned)
    assert (len(lost.encoded), lost.from_test) == (256, 0)
    assert lost.encoded.ids == probe_rows(tuned, 256).ids
    settings = {"task": None, "train_file": str(rows_file), "text": "text", "label": "label"}
    found = preparation.prepare(run.experiment.replace("data", **settings).data)
    run = replace(
        run,
        experiment=run.experiment.replace("data", **settings),
        environment={"data": found.manifest},
        header={"task": {**run.header["task"], "text": ["text"]}},
    )
    rows = job.find_rows(run, tuned)
    test = list(found.splits["test"]["text"])
    assert 0 < rows.from_test == len(test)
    assert len(rows.encoded) == 256
    assert rows.encoded.ids[: len(test)] == tuned.tokenizer(test)["input_ids"]


def test_batches_hold_every_row_once_and_unpadded_ones_rows_of_one_length() -> None:
    lengths = [1 + row % 7 for row in range(256)]
    rows = Encoded([[5] * length for length in lengths], None, 0)
    for batches in (list(parity_padded(rows)), list(unpadded(rows))):
        assert sorted(row for batch in batches for row in batch) == list(range(256))
    assert all(len({lengths[row] for row in batch}) == 1 for batch in unpadded(rows))
    assert {1, 3, 32, 8} <= set(map(len, parity_padded(rows)))


def test_parity_counts_differences_and_flips() -> None:
    rows = Encoded([[1], [2, 2], [3], [4]], None, 0)

    def ours(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.stack([input_ids[:, 0].float(), torch.full((len(input_ids),), 2.5)], 1)

    def theirs(**batch: Tensor) -> Tensor:
        return ours(**batch) + torch.tensor([1.0, 0.0])

    assert compare(rows, parity_padded(rows), ours, theirs) == {
        "rows": 4,
        "max_abs_logit_diff": 1.0,
        "mean_abs_logit_diff": 0.5,
        "label_flips": 1,
    }


# The command


@pytest.fixture(scope="module")
def trained(
    backbone_dir: Backbones, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of LoRA with the library's own head, trained for one epoch."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    settings = {
        "data": {"train_file": str(rows_file), "text": "text", "label": "label"},
        "model": {"backbone": str(backbone_dir("bert")), "pooling": "native"},
        "method": {"name": "lora"},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32"},
    }
    for _ in execution.execute(resolve([("", settings)]), directory):
        pass
    return directory


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_export_prints_the_contracts_object(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = invoke(trained, "--to", "hf", "--out", out, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report.keys() == {
        *("format", "path", "written", "parity", "tolerance", "notes", "bytes"),
    }
    assert report["parity"].keys() == {
        *("rows", "max_abs_logit_diff", "mean_abs_logit_diff", "label_flips", "test_rows"),
    }
    assert report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert (report["written"], report["tolerance"]) == (True, 1e-4)


def test_export_that_is_too_far_off_exits_1_and_leaves_nothing(
    trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = invoke(
        trained, "--to", "hf", "--out", out, "--tolerance", "1e-12", "--json"
    )
    report = json.loads(stdout)
    difference = report["parity"]["max_abs_logit_diff"]
    assert (code, report["written"]) == (1, False)
    assert stderr.splitlines()[-2:] == [
        f"error: {out}: not written, its logits differ by {difference:.2g}, and 1e-12 is allowed",
        "hint: please report it with the run's experiment.toml",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["--to", "onix"],
            "--to 'onix': no such format",
            "did you mean onnx? otherwise choose one of adapters, hf, onnx, peft",
        ),
        (["--to", "hf", "--fp16"], "--fp16: not for --to hf", "drop it, or use --to onnx"),
        (
            ["--to", "hf", "--part", "lora"],
            "--part lora: not for --to hf",
            "drop it, or use --to peft",
        ),
        (
            ["--to", "hf", "--tolerance", "0"],
            "--tolerance 0.0: not above 0",
            "give a number such as 1e-4",
        ),
    ],
)
def test_wrong_options_are_said_in_two_lines(
    trained: Path, arguments: list[str], message: str, hint: str
) -> None:
    code, stdout, stderr = invoke(trained, *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.splitlines() == [f"error: {message}", f"hint: {hint}"]


@pytest.mark.parametrize(
    ("to", "package"), [("peft", "peft"), ("onnx", "onnx"), ("onnx", "onnxruntime")]
)
def test_missing_extra_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, to: str, package: str
) -> None:
    def find(name: str) -> object:
        return None if name == package else importlib.util.find_spec(name)

    monkeypatch.setattr(formats, "find_spec", find)
    code, _, stderr = invoke(trained, "--to", to)
    assert code == 2
    assert stderr.splitlines() == [
        f"error: --to {to}: the package {package} is not installed",
        f"hint: pip install 'unipelt[{to}]'",
    ]


def test_help_lists_the_table_of_formats() -> None:
    code, stdout, _ = invoke("--help")
    assert code == 0
    assert f"One of {', '.join(formats.TARGETS)}." in " ".join(stdout.replace("│", "").split())
