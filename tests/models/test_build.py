"""Poolings, devices and lengths of a built model."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.backbones import Backbones
from support.models import experiment, logits_of
from support.rows import SENTENCES

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.models.build import build


def without_pooler(directory: Path) -> Path:
    tensors = load_file(directory / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    save_file(kept, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("model_type", [name for name, row in BACKBONES.items() if row.native])
def test_native_pooling_is_the_librarys_own_classifier(
    backbone_dir: Backbones, model_type: str
) -> None:
    directory = backbone_dir(model_type)
    settings = {"pooling": "native", "normalise": False}
    tuned = build(experiment(directory, "head", model=settings), 3)
    layout = BACKBONES[model_type]
    library = getattr(transformers, f"{layout.classes}ForSequenceClassification")
    theirs = library.from_pretrained(directory, num_labels=3).eval()
    head = {layout.native.out: tuned.classifier.head.out}
    if layout.native.dense is not None:
        head[layout.native.dense] = tuned.classifier.head.dense
    for path, own in head.items():
        theirs.get_submodule(path).load_state_dict(own.state_dict())
    tokens = tuned.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    if getattr(theirs.config, "type_vocab_size", 0) < 2:
        tokens.pop("token_type_ids")
    tokens["input_ids"][tokens["attention_mask"] == 0] = theirs.config.pad_token_id
    with torch.no_grad():
        expected = theirs(**tokens).logits
    assert torch.allclose(logits_of(tuned, SENTENCES), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "eos"])
def test_a_pooling_reads_what_its_name_says(backbone_dir: Backbones, pooling: str) -> None:
    settings = {"pooling": pooling, "normalise": False}
    tuned = build(experiment(backbone_dir("bert"), "head", model=settings), 2)
    tokens = tuned.tokenizer(SENTENCES[1], return_tensors="pt")
    with torch.no_grad():
        hidden = tuned.classifier.backbone(**tokens).last_hidden_state[0]
        features = {"cls": hidden[0], "mean": hidden.mean(0), "eos": hidden[-1]}[pooling]
        expected = tuned.classifier.head.out(features)
    assert torch.allclose(logits_of(tuned, SENTENCES)[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, "native"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
    ],
)
def test_auto_pooling_follows_the_backbones_own_files(
    bert_copy: Path, said: dict[str, bool], expected: str
) -> None:
    if said:
        (bert_copy / "1_Pooling").mkdir()
        (bert_copy / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert build(experiment(bert_copy, "head"), 2).pooling == expected


@pytest.mark.parametrize("method", ["head", "unipelt-apl", "bitfit", "full"])
def test_an_untrained_pooler_is_never_chosen_but_stored_when_asked_for(
    bert_copy: Path, method: str
) -> None:
    without_pooler(bert_copy)
    assert build(experiment(bert_copy, method), 2).pooling == "cls"
    settings = experiment(bert_copy, method, model={"pooling": "native"})
    tuned = build(settings, 2)
    stored = tuned.stored()
    assert {"backbone.pooler.dense.weight", "backbone.pooler.dense.bias"} <= stored.keys()
    assert tuned.parameter_counts()["head_parameters"] == 2 * 33 + 32 * 33
    fresh = build(settings, 2, folded=True)
    fresh.load(stored)
    assert torch.equal(logits_of(fresh, SENTENCES), logits_of(tuned, SENTENCES))


def test_electra_has_one_attention_and_says_so(backbone_dir: Backbones) -> None:
    settings = experiment(backbone_dir("electra"), "head", model={"attention": "sdpa"})
    with pytest.raises(BackboneError, match=r"model.attention = 'sdpa': not for electra"):
        build(settings, 2)


def test_more_tokens_than_positions_are_refused(backbone_dir: Backbones) -> None:
    settings = experiment(backbone_dir("roberta"), "head", model={"max_length": 139})
    with pytest.raises(BackboneError, match=r"model.max_length = 139: the backbone has 138 posi"):
        build(settings, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(backbone_dir: Backbones) -> None:
    with pytest.raises(ConfigError, match=r"train.device = 'cuda': this machine has none"):
        build(experiment(backbone_dir("bert"), "head", train={"device": "cuda"}), 2)
