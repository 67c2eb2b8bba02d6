"""The Experiment, the one value that describes a run, and how layers resolve to one."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from unipelt_cli import methods
from unipelt_cli.config.checks import (
    MOST_PROBLEMS,
    combine_problems,
    data_problems,
    resolve_method,
    table_tasks,
    validate_section,
)
from unipelt_cli.config.sections import (
    SECTIONS,
    DataSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.methods import Method
from unipelt_cli.tasks import get_task
from unipelt_cli.text import cut, shown


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run's result depends on, save versions and hardware."""

    data: DataSettings
    model: ModelSettings
    method_name: str
    method: Method
    train: TrainSettings

    def replace(self, section: str, **changes: object) -> "Experiment":
        """Return the experiment with some keys of one section changed, checked again."""
        settings = self.settings()
        settings[section] |= {key: value for key, value in changes.items() if value is not None}
        return resolve([("", settings)])

    def moved(self, source: str | None, backbone: str | None) -> "Experiment":
        """Return the experiment with its rows, its backbone or both somewhere else."""
        settings = self.settings()
        if source is not None:
            settings["data"] = self.data.moved(source).model_dump(exclude_none=True)
        if backbone is not None:
            settings["model"]["backbone"] = backbone
        return resolve([("", settings)])

    def settings(self) -> Settings:
        """Return the nested dictionary that `resolve` reads; unset keys are left out."""
        sections = {name: getattr(self, name).model_dump(exclude_none=True) for name in SECTIONS}
        method = {"name": self.method_name} | {
            key: value
            for key, value in dataclasses.asdict(self.method).items()
            if value is not None
        }
        return {
            "data": sections["data"],
            "model": sections["model"],
            "method": method,
            "train": sections["train"],
        }


def resolve(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Experiment:
    """Merge named layers of settings, later ones winning, into a checked Experiment.

    Raises ConfigError with all problems: unknown sections and keys, wrong types, values out of
    range, names that do not exist, settings that contradict each other.
    """
    problems: list[tuple[str, str]] = []
    merged = _merged(layers, problems)
    _add_recipe(merged)
    sections = {
        name: validate_section(schema, merged[name], name, problems)
        for name, schema in SECTIONS.items()
    }
    name = str(merged["method"].pop("name", methods.DEFAULT))
    method = resolve_method(name, merged["method"], problems)
    # Unchecked on purpose: what keys get wrong together is said beside what each gets wrong.
    keys = DataSettings.model_fields
    unchecked = {key: value for key, value in merged["data"].items() if key in keys}
    problems += data_problems(DataSettings.model_construct(**unchecked))
    if problems:
        raise combine_problems(problems)
    data, train = sections["data"], sections["train"]
    assert isinstance(train, TrainSettings)
    assert method is not None
    assert isinstance(data, DataSettings)
    data = data.with_folds()
    if "dev_size" not in merged["data"] and not data.folds and (names := table_tasks(data)):
        data = data.model_copy(update={"dev_size": get_task(names[0]).dev_size})
    model = sections["model"]
    assert isinstance(model, ModelSettings)
    return Experiment(data, model, name, method, train)


def _add_recipe(merged: Settings) -> None:
    """Put the method's own defaults under what the layers say."""
    name = merged["method"].get("name", methods.DEFAULT)
    if name not in [*methods.table()]:
        return  # said by the check of the method
    recipe = methods.get(name)
    defaults = {"train": {"learning_rate": recipe.learning_rate}}
    for layer in (defaults, recipe.settings):
        for section, values in layer.items():
            merged[section] = {**values, **merged[section]}


def _merged(
    layers: Sequence[tuple[str, Mapping[str, Any]]], problems: list[tuple[str, str]]
) -> Settings:
    merged: Settings = {"data": {}, "model": {}, "method": {}, "train": {}}
    for origin, layer in layers:
        unknown = (section for section in layer if section not in merged)
        for section in islice(unknown, MOST_PROBLEMS):
            problems.append((f"{cut(section)}: no such section", nearest(section, merged)))
        for section, values in layer.items():
            known = merged["method"].get("name")
            if section not in merged:
                continue
            if not isinstance(values, Mapping):
                problems.append(
                    (f"{section} = {shown(values)}: not a section", f"write {section}.KEY = VALUE")
                )
            elif section == "method" and known not in (None, values.get("name", known)):
                said = f"method.name = {shown(values['name'])}{origin}: the preset is for {known!r}"
                problems.append((said, "drop the preset or the method"))
            else:
                merged[section] |= values
    return merged


def merge_settings(layers: Sequence[Settings]) -> Settings:
    """Merge settings of one level; later ones win. Raises ConfigError for what is no section."""
    merged: Settings = {}
    for layer in layers:
        for section, values in layer.items():
            if not isinstance(values, Mapping):
                raise ConfigError(
                    f"{cut(section)} = {shown(values)}: not a section",
                    "write it as a table: [section] KEY = VALUE",
                )
            merged[section] = merged.get(section, {}) | values
    return merged
