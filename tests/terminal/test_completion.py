"""What the shell completes, through the protocol that it speaks: quick, true and quiet."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from unipelt_cli import methods
from unipelt_cli.cli import app
from unipelt_cli.commands import inspect_gates, listing
from unipelt_cli.commands.shared.track_option import TRACKERS
from unipelt_cli.config.presets import presets, published_presets
from unipelt_cli.config.sections import SECTIONS, Device, Metric, Pooling
from unipelt_cli.data import readers
from unipelt_cli.exports import formats
from unipelt_cli.methods import recipes
from unipelt_cli.tasks import TASKS
from unipelt_cli.terminal import choices as tables
from unipelt_cli.terminal import completion


def complete(line: str, shell: str = "bash") -> list[str]:
    """Ask for the last word of a line as a shell does; return the lines of the answer."""
    words = line.split()
    place = len(words) - (not line.endswith(" "))
    environment = {
        "COMP_WORDS": line,
        "COMP_CWORD": str(place),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_UNIPELT_COMPLETE": f"complete_{shell}",
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="unipelt")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.split("\n")[:-1] if result.stdout.strip() else []


def test_the_outline_is_that_of_the_real_tables() -> None:
    assert tables.tasks() == tuple(TASKS)
    assert tables.methods().keys() == methods.table().keys()
    assert set(tables.presets()) == presets().keys()
    assert set(tables.published_presets()) == published_presets().keys()
    for name, recipe in methods.table().items():
        assert tables.methods()[name].about == recipe.summary
        own = dataclasses.asdict(recipe.method)
        said = tables.method_settings(name)
        assert list(said) == list(own)
        for key, setting in said.items():
            value = own[key]
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            known = value is not None and value != ()
            assert setting.default == (shown.lower() if known else None), (name, key)
    for section, schema in SECTIONS.items():
        settings = tables.settings(section)
        assert list(settings) == list(schema.model_fields)
        for key, setting in settings.items():
            field = schema.model_fields[key]
            shown = None if field.default is None else str(field.default)
            if isinstance(field.default, bool):
                shown = str(field.default).lower()  # as `--set` takes it
            assert (setting.about, setting.default) == (field.description, shown)
    assert tables.settings("train")["device"].choices == get_args(Device)
    assert tables.settings("model")["pooling"].choices == get_args(Pooling)
    assert tables.settings("data")["metric"].choices == get_args(Metric)
    assert set(completion.LISTS) == listing.LISTS.keys()
    assert completion.DEFAULT_METHOD == methods.DEFAULT


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("to", set(formats.TARGETS)),
        ("by", set(inspect_gates.VIEWS)),
        ("kind", set(readers.FORMATS)),
        ("track", set(TRACKERS)),
        ("recipes", set(recipes.NAMES)),
    ],
)
def test_words_are_those_that_the_commands_take(name: str, choices: set[str]) -> None:
    context: Any = None
    assert {value for value, _ in completion.VALUES[name](context, "")} == choices


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("unipelt train --task m", ["mrpc", "mnli"]),
        ("unipelt train --tasks mrpc,s", ["mrpc,sst2", "mrpc,stsb"]),
        ("unipelt train --tasks mrpc,mr", []),
        ("unipelt prepare --task de", ["demo"]),
        ("unipelt train --method unipelt-ap", ["unipelt-ap", "unipelt-apl", "unipelt-aplb"]),
        ("unipelt sweep --methods lora,bitf", ["lora,bitfit"]),
        ("unipelt recommend --methods do", ["dora"]),
        ("unipelt recommend --recipes default,p", ["default,published"]),
        ("unipelt recommend --models bert,mini", ["bert,minilm"]),
        ("unipelt train --preset pap", ["paper"]),
        ("unipelt train --preset published/mad", ["published/madx"]),
        ("unipelt train --preset few-labels/lor", ["few-labels/lora", "few-labels/loreft"]),
        ("unipelt train --model mini", ["minilm"]),
        ("unipelt train --device c", ["cpu", "cuda"]),
        ("unipelt train --precision ", ["auto", "fp32", "bf16"]),
        ("unipelt list pre", ["presets"]),
        ("unipelt train --set train.ep", ["train.epochs=", "train.epochs=50"]),
        (
            "unipelt train --set train.prec",
            ["train.precision=auto", "train.precision=fp32", "train.precision=bf16"],
        ),
        ("unipelt train --set train.precision=b", ["train.precision=bf16"]),
        ("unipelt train --set train.w", ["train.warmup=", "train.weight_decay="]),
        (
            "unipelt train --set method.gate_",
            ["method.gate_pooling=", "method.gate_bias=", "method.gate_rate="],
        ),
        (
            "unipelt train --method coda --set method.att",
            ["method.attends=routed", "method.attends=all"],
        ),
        ("unipelt train --set nonsense.", []),
        ("unipelt eval nowhere/", []),
    ],
)
def test_a_word_is_completed_with_its_values(line: str, expected: list[str]) -> None:
    assert complete(line) == expected


def test_other_shells_see_what_a_value_is(tmp_path: Path) -> None:
    assert complete("unipelt train --method bitf", "fish") == ["bitfit\tthe backbone's biases"]
    assert complete("unipelt train --method bitf", "zsh") == [
        """_arguments '*: :(("bitfit":"the backbone''s biases"))'"""
    ]
    assert complete("unipelt train --task nothing", "zsh") == ["_files"]


def test_runs_are_those_below_runs_and_where_the_word_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("runs/first", "runs/grid/second", "other/third", "runs/unfinished"):
        Path(run).mkdir(parents=True)
        if run != "runs/unfinished":
            Path(run, "result.json").touch()
    assert complete("unipelt eval ") == ["runs/first", "runs/grid/second", "other/", "runs/"]
    assert complete("unipelt predict oth") == ["other/"]
    assert complete("unipelt inspect-gates other/") == ["other/third"]
    assert complete("unipelt verify runs/") == ["runs/first", "runs/grid/", "runs/unfinished/"]
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert complete("unipelt eval ~/") == ["~/third"]
    assert complete("unipelt compare other/") == ["other/third"]


def test_backbones_are_minilm_the_fetched_ones_and_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    Path("hub/models--google--electra-small").mkdir(parents=True)
    Path("mine").mkdir()
    Path("mine/config.json").touch()
    expected = ["minilm", "google/electra-small", "hub/", "mine"]
    assert complete("unipelt train --model ") == expected


def test_a_completion_is_quick_and_its_failure_is_silent(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from unipelt_cli.cli import app\n"
        "from unipelt_cli.terminal import choices\n"
        "app(prog_name='unipelt', standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))\n"
        "choices.tasks.cache_clear()\n"
        "choices.PACKAGE = choices.PACKAGE / 'nowhere'\n"
        "choices._parsed.cache_clear()\n"
        "app(prog_name='unipelt', standalone_mode=False)\n"
    )
    environment = {
        "COMP_WORDS": "unipelt train --task mn",
        "COMP_CWORD": "3",
        "_UNIPELT_COMPLETE": "complete_bash",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert (result.stdout.split(), result.stderr) == (["mnli", "[]"], "")
