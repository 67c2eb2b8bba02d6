"""Layers of settings resolve to one experiment, or every problem is said at once."""

import dataclasses
from typing import Any

import pytest
from pydantic import ValidationError
from support.models import resolved

from unipelt_cli.config.experiment import SectionName, resolve
from unipelt_cli.errors import ConfigError


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
    assert experiment.train.learning_rate == 3e-4
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
    ("section", "values"),
    [
        ("data", {"k": 7, "data_seed": 3}),
        ("data", {"folds": 4, "dev_size": 0}),
        ("model", {"pooling": "cls", "max_length": 32}),
        ("method", {"rank": 2}),
        ("train", {"seed": 1, "label_scale": "raw", "device": None}),
    ],
)
def test_a_changed_section_is_what_all_of_it_would_resolve_to(
    section: SectionName, values: dict[str, Any]
) -> None:
    before = resolved(data={"task": "rte"}, method={"name": "lora"})
    after = before.with_(section, **values)
    settings = before.settings()
    settings[section] |= {key: value for key, value in values.items() if value is not None}
    assert after == resolve([("", settings)])
    assert after != before
    others = {"data", "model", "method", "train"} - {section}
    assert all(getattr(after, name) is getattr(before, name) for name in others)


def test_a_change_to_nothing_is_no_change() -> None:
    experiment = resolved()
    assert experiment.with_("train", device=None) is experiment
    assert experiment.moved(None, None) is experiment


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("train", {"epochs": 0}, "train.epochs = 0 is not allowed"),
        ("train", {"epoch": 1}, "train.epoch = 1: no such setting"),
        ("method", {"rank": 0}, "method.rank = 0 is not allowed"),
        ("data", {"fold": 2}, "data.fold = 2 is set without data.folds"),
        ("data", {"k": 0, "tasks": ("rte", "rte")}, "3 settings are wrong: (1) data.k = 0 is not"),
    ],
)
def test_a_changed_section_is_checked(
    section: SectionName, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(data={"task": "rte"}, method={"name": "lora"}).with_(section, **values)
    assert caught.value.message.startswith(message)
