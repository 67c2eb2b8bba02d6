"""Presets are found by name and path, and broken ones are named."""

from pathlib import Path

import pytest
from support.models import resolved

from unipelt_cli import methods
from unipelt_cli.config.experiment import resolve
from unipelt_cli.config.presets import few_labels_presets, presets, published_presets, read_preset
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
        "head_start": "random",
        "head_end": "trained",
        "balanced": False,
        "rows_per_class": 1,
        "contrast": 0.0,
        "averaging": 0.0,
        "label_scale": "raw",
        "batch_size": 16,
        "warmup": 0.0,
        "weight_decay": 0.0,
        "clip": 1.0,
        "seed": 42,
        "device": "auto",
        "precision": "auto",
    }


PUBLISHED = {  # rates as the papers or their code have them, with AdamW
    "adapter": 1e-4,
    "bitfit": 1e-3,
    "child-tuning-d": 4e-5,
    "child-tuning-f": 4e-5,
    "compacter": 3e-3,
    "diff-pruning": 5e-5,
    "fish-mask": 5e-5,
    "full": 2e-5,
    "houlsby": 3e-4,
    "hyperformer": 3e-4,
    "adamix": 4e-4,
    "lora": 4e-4,
    "loreft": 6e-4,
    "lst": 3e-3,
    "mam": 1e-4,
    "parallel-adapter": 1e-4,
    "prefix": 5e-5,
    "propetl": 1e-4,
    "top-layers": 2e-5,
    "unipelt-apl": 5e-4,
}


def test_a_published_preset_is_not_mixed_with_our_other_defaults() -> None:
    ours, papers = (
        resolve([("", read_preset(name)), ("", {"data": {"task": "mrpc"}})])
        for name in ("head", "published/head")
    )
    assert (ours.model.normalise, ours.model.head_dropout) == (True, 0.0)
    assert (papers.model.normalise, papers.model.head_dropout) == (False, 0.1)
    train = papers.train
    assert (train.learning_rate, train.epochs, train.batch_size) == (1e-3, 16, 8)
    assert (train.patience, train.weight_decay, train.warmup) == (10, 0.0, 0.0)


@pytest.mark.parametrize("name", published_presets())
def test_every_published_preset_is_an_experiment(name: str) -> None:
    resolve([("", read_preset(name)), ("", {"data": {"task": "mrpc"}})])


def test_the_recipe_for_few_labels_is_a_preset_of_what_can_have_it() -> None:
    union = resolved(method={"name": "unipelt-apl"})
    for name in ("few-labels/lora", "few-labels/full"):
        assert name in few_labels_presets()
        run = resolve([("", read_preset(name)), ("", {"data": {"task": "mrpc"}})])
        method = name.removeprefix("few-labels/")
        assert run.method_name == method
        assert run.model == union.model
        rate = methods.get(method).learning_rate
        assert run.train == union.with_("train", learning_rate=rate).train
    again = resolve([("", read_preset("few-labels/unipelt-apl")), ("", {"data": {"task": "mrpc"}})])
    assert again == union
    assert "few-labels/probe" not in few_labels_presets()
    with pytest.raises(ConfigError) as caught:
        read_preset("few-labels/probe")
    assert caught.value.message == "recipe 'few-labels': probe has no such recipe"
    assert caught.value.hint == "it has default"
    with pytest.raises(ConfigError, match="preset 'few-labels/lor': no such file") as caught:
        read_preset("few-labels/lor")
    assert caught.value.hint.startswith("did you mean few-labels/lora?")


def test_published_presets_have_the_papers_numbers() -> None:
    found = {
        name: resolve([("", read_preset(f"published/{name}")), ("", {"data": {"task": "mrpc"}})])
        for name in PUBLISHED
    }
    assert {name: run.train.learning_rate for name, run in found.items()} == PUBLISHED
    assert all(methods.get(name).paper_rate == rate for name, rate in PUBLISHED.items())
    mam, pruned = found["mam"], found["diff-pruning"]
    train = mam.train
    assert (train.epochs, train.batch_size, train.warmup, train.weight_decay) == (10, 32, 0.06, 0.1)
    settings = mam.settings()["method"]
    expected = {
        "prefix_width": 800,
        "prefix_std": 1.0,
        "prefix_start": "uniform",
        "parallel_dropout": 0.1,
        "prefix_length": 16,
        "parallel_bottleneck": 16,
        "parallel_scale": 2.0,
    }
    assert expected.items() <= settings.items()
    settings = pruned.settings()["method"]
    assert settings["penalty"] == 1.25e-7
    rates = [5e-5 * settings[key] for key in ("weight_rate", "gate_rate")]
    assert rates == pytest.approx([1e-5, 0.1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompt", "Lester et al. 2021 trains with Adafactor, and every run here with AdamW"),
        ("ia3", "Liu et al. 2022 trains with Adafactor, and every run here with AdamW"),
        ("coda", "Lei et al. 2023 gives no learning rate for an encoder"),
    ],
)
def test_what_a_paper_does_not_say_is_no_preset(name: str, message: str) -> None:
    assert methods.get(name).paper_rate is None
    with pytest.raises(ConfigError) as caught:
        read_preset(f"published/{name}")
    assert caught.value.message == f"preset 'published/{name}': {message}"
    assert caught.value.hint == f"give --preset {name}: our own setting"


def test_a_published_preset_that_is_none_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="preset 'published/lor': no such file") as caught:
        read_preset("published/lor")
    assert caught.value.hint.startswith("did you mean published/lora?")


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
