"""What settings get wrong, alone or together: all problems at once."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from unipelt_cli import methods
from unipelt_cli.config.sections import DataSettings, read_folds, split_names
from unipelt_cli.errors import ConfigError, nearest
from unipelt_cli.methods import Method
from unipelt_cli.metrics import CLASSIFICATION_METRICS, REGRESSION_METRICS
from unipelt_cli.tasks import TASKS, Glue, get_task
from unipelt_cli.text import cut, shown

MOST_PROBLEMS = 20
_OWN_ROWS = (
    *("dataset", "train_file", "dev_file", "test_file", "encoding"),
    *("text", "text_pair", "label"),
)


def table_tasks(data: DataSettings) -> tuple[str, ...]:
    """Return the names of the tasks if their rows are found by the table, else nothing."""
    if data.train_file or data.dataset or data.prepared:
        return ()
    names = split_names(data.tasks) or (data.task,)
    return tuple(str(name) for name in names if name is not None)


def reads_source(data: Mapping[str, Any]) -> bool:
    """Say whether rows come from `data.source`: a task of the table that is not packaged.

    Of settings that are not checked yet: of what is wrong with them the check of all will tell.
    """
    if not isinstance(data.get("tasks"), str | list | tuple | None):
        return False
    names = table_tasks(_unchecked(data))
    is_known = all(name in TASKS for name in names)
    return is_known and any(isinstance(get_task(name).source, Glue) for name in names)


def unchecked_data_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what keys of the data section get wrong together, beside what each gets wrong."""
    yield from data_problems(_unchecked(values))


def _unchecked(values: Mapping[str, Any]) -> DataSettings:
    known = {key: value for key, value in values.items() if key in DataSettings.model_fields}
    return DataSettings.model_construct(**known)


def data_problems(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yield what the data section's keys, each right by itself, get wrong together."""
    own_rows = data.train_file or data.dataset
    if data.tasks is not None or isinstance(data.prepared, list | tuple):
        yield from _joint_problems(data)
        return
    if data.train_file and data.dataset:
        yield "data.train_file and data.dataset are both set", "keep one of them"
    if not own_rows and not data.prepared:
        if data.task is None:
            yield (
                "data.task is not set",
                "give --task NAME, or your own rows with --train-file FILE",
            )
        else:
            try:
                get_task(str(data.task))
            except ConfigError as error:
                yield cut(error.message), error.hint
    if own_rows and not data.prepared:
        for key in ("text", "label"):
            if getattr(data, key) is None:
                flag = "--" + key
                yield f"data.{key} is not set", f"name the column with {flag} COLUMN"
    contradicting = [key for key in _OWN_ROWS if getattr(data, key) is not None]
    if data.prepared and contradicting:
        yield (
            f"data.{contradicting[0]} = {shown(getattr(data, contradicting[0]))}: "
            "the rows are those of data.prepared",
            "drop one of them",
        )
    if data.source and (own_rows or data.prepared):
        yield (
            f"data.source = {shown(data.source)}: the rows come from elsewhere",
            "drop --source, or --prepared, --train-file and --dataset",
        )
    for key in ("dev_file", "test_file", "encoding"):
        if getattr(data, key) and not data.train_file:
            yield f"data.{key} is set without data.train_file", "give --train-file FILE as well"
    yield from _folds_problems(data)
    yield from _label_problems(data, is_own=bool(own_rows))


def _folds_problems(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yield what contradicts that all rows train, or that none of them is held for dev."""
    try:
        folds = read_folds(data.folds)
    except ValueError:
        return  # said by the check of the key
    if data.dev_file and data.dev_size == 0:
        yield "data.dev_file is set, and data.dev_size = 0", "drop one of them"
    if folds in ("auto", 0):
        if data.fold is not None:
            yield f"data.fold = {shown(data.fold)} is set without data.folds", "give --folds N"
        return
    if isinstance(data.fold, int) and data.fold > folds:
        yield f"data.fold = {data.fold}: there are {folds} folds", f"give 1 to {folds}"
    for key in ("dev_file", "test_file"):
        if getattr(data, key):
            yield (
                f"data.folds = {folds}: folds are trained and tested on train rows alone, and "
                f"data.{key} is set",
                f"drop --folds, or --{key.replace('_', '-')}",
            )
    if "dev_size" in data.model_fields_set and data.dev_size:
        yield (
            f"data.folds = {folds}: all train rows are trained on, and data.dev_size = "
            f"{shown(data.dev_size)}",
            "drop --folds, or --dev-size",
        )


def _label_problems(data: DataSettings, *, is_own: bool) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with how one task's labels are read and scored."""
    if data.skip_unusable and not is_own:
        yield (
            "data.skip_unusable = true: only own rows can lack a text or label",
            "drop it, or give --train-file FILE",
        )
    metrics = {"classification": CLASSIFICATION_METRICS, "regression": REGRESSION_METRICS}
    if data.metric and str(data.kind) in metrics and data.metric not in metrics[data.kind]:
        yield (
            f"data.metric = {shown(data.metric)}: not a metric of {data.kind}",
            f"choose one of {', '.join(metrics[data.kind])}",
        )


def _joint_problems(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with several tasks at once."""
    tasks, prepared = split_names(data.tasks or ()), data.prepared or ()
    prepared = (prepared,) if isinstance(prepared, str) else prepared
    for values in (tasks, prepared):
        if not isinstance(values, tuple | list) or not all(isinstance(v, str) for v in values):
            return  # said already by the check of each key
    named = [
        key
        for key in ("task", *_OWN_ROWS, "positive", "skip_unusable")
        if getattr(data, key) is not None
    ]
    named += ["folds"] if data.folds not in ("auto", "none", 0) else []
    if named:
        yield (
            f"data.{named[0]} = {shown(getattr(data, named[0]))}: "
            "one task's, but there are several",
            "drop it, or drop --tasks; own rows: `unipelt prepare` each, then --prepared A,B",
        )
    for key, values in (("tasks", tasks), ("prepared", prepared)):
        if values and len(set(values)) < len(values):
            yield f"data.{key} = {shown(list(values))}: one is named twice", "name each once"
    if len(tasks or prepared) < 2:
        key, values = ("tasks", tasks) if tasks else ("prepared", prepared)
        yield (
            f"data.{key} = {shown(list(values))}: not several",
            f"give --tasks A,B, or one as --{'task' if tasks else 'prepared'}",
        )
    if prepared and data.source:
        yield f"data.source = {shown(data.source)}: the rows come from elsewhere", "drop --source"
    if tasks and prepared and len(tasks) != len(prepared):
        yield (
            f"data.prepared = {shown(list(prepared))}: not one directory for each of "
            f"{shown(list(tasks))}",
            "drop --tasks: the directories know their tasks",
        )
    unknown = [name for name in table_tasks(data) if name not in TASKS]
    for name in unknown[:MOST_PROBLEMS]:
        yield f"data.tasks has {shown(name)}: no such task", nearest(name, TASKS)
    sizes = {} if unknown else {name: get_task(name).dev_size for name in table_tasks(data)}
    if "dev_size" not in data.model_fields_set and len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield f"data.dev_size is not set, and the tasks' own differ: {listed}", "give --dev-size N"


def resolve_method(
    name: str, values: Mapping[str, Any], problems: list[tuple[str, str]]
) -> Method | None:
    """Return the method with its settings, or None where `problems` got some."""
    try:
        default = methods.get(name).method
    except ConfigError as error:
        problems.append((cut(error.message), error.hint))
        return None
    complete = {**dataclasses.asdict(default), **values}
    checked = validate_section(type(default), complete, "method", problems)
    if checked is None:
        return None
    assert isinstance(checked, Method)
    problems += [(f"method.{text}", hint) for text, hint in checked.problems()]
    return checked


def validate_section(
    schema: type[Any], values: Mapping[str, Any], section: str, problems: list[tuple[str, str]]
) -> Any:
    """Check one section against its schema; collect its problems and return None if any."""
    keys = _keys(schema)
    # Before the schema is called: it has parameters of its own, which a file must not set.
    for key in islice((key for key in values if key not in keys), MOST_PROBLEMS):
        problem = f"{section}.{cut(key)} = {shown(values[key])}: no such setting"
        problems.append((problem, _hint(key, keys)))
    try:
        return schema(**{key: value for key, value in values.items() if key in keys})
    except ValidationError as invalid:
        wrong = dict[str, str]()
        for error in invalid.errors(include_url=False):
            expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            wrong.setdefault(str(error["loc"][0]) if error["loc"] else "?", expected)
        problems += (
            (f"{section}.{key} = {shown(values.get(key))} is not allowed", f"give {expected}")
            for key, expected in wrong.items()
        )
        return None


def _keys(schema: type[Any]) -> list[str]:
    if issubclass(schema, BaseModel):
        return list(schema.model_fields)
    return [field.name for field in dataclasses.fields(schema)]


def _hint(key: str, keys: Sequence[str]) -> str:
    if not keys:
        return "this method has no settings"
    return nearest(key, keys)


def combine_problems(problems: Sequence[tuple[str, str]]) -> ConfigError:
    """Return one error that tells the first of the problems, numbered, and how many there are."""
    if len(problems) == 1:
        return ConfigError(*problems[0])
    shown_problems = problems[:MOST_PROBLEMS]
    lines = "; ".join(f"({n}) {text}" for n, (text, _) in enumerate(shown_problems, 1))
    hints = "; ".join(f"({n}) {hint}" for n, (_, hint) in enumerate(shown_problems, 1))
    return ConfigError(f"{len(problems)} settings are wrong: {lines}", hints)
