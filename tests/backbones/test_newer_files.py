"""Folders that transformers 5 saved are read as that version computes them, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbones import save_backbone
from support.models import experiment, logits_of
from support.rows import SENTENCES

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import find
from unipelt_cli.errors import BackboneError
from unipelt_cli.models.build import build

WHOLE, SLIDING = "full_attention", "sliding_attention"
THETAS = {"global_rope_theta": 80000.0, "local_rope_theta": 500.0}
ELSEWHERE = "choose another backbone: this one needs a newer generation of the library"
UNKNOWN = "choose another backbone, or remove the key if the encoder computes the same without it"
SAVED = "give a config.json that was saved with the weights"


@pytest.fixture
def modernbert(tmp_path: Path) -> Path:
    """Return a ModernBERT of three layers whose angles and order of layers are not the default."""
    sizes = {"num_hidden_layers": 3, "global_attn_every_n_layers": 2, "local_attention": 4}
    return save_backbone(tmp_path / "modernbert", "modernbert", **sizes, **THETAS)


def rope(kind: str, theta: object, **more: object) -> dict[str, Any]:
    return {kind: {"rope_theta": theta, "rope_type": "default", **more}}


def newer(directory: Path, **changes: Any) -> dict[str, Any]:
    """Write the config of a ModernBERT in the newer words; a change to None leaves a key out."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for name in (*THETAS, "global_attn_every_n_layers", "torch_dtype", "repad_logits_with_grad"):
        config.pop(name, None)
    config |= {
        "dtype": "float32",
        "layer_types": [WHOLE, SLIDING, WHOLE],
        "rope_parameters": {**rope(WHOLE, 80000.0), **rope(SLIDING, 500.0)},
        "tie_word_embeddings": True,
        "transformers_version": "5.24.0",
    } | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return config


def logits(directory: Path) -> torch.Tensor:
    return logits_of(build(experiment(directory, "head"), 2), SENTENCES)


def test_a_modernbert_in_newer_words_computes_the_same_to_the_bit(modernbert: Path) -> None:
    expected = logits(modernbert)
    newer(modernbert)
    assert torch.equal(logits(modernbert), expected)
    read = find(str(modernbert)).library_config()
    assert (read.global_rope_theta, read.local_rope_theta) == (80000.0, 500.0)
    assert read.global_attn_every_n_layers == 2
    newer(modernbert, rope_parameters={**rope(WHOLE, 80000.0), **rope(SLIDING, 80000.0)})
    assert not torch.equal(logits(modernbert), expected)


def test_both_generations_words_may_stand_beside_each_other_if_they_agree(modernbert: Path) -> None:
    expected = logits(modernbert)
    newer(modernbert, **THETAS, global_attn_every_n_layers=2)
    assert torch.equal(logits(modernbert), expected)


def test_what_the_newer_words_leave_out_is_the_default(modernbert: Path) -> None:
    newer(modernbert, rope_parameters={WHOLE: None}, layer_types=None)
    read = find(str(modernbert)).library_config()
    assert (read.global_rope_theta, read.local_rope_theta) == (160000.0, 10000.0)
    assert read.global_attn_every_n_layers == 3


def test_local_angles_that_are_null_are_the_others_as_in_the_library(modernbert: Path) -> None:
    path = modernbert / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"local_rope_theta": None}))
    assert find(str(modernbert)).library_config().local_rope_theta == 80000.0


@pytest.mark.parametrize(
    ("kinds", "every"),
    [
        ([WHOLE, WHOLE, WHOLE], 1),
        ([WHOLE, SLIDING, WHOLE], 2),
        ([WHOLE, SLIDING, SLIDING], 3),
    ],
)
def test_an_order_of_layers_becomes_their_count(
    modernbert: Path, kinds: list[str], every: int
) -> None:
    newer(modernbert, layer_types=kinds)
    assert find(str(modernbert)).library_config().global_attn_every_n_layers == every


YARN = rope(WHOLE, 80000.0, rope_type="yarn", factor=4.0)
NOT_COMPUTED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"rope_parameters": YARN},
        "rope_parameters.full_attention.rope_type = 'yarn' is not computed here",
        ELSEWHERE,
    ),
    (
        {"rope_parameters": rope(SLIDING, 500.0, partial_rotary_factor=0.5)},
        "rope_parameters.sliding_attention.partial_rotary_factor = 0.5 is not computed here",
        ELSEWHERE,
    ),
    (
        {"rope_parameters": {"rope_theta": 7.0}},
        "rope_parameters = {'rope_theta': 7.0} is not computed here",
        ELSEWHERE,
    ),
    ({"rope_parameters": [1]}, "rope_parameters = [1] is not computed here", ELSEWHERE),
    (
        {"rope_parameters": {WHOLE: 3}},
        "rope_parameters.full_attention = 3 is not computed here",
        ELSEWHERE,
    ),
    (
        {"rope_parameters": rope(WHOLE, "wide")},
        "rope_parameters.full_attention.rope_theta = 'wide' is not a number above 1",
        SAVED,
    ),
    (
        {"rope_parameters": rope(WHOLE, -5)},
        "rope_parameters.full_attention.rope_theta = -5 is not a number above 1",
        SAVED,
    ),
    (
        {"global_rope_theta": 9.0},
        "rope_parameters.full_attention and global_rope_theta contradict each other",
        SAVED,
    ),
    (
        {"global_attn_every_n_layers": 3},
        "layer_types and global_attn_every_n_layers contradict each other",
        SAVED,
    ),
    (
        {"layer_types": [SLIDING, WHOLE, SLIDING]},
        "layer_types = ['sliding_attention', 'full_attention', 'sliding_attention'] is not "
        "computed here",
        ELSEWHERE,
    ),
    ({"layer_types": [WHOLE]}, "layer_types = ['full_attention'] is not computed here", ELSEWHERE),
    ({"layer_types": "all"}, "layer_types = 'all' is not computed here", ELSEWHERE),
    ({"sliding_window": 7}, "sliding_window = 7 is not computed here", UNKNOWN),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling = {'rope_type': 'linear', 'factor': 2.0} is not computed here",
        UNKNOWN,
    ),
]


@pytest.mark.parametrize(
    ("keys", "message", "hint"), NOT_COMPUTED, ids=[m for _, m, _ in NOT_COMPUTED]
)
def test_what_this_version_cannot_compute_is_refused_by_name(
    modernbert: Path, keys: dict[str, Any], message: str, hint: str
) -> None:
    newer(modernbert, **keys)
    with pytest.raises(BackboneError) as caught:
        find(str(modernbert))
    assert caught.value.message == f"{modernbert / 'config.json'}: {message}"
    assert caught.value.hint == hint


@pytest.mark.parametrize("model_type", BACKBONES)
def test_a_key_that_nobody_knows_is_refused_in_every_architecture(
    backbone_dir: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    directory = Path(shutil.copytree(backbone_dir(model_type), tmp_path / "backbone"))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"logit_softcap": 30.0}))
    with pytest.raises(BackboneError, match=r": logit_softcap = 30\.0 is not computed here$"):
        find(str(directory))
    empty = {"logit_softcap": None, "a": {}, "b": [], "c": {"d": {}}, "dtype": "bfloat16"}
    path.write_text(json.dumps(config | empty))
    find(str(directory))


ALIASES = [
    ("distilbert", "hidden_size", 32),
    ("distilbert", "num_hidden_layers", 2),
    ("t5", "is_gated_act", False),
    ("bart", "num_hidden_layers", 2),
    ("modernbert", "rope_theta", 160000.0),
]


@pytest.mark.parametrize(("model_type", "key", "value"), ALIASES)
def test_a_key_that_says_the_same_again_may_stand_and_one_that_does_not_is_refused(
    backbone_dir: Callable[[str], Path], tmp_path: Path, model_type: str, key: str, value: Any
) -> None:
    directory = Path(shutil.copytree(backbone_dir(model_type), tmp_path / "backbone"))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: value}))
    find(str(directory))
    other = not value if isinstance(value, bool) else value + 1
    path.write_text(json.dumps(config | {key: other}))
    with pytest.raises(BackboneError, match=f": {key} = {other} is not computed here"):
        find(str(directory))


def test_a_barts_keys_of_old_may_only_say_what_is_computed(
    backbone_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(backbone_dir("bart"), tmp_path / "bart"))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"normalize_before": False, "classif_dropout": 0.1}))
    find(str(directory))
    path.write_text(json.dumps(config | {"normalize_before": True}))
    with pytest.raises(BackboneError, match="normalize_before = True is not computed here"):
        find(str(directory))


# tokenizers


def newer_tokenizer(directory: Path, **changes: Any) -> None:
    """Leave the tokenizer as transformers 5 saves it: one file, and settings in its words."""
    for name in ("special_tokens_map.json", "vocab.txt"):
        (directory / name).unlink()
    names = ("pad", "unk", "cls", "sep", "mask")
    settings = {
        **{f"{name}_token": f"[{name.upper()}]" for name in names},
        **{"backend": "tokenizers", "is_local": True, "local_files_only": True},
        **{"model_max_length": 512, "stride": 0, "truncation_strategy": "longest_first"},
        **{"do_lower_case": True, "tokenizer_class": "TokenizersBackend"},
    } | changes
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", ["TokenizersBackend", "BertTokenizer"])
@pytest.mark.parametrize("extra", [[], ["good"], [{"content": "good"}]])
def test_a_tokenizer_of_the_newer_library_gives_the_same_logits_to_the_bit(
    bert: Path, bert_copy: Path, kind: str, extra: list[Any]
) -> None:
    newer_tokenizer(bert_copy, tokenizer_class=kind, extra_special_tokens=extra)
    tuned = build(experiment(bert_copy, "head"), 2)
    assert torch.equal(logits_of(tuned, SENTENCES), logits(bert))
    assert tuned.tokenizer.additional_special_tokens == (["good"] if extra else [])


def test_special_tokens_of_one_model_keep_their_names(bert_copy: Path) -> None:
    named = {"extra_special_tokens": [], "model_specific_special_tokens": {"user_token": "cat"}}
    newer_tokenizer(bert_copy, **named)
    assert build(experiment(bert_copy, "head"), 2).tokenizer.user_token == "cat"


ODD: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer_class": "PythonBackend"}, "tokenizer_class = 'PythonBackend' is not that of a"),
    ({"extra_special_tokens": ["x", 3]}, r"extra_special_tokens = \['x', 3\] is not a list of tok"),
    ({"extra_special_tokens": [{"a": 1}]}, "extra_special_tokens = .* is not a list of tokens"),
    ({"additional_special_tokens": [None]}, r"additional_special_tokens = \[None\] is not a list"),
    (
        {"extra_special_tokens": [], "model_specific_special_tokens": 3},
        "the tokenizer cannot be read",
    ),
]


@pytest.mark.parametrize(("keys", "message"), ODD, ids=[m for _, m in ODD])
def test_odd_settings_of_a_newer_tokenizer_are_refused(
    bert_copy: Path, keys: dict[str, Any], message: str
) -> None:
    newer_tokenizer(bert_copy, **keys)
    with pytest.raises(BackboneError, match=message) as caught:
        build(experiment(bert_copy, "head"), 2)
    assert caught.value.hint == "save it again with save_pretrained of a fast tokenizer"


def test_a_newer_tokenizer_without_its_file_is_refused(bert_copy: Path) -> None:
    newer_tokenizer(bert_copy)
    (bert_copy / "tokenizer.json").rename(bert_copy / "vocab.txt")
    with pytest.raises(BackboneError, match="the tokenizer cannot be read"):
        build(experiment(bert_copy, "head"), 2)
