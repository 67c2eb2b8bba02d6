"""What a shell offers for the word that is being typed: quick, and silent when something is wrong.

Values are found by the name of the parameter, whichever command has it.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import typer
from typer.models import ParameterInfo

from unipelt_cli.exports.formats import TARGETS
from unipelt_cli.system import network
from unipelt_cli.terminal.choices import (
    SECTIONS,
    method_settings,
    methods,
    presets,
    published_presets,
    settings,
    tasks,
)

Candidates = Iterable[tuple[str, str]]  # a value, and what it is
DEFAULT_METHOD = "unipelt-apl"
MOST = 200
RESULT, CONFIG = "result.json", "config.json"  # what tells a finished run, and a backbone
LISTS = ("backbones", "methods", "presets", "runs", "sweeps", "tasks")


def attach(app: typer.Typer) -> None:
    """Let every option and argument whose name is in the table below offer its values."""
    for command in app.registered_commands:
        assert command.callback is not None
        for name, parameter in inspect.signature(command.callback).parameters.items():
            for info in get_args(parameter.annotation)[1:]:
                if isinstance(info, ParameterInfo) and name in VALUES:
                    info.autocompletion = _quiet(VALUES[name])


def _quiet(
    find: Callable[[typer.Context, str], Candidates],
) -> Callable[[typer.Context, str], list[tuple[str, str]]]:
    """Keep what begins as the word does; of what goes wrong a shell cannot be told."""

    def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        try:
            fitting = [pair for pair in find(context, incomplete) if pair[0].startswith(incomplete)]
        except Exception:
            return []
        return fitting[:MOST]

    return complete


def words(*choices: str) -> Callable[[typer.Context, str], Candidates]:
    """Offer a few words."""
    return lambda _, __: [(choice, "") for choice in choices]


def _tasks(_: typer.Context, __: str) -> Candidates:
    return [(name, "") for name in tasks()]


def _methods(_: typer.Context, __: str) -> Candidates:
    return [(name, method.about) for name, method in methods().items()]


def _presets(_: typer.Context, incomplete: str) -> Candidates:
    yield from _methods(_, incomplete)
    yield from ((name, "") for name in presets() if name not in methods())
    yield from ((name, "the paper's own numbers") for name in published_presets())
    yield from ((f"few-labels/{name}", "the recipe for few labels") for name in methods())
    yield from _paths(incomplete, lambda path: path.suffix == ".toml")


def _several(
    find: Callable[[typer.Context, str], Candidates],
) -> Callable[[typer.Context, str], Candidates]:
    """Offer the next of several names with commas between them."""

    def complete(context: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        for name, about in find(context, last):
            if name not in taken:
                yield f"{before}{comma}{name}", about

    return complete


def _choices(section: str, key: str) -> Callable[[typer.Context, str], Candidates]:
    return lambda _, __: [(choice, "") for choice in settings(section)[key].choices]


def _backbones(_: typer.Context, incomplete: str) -> Candidates:
    yield "minilm", "the packaged backbone"
    yield from ((name, "downloaded") for name in network.cached_backbones())
    yield from _paths(incomplete, lambda path: (path / CONFIG).is_file())


def _runs(_: typer.Context, incomplete: str) -> Candidates:
    """Offer the finished runs below runs/, and what lies where the word leads."""
    if "runs".startswith(incomplete):
        for pattern in ("*", "*/*"):
            for path in sorted(Path("runs").glob(f"{pattern}/{RESULT}")):
                yield str(path.parent), ""
    yield from _paths(incomplete, lambda path: (path / RESULT).is_file())


def _paths(incomplete: str, is_wanted: Callable[[Path], bool]) -> Iterator[tuple[str, str]]:
    """Yield what is wanted beside the word typed so far, and directories to go on in."""
    before, slash, last = incomplete.rpartition("/")
    folder = Path(before + slash).expanduser()
    for entry in sorted(
        os.scandir(folder) if folder.is_dir() else (), key=lambda entry: entry.name
    ):
        if not entry.name.startswith(last) or entry.name.startswith(".") > last.startswith("."):
            continue
        if is_wanted(Path(entry.path)):
            yield f"{before}{slash}{entry.name}", ""
        elif entry.is_dir():
            yield f"{before}{slash}{entry.name}/", ""


def _settings(context: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """Offer `section.key=`; where the word leaves one key alone, its values too."""
    known = {
        f"{section}.{key}": setting
        for section in SECTIONS
        for key, setting in settings(section).items()
    }
    for name in _chosen_methods(context.params):
        of_method = method_settings(name)
        known |= {f"method.{key}": setting for key, setting in of_method.items()}
    typed = incomplete.partition("=")[0]
    close = {key: setting for key, setting in known.items() if key.startswith(typed)}
    if typed in known or len(close) == 1:
        ((key, setting),) = (
            (k, candidate) for k, candidate in close.items() if k == typed or len(close) == 1
        )
        values = setting.choices or ("", setting.default) if setting.default else setting.choices
        yield from ((f"{key}={value}", setting.about) for value in values or ("",))
        return
    yield from ((f"{key}=", setting.about) for key, setting in close.items())


def _chosen_methods(parameters: Mapping[str, Any]) -> list[str]:
    """Return the methods that the words before this one ask for, as far as they are methods."""
    names = (
        parameters.get("methods")
        or parameters.get("method")
        or parameters.get("preset")
        or DEFAULT_METHOD
    )
    return [name for name in str(names).split(",") if name in methods()]


VALUES: Mapping[str, Callable[[typer.Context, str], Candidates]] = {
    "task": _tasks,
    "tasks": _several(_tasks),
    "method": _methods,
    "methods": _several(_methods),
    "preset": _presets,
    "model": _backbones,
    "backbones": _several(_backbones),
    "models": _several(_backbones),
    "recipes": _several(words("default", "few-labels", "published")),
    "device": _choices("train", "device"),
    "precision": _choices("train", "precision"),
    "split": words("dev", "test", "train"),
    "engine": words("local", "ray"),
    "to": lambda _, __: [(name, target.summary) for name, target in TARGETS.items()],
    "by": words("layer", "class", "example", "epoch"),
    "kind": words("lines", "jsonl", "csv", "tsv", "parquet"),
    "track": _several(words("tensorboard", "wandb")),
    "what": words(*LISTS),
    "settings": _settings,
    "run": _runs,
    "several": _runs,
    "directories": _runs,
}
