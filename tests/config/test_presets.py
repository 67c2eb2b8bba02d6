"""Presets are found by name and path, and broken ones are named."""

from pathlib import Path

import pytest
from support.models import resolved

from unipelt_cli import methods
from unipelt_cli.config.experiment import resolve
from unipelt_cli.config.presets import presets, read_preset
from unipelt_cli.errors import ConfigError


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
