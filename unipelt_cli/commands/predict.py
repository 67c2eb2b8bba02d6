"""The command `predict`: label rows with finished runs."""

import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unipelt_cli.commands.shared import options, run_argument
from unipelt_cli.errors import ConfigError, DataError
from unipelt_cli.runs.opening import open_run
from unipelt_cli.terminal import console, progress

if TYPE_CHECKING:
    from unipelt_cli.data.cells import RawColumns
    from unipelt_cli.data.unusable import Window
    from unipelt_cli.runs.loaded_runs import LoadedRuns

CellValue = str | int | float | None
Answers = Mapping[str, Mapping[str, object]]
"""What each run says of a row, by the run's name."""
ANSWERED = frozenset({"label", "probabilities", "value", "runs"})
SKIP_THEM = "fill it in, or have such rows answered with null by --skip-unusable"


def predict(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run directory; left out where --run names some."),
    ],
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE|-", help="Rows to label; - reads stdin.", show_default=False),
    ] = None,
    several: Annotated[
        list[Path] | None,
        typer.Option("--run", metavar="RUN", help="Ask several runs at once; one option each."),
    ] = None,
    task: options.OneTaskOption = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="lines|jsonl|csv|tsv|parquet",
            help="What FILE or stdin holds. (default: its suffix, or its beginning, says)",
            show_default=False,
        ),
    ] = None,
    text: options.FileTextOption = None,
    text_pair: options.FileTextPairOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Write this column too, such as an id; may be repeated."
        ),
    ] = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of FILE or stdin. (default: its byte-order mark says it, else UTF-8)",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write there, all or nothing. (default stdout)"),
    ] = None,
    skip_unusable: Annotated[
        bool,
        typer.Option(
            "--skip-unusable",
            help="Answer rows without a text with null. (default as the run was trained)",
        ),
    ] = False,
    device: options.DeviceOption = None,
    precision: options.RunPrecisionOption = None,
    model: options.MovedModelOption = None,
    offline: options.Offline = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The output is always JSON, an object a line.")
    ] = False,
) -> None:
    """Label new rows as they come: one JSON object a line, in the order of the input.

    A file of any size holds the run's text columns. On stdin: JSON, or CSV or TSV with these
    columns and others; what looks like none of them is plain lines of text, and that is said.
    What is there is answered before more is waited for.

    Example: echo "my parcel never came" | unipelt predict RUN -

    Example: unipelt predict --run RUN --run OTHER rows.csv
    """
    if not several and file not in (None, "-") and not os.path.lexists(str(file)):
        is_text = " " in str(file)
        raise DataError(
            f"{file}: No such file or directory",
            f"give a text as a line: echo {str(file)!r} | unipelt predict {run} -"
            if is_text
            else "name a file of rows, or - for stdin",
        )
    if several and file is not None:
        raise ConfigError(f"RUN {run} and --run contradict each other", "give every run with --run")
    if file is None and not several:
        raise ConfigError("predict: there is no FILE|-", "name a file of rows, or - for stdin")
    paths, rows = (several, run) if several else ([Path(run)], str(file))
    runs = [
        open_run(run_argument.locate(path, offline), offline=offline, model=model, needs_rows=False)
        for path in paths
    ]
    from unipelt_cli.data import readers, unusable
    from unipelt_cli.runs import loaded_runs

    if rows == "-" and sys.stdin is None:
        raise DataError("stdin is closed", "give rows on it, or name a FILE")
    each = dict(zip(loaded_runs.named(paths), runs, strict=True))
    loaded = loaded_runs.load(each, task, device, model, precision)
    names = run_argument.file_columns(loaded.columns, text, text_pair)
    kept = _Kept(keep or ())
    plain = [[names[column] for column in each] for each in loaded.plain]
    wanted = ([*dict.fromkeys([*names.values(), *kept.columns])], kind, plain, encoding)
    if rows == "-":
        read = readers.read_input(sys.stdin.buffer, *wanted)
    else:
        read = readers.read_file(Path(rows), *wanted)
    windows = (kept.remember(cells).renamed(names) for cells in readers.noted(read, console.note))
    skip = skip_unusable or all(each_run.experiment.data.skip_unusable for each_run in runs)
    shown = rows != "-" and not (out is None and sys.stdout is not None and sys.stdout.isatty())
    with _output(out) as write, progress.counting("rows", shown=shown) as count:
        parts = unusable.windows_of_texts(windows, loaded.groups, SKIP_THEM, skip=skip)
        for part in parts:
            answers = [{**kept.next(), **_shape(row, several)} for row in _answers(loaded, part)]
            write("".join(f"{json.dumps(row)}\n" for row in answers))
            count(len(answers))


class _Kept:
    """Columns that are written beside the answers: their values wait for those of their rows."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns, self._rows = list(dict.fromkeys(columns)), deque[Mapping[str, CellValue]]()
        if taken := ANSWERED.intersection(columns):
            name = min(taken)
            raise ConfigError(f"--keep {name}: answers have this name themselves", "rename it")

    def remember(self, cells: "RawColumns") -> "RawColumns":
        """Keep the columns' values of some rows, and return the rows."""
        values = [map(_writable, cells.column(column)) for column in self.columns]
        self._rows.extend(
            dict(zip(self.columns, row, strict=True)) for row in zip(*values, strict=True)
        )
        return cells

    def next(self) -> Mapping[str, CellValue]:
        """Return what is kept of the next row."""
        return self._rows.popleft() if self.columns else {}


def _writable(value: Any) -> CellValue:
    """Return a cell as JSON can hold it: dates and the like as text, what is missing as null."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float) else str(value)


def _answers(loaded: "LoadedRuns", part: "Window") -> list[Answers]:
    """Return every run's answer to each row, by name; those to a row without a text are null."""
    answers = loaded.predict_columns(part.texts)
    nothing = {name: loaded_run.nothing for name, loaded_run in loaded.items()}
    return [
        {name: loaded_run.as_json() for name, loaded_run in next(answers).items()}
        if usable
        else nothing
        for usable in part.usable
    ]


def _shape(each: Answers, several: list[Path] | None) -> Mapping[str, object]:
    """Return a row's object: one run's answer, or those of all by name."""
    return {"runs": each} if several else next(iter(each.values()))


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Give a function that writes, to stdout at once or to a file that is whole or not there."""
    if path is None:
        yield lambda text: typer.echo(text, nl=False)
        return
    from unipelt_cli.files import atomic

    with atomic.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream.write
