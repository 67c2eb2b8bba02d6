"""What a run becomes in PEFT, and that it computes the same there, loaded as its users do."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.backbones import Backbones
from support.exported import LABELS, NATIVE, TINY, difference, hidden, logits, make_run, rows_of
from transformers import AutoModelForSequenceClassification as Library

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.exports import export, job, peft_folder

RESCALED = ["bert", "roberta", "distilbert", "electra", "mpnet"]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(job, "ROWS", 24)
    yield
    transformers.logging.set_verbosity_warning()


def load_as_a_user(backbone: Path, folder: Path, kind: Any, **options: Any) -> Any:
    transformers.logging.set_verbosity_error()
    base = kind.from_pretrained(backbone, **options)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize(
    ("model_type", "method"),
    [*((name, "lora") for name in NATIVE), *((name, "ia3") for name in RESCALED)],
)
def test_library_head_and_submodules_have_same_logits(
    backbone_dir: Backbones, tmp_path: Path, model_type: str, method: str
) -> None:
    directory = backbone_dir(model_type)
    run, tuned = make_run(directory, method, pooling="native")
    report = export.export_run(run, tuned, "peft", tmp_path / "out")

    assert report.holds, report
    assert report.parity.label_flips == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = load_as_a_user(directory, tmp_path / "out", Library, num_labels=len(LABELS))
    rows = rows_of(tuned)
    assert difference(tuned.classifier, logits(model), rows) <= 3e-5
    plain = Library.from_pretrained(directory, num_labels=len(LABELS)).eval()
    assert difference(tuned.classifier, logits(plain), rows) > 0.05


@pytest.mark.parametrize("model_type", [*BACKBONES, "deberta-v2-separate"])
def test_without_a_head_hidden_states_are_the_same(
    backbone_dir: Backbones, tmp_path: Path, model_type: str
) -> None:
    directory = backbone_dir(model_type)
    run, tuned = make_run(directory, "lora", {"lora_scale": 0.7}, pooling="mean")
    report = export.export_run(run, tuned, "peft", tmp_path / "out")

    assert report.holds, report
    assert any("no head was written" in note for note in report.notes)
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert all("lora_" in name for name in names)
    kind = tuned.pretrained.library_class
    model = load_as_a_user(directory, tmp_path / "out", kind)
    assert difference(hidden(tuned.classifier.backbone), hidden(model), rows_of(tuned)) <= 3e-5


def test_scale_is_alpha_over_rank_and_the_paths_are_exact(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "lora", {"lora_scale": 3.0}, pooling="native")
    export.export_run(run, tuned, "peft", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (TINY["rank"], 3 * TINY["rank"])
    assert (
        config["modules_to_save"] == ["classifier", "score"]
        or "classifier" in (config["modules_to_save"])
    )
    assert str(backbone_dir("bert").parent) not in json.dumps(config)
    run, tuned = make_run(backbone_dir("bert"), "ia3", pooling="native")
    export.export_run(run, tuned, "peft", tmp_path / "ia3")
    names = load_file(tmp_path / "ia3" / "adapter_model.safetensors")
    assert len([name for name in names if "ia3_l" in name]) == 3 * 2
    assert not [name for name in names if "attention.output" in name]


def test_pooler_that_the_run_trained_goes_along(backbone_dir: Backbones, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(backbone_dir("bert"), tmp_path / "backbone"))
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    run, tuned = make_run(directory, "lora", pooling="native")
    assert tuned.untrained
    assert export.export_run(run, tuned, "peft", tmp_path / "out").holds
    model = load_as_a_user(directory, tmp_path / "out", Library, num_labels=len(LABELS))
    assert difference(tuned.classifier, logits(model), rows_of(tuned)) <= 3e-5


@pytest.mark.parametrize(
    ("method", "settings"), [("unipelt-apl", {}), ("unipelt-apl", {"lora_gates": "separate"})]
)
def test_one_part_of_a_union_is_another_model_and_only_written_if_that_is_said(
    backbone_dir: Backbones, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    directory = backbone_dir("bert")
    run, tuned = make_run(directory, method, settings, pooling="native")
    refused = export.export_run(run, tuned, "peft", tmp_path / "out", part="lora")
    assert not refused.written
    assert list(tmp_path.iterdir()) == []
    report = export.export_run(run, tuned, "peft", tmp_path / "out", part="lora", tolerance=1e3)
    assert report.written
    assert report.parity == refused.parity
    assert report.parity.max_abs_logit_diff > 0.1
    assert any("another model than the run's" in note for note in report.notes)
    assert "another model than the run's" in (tmp_path / "out" / "README.md").read_text()


def test_part_is_exact_where_the_other_parts_do_nothing(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    """The gate's mean stands for the gate, and nothing else is lost."""
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", {"parts": "lora"}, pooling="cls")
    with torch.no_grad():
        for layer in tuned.classifier.backbone.submodules.layers:
            layer.gates["lora"].weight.zero_()  # then a gate is what its bias says
            layer.gates["lora"].bias.fill_(0.5 + layer.index)
    with pytest.raises(RunError, match="its gates depend on the input"):
        export.export_run(run, tuned, "peft", tmp_path / "out")
    report = export.export_run(run, tuned, "peft", tmp_path / "out", part="lora")
    assert report.holds, report
    assert any("held at each layer's mean" in note for note in report.notes)


@pytest.mark.parametrize(
    ("model_type", "method", "pooling", "part", "said", "hint"),
    [
        (
            *("bert", "unipelt-apl", "native", None, "its gates depend on the input"),
            "use --to onnx, or export another model, one part alone, with --part lora",
        ),
        (
            *("bert", "apl-ungated", "native", None, "PEFT does not have its adapter and prefix"),
            "use --to onnx, or export another model, one part alone, with --part lora",
        ),
        ("bert", "adapter", "native", None, "PEFT does not have its adapter", "use --to onnx"),
        (
            *("bert", "prefix", "native", None),
            "PEFT's prefix moves a row's positions, and this one does not",
            "use --to onnx",
        ),
        (
            *("bert", "prompt", "native", None),
            "its soft tokens stand after the first token, and PEFT's before it",
            "use --to onnx",
        ),
        (
            *("bert", "bitfit", "native", None, "it is neither LoRA nor (IA)3"),
            "use --to hf, or --to onnx",
        ),
        (
            *("bert", "full", "mean", None, "it is neither LoRA nor (IA)3"),
            "train with --set model.pooling=native, use --to hf, or --to onnx",
        ),
        ("bert", "unipelt-ap", "mean", "lora", "it has no LoRA", "use --to onnx"),
        (
            *("bert", "unipelt-apl", "mean", "prefix"),
            "of UniPELT's parts PEFT has lora, not 'prefix'",
            "use --to onnx",
        ),
        ("bert", "ia3", "mean", "lora", "it has no part 'lora'", None),
        (
            *("albert", "unipelt-apl", "mean", "lora"),
            "in albert not every layer has a gate of its own",
            "use --to onnx",
        ),
    ],
)
def test_what_peft_cannot_hold_is_refused(
    backbone_dir: Backbones,
    tmp_path: Path,
    model_type: str,
    method: str,
    pooling: str,
    part: str | None,
    said: str,
    hint: str | None,
) -> None:
    run, tuned = make_run(backbone_dir(model_type), method, pooling=pooling)
    with pytest.raises(RunError) as refused:
        export.export_run(run, tuned, "peft", tmp_path / "new" / "out", part=part)
    assert refused.value.message == f"the-run: PEFT has no such method, {said}"
    assert hint is None or refused.value.hint == hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["lost", "renamed"])
def test_tensor_that_peft_does_not_read_is_found(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    translate = peft_folder._translate

    def damaged(*arguments: Any) -> Any:
        config, tensors = translate(*arguments)
        name = min(tensors)
        tensor = tensors.pop(name)
        return config, tensors if damage == "lost" else {**tensors, f"{name}.x": tensor}

    monkeypatch.setattr(peft_folder, "_translate", damaged)
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    with pytest.raises(CheckError, match="disagree about the tensor"):
        export.export_run(run, tuned, "peft", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_prefix_of_peft_is_another_function(backbone_dir: Backbones) -> None:
    """The reason of a refusal: with a prefix in front its backbone counts positions from there."""
    directory = backbone_dir("bert")
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    seen = []
    model = peft.get_peft_model(transformers.AutoModel.from_pretrained(directory), config).eval()
    embeddings = model.base_model.embeddings.position_embeddings
    embeddings.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert seen[0].tolist() == [[4, 5, 6]]
