"""The Experiment: the one frozen value that describes a run, and its way in and out of TOML.

Layers of settings are merged in this order: defaults, a preset, then `--set` and flags.
Checking reports every problem at once, each with `section.key`, the value and what is possible.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from unipelt_cli import methods
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.files.strict import parse_toml
from unipelt_cli.methods import Method
from unipelt_cli.tasks import CLASSIFICATION_METRICS, REGRESSION_METRICS, TASKS, Glue, get_task

Settings = dict[str, dict[str, Any]]
LARGEST_FILE = 1_000_000
MOST_PROBLEMS = 20
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Pooling = Literal["auto", "native", "cls", "mean", "eos"]
Metric = Literal["accuracy", "f1", "matthews", "spearman", "pearson", "mse"]


def _names(value: Any) -> Any:
    """Take "a,b" and TOML's lists as tuples of names; what is wrong stays for the check."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Directories = Annotated[
    str | tuple[str, ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class Section(BaseModel):
    """One table of the experiment file: frozen, strict, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class DataSettings(Section):
    """Which rows: tasks of the table, a hub data set, or files of the user's own."""

    task: str | None = Field(None, description="a task of the table, or a name for your own data")
    tasks: Names | None = Field(None, description="several tasks of the table, trained at once")
    k: Annotated[int, Field(ge=1)] | None = Field(None, description="train rows; all without it")
    data_seed: int = Field(111, ge=0, lt=2**63, description="draws the rows")
    dev_size: int = Field(1000, ge=1, lt=2**63, description="dev rows, drawn after the train rows")
    source: str | None = Field(None, description="a directory in GLUE's layout, or 'hub'")
    prepared: Directories | None = Field(
        None, description="a directory that `prepare` wrote, or one for each of several tasks"
    )
    dataset: str | None = Field(None, description="a hub data set, NAME or NAME:CONFIG")
    train_file: str | None = Field(None, description="own rows: .csv, .tsv, .jsonl or .parquet")
    dev_file: str | None = Field(None, description="own dev rows")
    test_file: str | None = Field(None, description="own test rows")
    text: str | None = Field(None, description="the text column")
    text_pair: str | None = Field(None, description="the second text column of a pair")
    label: str | None = Field(None, description="the label column")
    kind: Literal["auto", "classification", "regression"] = Field(
        "auto", description="what own labels are; auto: fractional numbers are regression"
    )
    metric: Metric | None = Field(None, description="what selects the best epoch of own data")

    def each(self) -> tuple["DataSettings", ...]:
        """Return every task's settings as if it were alone: its rows are drawn by them."""
        directories = self.prepared if isinstance(self.prepared, tuple) else None
        count = len(self.tasks or directories or (self.task,))
        names = self.tasks or (self.task,) * count
        places = directories or (self.prepared,) * count
        return tuple(
            self.model_copy(update={"task": name, "tasks": None, "prepared": place})
            for name, place in zip(names, places, strict=True)
        )

    def moved(self, source: str) -> "DataSettings":
        """Return the settings with the rows at `source`: files and directories keep their names."""
        folder = Path(source)
        changes: dict[str, Any] = {
            key: str(folder / Path(path).name)
            for key in ("train_file", "dev_file", "test_file")
            if (path := getattr(self, key)) is not None
        }
        if isinstance(self.prepared, tuple):
            changes["prepared"] = tuple(str(folder / Path(path).name) for path in self.prepared)
        elif not changes and (folder / "manifest.json").is_file():
            changes = {"prepared": source, "source": None}
        elif not changes:
            changes = {"prepared": None, "source": source}
        return self.model_copy(update=changes)


class ModelSettings(Section):
    """The frozen backbone and how a row's features are read from it."""

    backbone: str = Field("minilm", min_length=1, description="a directory, a hub name, or minilm")
    pooling: Pooling = Field("auto", description="what the head reads")
    head_dropout: float = Field(0.1, ge=0, le=0.9, description="dropout before the head")
    max_length: int = Field(128, ge=8, le=512, description="tokens a row is cut to")
    attention: Literal["auto", "eager", "sdpa"] = Field("auto", description="implementation")


class TrainSettings(Section):
    """The loop: AdamW, linear schedule, early stopping on dev."""

    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="peak rate; the method's own without it"
    )
    epochs: int = Field(50, ge=1, description="at most so many")
    patience: int = Field(10, ge=1, description="epochs without a better dev score before the end")
    patience_steps: int = Field(0, ge=0, description="and at least so many steps without one")
    batch_size: int = Field(16, ge=1, description="rows a step")
    head_rate: float = Field(1.0, gt=0, le=1000, description="head: factor on the rate")
    averaging: float = Field(
        0.0, ge=0, lt=1, description="dev scores and keeps a running mean of the tensors; its decay"
    )
    warmup: float = Field(0.06, ge=0, lt=1, description="share of all steps that warm up")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's, on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    seed: int = Field(42, ge=0, lt=2**63, description="initialises, shuffles and drops out")
    device: Device = Field("auto", description="where to compute")
    precision: Precision = Field("auto", description="auto: bf16 where the hardware is fast at it")


SECTIONS: Mapping[str, type[Section]] = {
    "data": DataSettings,
    "model": ModelSettings,
    "train": TrainSettings,
}


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
    sections = {
        name: _validated(schema, merged[name], name, problems) for name, schema in SECTIONS.items()
    }
    name = str(merged["method"].pop("name", methods.DEFAULT))
    method = _method(name, merged["method"], problems)
    # Unchecked on purpose: what keys get wrong together is said beside what each gets wrong.
    keys = DataSettings.model_fields
    unchecked = {key: value for key, value in merged["data"].items() if key in keys}
    problems += _data_problems(DataSettings.model_construct(**unchecked))
    if problems:
        raise _combined(problems)
    data, train = sections["data"], sections["train"]
    assert isinstance(train, TrainSettings)
    assert method is not None
    if train.learning_rate is None:
        train = train.model_copy(update={"learning_rate": methods.get(name).learning_rate})
    assert isinstance(data, DataSettings)
    if "dev_size" not in merged["data"] and (names := _table_tasks(data)):
        data = data.model_copy(update={"dev_size": get_task(names[0]).dev_size})
    model = sections["model"]
    assert isinstance(model, ModelSettings)
    return Experiment(data, model, name, method, train)


def _merged(
    layers: Sequence[tuple[str, Mapping[str, Any]]], problems: list[tuple[str, str]]
) -> Settings:
    merged: Settings = {"data": {}, "model": {}, "method": {}, "train": {}}
    for origin, layer in layers:
        unknown = (section for section in layer if section not in merged)
        for section in islice(unknown, MOST_PROBLEMS):
            problems.append((f"{_cut(section)}: no such section", nearest(section, merged)))
        for section, values in layer.items():
            known = merged["method"].get("name")
            if section not in merged:
                continue
            if not isinstance(values, Mapping):
                problems.append(
                    (f"{section} = {_shown(values)}: not a section", f"write {section}.KEY = VALUE")
                )
            elif section == "method" and known not in (None, values.get("name", known)):
                said = (
                    f"method.name = {_shown(values['name'])}{origin}: the preset is for {known!r}"
                )
                problems.append((said, "drop the preset or the method"))
            else:
                merged[section] |= values
    return merged


def _table_tasks(data: DataSettings) -> tuple[str, ...]:
    """Return the names of the tasks if their rows are found by the table, else nothing."""
    if data.train_file or data.dataset or data.prepared:
        return ()
    names = _names(data.tasks) or (data.task,)
    return tuple(str(name) for name in names if name is not None)


def reads_source(data: DataSettings) -> bool:
    """Say whether rows come from `data.source`: a task of the table that is not packaged."""
    return any(isinstance(get_task(name).source, Glue) for name in _table_tasks(data))


_OWN_ROWS = ("dataset", "train_file", "dev_file", "test_file", "text", "text_pair", "label")


def _data_problems(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yield what the data section's keys, each right by itself, get wrong together."""
    own = data.train_file or data.dataset
    if data.tasks is not None or isinstance(data.prepared, list | tuple):
        yield from _joint_problems(data)
        return
    if data.train_file and data.dataset:
        yield "data.train_file and data.dataset are both set", "keep one of them"
    if not own and not data.prepared:
        if data.task is None:
            yield (
                "data.task is not set",
                "give --task NAME, or your own rows with --train-file FILE",
            )
        else:
            try:
                get_task(str(data.task))
            except ConfigError as error:
                yield _cut(error.message), error.hint
    if own and not data.prepared:
        for key in ("text", "label"):
            if getattr(data, key) is None:
                flag = "--" + key
                yield f"data.{key} is not set", f"name the column with {flag} COLUMN"
    given = [key for key in _OWN_ROWS if getattr(data, key) is not None]
    if data.prepared and given:
        yield (
            f"data.{given[0]} = {_shown(getattr(data, given[0]))}: "
            "the rows are those of data.prepared",
            "drop one of them",
        )
    if data.source and (own or data.prepared):
        yield (
            f"data.source = {_shown(data.source)}: the rows come from elsewhere",
            "drop --source, or --prepared, --train-file and --dataset",
        )
    for key in ("dev_file", "test_file"):
        if getattr(data, key) and not data.train_file:
            yield f"data.{key} is set without data.train_file", "give --train-file FILE as well"
    metrics = {"classification": CLASSIFICATION_METRICS, "regression": REGRESSION_METRICS}
    if data.metric and str(data.kind) in metrics and data.metric not in metrics[data.kind]:
        yield (
            f"data.metric = {_shown(data.metric)}: not a metric of {data.kind}",
            f"choose one of {', '.join(metrics[data.kind])}",
        )


def _joint_problems(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with several tasks at once."""
    tasks, prepared = _names(data.tasks or ()), data.prepared or ()
    prepared = (prepared,) if isinstance(prepared, str) else prepared
    for values in (tasks, prepared):
        if not isinstance(values, tuple | list) or not all(isinstance(v, str) for v in values):
            return  # said already by the check of each key
    named = [key for key in ("task", *_OWN_ROWS) if getattr(data, key) is not None]
    if named:
        yield (
            f"data.{named[0]} = {_shown(getattr(data, named[0]))}: "
            "one task's, but there are several",
            "drop it, or drop --tasks; own rows: `unipelt prepare` each, then --prepared A,B",
        )
    for key, values in (("tasks", tasks), ("prepared", prepared)):
        if values and len(set(values)) < len(values):
            yield f"data.{key} = {_shown(list(values))}: one is named twice", "name each once"
    if len(tasks or prepared) < 2:
        key, values = ("tasks", tasks) if tasks else ("prepared", prepared)
        yield (
            f"data.{key} = {_shown(list(values))}: not several",
            f"give --tasks A,B, or one as --{'task' if tasks else 'prepared'}",
        )
    if prepared and data.source:
        yield f"data.source = {_shown(data.source)}: the rows come from elsewhere", "drop --source"
    if tasks and prepared and len(tasks) != len(prepared):
        yield (
            f"data.prepared = {_shown(list(prepared))}: not one directory for each of "
            f"{_shown(list(tasks))}",
            "drop --tasks: the directories know their tasks",
        )
    unknown = [name for name in _table_tasks(data) if name not in TASKS]
    for name in unknown[:MOST_PROBLEMS]:
        yield f"data.tasks has {_shown(name)}: no such task", nearest(name, TASKS)
    sizes = {} if unknown else {name: get_task(name).dev_size for name in _table_tasks(data)}
    if "dev_size" not in data.model_fields_set and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield f"data.dev_size is not set, and the tasks' own differ: {listed}", "give --dev-size N"


def _method(name: str, values: Mapping[str, Any], problems: list[tuple[str, str]]) -> Method | None:
    try:
        default = methods.get(name).method
    except ConfigError as error:
        problems.append((_cut(error.message), error.hint))
        return None
    complete = {**dataclasses.asdict(default), **values}
    checked = _validated(type(default), complete, "method", problems)
    if checked is None:
        return None
    assert isinstance(checked, Method)
    problems += [(f"method.{text}", hint) for text, hint in checked.problems()]
    return checked


def _validated(
    schema: type[Any], values: Mapping[str, Any], section: str, problems: list[tuple[str, str]]
) -> Any:
    """Check one section against its schema; collect its problems and return None if any."""
    keys = _keys(schema)
    # Before the schema is called: it has parameters of its own, which a file must not set.
    for key in islice((key for key in values if key not in keys), MOST_PROBLEMS):
        said = f"{section}.{_cut(key)} = {_shown(values[key])}: no such setting"
        problems.append((said, _hint(key, keys)))
    try:
        return schema(**{key: value for key, value in values.items() if key in keys})
    except ValidationError as invalid:
        wrong = dict[str, str]()
        for error in invalid.errors(include_url=False):
            said = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            wrong.setdefault(str(error["loc"][0]) if error["loc"] else "?", said)
        problems += (
            (f"{section}.{key} = {_shown(values.get(key))} is not allowed", f"give {said}")
            for key, said in wrong.items()
        )
        return None


def _shown(value: object) -> str:
    """Write a value out for a message, but no more of it than one can hold."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _keys(schema: type[Any]) -> list[str]:
    if issubclass(schema, BaseModel):
        return list(schema.model_fields)
    return [field.name for field in dataclasses.fields(schema)]


def _hint(key: str, keys: Sequence[str]) -> str:
    if not keys:
        return "this method has no settings"
    return nearest(key, keys)


def _combined(problems: Sequence[tuple[str, str]]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(*problems[0])
    told = problems[:MOST_PROBLEMS]
    lines = "; ".join(f"({n}) {text}" for n, (text, _) in enumerate(told, 1))
    hints = "; ".join(f"({n}) {hint}" for n, (_, hint) in enumerate(told, 1))
    return ConfigError(f"{len(problems)} settings are wrong: {lines}", hints)


def parse_assignment(text: str) -> Settings:
    """Read one `--set section.key=value`: the value is TOML, a bare word is a string."""
    target, equals, value = text.partition("=")
    section, dot, key = target.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(
            f"--set {_shown(text)} is not an assignment",
            "write --set section.key=value, for example --set train.epochs=20",
        )
    word = value.strip()
    try:
        parsed = parse_toml(f"value = {word}")
    except tomllib.TOMLDecodeError:
        return {section: {key: word}}
    except (ValueError, RecursionError) as error:
        said = f"--set {section}.{key} = {_cut(word)}: {_reason(error)}"
        raise ConfigError(said, "give a value of TOML, or put quotes around a text") from None
    # More keys than one: line ends made a word look like several settings.
    return {section: {key: parsed["value"] if len(parsed) == 1 else word}}


def merge(layers: Sequence[Settings]) -> Settings:
    """Merge settings of one level; later ones win. Raises ConfigError for what is no section."""
    merged: Settings = {}
    for layer in layers:
        for section, values in layer.items():
            if not isinstance(values, Mapping):
                raise ConfigError(
                    f"{_cut(section)} = {_shown(values)}: not a section",
                    "write it as a table: [section] KEY = VALUE",
                )
            merged[section] = merged.get(section, {}) | values
    return merged


def preset_folder() -> Path:
    """Return where shipped files lie: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    folder = package / "presets"
    return folder if folder.is_dir() else package.parent / "presets"


def presets() -> dict[str, Path]:
    """Return the shipped presets by name."""
    return {path.stem: path for path in sorted(preset_folder().glob("*.toml"))}


def sweep_presets() -> dict[str, Path]:
    """Return the shipped grids for `sweep` by name."""
    return {path.stem: path for path in sorted((preset_folder() / "sweeps").glob("*.toml"))}


def read_preset(name: str) -> Settings:
    """Read a preset by path or by name; raise ConfigError when it is absent or not TOML.

    A method's name is a preset too: its defaults, where no file says more.
    """
    if not Path(name).is_file() and name not in presets() and name in methods.table():
        rate = methods.get(name).learning_rate
        return {"method": {"name": name}, "train": {"learning_rate": rate}}
    return read_settings(name, presets(), "unipelt list presets", [*presets(), *methods.table()])


def read_settings(
    name: str, shipped: Mapping[str, Path], listed_by: str, known: Sequence[str] = ()
) -> Settings:
    """Read a TOML file by path, or a shipped one by name.

    Raises ConfigError when it is absent, unreadable or not TOML.
    """
    path = Path(name)
    try:
        if not path.is_file():
            if name not in shipped:
                raise ConfigError(
                    f"preset {_shown(name)}: no such file or preset",
                    nearest(name, known or [*shipped], listed_by),
                )
            path = shipped[name]
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path}: larger than a settings file can be", "give a TOML preset")
        with path.open("rb") as file:
            settings: Settings = parse_toml(file.read(LARGEST_FILE).decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason})", "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        said = f"{path}: not TOML ({_reason(error)})"
        raise ConfigError(said, "mend the line it names") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "check the path and its rights") from None
    return settings


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else _cut(str(error))


def dump(experiment: Experiment) -> str:
    """Write the experiment as TOML that `read_preset` and `resolve` give back unchanged."""
    blocks = [
        "\n".join([f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())])
        for section, values in experiment.settings().items()
    ]
    return "\n\n".join(blocks) + "\n"


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # TOML's basic strings are JSON's, save that DEL must be escaped as well.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return repr(value)
        case tuple() | list():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
    raise TypeError(f"no TOML for {value!r}")
