"""A backbone is read if it is sound, and refused by name if it is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.backbones import Backbones, save_backbone
from support.models import experiment, logits_of
from support.rows import SENTENCES

from unipelt_cli.backbones.pretrained import find
from unipelt_cli.errors import BackboneError
from unipelt_cli.models.build import build


def test_what_the_checkpoint_lacks_is_named(bert_copy: Path) -> None:
    tensors = load_file(bert_copy / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, bert_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"such as encoder\.layer\.1\.output\.dense\.weight"):
        build(experiment(bert_copy, "head"), 2)


@pytest.mark.parametrize(
    "keys",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"_attn_implementation": "someone/kernel"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"nested": [{"deeper": {"trust_remote_code": True}}]},
        {"custom_pipelines": {"x": "y"}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_keys_that_fetch_or_run_something_are_refused_by_name(
    bert_copy: Path, file: str, keys: dict[str, Any]
) -> None:
    config = json.loads((bert_copy / file).read_text())
    (bert_copy / file).write_text(json.dumps(config | keys))
    with pytest.raises(BackboneError, match="can make a library fetch or run code") as caught:
        find(str(bert_copy))
    name = next(iter(keys)) if "nested" not in keys else "trust_remote_code"
    assert caught.value.message.startswith(f"{bert_copy / file}: holds {name}, ")


def break_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def make_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: (d / "config.json").unlink(), "no config.json there"),
    (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
    (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "'gpt2' is not supported"),
    (make_pickle, "no model.safetensors there, and no other format is read"),
    (break_weights, "the weights cannot be read"),
    (lambda d: (d / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
    (
        lambda d: [(d / name).unlink() for name in ("tokenizer.json", "vocab.txt")],
        "no tokenizer there",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[text for _, text in BROKEN])
def test_a_broken_backbone_is_refused(
    bert_copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(bert_copy)
    with pytest.raises(BackboneError, match=message):
        build(experiment(bert_copy, "head"), 2)


def test_a_config_with_impossible_sizes_is_refused(bert_copy: Path) -> None:
    config = json.loads((bert_copy / "config.json").read_text())
    (bert_copy / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(BackboneError, match="hidden_size = 'wide' is not a whole number from 1"):
        build(experiment(bert_copy, "head"), 2)


def test_the_fingerprint_changes_with_weights_config_and_tokenizer(bert_copy: Path) -> None:
    seen = {find(str(bert_copy)).fingerprint}
    names = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")
    for name in (*names, "special_tokens_map.json"):
        path = bert_copy / name
        path.write_bytes(path.read_bytes() + b"\n")
        seen.add(find(str(bert_copy)).fingerprint)
    tensors = load_file(bert_copy / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1
    save_file(tensors, bert_copy / "model.safetensors", {"format": "pt"})
    seen.add(find(str(bert_copy)).fingerprint)
    assert len(seen) == 7


def test_harmless_keys_of_older_releases_are_dropped(bert_copy: Path) -> None:
    config = json.loads((bert_copy / "config.json").read_text())
    harmless = {"_attn_implementation_autoset": True, "return_dict": False}
    (bert_copy / "config.json").write_text(json.dumps(config | harmless))
    assert logits_of(build(experiment(bert_copy, "head"), 2), SENTENCES).shape == (4, 2)


def test_a_tokenizer_of_another_backbone_is_refused(tmp_path: Path) -> None:
    directory = save_backbone(tmp_path / "small", "bert", vocab_size=40)
    with pytest.raises(BackboneError, match="the tokenizer has 43 tokens, the backbone 40"):
        build(experiment(directory, "head"), 2)


def test_a_backbone_with_a_head_of_its_own_loads(tmp_path: Path, backbone_dir: Backbones) -> None:
    """A checkpoint of a whole classifier or language model holds the encoder under a prefix."""
    directory = save_backbone(tmp_path / "whole", "bert")
    model = transformers.BertForMaskedLM.from_pretrained(directory)
    model.save_pretrained(directory)
    tuned = build(experiment(directory, "head"), 2)
    assert tuned.pooling == "cls"
    encoder = load_file(directory / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(tuned.classifier.backbone.get_parameter(name), encoder[f"bert.{name}"])
