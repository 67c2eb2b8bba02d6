"""From settings to several experiments that differ in a few of them, and what each is called."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unipelt_cli import methods
from unipelt_cli.config.earlier import BY_DEFAULT
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.presets import read_preset, read_settings, sweep_presets
from unipelt_cli.config.sections import Settings
from unipelt_cli.config.toml import dump, dump_settings, parse_assignment
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.runs.names import run_name
from unipelt_cli.text import cut, shown

AXES = ("backbones", "k", "tasks", "methods", "data_seeds", "seeds")
"""The axes with names of their own, in the order in which cells are trained but for the seeds."""
SEEDS = ("data_seeds", "seeds")
MOST_CELLS = 100_000
ALIASES = {
    "model.backbone": "backbones",
    "data.k": "k",
    "data.task": "tasks",
    "data.tasks": "tasks",
    "method.name": "methods",
    "data.data_seed": "data_seeds",
    "train.seed": "seeds",
}
Axes = dict[str, list[Any]]


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid, and the name of its run directory."""

    name: str
    experiment: Experiment


@dataclass(frozen=True)
class Grid:
    """What is varied, each axis with its values, and the settings that all cells share.

    `settings` yield to an axis, as a preset does; `flags` win.
    """

    axes: Axes
    settings: Settings
    flags: Settings = field(default_factory=dict)

    def cells(self, complete: Callable[[Sequence[Settings]], Experiment]) -> list[Cell]:
        """Resolve every combination; `complete` makes an experiment of layers of settings.

        Cells that differ in seeds alone stand side by side. Raises ConfigError for a value that
        its setting does not take, and where one cell would be there twice.
        """
        for name in self.axes.keys() & ALIASES.keys():
            setting = ALIASES[name]
            raise ConfigError(f"the axis {name}: is the axis {setting}", f"write {setting} = [...]")
        axes = {name: self.axes[name] for name in self._order()}
        count = 1
        for values in axes.values():
            count *= len(values)
        if count > MOST_CELLS:
            raise ConfigError(f"the grid has {count:,} cells", "give fewer values")
        layers = {name: [_layers(name, value) for value in axes[name]] for name in axes}
        by_name: dict[str, Cell] = {}
        for chosen in itertools.product(*layers.values()):
            varied = itertools.chain.from_iterable(chosen)
            experiment = complete([self.settings, *varied, self.flags])
            cell = Cell(cell_name(experiment), experiment)
            if cell.name in by_name:
                raise ConfigError(
                    f"the grid has {cell.name} twice", "give each value of an axis once"
                )
            by_name[cell.name] = cell
        return list(by_name.values())

    def _order(self) -> list[str]:
        named = [name for name in AXES if name in self.axes and name not in SEEDS]
        others = [name for name in self.axes if name not in AXES]
        return [*named, *others, *(name for name in SEEDS if name in self.axes)]


def groups(cells: Sequence[Cell], size: int) -> list[list[Cell]]:
    """Put cells that differ in seeds alone together, at most `size` in a group."""
    parted: list[list[Cell]] = []
    for _, members in itertools.groupby(cells, key=lambda cell: _without_seeds(cell.experiment)):
        similar = list(members)
        parted += (similar[start : start + size] for start in range(0, len(similar), size))
    return parted


def _without_seeds(experiment: Experiment) -> str:
    return dump(experiment.with_("data", data_seed=0).with_("train", seed=0))


def read_grid(name: str) -> Grid:
    """Read a grid by path or by the name of a shipped one: a table `axes`, and settings.

    Raises ConfigError when it is absent, not TOML, or no grid.
    """
    settings = read_settings(name, sweep_presets(), "unipelt list sweeps")
    axes: Any = settings.pop("axes", {})
    if not isinstance(axes, dict):
        raise ConfigError(f"axes = {shown(axes)}: not a table", "write [axes] and lists below it")
    unknown = [key for key in axes if key not in AXES and "." not in key]
    if unknown:
        known = [*AXES, "any section.key"]
        raise ConfigError(f"axes.{cut(unknown[0])}: no such axis", nearest(unknown[0], known))
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            message = f"axes.{cut(key)} = {shown(values)}: not a list of values"
            raise ConfigError(message, "write it in [ ]")
    return Grid(dict(axes), settings)


def take_axes(settings: Sequence[str]) -> tuple[Axes, list[str]]:
    """Take the `--set` assignments apart: a list is an axis, what is left is for all cells.

    A setting that takes a list itself is written with commas, or as a list of lists.
    """
    axes: Axes = {}
    rest = []
    for text in settings:
        ((section, values),) = parse_assignment(text).items()
        ((key, value),) = values.items()
        if isinstance(value, list) and value:
            axes[f"{section}.{key}"] = value
        else:
            rest.append(text)
    return axes, rest


def _layers(axis: str, value: Any) -> list[Settings]:
    """Turn one value of an axis into layers of settings."""
    match axis, value:
        case "methods", {"name": str(name)}:
            return [*_method(name), {k: v for k, v in value.items() if k != "name"}]
        case "methods", str(name):
            return _method(name)
        case "tasks", str(name) if "+" in name:
            return [{"data": {"tasks": name.split("+")}}]
        case "tasks", _:
            return [{"data": {"task": value}}]
        case "k", "all":
            return []
        case "k" | "data_seeds", _:
            return [{"data": {{"k": "k", "data_seeds": "data_seed"}[axis]: value}}]
        case "seeds", _:
            return [{"train": {"seed": value}}]
        case "backbones", _:
            return [{"model": {"backbone": value}}]
        case _ if axis not in AXES:
            section, _, key = axis.partition(".")
            return [{section: {key: value}}]
    message = f"axes.{cut(axis)} has {shown(value)}"
    raise ConfigError(message, "give a name, or a table that has one")


def _method(name: str) -> list[Settings]:
    """Take a method's name as its defaults, and a preset's name or file as what it holds."""
    return [{"method": {"name": name}}] if name in methods.table() else [read_preset(name)]


def cell_name(experiment: Experiment) -> str:
    """Return what a cell's directory is called: readable, and with its settings' hash.

    A setting that came later is left out where it says what earlier versions did: their cells
    keep their names.
    """
    settings = experiment.settings()
    earlier = {**BY_DEFAULT, "method": experiment.method.earlier}
    kept = {
        section: {
            key: value
            for key, value in values.items()
            if key not in earlier.get(section, {}) or value != earlier[section][key]
        }
        for section, values in settings.items()
    }
    digest = hashlib.sha256(dump_settings(kept).encode()).hexdigest()
    return f"{run_name(experiment)[:200]}-{digest[:8]}"


def over_seeds(
    experiment: Experiment, data_seeds: str | None, seeds: str | None
) -> dict[str, Experiment]:
    """Return a run for each data seed and each seed of two lists with commas, by a short label.

    Raises ConfigError for what is no list of numbers, and for rows that are drawn already.
    """
    if data_seeds is not None and experiment.data.prepared is not None:
        raise ConfigError(
            f"--data-seeds {data_seeds}: the rows of data.prepared are drawn already",
            "drop --data-seeds, or --prepared",
        )
    grid = {}
    for data_seed in split_numbers("--data-seeds", data_seeds) or [experiment.data.data_seed]:
        drawn = experiment.with_("data", data_seed=data_seed)
        for seed in split_numbers("--seeds", seeds) or [experiment.train.seed]:
            varied = (("d", data_seed, data_seeds), ("s", seed, seeds))
            label = " ".join(f"{letter}{n}" for letter, n, flag in varied if flag is not None)
            grid[label] = drawn.with_("train", seed=seed)
    return grid


def split_numbers(flag: str, text: str | None, *, word: str | None = None) -> list[Any]:
    """Read numbers with commas between them; one `word` may stand for a number."""
    words = split_names(flag, text)
    if not all(part == word or (part.isdecimal() and part.isascii()) for part in words):
        raise ConfigError(f"{flag} {text!r}: not numbers with commas", "write it like 111,222,333")
    numbers = [part if part == word else int(part) for part in words]
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{flag} {text!r}: a number is there twice", "give each once")
    return numbers


def split_names(flag: str, text: str | None) -> list[str]:
    """Read names with commas between them."""
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{flag} {text!r}: a name is missing", "write it like A,B,C")
    return words
