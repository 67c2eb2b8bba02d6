"""Settings survive being written, and one assignment is read as TOML."""

import tomllib
from typing import Any

import pytest
from support.models import resolved

from unipelt_cli import methods
from unipelt_cli.config.experiment import merge_settings, resolve
from unipelt_cli.config.toml import dump, parse_assignment
from unipelt_cli.errors import ConfigError


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
