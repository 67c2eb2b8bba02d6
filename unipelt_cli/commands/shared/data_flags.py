"""The options that say which rows, declared once: a command takes them all as one value."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unipelt_cli.commands.shared.options import (
    EncodingOption,
    LabelOption,
    SourceOption,
    data_option,
)

if TYPE_CHECKING:
    from unipelt_cli.config.sections import Settings

Command = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """The data options of a command line, in the order of its help; None where it is silent."""

    task: Annotated[str | None, data_option("--task", "A task: see `unipelt list tasks`.")] = None
    tasks: Annotated[
        str | None,
        data_option(
            "--tasks", "Several tasks at once, by one model with a head each.", metavar="A,B"
        ),
    ] = None
    k: Annotated[int | None, data_option("--k", "Train on so many rows. (default all)")] = None
    data_seed: Annotated[
        int | None,
        data_option("--data-seed", "DropoutSource the rows. (default 111)", show_default=False),
    ] = None
    data_seeds: Annotated[
        str | None,
        data_option(
            "--data-seeds",
            "A run for each, all in one pass where the method can.",
            metavar="A,B,…",
        ),
    ] = None
    source: SourceOption = None
    prepared: Annotated[
        str | None,
        data_option(
            "--prepared",
            "A directory that `prepare` wrote, or several with commas.",
            metavar="DIR",
        ),
    ] = None
    dev_size: Annotated[
        int | None,
        data_option("--dev-size", "Dev rows; 0: none. (default 1000)", show_default=False),
    ] = None
    folds: Annotated[
        str | None,
        data_option(
            "--folds", "Test every train row, by N trainings without it.", metavar="N|none"
        ),
    ] = None
    dataset: Annotated[
        str | None, data_option("--dataset", "Any hub data set.", metavar="NAME[:CONFIG]")
    ] = None
    train_file: Annotated[
        str | None,
        data_option(
            "--train-file", "Your rows: .csv, .tsv, .jsonl, .json, .parquet.", metavar="FILE"
        ),
    ] = None
    dev_file: Annotated[str | None, data_option("--dev-file", "Your dev rows.", metavar="FILE")] = (
        None
    )
    test_file: Annotated[
        str | None, data_option("--test-file", "Your test rows.", metavar="FILE")
    ] = None
    encoding: EncodingOption = None
    text: Annotated[str | None, data_option("--text", "The text column.", metavar="COLUMN")] = None
    text_pair: Annotated[
        str | None,
        data_option("--text-pair", "The second text column, for pairs.", metavar="COLUMN"),
    ] = None
    label: LabelOption = None

    def settings(self) -> "Settings":
        """Return them as settings of the data section; several data seeds are several runs."""
        values = dataclasses.asdict(self)
        del values["data_seeds"]
        return {"data": values | {"prepared": _split_directories(self.prepared)}}


def takes_data(*left_out: str) -> Callable[[Command], Command]:
    """Give a command every data option but those left out, as its one parameter `data`."""
    if unknown := {*left_out} - {field.name for field in dataclasses.fields(DataFlags)}:
        raise TypeError(f"no data options: {', '.join(sorted(unknown))}")
    taken = [field for field in dataclasses.fields(DataFlags) if field.name not in left_out]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            flags = DataFlags(**{field.name: values.pop(field.name) for field in taken})
            command(data=flags, **values)

        def parameters() -> Iterator[inspect.Parameter]:
            for parameter in inspect.signature(command).parameters.values():
                named = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                if parameter.name != "data":
                    yield named
                    continue
                for field in taken:
                    yield named.replace(
                        name=field.name, annotation=field.type, default=field.default
                    )

        expanded = [*parameters()]
        with_options.__dict__["__signature__"] = inspect.Signature(expanded)
        with_options.__annotations__ = {option.name: option.annotation for option in expanded}
        return with_options

    return decorate


def _split_directories(prepared: str | None) -> str | list[str] | None:
    """Take directories with commas between them apart, unless one is called so."""
    if prepared is None or "," not in prepared or Path(prepared).is_dir():
        return prepared
    return [path.strip() for path in prepared.split(",")]
