"""From the bytes of a file or a pipe to cells: all of them, or a window of rows at a time.

A window ends where it is full, or where the next row is not there yet: whoever writes to a pipe
slowly is answered all the same. What was read before an error comes before the error.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from unipelt_cli.data import decoded_lines, parquet, records
from unipelt_cli.data.cells import Cells, require
from unipelt_cli.data.decoded_lines import Lines
from unipelt_cli.data.records import Fills, Form, Grid, Objects, Plain, check_names
from unipelt_cli.errors import ConfigError, DataError, nearest
from unipelt_cli.text import reason, short

Format = Literal["lines", "jsonl", "csv", "tsv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FIRST_WINDOW, LARGEST_WINDOW, GROWTH = 256, 4096, 4  # rows: the first answer comes soon
WINDOW_CHARACTERS = 2**23
Record = tuple[int, Any]  # a line's number, and what it holds


def read_cells(path: Path, header: bool = True, published: bool = False) -> Cells:
    """Read a whole file by its suffix; TSV is read with quoting off."""
    content = decoded_lines.read_bytes(path, SUFFIXES)
    kind = _by_suffix(path)
    if kind == "parquet":
        columns = _parquet(str(path), content)
        return Cells(str(path), columns, range(columns.rows), names=columns.class_names)
    found = decoded_lines.of_bytes(str(path), content)
    [cells] = _windows(found, kind, (), lambda rows: False, header, published)
    return cells


def read_file(
    path: Path, columns: Sequence[str], kind: str | None = None, plain: Fills | None = None
) -> Iterator[Cells]:
    """Read a file of any size a window at a time; its suffix says what it is, if nobody does.

    `plain` says which columns each text of a line without names fills: by default one each.
    Raises DataError for a file that cannot be read, and ConfigError for an unknown format.
    """
    known = _by_suffix(path) if kind is None else _format(kind)
    if known == "parquet":
        yield from _parquet_windows(
            str(path), decoded_lines.read_bytes(path, (path.suffix,)), columns
        )
        return
    with decoded_lines.of_file(path) as found:
        yield from _windows(found, known, columns, _Pace(found), plain=plain)


def read_input(
    stream: BinaryIO,
    columns: Sequence[str],
    kind: str | None = None,
    plain: Fills | None = None,
) -> Iterator[Cells]:
    """Read standard input, each row as soon as it is there.

    Its first line says what it is, if nobody does: JSON lines begin with a brace, CSV and TSV with
    the names of the columns and more; all else is lines, of the texts of `columns` with tabs.
    """
    known = None if kind is None else _format(kind)
    if known == "parquet":
        raise ConfigError("--format 'parquet': not for stdin", "name the FILE")
    found = decoded_lines.of_pipe("stdin", stream)
    known = known or _guess(found.first(), columns)
    yield from _windows(found, known, columns, _Pace(found), plain=plain)


def _by_suffix(path: Path) -> Format:
    decoded_lines.check_suffix(path, SUFFIXES)
    suffix = path.suffix.lower()
    return next((known for known in FORMATS if suffix == f".{known}"), "lines")


def _format(name: str) -> Format:
    for known in FORMATS:
        if name == known:
            return known
    raise ConfigError(f"--format {name!r}: no such format", nearest(name, FORMATS))


def _guess(first: str, columns: Sequence[str]) -> Format:
    if first.lstrip().startswith("{"):
        return "jsonl"
    kinds: tuple[tuple[Format, str], ...] = (("csv", ","), ("tsv", "\t"))
    for kind, mark in kinds:
        names = first.rstrip("\r\n").split(mark)
        if len(names) > 1 and {*columns} <= {name.strip('"') for name in names}:
            return kind
    return "lines"


class _Pace:
    """Where a window ends: few rows at first, then more, and never to wait for one."""

    def __init__(self, found: Lines) -> None:
        self.found, self.size, self.since = found, FIRST_WINDOW, 0

    def __call__(self, rows: int) -> bool:
        if rows < self.size and self.found.taken - self.since < WINDOW_CHARACTERS:
            return not self.found.is_ready()
        self.size, self.since = min(LARGEST_WINDOW, GROWTH * self.size), self.found.taken
        return True


def _windows(
    found: Lines,
    kind: Format,
    columns: Sequence[str],
    is_full: Callable[[int], bool],
    header: bool = True,
    published: bool = False,
    plain: Fills | None = None,
) -> Iterator[Cells]:
    """Group the rows of a text into windows; `columns` are those that will be asked for."""
    form: Form
    if kind == "lines" and plain is not None and not plain:
        listed = ", ".join(map(short, columns))
        what = f"{found.origin}: lines without names, and the runs read different columns"
        raise DataError(what, f"give JSON lines, or CSV or TSV, with the columns {listed}")
    if kind == "lines":
        form = Plain(found.origin, [[name] for name in columns] if plain is None else plain)
    elif kind == "jsonl":
        form = Objects(found.origin, columns)
    else:
        form = Grid(found.origin, header, published, _marked(found, kind))
    if not found.first():
        next(found, None)  # it may have a reason
        form.refuse_empty()
    failure: DataError | None = None
    try:
        for line, record in _records(found, kind):
            form.add(line, record)
            if len(form) and is_full(len(form)):
                yield form.take()
        form.finish()
    except DataError as error:
        failure = error
    if len(form):
        yield form.take()
    if failure is not None:
        raise failure


def _records(found: Lines, kind: Format) -> Iterator[Record]:
    if kind == "csv":
        return _csv_records(found)
    bare = ((number, line.removesuffix("\n").removesuffix("\r")) for number, line in found)
    if kind == "tsv":
        return ((number, line.split("\t")) for number, line in bare)
    return bare


def _marked(found: Lines, kind: Format) -> tuple[str, ...]:
    """Say where a CSV is read with another mark than commas."""
    mark = _delimiter(found) if kind == "csv" else ","
    named = Path(found.origin).name
    return () if mark == "," else (f"{named}: read with {mark!r} between its fields",)


def _delimiter(found: Lines) -> str:
    """Return what parts the fields: a comma, unless the first line has none, and another does."""
    return next((mark for mark in ",;\t" if mark in found.first()), ",")


def _csv_records(found: Lines) -> Iterator[Record]:
    """Yield each record with the line on which it starts; quoted fields may hold line ends."""
    csv.field_size_limit(decoded_lines.LONGEST_LINE)
    begun = 0

    def pieces() -> Iterator[str]:
        for _, text in found:
            if found.taken - begun > decoded_lines.LONGEST_LINE:
                raise csv.Error(f"a row of more than {decoded_lines.LONGEST_LINE} characters")
            if "\r" in text.rstrip("\r\n"):  # as lines of old files end
                yield from io.StringIO(text, newline="")
            else:
                yield text

    reader = csv.reader(pieces(), delimiter=_delimiter(found), strict=True)
    line = 1
    try:
        for record in reader:
            yield line, record
            line, begun = reader.line_num + 1, found.taken
    except csv.Error as error:
        hint = "close the quotes; a quote inside a quoted field is written twice"
        raise DataError(f"{found.origin}, line {line}: malformed CSV ({error})", hint) from error


def _parquet(origin: str, content: bytes) -> parquet.ParquetColumns:
    try:
        columns = parquet.ParquetColumns(content)
    except parquet.ERRORS as error:
        what = f"not a Parquet file ({reason(error)})" if content else "empty file"
        raise DataError(f"{origin}: {what}", "write it again, or give .csv or .jsonl") from error
    check_names(origin, columns.names)
    if columns.rows < 1:
        raise DataError(f"{origin}: a header but no rows", records.GIVE_ROWS)
    return columns


def _parquet_windows(origin: str, content: bytes, columns: Sequence[str]) -> Iterator[Cells]:
    """Unpack a file's columns a window at a time; the packed file itself is held whole."""
    found, start = _parquet(origin, content), 0
    require(origin, columns, found.names)
    try:
        for batch in found.batches(columns, LARGEST_WINDOW):
            rows = range(start, start + len(batch[columns[0]]))
            yield Cells(origin, batch, rows, names=found.class_names)
            start = rows.stop
    except parquet.ERRORS as error:
        named = " and ".join(map(short, columns))
        what = f"column {named} cannot be read ({reason(error)})"
        hint = "give texts as UTF-8 strings, labels as strings or numbers"
        raise DataError(f"{origin}: {what}", hint) from error
