"""A sentence encoder is read as its own files say, in each dialect, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbones import NEW, OLD, save_pipeline
from support.command import FAST, error_of, invoke, rows_options
from support.models import experiment, logits_of
from support.rows import SENTENCES

from unipelt_cli.backbones.pretrained import find
from unipelt_cli.errors import BackboneError
from unipelt_cli.models.build import build

SWITCHES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
CHOOSE = "choose the pooling yourself: --set model.pooling=mean, cls or eos"


def switches(*modes: str) -> dict[str, Any]:
    """Say modes as versions up to 5.3 do: a switch for each."""
    return {"word_embedding_dimension": 32} | {key: mode in modes for mode, key in SWITCHES.items()}


def words(*modes: str) -> dict[str, Any]:
    """Say modes as versions from 5.4 on do: one word, or a list."""
    mode = modes[0] if len(modes) == 1 else list(modes)
    return {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}


DIALECTS = {"switches": (OLD, switches), "words": (NEW, words)}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("mode", "pooling"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "eos")]
)
def test_a_mode_is_followed_in_each_dialect_to_the_bit(
    bert: Path, bert_copy: Path, dialect: str, mode: str, pooling: str
) -> None:
    prefix, say = DIALECTS[dialect]
    save_pipeline(bert_copy, say(mode), ("Normalize",), prefix)
    tuned = build(experiment(bert_copy, "head"), 2)
    assert (tuned.pooling, tuned.notes) == (pooling, ())
    chosen = build(experiment(bert, "head", model={"pooling": pooling}), 2)
    assert torch.equal(logits_of(tuned, SENTENCES), logits_of(chosen, SENTENCES))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (["max"], "'max' pooling is not supported"),
        (["mean_sqrt_len_tokens"], "'mean_sqrt_len_tokens' pooling is not supported"),
        (["weightedmean"], "'weightedmean' pooling is not supported"),
        (["cls", "mean"], "'cls' and 'mean' pooling side by side is not supported"),
    ],
)
def test_a_mode_that_cannot_be_followed_is_refused_by_name(
    bert_copy: Path, rows_file: Path, dialect: str, modes: list[str], message: str
) -> None:
    prefix, say = DIALECTS[dialect]
    save_pipeline(bert_copy, say(*modes), (), prefix)
    given = ["train", *rows_options(rows_file), "--k", "20", "--model", str(bert_copy)]
    path = bert_copy / "1_Pooling" / "config.json"
    assert error_of(*given, "--dry-run") == (f"{path}: {message}", CHOOSE)
    for pooling in ("mean", "cls", "eos"):
        tuned = build(experiment(bert_copy, "head", model={"pooling": pooling}), 2)
        assert tuned.pooling == pooling


PIPELINES: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda d: save_pipeline(d, words("mean"), ("Asym",)),
        "modules.json: a pipeline of Transformer, Pooling, Asym cannot be followed",
    ),
    (
        lambda d: save_pipeline(d, None, ("Dense",)),
        "modules.json: a pipeline of Transformer, Dense cannot be followed",
    ),
    (
        lambda d: save_pipeline(d, words("mean"), (), "somebody.modules"),
        "modules.json: a pipeline of 'somebody.modules.Transformer', 'somebody.modules.Pooling' "
        "cannot be followed",
    ),
    (lambda d: (d / "modules.json").write_text("[]"), "a pipeline of no module cannot be followed"),
    (lambda d: (d / "modules.json").write_text("{}"), "modules.json: not a JSON list"),
    (lambda d: (d / "modules.json").write_text("[1"), "modules.json: cannot be read"),
    (lambda d: (d / "modules.json").write_text("[3]"), "3 is not a module with a type and a path"),
    (
        lambda d: (d / "modules.json").write_text('[{"type": "x", "path": "../y"}]'),
        "the path '../y' is none inside the folder",
    ),
    (
        lambda d: (save_pipeline(d, words("mean")) / "1_Pooling" / "config.json").unlink(),
        "modules.json: names 1_Pooling/config.json, which is not there",
    ),
    (lambda d: save_pipeline(d, words()), "1_Pooling/config.json: names no pooling"),
    (lambda d: save_pipeline(d, switches()), "1_Pooling/config.json: names no pooling"),
    (lambda d: save_pipeline(d, {"pooling_mode": 3}), "pooling_mode = 3 is not a mode's name"),
    (
        lambda d: save_pipeline(d, {"pooling_mode_mean_tokens": "yes"}),
        "pooling_mode_mean_tokens = 'yes' is not true or false",
    ),
    (
        lambda d: save_pipeline(d, {"pooling_mode_by_weather": True}),
        "'pooling_mode_by_weather' pooling is not supported",
    ),
    (
        lambda d: save_pipeline(d, {"pooling_mode": "cls", "pooling_mode_mean_tokens": True}),
        "pooling_mode says 'cls', the switches 'mean'",
    ),
    (
        lambda d: (save_pipeline(d, words("mean")) / "sentence_bert_config.json").write_text(
            '{"modality_config": {"text": {"method_output_name": ["hidden_states", -2]}}}'
        ),
        "the pooling reads ['hidden_states', -2], and only last_hidden_state is supported",
    ),
]


@pytest.mark.parametrize(("make", "message"), PIPELINES, ids=[text for _, text in PIPELINES])
def test_a_pipeline_that_cannot_be_followed_is_refused(
    bert_copy: Path, make: Callable[[Path], object], message: str
) -> None:
    make(bert_copy)
    with pytest.raises(BackboneError) as caught:
        build(experiment(bert_copy, "head"), 2)
    assert message in caught.value.message
    assert caught.value.hint in (CHOOSE, "download or save it again")
    assert build(experiment(bert_copy, "head", model={"pooling": "cls"}), 2).pooling == "cls"


def test_trained_modules_behind_the_pooling_are_left_out_with_a_word(
    bert_copy: Path, rows_file: Path
) -> None:
    save_pipeline(bert_copy, words("mean"), ("Dense", "LayerNorm", "Normalize"))
    given = ["train", *rows_options(rows_file), "--k", "20", "--model", str(bert_copy)]
    _, stdout, stderr = invoke(*given, "--dry-run", "--json")
    note = (
        "the backbone's own pipeline goes on with Dense and LayerNorm after its mean pooling; "
        "that is left out, and the head reads what was pooled"
    )
    assert f"note: {note}\n" in stderr
    assert json.loads(stdout)["notes"] == [note]


def test_a_pipeline_without_a_pooling_is_the_architectures_own(bert_copy: Path) -> None:
    save_pipeline(bert_copy, None)
    assert build(experiment(bert_copy, "head"), 2).pooling == "native"


@pytest.mark.parametrize("given", ["", "0_Transformer"])
def test_an_encoder_in_a_folder_of_its_own_is_found_with_its_pooling(
    backbone_dir: Callable[[str], Path], tmp_path: Path, given: str
) -> None:
    shutil.copytree(backbone_dir("bert"), tmp_path / "0_Transformer")
    save_pipeline(tmp_path, switches("mean"), (), OLD, encoder="0_Transformer")
    found = find(str(tmp_path / given))
    assert found.directory == tmp_path / "0_Transformer"
    assert build(experiment(tmp_path / given, "head"), 2).pooling == "mean"


def test_doctor_says_how_a_pipeline_is_read(bert_copy: Path) -> None:
    save_pipeline(bert_copy, words("mean"), ("Normalize",))
    _, stdout, _ = invoke("doctor", bert_copy, "--offline", "--json")
    checks = {check["what"]: check for check in json.loads(stdout)["checks"]}
    said = "mean, as 1_Pooling/config.json says; left out behind it: Normalize"
    assert (checks["pooling"]["ok"], checks["pooling"]["found"]) == (True, said)
    (bert_copy / "1_Pooling" / "config.json").write_text(json.dumps(words("max")))
    _, stdout, _ = invoke("doctor", bert_copy, "--offline", "--json")
    checks = {check["what"]: check for check in json.loads(stdout)["checks"]}
    assert checks["pooling"]["ok"] is False
    assert checks["pooling"]["remedy"] == CHOOSE


# capitals


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "the", "Film", "##s", "good"]


def make_bare(directory: Path, vocabulary: list[str]) -> None:
    """Leave a folder with the bare list of pieces that a tokenizer may come as."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink()
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")


def test_a_cased_vocabulary_that_is_read_in_small_letters_gets_a_word(
    bert_copy: Path, rows_file: Path
) -> None:
    make_bare(bert_copy, VOCABULARY)
    given = ["train", *rows_options(rows_file), "--k", "20", "--model", str(bert_copy)]
    said = (
        f"note: {bert_copy}: the tokenizer makes every letter a small one, and 2 of the 5 pieces "
        "of its vocabulary have capitals; if the backbone is a cased one, write "
        '{"do_lower_case": false} into its tokenizer_config.json\n'
    )
    assert said in invoke(*given, "--dry-run")[2]
    _, _, stderr = invoke(*given, *FAST, "--out", bert_copy.parent / "run")
    assert stderr.index(said) < stderr.index("epoch  1/3")
    (bert_copy / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert "capitals" not in invoke(*given, "--dry-run")[2]
    assert build(experiment(bert_copy, "head"), 2).tokenizer.tokenize("Paris") == ["Paris"]


def test_an_uncased_vocabulary_gets_none(bert: Path) -> None:
    assert build(experiment(bert, "head"), 2).notes == ()


def test_a_pipeline_that_wants_small_letters_gets_a_word_where_the_tokenizer_keeps_capitals(
    bert_copy: Path,
) -> None:
    save_pipeline(bert_copy, words("mean"))
    (bert_copy / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert build(experiment(bert_copy, "head"), 2).notes == ()
    make_bare(bert_copy, VOCABULARY)
    (bert_copy / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (note,) = build(experiment(bert_copy, "head"), 2).notes
    assert note.startswith(f"{bert_copy}: the backbone's own pipeline makes every letter a small")
