"""From what a command was given to a checked Experiment."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unipelt_cli.errors import ConfigError
from unipelt_cli.runs.opening import settle_network
from unipelt_cli.system import processes
from unipelt_cli.system.imports import importing
from unipelt_cli.terminal import console

if TYPE_CHECKING:
    from unipelt_cli.config.experiment import Experiment
    from unipelt_cli.config.sections import Settings
    from unipelt_cli.data.own_files import OwnFiles


@dataclass(frozen=True)
class Resolved:
    """An experiment, and its own rows where they were read to guess their columns."""

    experiment: "Experiment"
    files: "OwnFiles"


@dataclass(frozen=True)
class WithColumns:
    """The command line's settings with the columns of own rows, and what was read to guess them."""

    settings: "Settings"
    files: "OwnFiles"


def absolute(path: str | None) -> str | None:
    """Keep a run's paths good from any directory; the word hub is not a path."""
    if path is None or path == "hub":
        return path
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):
        return path  # No such home, or no path at all: said by whoever reads from there.


def with_absolute_paths(settings: "Settings") -> "Settings":
    """Make the paths in settings good from any directory."""
    data, model = settings.get("data"), settings.get("model")
    if isinstance(data, dict):
        for key in ("source", "prepared", "train_file", "dev_file", "test_file"):
            if isinstance(data.get(key), str):
                data[key] = absolute(data[key])
            elif isinstance(data.get(key), list):
                data[key] = [absolute(p) if isinstance(p, str) else p for p in data[key]]
    if isinstance(model, dict) and isinstance(name := model.get("backbone"), str):
        is_folder = name != "minilm" and Path(name).expanduser().is_dir()
        model["backbone"] = absolute(name) if is_folder else name
    return settings


def resolve_settings(
    presets: Sequence[str],
    assignments: Sequence[str] | None,
    flags: "Settings",
    *,
    offline: bool,
    data_only: bool = False,
) -> Resolved:
    """Resolve defaults < preset < --set and flags, and settle whether the network is used."""
    layers, command_line = preset_layers(presets), command_line_settings(assignments, flags)
    guessed = with_columns(layers, command_line)
    experiment = complete(layers, guessed.settings)
    settle_network([experiment], offline=offline, needs_backbone=not data_only)
    return Resolved(experiment, guessed.files)


def preset_layers(presets: Sequence[str]) -> list[tuple[str, "Settings"]]:
    """Read presets as layers of settings, each with words that say where it is from."""
    with importing():
        from unipelt_cli.config.presets import read_preset

    return [(f" (from {name})", with_absolute_paths(read_preset(name))) for name in presets]


def command_line_settings(assignments: Sequence[str] | None, flags: "Settings") -> "Settings":
    """Merge `--set` and the flags that were given; flags win."""
    from unipelt_cli.config.experiment import merge_settings
    from unipelt_cli.config.toml import parse_assignment

    flagged = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in flags.items()
    }
    sets = [parse_assignment(text) for text in assignments or ()]
    return with_absolute_paths(merge_settings([*sets, flagged]))


def with_columns(layers: Sequence[tuple[str, "Settings"]], command_line: "Settings") -> WithColumns:
    """Return settings with the columns of own rows: where no layer says them, they are guessed.

    What was guessed is printed.
    """
    from unipelt_cli.config.experiment import merge_settings
    from unipelt_cli.data.own_files import OwnFiles

    files = OwnFiles()
    data = merge_settings([*(layer for _, layer in layers), command_line]).get("data", {})
    path = data.get("train_file")
    elsewhere = any(data.get(key) for key in ("dataset", "prepared", "tasks"))
    named = {key: data.get(key) for key in ("text", "text_pair", "label")}
    kind = data.get("kind", "auto")
    if not isinstance(path, str) or elsewhere or (named["text"] and named["label"]):
        return WithColumns(command_line, files)
    named["encoding"] = data.get("encoding")
    if not all(value is None or isinstance(value, str) for value in (*named.values(), kind)):
        return WithColumns(command_line, files)  # said by the check of each key
    from unipelt_cli.data import column_guess

    guess = column_guess.columns(Path(path), **named, kind=kind, files=files)
    if processes.is_first():
        console.say(("note: ", "yellow"), guess.note)
    guessed = {
        key: value for key, value in guess.settings.items() if key != "kind" or kind == "auto"
    }
    return WithColumns(merge_settings([{"data": guessed}, command_line]), files)


def complete(layers: Sequence[tuple[str, "Settings"]], command_line: "Settings") -> "Experiment":
    """Resolve presets and the command line; where rows come from is always written down."""
    from unipelt_cli.config.experiment import merge_settings, resolve

    data = merge_settings([*(layer for _, layer in layers), command_line]).get("data", {})
    return resolve([*layers, ("", command_line), ("", _source_layer(data))])


def _source_layer(data: Mapping[str, Any]) -> "Settings":
    """Return where the rows of a task of the table are, by merged settings of the data section."""
    from unipelt_cli.config.checks import reads_source

    source = data.get("source") or os.environ.get("UNIPELT_DATA") or "hub"
    if not reads_source(data) or not isinstance(source, str):
        return {}
    if source != "hub" and (Path(source) / "manifest.json").is_file():
        return {"data": {"prepared": absolute(source), "source": None}}
    return {"data": {"source": absolute(source)}}


def settle_backbone(name: str, offline: bool) -> None:
    """Decide about the network where only a backbone is asked for."""
    from unipelt_cli.system import network

    backbone = name if network.names_hub(name) else None
    network.configure_network(offline=offline, needed=bool(backbone))
    network.require_cached(backbone=backbone, dataset=None)


def refuse_pairs(*pairs: tuple[str | None, str | None]) -> None:
    """Raise ConfigError where both of two flags are given that contradict each other."""
    for first, second in pairs:
        if first and second:
            raise ConfigError(f"{first} and {second} contradict each other", "give one of them")


def refuse_processes(what: str) -> None:
    """Raise ConfigError where several processes were launched for what takes one."""
    if (count := processes.launched()) > 1:
        raise ConfigError(
            f"{what}: takes one process, and {count} were launched",
            "start it without a launcher; several processes train one run",
        )


def flag_text(flag: str, value: object) -> str | None:
    """Write a flag as it was given; None where it was not."""
    return None if value is None else f"{flag} {value}"
