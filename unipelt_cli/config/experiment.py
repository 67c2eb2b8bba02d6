"""The Experiment, the one value that describes a run, and how layers resolve to one."""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from unipelt_cli import methods
from unipelt_cli.config.checks import (
    MOST_PROBLEMS,
    combine_problems,
    resolve_method,
    table_tasks,
    unchecked_data_problems,
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

SectionName = Literal["data", "model", "method", "train"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run's result depends on, save versions and hardware."""

    data: DataSettings
    model: ModelSettings
    method_name: str
    method: Method
    train: TrainSettings

    def with_(self, section: SectionName, **values: object) -> "Experiment":
        """Return the experiment with some keys of one section changed; None leaves one as it is.

        That section alone is checked again. Raises ConfigError with all that is wrong with it.
        """
        changes = {key: value for key, value in values.items() if value is not None}
        if not changes:
            return self
        if section == "method":
            return self._with_method(dataclasses.asdict(self.method) | changes)
        return self._with_section(
            section, getattr(self, section).model_dump(exclude_none=True) | changes
        )

    def moved(self, source: str | None, backbone: str | None) -> "Experiment":
        """Return the experiment with its rows, its backbone or both somewhere else."""
        moved = self.with_("model", backbone=backbone)
        if source is None:
            return moved
        return moved._with_section("data", self.data.moved(source).model_dump(exclude_none=True))

    def _with_section(self, section: str, values: Mapping[str, Any]) -> "Experiment":
        problems: list[tuple[str, str]] = []
        checked = validate_section(SECTIONS[section], values, section, problems)
        if section == "data":
            problems += unchecked_data_problems(values)
        if problems:
            raise combine_problems(problems)
        if isinstance(checked, DataSettings):
            checked = checked.with_folds()
        changes: dict[str, Any] = {section: checked}
        return dataclasses.replace(self, **changes)

    def _with_method(self, values: Mapping[str, Any]) -> "Experiment":
        problems: list[tuple[str, str]] = []
        method = resolve_method(self.method_name, values, problems)
        if problems:
            raise combine_problems(problems)
        assert method is not None
        return dataclasses.replace(self, method=method)

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
    problems += unchecked_data_problems(merged["data"])
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
                name = shown(values["name"])
                problem = f"method.name = {name}{origin}: the preset is for {known!r}"
                problems.append((problem, "drop the preset or the method"))
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
