"""What a run becomes in `adapters` and in transformers, and that it computes the same there."""

import ast
import json
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import unipelt_cli
from unipelt_cli import adapterhub, execution, export, runs
from unipelt_cli.backbones import BACKBONES
from unipelt_cli.config import resolve
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.modeling import build

LABELS = ("low", "middle", "high")
TINY = {"prefix_length": 4, "prefix_width": 16, "rank": 4, "reduction": 8}
WITH_PREFIX = ("prefix_length", "prefix_width")
# Method and settings of ours, by what they are called in the paper.
UNIONS = {
    "apl": ("unipelt-apl", {}),
    "apl-separate-gates": ("unipelt-apl", {"lora_gates": "separate"}),
    "ap": ("unipelt-ap", {}),
    "apl-ungated": ("apl-ungated", {"lora_scale": 0.7}),
    "adapter": ("adapter", {}),
    "prefix": ("prefix", {}),
    "lora": ("lora", {}),
}
KNOWN = sorted(BACKBONES.keys() - adapterhub.UNKNOWN)


@pytest.fixture(scope="module")
def adapters():
    """The library of that name; it warns where this project's tests allow no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import adapters

        yield adapters


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Tiny saved backbones by architecture, with weights so large that every effect is visible."""

    @cache
    def saved(model_type, pooler=True):
        directory = tmp_path_factory.mktemp(model_type)
        classes = BACKBONES[model_type].classes
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        if model_type == "distilbert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
        config = getattr(transformers, f"{classes}Config")(
            vocab_size=100,
            max_position_embeddings=64,
            initializer_range=0.3,
            pad_token_id=0,
            **({"embedding_size": 16} if model_type == "electra" else {}),
            **sizes,
        )
        torch.manual_seed(0)
        without = {} if pooler else {"add_pooling_layer": False}
        model = getattr(transformers, f"{classes}Model")(config, **without)
        model.save_pretrained(directory)
        _tokenizer().save_pretrained(directory)
        return directory

    return saved


def _tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{n}" for n in range(90))]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )


def make_run(directory, method, settings=None, labels=LABELS, folded=True, **model):
    """Return a run that no training made, and its model with noise on all that trains."""
    settings = dict(settings or {})
    if method in {name for name, _ in UNIONS.values()} | {"unipelt-aplb"}:
        settings = TINY | settings
    train = {"device": "cpu", "precision": settings.pop("precision", "fp32")}
    experiment = resolve(
        [
            ("", {"data": {"task": "demo"}, "train": train}),
            ("", {"model": {"backbone": str(directory), "max_length": 32} | model}),
            ("", {"method": {"name": method} | settings}),
        ]
    )
    tuned = build(experiment, len(labels) or 1, folded=folded)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.classifier.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    task = {"name": "my task.", "text": ["a"], "labels": labels, "metric": "accuracy", "also": []}
    return runs.Run(Path("the-run"), experiment, {}, {"task": task}, {}), tuned


def rows_of(tuned, count=8):
    rows = runs.probe_rows(tuned)
    return [rows.batch([row], torch.device("cpu")) for row in range(count)]


def difference(ours, theirs, rows):
    with torch.inference_mode():
        return max(float((ours(**row) - theirs(**row)).abs().max()) for row in rows)


def hidden(model):
    return lambda **row: model(**row).last_hidden_state


def logits(model):
    return lambda **row: model(**row).logits


# The submodules themselves, against the library that the export writes for.


def adapters_config(adapters, method):
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


def copy_into(ours, theirs, layout, name, shared):
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
            pairs += [(own.lora[place].a, lora.lora_A), (own.lora[place].b, lora.lora_B)]
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


def pair_linear(ours, theirs):
    return [(ours.weight, theirs.weight), (ours.bias, theirs.bias)]


@pytest.mark.parametrize("union", UNIONS)
@pytest.mark.parametrize("model_type", KNOWN)
def test_submodules_compute_what_adapters_computes(adapters, backbones, model_type, union):
    directory = backbones(model_type)
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
    assert difference(hidden(ours), hidden(theirs), rows) <= 1e-5
    moved = max(
        float((hidden(theirs)(**row) - before).abs().max())
        for row, before in zip(rows, bare, strict=True)
    )
    assert moved > 0.05


# --to adapters


def load_as_a_user(adapters, backbone, folder):
    model = adapters.AutoAdapterModel.from_pretrained(backbone)
    model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    return model.eval()


@pytest.mark.parametrize(
    ("model_type", "pooling"), [*((name, "native") for name in KNOWN), ("bert", "cls")]
)
def test_adapters_folder_has_same_hidden_states_and_logits(
    adapters, backbones, tmp_path, model_type, pooling
):
    run, tuned = make_run(backbones(model_type), "unipelt-apl", pooling=pooling)
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert export.holds(report["parity"])
    assert report["parity"]["rows"] == 64
    assert report["parity"]["label_flips"] == 0
    assert any("padding" in note for note in report["notes"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    ]
    model = load_as_a_user(adapters, backbones(model_type), tmp_path / "out")
    rows = rows_of(tuned)
    assert difference(tuned.classifier, logits(model), rows) <= 1e-5
    assert difference(hidden(tuned.classifier.backbone), hidden(model.base_model), rows) <= 1e-5
    assert list(model.get_labels()) == list(LABELS)


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
def test_adapters_holds_every_union(backbones, tmp_path, method, settings):
    run, tuned = make_run(backbones("bert"), method, settings, pooling="cls")
    before = {name: tensor.clone() for name, tensor in tuned.stored().items()}
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert report["parity"]["max_abs_logit_diff"] <= 1e-5
    padded = [note for note in report["notes"] if "padding" in note]
    assert bool(padded) == tuned.method.gated
    if settings.get("gate_pooling") == "all":
        assert "every row to 32 tokens" in padded[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.stored().items())


def test_prefix_is_stored_once_and_flat(backbones, tmp_path):
    run, tuned = make_run(backbones("bert"), "prefix", folded=False, pooling="cls")
    export.export(run, tuned, "adapters", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter.safetensors")

    assert [tensor.numel() for tensor in stored.values()] == [2 * 2 * 4 * 32]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["config"]["flat"] is True
    assert config["version"] == "adapters.1.3.0"


@pytest.mark.parametrize("pooling", ["mean", "eos"])
def test_without_a_head_the_parity_is_of_hidden_states(adapters, backbones, tmp_path, pooling):
    run, tuned = make_run(backbones("bert"), "unipelt-apl", pooling=pooling)
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert export.holds(report["parity"])
    assert any("hidden states" in note for note in report["notes"])
    assert not (tmp_path / "out" / "head_config.json").exists()
    model = load_as_a_user(adapters, backbones("bert"), tmp_path / "out")
    assert difference(hidden(tuned.classifier.backbone), hidden(model), rows_of(tuned)) <= 1e-5


def test_adapters_holds_a_regression(adapters, backbones, tmp_path):
    run, tuned = make_run(backbones("roberta"), "unipelt-ap", labels=(), pooling="native")
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert export.holds(report["parity"])
    model = load_as_a_user(adapters, backbones("roberta"), tmp_path / "out")
    assert logits(model)(**rows_of(tuned)[0]).shape == (1, 1)


def test_bf16_run_is_exported_in_float32_and_says_so(backbones, tmp_path):
    run, tuned = make_run(backbones("bert"), "unipelt-apl", {"precision": "bf16"}, pooling="cls")
    report = export.export(run, tuned, "adapters", tmp_path / "out")

    assert report["parity"]["max_abs_logit_diff"] <= 1e-5
    assert any("bf16" in note for note in report["notes"])


@pytest.mark.parametrize("lost", ["gates.lora", "adapter.up", "lora.value.b"])
def test_tensor_that_adapters_does_not_read_is_found(backbones, tmp_path, monkeypatch, lost):
    run, tuned = make_run(backbones("bert"), "unipelt-apl", pooling="cls")
    names = adapterhub.LAYER_NAMES
    monkeypatch.setattr(adapterhub, "LAYER_NAMES", {**names, lost: names[lost][1:]})

    with pytest.raises(CheckError, match="disagree about the tensor"):
        export.export(run, tuned, "adapters", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_swapped_tensors_break_the_parity(backbones, tmp_path, monkeypatch):
    run, tuned = make_run(backbones("bert"), "unipelt-apl", pooling="cls")
    names = dict(adapterhub.LAYER_NAMES)
    for kind in "ab":
        query, value = names[f"lora.query.{kind}"], names[f"lora.value.{kind}"]
        names |= {f"lora.query.{kind}": value, f"lora.value.{kind}": query}
    monkeypatch.setattr(adapterhub, "LAYER_NAMES", names)

    assert not export.holds(export.export(run, tuned, "adapters", tmp_path / "out")["parity"])
    assert not export.holds({"max_abs_logit_diff": float("nan")})


def test_adapters_has_the_architectures_that_are_not_refused(adapters):
    for model_type, layout in BACKBONES.items():
        has = hasattr(adapters, f"{layout.classes}AdapterModel")
        assert has == (model_type not in adapterhub.UNKNOWN)


def test_adapters_is_imported_in_functions_of_one_module():
    for path in Path(unipelt_cli.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        allowed = set()
        if path.name == "adapterhub.py":
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            allowed = {id(inner) for function in functions for inner in ast.walk(function)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "adapters" for name in names):
                assert id(node) in allowed, f"{path.name} line {node.lineno}"


# --to hf


@pytest.mark.parametrize("method", ["full", "bitfit", "head", "lora"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert", "camembert"])
def test_hf_folder_has_same_logits(backbones, tmp_path, model_type, method):
    run, tuned = make_run(backbones(model_type), method, pooling="native")
    rows = rows_of(tuned)
    with torch.inference_mode():
        before = [tuned.classifier(**row) for row in rows]
    report = export.export(run, tuned, "hf", tmp_path / "out")

    assert export.holds(report["parity"])
    assert report["parity"]["label_flips"] == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert difference(tuned.classifier, logits(model), rows) <= 1e-5
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: place for place, label in enumerate(LABELS)}
    assert not list((tmp_path / "out").glob("*.bin"))
    with torch.inference_mode():  # the model that was given is not the one that was merged
        after = [tuned.classifier(**row) for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_hf_folder_has_the_tokenizer_and_works_in_a_pipeline(backbones, tmp_path):
    run, tuned = make_run(backbones("bert"), "lora", pooling="native")
    export.export(run, tuned, "hf", tmp_path / "out")
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    text = "word1 word2 word30"
    row = tuned.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        label = LABELS[int(tuned.classifier(**row).argmax())]

    assert classify(text)[0]["label"] == label


def test_hf_folder_holds_a_regression_and_a_trained_pooler(backbones, tmp_path):
    directory = backbones("bert", pooler=False)
    run, tuned = make_run(directory, "bitfit", labels=(), pooling="native")
    assert tuned.untrained
    report = export.export(run, tuned, "hf", tmp_path / "out")

    assert export.holds(report["parity"])
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
        ("adapters", "camembert", "unipelt-apl", "cls", "is a camembert", "xlm-roberta, or try --to hf"),
        ("hf", "bert", "unipelt-apl", "native", "gates depend on the input", "use --to adapters"),
        ("hf", "bert", "adapter", "native", "what its adapter does", "use --to adapters"),
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
            "use --to adapters, or train with --set model.pooling=native",
        ),
        ("hf", "bert", "unipelt-apl", "mean", "does not read mean pooling", "use --to adapters"),
        (
            "hf",
            "bert",
            "unipelt-aplb",
            "native",
            "gates depend on the input",
            "train without it (--set method.parts=adapter,prefix,lora) and use --to adapters",
        ),
    ],
)
def test_refusals(backbones, tmp_path, to, model_type, method, pooling, said, hint):
    run, tuned = make_run(backbones(model_type), method, pooling=pooling)
    with pytest.raises(RunError) as refused:
        export.export(run, tuned, to, tmp_path / "new" / "out")

    assert "the-run" in refused.value.message
    assert said in refused.value.message
    assert refused.value.hint.endswith(hint)
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_pooler_that_the_run_trained_is_refused_by_adapters(backbones, tmp_path):
    run, tuned = make_run(backbones("bert", pooler=False), "unipelt-apl", pooling="native")
    with pytest.raises(RunError, match="trained one") as refused:
        export.export(run, tuned, "adapters", tmp_path / "out")
    assert "model.pooling=cls" in refused.value.hint


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_target_that_exists_is_refused_and_kept(backbones, tmp_path, kind):
    target = tmp_path / "out"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    run, tuned = make_run(backbones("bert"), "lora", pooling="native")
    with pytest.raises(RunError, match="exists already"):
        export.export(run, tuned, "hf", target)
    assert list(tmp_path.iterdir()) == [target]


def test_target_that_cannot_be_written_is_refused(backbones, tmp_path):
    (tmp_path / "file").write_text("")
    run, tuned = make_run(backbones("bert"), "lora", pooling="native")
    with pytest.raises(RunError, match="cannot be written"):
        export.export(run, tuned, "hf", tmp_path / "file" / "out")


def test_failure_leaves_nothing_behind(backbones, tmp_path, monkeypatch):
    def fail(directory):
        raise CheckError("failed", "")

    monkeypatch.setattr(export, "_load_plain", fail)
    run, tuned = make_run(backbones("bert"), "lora", pooling="native")
    with pytest.raises(CheckError):
        export.export(run, tuned, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# A run that was really trained


@pytest.mark.parametrize(("to", "method"), [("adapters", "unipelt-apl"), ("hf", "lora")])
def test_trained_run_is_exported(backbones, tmp_path, to, method):
    file = tmp_path / "rows.csv"
    rows = [f"word{n} word{n % 7} word{n % 3},{LABELS[n % 3]}" for n in range(60)]
    file.write_text("\n".join(["text,label", *rows]) + "\n")
    experiment = resolve(
        [
            ("", {"data": {"train_file": str(file), "text": "text", "label": "label"}}),
            ("", {"model": {"backbone": str(backbones("bert")), "max_length": 16}}),
            ("", {"method": {"name": method, **TINY}}),
            ("", {"train": {"epochs": 1, "device": "cpu", "precision": "fp32"}}),
        ]
    )
    for _ in execution.execute(experiment, tmp_path / "run"):
        pass
    run = runs.read(tmp_path / "run")
    report = export.export(run, run.build(), to, tmp_path / "out")

    assert export.holds(report["parity"])
    assert report["format"] == to
    assert report["path"] == str(tmp_path / "out")
    json.dumps(report)
