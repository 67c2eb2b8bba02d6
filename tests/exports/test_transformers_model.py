"""A classifier of the transformers library computes what the run does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.backbones import Backbones
from support.exported import LABELS, NATIVE, difference, logits, make_run, rows_of

from unipelt_cli.errors import RunError
from unipelt_cli.exports import export


@pytest.fixture
def without_pooler(backbone_dir: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose checkpoint holds no pooler."""
    directory = tmp_path_factory.mktemp("backbone") / "bert"
    shutil.copytree(backbone_dir("bert"), directory)
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


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
    report = export.export_run(run, tuned, "hf", tmp_path / "out")

    assert report.holds
    assert report.parity.label_flips == 0
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
    export.export_run(run, tuned, "hf", tmp_path / "out")
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    text = "the film was not bad"
    row = tuned.tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        label = LABELS[int(tuned.classifier(**row).argmax())]

    assert classify(text)[0]["label"] == label
    length = run.experiment.model.max_length
    assert classify.tokenizer.model_max_length == length == 32
    assert len(classify.tokenizer("good " * 500, truncation=True)["input_ids"]) == length


def test_hf_folder_holds_a_regression_and_a_trained_pooler(
    without_pooler: Path, tmp_path: Path
) -> None:
    run, tuned = make_run(without_pooler, "bitfit", labels=(), pooling="native")
    assert tuned.untrained
    report = export.export_run(run, tuned, "hf", tmp_path / "out")

    assert report.holds
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_labels == 1


def test_pooler_that_the_run_trained_is_refused_by_adapters(
    without_pooler: Path, tmp_path: Path
) -> None:
    run, tuned = make_run(without_pooler, "unipelt-apl", pooling="native")
    with pytest.raises(RunError, match="trained one") as refused:
        export.export_run(run, tuned, "adapters", tmp_path / "out")
    assert "model.pooling=cls" in refused.value.hint
