"""Settings in, one frozen Experiment out; every problem said at once."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from unipelt_cli import methods
from unipelt_cli.config.experiment import Experiment, merge_settings, resolve
from unipelt_cli.config.presets import presets, read_preset
from unipelt_cli.config.toml import dump, parse_assignment
from unipelt_cli.errors import ConfigError


def resolved(**sections: dict[str, Any]) -> Experiment:
    return resolve([("", {"data": {"task": "mrpc"}, **sections})])


@pytest.mark.parametrize("name", methods.table())
def test_dump_and_resolve_give_the_same_experiment(name: str) -> None:
    experiment = resolved(
        method={"name": name},
        train={"epochs": 3, "weight_decay": 0.01},
        data={
            "task": 'a "quoted" \\ name\n\x7fü',
            "train_file": "x.csv",
            "text": "t",
            "label": "l",
        },
    )
    text = dump(experiment)
    assert resolve([("", tomllib.loads(text))]) == experiment
    assert dump(resolve([("", tomllib.loads(text))])) == text


def test_an_experiment_is_frozen() -> None:
    experiment = resolved()
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.method_name = "lora"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        experiment.train.epochs = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.method.rank = 1  # type: ignore[attr-defined]


def test_later_layers_win_and_the_rate_is_the_methods_own() -> None:
    experiment = resolve(
        [
            (" (preset)", {"data": {"task": "rte", "k": 100}, "train": {"epochs": 3, "clip": 2.0}}),
            ("", {"data": {"k": 50}, "train": {"epochs": 4}}),
        ]
    )
    assert (experiment.data.k, experiment.train.epochs, experiment.train.clip) == (50, 4, 2.0)
    assert experiment.train.learning_rate == 5e-4
    assert resolved(method={"name": "full"}).train.learning_rate == 2e-5
    assert resolved(train={"learning_rate": 0.1}).train.learning_rate == 0.1


def test_every_problem_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(
            data={"task": "mrcp", "k": 0},
            methd={},
            method={"name": "lora", "rnk": 4, "rank": 0},
            train={"epochs": 1.5, "learning_rat": 3, "device": "gpu"},
        )
    message, hint = caught.value.message, caught.value.hint
    assert message.startswith("8 settings are wrong: (1) ")
    for part in (
        "methd: no such section",
        "data.k = 0 is not allowed",
        "data.task = 'mrcp': no such task",
        "method.rnk = 4: no such setting",
        "method.rank = 0 is not allowed",
        "train.epochs = 1.5 is not allowed",
        "train.learning_rat = 3: no such setting",
        "train.device = 'gpu' is not allowed",
    ):
        assert part in message
    for part in ("did you mean method?", "did you mean mrpc?", "did you mean rank?", "'cpu'"):
        assert part in hint


@pytest.mark.parametrize(
    ("sections", "message", "hint"),
    [
        (
            {"method": {"name": "lorra"}},
            "method.name = 'lorra': no such method",
            "did you mean lora? otherwise see `unipelt list methods`",
        ),
        (
            {"train": {"learning_rate": -1.0}},
            "train.learning_rate = -1.0 is not allowed",
            "give greater than 0",
        ),
        (
            {"train": {"epochs": "ten"}},
            "train.epochs = 'ten' is not allowed",
            "give a valid integer",
        ),
        ({"train": {"epochs": True}}, "train.epochs = True is not allowed", "give a valid integer"),
        ({"train": 3}, "train = 3: not a section", "write train.KEY = VALUE"),
        (
            {"data": {"train_file": "a.csv", "text": "t"}},
            "data.label is not set",
            "name the column with --label COLUMN",
        ),
        (
            {"method": {"name": "lora", "lora_scale": float("inf")}},
            "method.lora_scale = inf is not allowed",
            "give a finite number",
        ),
        (
            {"data": {"prepared": "p", "label": "l"}},
            "data.label = 'l': the rows are those of data.prepared",
            "drop one of them",
        ),
        (
            {"data": {}},
            "data.task is not set",
            "give --task NAME, or your own rows with --train-file FILE",
        ),
        (
            {"data": {"task": "rte", "dev_file": "d.csv"}},
            "data.dev_file is set without data.train_file",
            "give --train-file FILE as well",
        ),
        (
            {"data": {"train_file": "a.csv", "text": "t", "label": "l", "source": "x"}},
            "data.source = 'x': the rows come from elsewhere",
            "drop --source",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(
    sections: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(**sections)
    assert caught.value.message == message
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=20", {"train": {"epochs": 20}}),
        ("train.learning_rate = 1e-3", {"train": {"learning_rate": 1e-3}}),
        ("method.gated=false", {"method": {"gated": False}}),
        ("model.backbone=bert-base-uncased", {"model": {"backbone": "bert-base-uncased"}}),
        ('data.task="a=b"', {"data": {"task": "a=b"}}),
        ('method.parts=["adapter","lora"]', {"method": {"parts": ["adapter", "lora"]}}),
    ],
)
def test_assignments_are_toml_and_bare_words_are_strings(
    text: str, expected: dict[str, Any]
) -> None:
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["epochs=20", "train.epochs", "=3", "train.=3", ".epochs=3"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an assignment"):
        parse_assignment(text)


def test_assignments_merge() -> None:
    layers = [
        parse_assignment(text) for text in ("train.epochs=1", "train.clip=2.0", "train.epochs=3")
    ]
    assert merge_settings(layers) == {"train": {"epochs": 3, "clip": 2.0}}


def test_the_files_are_presets_of_methods_and_the_papers() -> None:
    files = presets().keys()
    assert "paper" in files
    assert files - {"paper"} <= methods.table().keys()
    assert files & methods.table().keys() < methods.table().keys(), "a method needs no file"


@pytest.mark.parametrize("name", methods.table())
def test_a_methods_preset_is_its_default(name: str) -> None:
    preset = resolve([("", read_preset(name)), ("", {"data": {"task": "mrpc"}})])
    assert preset == resolved(method={"name": name})


def test_the_papers_preset_is_the_papers_setting() -> None:
    paper = resolve([("", read_preset("paper")), ("", {"data": {"task": "mrpc", "k": 500}})])
    assert paper.model.backbone == "bert-base-uncased"
    assert paper.train.model_dump() == {
        "learning_rate": 5e-4,
        "epochs": 50,
        "patience": 10,
        "patience_steps": 0,
        "head_rate": 1.0,
        "averaging": 0.0,
        "batch_size": 16,
        "warmup": 0.0,
        "weight_decay": 0.0,
        "clip": 1.0,
        "seed": 42,
        "device": "auto",
        "precision": "auto",
    }


def test_a_preset_of_another_method_is_refused() -> None:
    layers = [(" (preset lora)", read_preset("lora")), ("", {"method": {"name": "full"}})]
    with pytest.raises(ConfigError, match=r"method.name = 'full': the preset is for 'lora'"):
        resolve(layers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\n", "not TOML"),
        (b"\xff\xfe[train]", "not UTF-8"),
        (b"[train]\nepochs = 1\nepochs = 2\n", "not TOML"),
    ],
)
def test_a_broken_preset_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_preset(str(path))
    assert str(path) in caught.value.message


def test_an_absent_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="preset 'papr': no such file or preset") as caught:
        read_preset("papr")
    assert caught.value.hint.startswith("did you mean paper?")
