"""Backbones from elsewhere: they load and compute, or are refused in words."""

import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.backbones import save_backbone, save_pipeline
from support.fuzzing import VALUES, changed, damaged, outcome, tell
from support.models import experiment, logits_of
from support.rows import write_rows
from typer.testing import CliRunner

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.backbones.pretrained import find
from unipelt_cli.cli import app
from unipelt_cli.errors import BackboneError
from unipelt_cli.models.batches import encode
from unipelt_cli.models.build import build
from unipelt_cli.system import memory

CONFIGS, WEIGHTS, TOKENIZERS, PIPELINES, COMMANDS = 1500, 600, 600, 600, 30
MEMORY = 400 * 2**20
TEXTS = [
    "good film",
    "",
    "  ",
    "\u0000\u202e",
    "雪" * 300,
    "a " * 500,
    "[MASK] [PAD]",
    "\U0001f600",
]
JSON_FILES = ["config.json", "tokenizer_config.json", "special_tokens_map.json"]


@pytest.fixture
def bert(backbone_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(backbone_dir("bert"), tmp_path / "bert"))
    for name in JSON_FILES[1:]:
        assert (directory / name).is_file()
    return directory


def rewrite(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def used() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(directory: Path) -> None:
    """Load a backbone as a run does, and see that it computes."""
    logits = logits_of(build(experiment(directory, "head"), 2), ["good film", "so so"])
    assert bool(torch.isfinite(logits).all())


RULES: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"vocab_size": 10**9}, "vocab_size is 1000000000, more than the weights"),
    ("config.json", {"hidden_size": 10**6}, "hidden_size is 1000000, more than the weights"),
    ("config.json", {"intermediate_size": 2**30}, "feed-forward size is 1073741824, more than"),
    ("config.json", {"max_position_embeddings": 2**31 - 1}, "max_position_embeddings is 21474"),
    ("config.json", {"num_hidden_layers": 10**5}, "num_hidden_layers = 100000 is not a whole"),
    ("config.json", {"num_attention_heads": 0}, "num_attention_heads = 0 is not a whole number"),
    ("config.json", {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob = 1.5 is not a share"),
    ("config.json", {"layer_norm_eps": -1}, "layer_norm_eps = -1 is not a small number"),
    ("config.json", {"hidden_act": ["gelu"]}, r"hidden_act = \['gelu'\] is not a name"),
    ("config.json", {"use_cache": "yes"}, "use_cache = 'yes' is not true or false"),
    ("config.json", {"pad_token_id": -3}, "pad_token_id = -3 is not a token's number"),
    ("config.json", {"hidden_act": "os.system"}, "the weights cannot be read"),
    ("config.json", {"num_attention_heads": 5}, "the weights cannot be read"),
    ("config.json", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters = {'rope_theta': 1"),
    ("config.json", {"logit_softcap": 30}, "logit_softcap = 30 is not computed here"),
    ("config.json", {"use_kernels": True}, "holds use_kernels, which can make a library fetch"),
    ("config.json", {"x": [{"y": {"auto_map": {"A": "b"}}}]}, "holds auto_map, which can make"),
    (
        "special_tokens_map.json",
        {"x": {"trust_remote_code": True}},
        "holds trust_remote_code, which can make",
    ),
    (
        "tokenizer_config.json",
        {"tokenizer_file": "/etc/passwd"},
        "holds tokenizer_file = '/etc/passwd', and only files of known names are read",
    ),
    ("tokenizer_config.json", {"vocab_file": "../x"}, "holds vocab_file = '../x', and only"),
    ("tokenizer_config.json", {"tokenizer_class": "TransfoXLTokenizer"}, "is not that of a supp"),
    ("tokenizer_config.json", {"tokenizer_class": ["x"]}, "is not that of a supported"),
]


@pytest.mark.parametrize(("name", "keys", "message"), RULES, ids=[m for _, _, m in RULES])
def test_what_a_config_may_not_say_is_refused_by_name(
    bert: Path, name: str, keys: dict[str, Any], message: str
) -> None:
    rewrite(bert / name, **keys)
    before = used()
    with pytest.raises(BackboneError, match=message):
        load(bert)
    assert used() - before < MEMORY


@pytest.mark.parametrize("content", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 5000, '{"a": 1e999}'])
@pytest.mark.parametrize("name", JSON_FILES)
def test_odd_json_is_refused(bert: Path, name: str, content: str) -> None:
    (bert / name).write_text(content)
    with pytest.raises(BackboneError, match="cannot be read"):
        find(str(bert))


def test_harmless_keys_are_left_out(bert: Path) -> None:
    expected = logits_of(build(experiment(bert, "head"), 2), ["good film"])
    rewrite(
        bert / "config.json",
        num_labels=10**9,
        id2label={"0": "x"},
        task_specific_params={"a": {"b": 1}},
        gradient_checkpointing=True,
        pruned_heads={"0": [0]},
        torch_dtype="float16",
        transformers_version="9.9",
        name_or_path="/etc",
    )
    rewrite(bert / "tokenizer_config.json", special_tokens_map_file="/home/someone/x.json")
    before = used()
    assert torch.equal(logits_of(build(experiment(bert, "head"), 2), ["good film"]), expected)
    assert used() - before < MEMORY


LEGACY: dict[str, dict[str, Any]] = {
    "bert": {"gradient_checkpointing": False, "position_embedding_type": "absolute"},
    "roberta": {
        "output_past": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "classifier_dropout": None,
    },
    "xlm-roberta": {"output_past": True, "use_cache": True, "tie_word_embeddings": True},
    "camembert": {"output_past": True, "classifier_dropout": None},
    "electra": {"summary_type": "first", "summary_use_proj": True, "summary_last_dropout": 0.1},
    "distilbert": {"sinusoidal_pos_embds": False, "tie_weights_": True, "qa_dropout": 0.1},
    "mpnet": {"relative_attention_num_buckets": 32},
    "albert": {
        "down_scale_factor": 1,
        "gap_size": 0,
        "net_structure_type": 0,
        "num_memory_blocks": 0,
    },
    "deberta-v2": {"max_relative_positions": -1, "pooler_dropout": 0, "pooler_hidden_size": 32},
    "t5": {"n_positions": 512, "task_specific_params": {"translation": {"prefix": "x: "}}},
    "modernbert": {
        "gradient_checkpointing": False,
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "absolute",
    },
    "bart": {"gradient_checkpointing": False, "normalize_before": False, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("model_type", BACKBONES)
def test_configs_as_the_world_has_them_load(
    backbone_dir: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    directory = Path(shutil.copytree(backbone_dir(model_type), tmp_path / "backbone"))
    rewrite(directory / "config.json", architectures=["X"], **LEGACY[model_type])
    load(directory)


def test_configs_with_other_values_load_or_are_refused(bert: Path) -> None:
    chosen, seen = random.Random(1), Counter[str]()
    texts = {name: (bert / name).read_text() for name in JSON_FILES}
    for turn in range(CONFIGS):
        name = JSON_FILES[turn % 3 if turn % 2 else 0]
        path = bert / name
        if turn % 5 == 0:
            path.write_bytes(damaged(texts[name].encode(), chosen))
        else:
            value = changed(json.loads(texts[name]), chosen)
            if turn % 7 == 0 and isinstance(value, dict):
                value[chosen.choice(["vocab_size", "hidden_size", "x"])] = chosen.choice(VALUES)
            path.write_text(json.dumps(value))
        deep = turn % 10 == 0
        result = outcome(lambda deep=deep: load(bert) if deep else find(str(bert)))  # type: ignore[misc]
        seen[f"{name} {result}"] += 1
        path.write_text(texts[name])
    tell("values of configs", seen)
    assert all(seen[f"{name} {way}"] > 20 for name in JSON_FILES for way in ("read", "refused"))
    assert used() < 4 * 2**30


def test_damaged_pipelines_are_followed_or_refused(bert: Path) -> None:
    chosen, seen = random.Random(5), Counter[str]()
    save_pipeline(bert, {"pooling_mode": "mean", "pooling_mode_max_tokens": False}, ("Normalize",))
    modality = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    settings = {"modality_config": modality, "do_lower_case": False}
    (bert / "sentence_bert_config.json").write_text(json.dumps(settings))
    names = ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"]
    texts = {name: (bert / name).read_text() for name in names}
    for turn in range(PIPELINES):
        name = names[turn % 3]
        if turn % 4 == 0:
            (bert / name).write_bytes(damaged(texts[name].encode(), chosen))
        else:
            (bert / name).write_text(json.dumps(changed(json.loads(texts[name]), chosen)))
        seen[f"{name} {outcome(lambda: find(str(bert)).sentence_reading)}"] += 1
        (bert / name).write_text(texts[name])
    tell("pipelines", seen)
    assert all(seen[f"{name} {way}"] > 10 for name in names for way in ("read", "refused"))


def test_damaged_configs_of_the_newer_library_are_read_or_refused(
    backbone_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen, seen = random.Random(6), Counter[str]()
    directory = Path(shutil.copytree(backbone_dir("modernbert"), tmp_path / "modernbert"))
    path = directory / "config.json"
    plain = {"rope_theta": 10000.0, "rope_type": "default"}
    kinds = ["full_attention", "sliding_attention"]
    newer = {"rope_parameters": dict.fromkeys(kinds, plain), "layer_types": kinds}
    config = json.loads(path.read_text())
    for name in ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"):
        del config[name]
    for _ in range(PIPELINES):
        value = changed(newer, chosen)
        path.write_text(json.dumps(config | value if isinstance(value, dict) else value))
        seen[outcome(lambda: find(str(directory)))] += 1
    tell("newer configs", seen)
    assert min(seen["read"], seen["refused"]) > 20


def test_damaged_weights_load_or_are_refused(bert: Path) -> None:
    chosen, seen = random.Random(2), Counter[str]()
    path = bert / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    before = used()
    for turn in range(WEIGHTS):
        if turn % 2:  # where a byte means most
            path.write_bytes(damaged(content[:header], chosen) + content[header:])
        else:
            path.write_bytes(damaged(content, chosen))
        seen[outcome(lambda: load(bert))] += 1
    tell("damaged weights", seen)
    assert min(seen["read"], seen["refused"]) > 20
    assert used() - before < MEMORY


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bert: Path, value: float) -> None:
    tensors = load_file(bert / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 5] = value
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    message = r"tensor encoder\.layer\.1\.output\.dense\.weight holds numbers that are not finite"
    with pytest.raises(BackboneError, match=message):
        load(bert)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_weights_of_every_plain_kind_load(bert: Path, kind: torch.dtype) -> None:
    tensors = {name: t.to(kind) for name, t in load_file(bert / "model.safetensors").items()}
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    load(bert)


def test_weights_of_an_odd_kind_are_refused(bert: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    name = "embeddings.LayerNorm.bias"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=f"tensor '{name}' is of no plain type"):
        find(str(bert))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "tf_model.h5", "x.pt"])
def test_no_other_format_is_ever_opened(
    bert: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (bert / "model.safetensors").rename(bert / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(BackboneError, match=r"no model\.safetensors there"):
        load(bert)


def read_tokens(directory: Path) -> None:
    """Tokenize odd texts; every token must be one that the backbone has."""
    found = find(str(directory))
    config = found.library_config()
    rows = encode([TEXTS], found.load_tokenizer(), config, max_length=64)
    assert all(0 <= token < config.vocab_size for row in rows.ids for token in row)
    assert all(0 < len(row) <= 64 for row in rows.ids)


def test_damaged_tokenizers_tokenize_or_are_refused(
    bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen, seen = random.Random(3), Counter[str]()
    read_tokens(bert)
    contents = {name: (bert / name).read_bytes() for name in ("tokenizer.json", "vocab.txt")}
    for turn in range(TOKENIZERS):
        name = "tokenizer.json" if turn % 4 else "vocab.txt"
        if turn % 4 == 0:
            (bert / "tokenizer.json").unlink(missing_ok=True)
            (bert / name).write_bytes(damaged(contents[name], chosen))
        elif turn % 4 == 1:
            (bert / name).write_bytes(damaged(contents[name], chosen))
        else:
            value = changed(json.loads(contents[name]), chosen)
            (bert / name).write_text(json.dumps(value))
        seen[f"{name} {outcome(lambda: read_tokens(bert))}"] += 1
        for other, content in contents.items():
            (bert / other).write_bytes(content)
    assert "panicked" not in capfd.readouterr().err
    tell("tokenizers", seen)
    assert min(seen[f"tokenizer.json {way}"] for way in ("read", "refused")) > 10
    assert used() < 4 * 2**30


PADDED = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0}


@pytest.mark.parametrize(
    "keys",
    [
        {"padding": {**PADDED, "pad_to_multiple_of": None, "pad_token": "[PAD]"}},
        {
            "truncation": {
                **{"direction": "Left", "max_length": 1, "strategy": "LongestFirst"},
                "stride": 0,
            }
        },
    ],
)
def test_a_tokenizers_own_padding_and_cutting_do_not_act(bert: Path, keys: dict[str, Any]) -> None:
    expected = encode_good(bert)
    rewrite(bert / "tokenizer.json", **keys)
    before = used()
    assert encode_good(bert) == expected
    assert used() - before < MEMORY


def encode_good(directory: Path) -> Any:
    found = find(str(directory))
    return encode(
        [["good film"]], found.load_tokenizer(), found.library_config(), max_length=64
    ).ids


def test_tokens_that_the_backbone_lacks_are_refused(bert: Path) -> None:
    value = json.loads((bert / "tokenizer.json").read_text())
    value["model"]["vocab"]["good"] = 10**6
    (bert / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(BackboneError, match="numbered up to 1000000 of 100"):
        read_tokens(bert)


def test_what_cannot_fit_is_refused_before_it_is_loaded(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 100_000)
    with pytest.raises(BackboneError, match=r"backbone .* takes 0\.0 GiB, and 0\.0 GiB are free"):
        load(bert)
    monkeypatch.setattr(memory, "available", lambda device: 200_000)
    load(bert)
    with pytest.raises(BackboneError, match=r"training [\d,]+ numbers takes"):
        build(experiment(bert, "full"), 2)
    monkeypatch.setattr(memory, "available", lambda device: None)
    build(experiment(bert, "full"), 2)


def test_free_memory_is_known_here() -> None:
    free = memory.available(torch.device("cpu"))
    assert free is None or 2**26 < free < 2**50


def test_hostile_backbones_end_a_command_in_two_lines(bert: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv")
    chosen, seen = random.Random(4), Counter[int]()
    contents = {path.name: path.read_bytes() for path in bert.iterdir() if path.is_file()}
    for _ in range(COMMANDS):
        name = chosen.choice(sorted(contents))
        (bert / name).write_bytes(damaged(contents[name], chosen))
        given = ["train", "--dry-run", "--train-file", rows, "--text", "text", "--label", "label"]
        given += ["--k", "20", "--model", bert, "--method", "head", "--device", "cpu"]
        result = CliRunner().invoke(app, [*map(str, given)], prog_name="unipelt")
        assert result.exception is None or isinstance(result.exception, SystemExit), name
        assert result.exit_code in (0, 2)
        if result.exit_code == 2:
            lines = [*map(str, result.stderr.splitlines())]
            assert [line.partition(":")[0] for line in lines[-2:]] == ["error", "hint"], lines
        seen[result.exit_code] += 1
        (bert / name).write_bytes(contents[name])
    assert min(seen[0], seen[2]) > 2


OFFLINE = """
import socket, sys
from pathlib import Path

def refuse(*given, **named):
    raise AssertionError(f"a socket was opened: {given}")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
for name in ("gethostbyname", "gethostbyaddr"):
    setattr(socket, name, refuse)

from unipelt_cli.cli import app

backbone, rows, out = sys.argv[1:]
own = ["--train-file", rows, "--text", "text", "--label", "label", "--k", "20"]
own += ["--folds", "none"]
small = ["--set", "train.epochs=1", "--method", "unipelt-apl", "--model", backbone]
run = f"{out}/run"
for command in (
    ["prepare", *own, "--out", f"{out}/data"],
    ["train", "--prepared", f"{out}/data", *small, "--out", run],
    ["eval", run],
    ["predict", run, rows],
    ["inspect-gates", run],
    ["export", run, "--to", "adapters"],
    ["list", "methods", "--model", backbone],
    ["verify", run],
    ["reproduce", run],
):
    code = app([*command, "--offline"], standalone_mode=False)
    assert code in (0, None), (command, code)
code = app(["train", *own, "--model", "bert-base-uncased", "--offline"], standalone_mode=False)
assert code == 2, code
"""


def test_offline_opens_no_socket(backbone_dir: Callable[[str], Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    switches = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
    environment = {key: value for key, value in os.environ.items() if key not in switches}
    rows = write_rows(tmp_path / "rows.csv")
    ended = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(backbone_dir("bert")), str(rows), str(tmp_path)],
        env=environment | {"HF_HOME": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "a socket was opened" not in ended.stderr


def test_a_backbone_in_a_cache_of_links_loads(tmp_path: Path) -> None:
    real = save_backbone(tmp_path / "blobs", "bert")
    snapshot = tmp_path / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    for path in real.iterdir():
        (snapshot / path.name).symlink_to(path)
    load(snapshot)
    assert find(str(snapshot)).revision == "ab" * 20
