"""From the bytes of a file or a pipe to cells: all of them, or a window of rows at a time.

A window ends where it is full, or where the next row is not there yet: whoever writes to a pipe
slowly is answered all the same. What was read before an error comes before the error.
"""

import csv
import io
import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, Protocol, get_args

from unipelt_cli import columnar, lines
from unipelt_cli.cells import Cells, RowError, require
from unipelt_cli.errors import ConfigError, DataError, nearest, reason, short
from unipelt_cli.lines import Lines
from unipelt_cli.strict import parse_json

Format = Literal["lines", "jsonl", "csv", "tsv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
GIVE_ROWS = "give a file with labelled rows"
FIRST_WINDOW, LARGEST_WINDOW, GROWTH = 256, 4096, 4  # rows: the first answer comes soon
WINDOW_CHARACTERS = 2**23
Record = tuple[int, Any]  # a line's number, and what it holds
Plain = Sequence[Sequence[str]]  # the columns that each text of a line without names fills


class Form(Protocol):
    """What is made of a format's records: the rows that were added and not taken yet."""

    def __len__(self) -> int: ...

    def add(self, line: int, found: Any) -> None:
        """Take up a record; raise DataError, and change nothing, for a wrong one."""

    def take(self) -> Cells:
        """Return the rows, and begin anew."""

    def finish(self) -> None:
        """Raise DataError where the end should not be here."""

    def refuse_empty(self) -> NoReturn:
        """Raise DataError for an input that holds nothing."""


def read_cells(path: Path, header: bool = True, published: bool = False) -> Cells:
    """Read a whole file by its suffix; TSV is read with quoting off."""
    content = lines.read_bytes(path, SUFFIXES)
    kind = _by_suffix(path)
    if kind == "parquet":
        columns = _parquet(str(path), content)
        return Cells(str(path), columns, range(columns.rows))
    found = lines.of_bytes(str(path), content)
    [cells] = _windows(found, kind, (), lambda rows: False, header, published)
    return cells


def read_file(
    path: Path, columns: Sequence[str], kind: str | None = None, plain: Plain | None = None
) -> Iterator[Cells]:
    """Read a file of any size a window at a time; its suffix says what it is, if nobody does.

    `plain` says which columns each text of a line without names fills: by default one each.
    Raises DataError for a file that cannot be read, and ConfigError for an unknown format.
    """
    known = _by_suffix(path) if kind is None else _format(kind)
    if known == "parquet":
        yield from _parquet_windows(str(path), lines.read_bytes(path, (path.suffix,)), columns)
        return
    with lines.of_file(path) as found:
        yield from _windows(found, known, columns, _Pace(found), plain=plain)


def read_input(
    stream: BinaryIO,
    columns: Sequence[str],
    kind: str | None = None,
    plain: Plain | None = None,
) -> Iterator[Cells]:
    """Read standard input, each row as soon as it is there.

    Its first line says what it is, if nobody does: JSON lines begin with a brace, CSV and TSV with
    the names of the columns and more; all else is lines, of the texts of `columns` with tabs.
    """
    known = None if kind is None else _format(kind)
    if known == "parquet":
        raise ConfigError("--format 'parquet': not for stdin", "name the FILE")
    found = lines.of_pipe("stdin", stream)
    known = known or _guess(found.first(), columns)
    yield from _windows(found, known, columns, _Pace(found), plain=plain)


def texts(windows: Iterable[Cells], columns: Sequence[str]) -> Iterator[dict[str, list[str]]]:
    """Yield the checked texts of each window; those before a row that cannot be used come first."""
    for cells in windows:
        failure: RowError | None = None
        while True:
            try:
                found = {column: cells.texts(column) for column in columns}
                break
            except RowError as error:
                failure, cells = error, cells.first(error.index, columns)
        if cells.rows:
            yield found
        if failure is not None:
            raise failure


def _by_suffix(path: Path) -> Format:
    lines.check_suffix(path, SUFFIXES)
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
    plain: Plain | None = None,
) -> Iterator[Cells]:
    """Group the rows of a text into windows; `columns` are those that will be asked for."""
    form: Form
    if kind == "lines":
        form = _Plain(found.origin, [[name] for name in columns] if plain is None else plain)
    elif kind == "jsonl":
        form = _Objects(found.origin, columns)
    else:
        form = _Grid(found.origin, header, published)
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


def _csv_records(found: Lines) -> Iterator[Record]:
    """Yield each record with the line on which it starts; quoted fields may hold line ends."""
    csv.field_size_limit(lines.LONGEST_LINE)
    begun = 0

    def pieces() -> Iterator[str]:
        for _, text in found:
            if found.taken - begun > lines.LONGEST_LINE:
                raise csv.Error(f"a row of more than {lines.LONGEST_LINE} characters")
            if "\r" in text.rstrip("\r\n"):  # as lines of old files end
                yield from io.StringIO(text, newline="")
            else:
                yield text

    reader = csv.reader(pieces(), strict=True)
    line = 1
    try:
        for record in reader:
            yield line, record
            line, begun = reader.line_num + 1, found.taken
    except csv.Error as error:
        hint = "close the quotes; a quote inside a quoted field is written twice"
        raise DataError(f"{found.origin}, line {line}: malformed CSV ({error})", hint) from error


class _Plain:
    """Lines of texts, a tab between each two; of one text, any line that is not blank."""

    def __init__(self, origin: str, names: Plain) -> None:
        self.origin, self.names, self.start = origin, names, 0
        parts = ", a tab, and that of ".join(short(each[0]) for each in names)
        self.hint = f"write on each line the text of {parts}; or JSON lines"
        self._begin()

    def _begin(self) -> None:
        self.columns: list[list[str]] = [[] for _ in self.names]
        self.numbers = array("q")

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, line: int, found: str) -> None:
        is_alone = len(self.names) == 1
        if is_alone and not found.strip():
            return
        parts = [found] if is_alone else found.split("\t")
        if len(parts) != len(self.names):
            what = f"texts between tabs: {len(parts)} instead of {len(self.names)}"
            raise DataError(f"{self.origin}, line {line}: {what}", self.hint)
        _append(self.columns, parts)
        self.numbers.append(line)

    def take(self) -> Cells:
        filled = zip(self.names, self.columns, strict=True)
        columns = {name: column for names, column in filled for name in names}
        rows = range(self.start, self.start + len(self))
        cells = Cells(self.origin, columns, rows, self.numbers)
        self.start = rows.stop
        self._begin()
        return cells

    def finish(self) -> None:
        pass

    def refuse_empty(self) -> NoReturn:
        raise DataError(f"{self.origin}: empty", self.hint)


class _Grid:
    """Records under a header; of published files, up to 1 % of garbled rows are left out."""

    def __init__(self, origin: str, header: bool, published: bool) -> None:
        self.origin, self.published, self.has_header = origin, published, header
        self.names: Sequence[str] | None = None
        self.row = self.bad = 0
        self.wrong: DataError | None = None
        self._begin()

    def _begin(self) -> None:
        self.columns: list[list[str]] = [[] for _ in self.names or ()]
        self.lines, self.rows = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, line: int, found: Sequence[str]) -> None:
        if self.names is None:
            self.names = found if self.has_header else [str(place) for place in range(len(found))]
            _check_names(self.origin, self.names)
            self._begin()
            if self.has_header:
                return
        if len(found) == len(self.names):
            _append(self.columns, found)
            self.lines.append(line)
            self.rows.append(self.row)
        else:
            self._refuse(line, len(found), len(self.names))
        self.row += 1

    def _refuse(self, line: int, fields: int, expected: int) -> None:
        hint = (
            "mend the line; .csv fields that hold commas need quotes, .tsv is read without quoting"
        )
        what = f"{fields} fields, where the first line has {expected}"
        self.wrong = self.wrong or DataError(f"{self.origin}, line {line}: {what}", hint)
        self.bad += 1
        if not self.published:
            raise self.wrong

    def take(self) -> Cells:
        names = self.names or ()
        notes = (f"{self.origin}: garbled rows left out: {self.bad}",) if self.bad else ()
        columns = dict(zip(names, self.columns, strict=True))
        cells = Cells(self.origin, columns, self.rows, self.lines, self.published, notes)
        self._begin()
        return cells

    def finish(self) -> None:
        if self.wrong is not None and self.bad > self.row // 100:
            raise self.wrong
        if not self.row:
            raise DataError(f"{self.origin}: a header but no rows", GIVE_ROWS)

    def refuse_empty(self) -> NoReturn:
        raise DataError(f"{self.origin}: empty file", GIVE_ROWS)


class _Objects:
    """JSON objects, one a line."""

    def __init__(self, origin: str, wanted: Sequence[str]) -> None:
        self.origin, self.wanted, self.start = origin, wanted, 0
        self.rows: list[dict[str, object]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, line: int, found: str) -> None:
        hint = "write one JSON object on each line"
        try:
            row = parse_json(found)
            if "\\u" in found:
                json.dumps(row, ensure_ascii=False).encode()  # Refuses half a surrogate pair.
        except ValueError as error:
            what = f"malformed JSON ({reason(error)})"
            raise DataError(f"{self.origin}, line {line}: {what}", hint) from error
        if not isinstance(row, dict):
            what = f"not an object but {type(row).__name__}"
            raise DataError(f"{self.origin}, line {line}: {what}", hint)
        self.rows.append({sys.intern(name): value for name, value in row.items()})

    def take(self) -> Cells:
        place = range(self.start, self.start + len(self.rows))
        # A column that the first window has is one of all: later its cells can only be missing.
        columns = _Columns(self.rows, self.wanted if self.start else ())
        self.rows, self.start = [], place.stop
        return Cells(self.origin, columns, place, range(place.start + 1, place.stop + 1))

    def finish(self) -> None:
        pass

    def refuse_empty(self) -> NoReturn:
        raise DataError(f"{self.origin}: empty file", GIVE_ROWS)


class _Columns(Mapping[str, list[object]]):
    """The columns of JSON objects, each made when it is asked for.

    All at once they would hold a cell for each key of any line in each line.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]], known: Iterable[str]) -> None:
        self._rows = rows
        self._names = dict.fromkeys([*(name for row in rows for name in row), *known])

    def __getitem__(self, name: str) -> list[object]:
        if name not in self._names:
            raise KeyError(name)
        return [row.get(name) for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _append(columns: Iterable[list[str]], fields: Sequence[str]) -> None:
    for column, field in zip(columns, fields, strict=True):
        column.append(field)


def _parquet(origin: str, content: bytes) -> columnar.ParquetColumns:
    try:
        columns = columnar.ParquetColumns(content)
    except columnar.ERRORS as error:
        what = f"not a Parquet file ({reason(error)})" if content else "empty file"
        raise DataError(f"{origin}: {what}", "write it again, or give .csv or .jsonl") from error
    _check_names(origin, columns.names)
    if columns.rows < 1:
        raise DataError(f"{origin}: a header but no rows", GIVE_ROWS)
    return columns


def _parquet_windows(origin: str, content: bytes, columns: Sequence[str]) -> Iterator[Cells]:
    """Unpack a file's columns a window at a time; the packed file itself is held whole."""
    found, start = _parquet(origin, content), 0
    require(origin, columns, found.names)
    try:
        for batch in found.batches(columns, LARGEST_WINDOW):
            rows = range(start, start + len(batch[columns[0]]))
            yield Cells(origin, batch, rows)
            start = rows.stop
    except columnar.ERRORS as error:
        named = " and ".join(map(short, columns))
        what = f"column {named} cannot be read ({reason(error)})"
        hint = "give texts as UTF-8 strings, labels as strings or numbers"
        raise DataError(f"{origin}: {what}", hint) from error


def _check_names(origin: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            what = f"{count} columns are called {short(name)}"
            raise DataError(f"{origin}: {what}", "give each column its own name")
