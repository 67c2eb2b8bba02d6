"""From the bytes of a file or a pipe to cells: all of them, or a window of rows at a time.

A window ends where it is full, or where the next row is not there yet: whoever writes to a pipe
slowly is answered all the same. What was read before an error comes before the error.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from unipelt_cli.data import parquet
from unipelt_cli.data.cells import RawColumns
from unipelt_cli.data.text_files import byte_sources, decoded_lines, json_values, recognition
from unipelt_cli.data.text_files.decoded_lines import Lines
from unipelt_cli.data.text_files.recognition import Layout, Quoting
from unipelt_cli.data.text_files.records import (
    GIVE_ROWS,
    DelimitedRecords,
    Fills,
    JsonRecords,
    RecordCollector,
    TextRecords,
    check_names,
)
from unipelt_cli.errors import ConfigError, DataError, nearest
from unipelt_cli.text import reason, short

Format = Literal["lines", "jsonl", "csv", "tsv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FIRST_WINDOW, LARGEST_WINDOW, GROWTH = 256, 4096, 4  # rows: the first answer comes soon
WINDOW_CHARACTERS = 2**23
Record = tuple[int, Any]  # a line's number, and what it holds
QUOTED = Quoting(True)


def read_cells(
    path: Path,
    header: bool = True,
    published: bool = False,
    encoding: str | None = None,
    quotes: bool = True,
) -> RawColumns:
    """Read a whole file by its suffix; of a published one, or without `quotes`, a TSV keeps them.

    Raises ConfigError for an unknown encoding, and DataError for a file that cannot be read.
    """
    content = decoded_lines.read_bytes(path, SUFFIXES)
    kind = _by_suffix(path)
    if kind == "parquet":
        columns, shared = _parquet(str(path), content)
        names = columns.class_names
        return RawColumns(str(path), columns, range(columns.rows), shared=shared, names=names)

    def text() -> Lines:
        return decoded_lines.of_bytes(str(path), content, encoding)

    def again() -> Iterator[str]:
        yield from (line for _, line in text())

    lines = text()
    reading = _Reading(lines, recognition.of_kind(lines, kind), (), header, published)
    [cells] = reading.windows(
        lambda rows: False, _Look(str(path), again, is_off=published or not quotes)
    )
    return cells


def read_file(
    path: Path,
    columns: Sequence[str],
    kind: str | None = None,
    plain: Fills | None = None,
    encoding: str | None = None,
) -> Iterator[RawColumns]:
    """Read a file of any size a window at a time; its suffix says what it is, if nobody does.

    `plain` says which columns each text of a line without names fills: by default one each.
    Raises DataError for a file that cannot be read, and ConfigError for an unknown format.
    """
    known = _by_suffix(path) if kind is None else _format(kind)
    if encoding is not None:
        byte_sources.check_encoding(encoding)
    if known == "parquet":
        yield from _parquet_windows(
            str(path), decoded_lines.read_bytes(path, (path.suffix,)), columns
        )
        return

    def again() -> Iterator[str]:
        with decoded_lines.of_file(path, encoding) as whole:
            yield from (line for _, line in whole)

    with decoded_lines.of_file(path, encoding) as lines:
        reading = _Reading(lines, recognition.of_kind(lines, known), columns, plain=plain)
        yield from reading.windows(_Pace(lines), _Look(str(path), again))


def read_input(
    stream: BinaryIO,
    columns: Sequence[str],
    kind: str | None = None,
    plain: Fills | None = None,
    encoding: str | None = None,
) -> Iterator[RawColumns]:
    """Read standard input, each row as soon as it is there.

    What it is, its beginning says, if nobody does: JSON, or a table with the names of the columns.
    What looks like neither is lines, of the texts of `columns` with tabs; a note says so.
    """
    known = None if kind is None else _format(kind)
    if known == "parquet":
        raise ConfigError("--format 'parquet': not for stdin", "name the FILE")
    lines = decoded_lines.of_pipe("stdin", stream, encoding)
    if known is None:
        layout = recognition.of_pipe(lines, columns, len(columns if plain is None else plain))
    else:
        layout = recognition.of_kind(lines, known)
    reading = _Reading(lines, layout, columns, plain=plain)
    yield from reading.windows(_Pace(lines), _Look(lines.origin))


def noted(windows: Iterable[RawColumns], say: Callable[[str], object]) -> Iterator[RawColumns]:
    """Hand windows on; what they say of how they were read is said once, as it comes."""
    heard: set[str] = set()
    for cells in windows:
        for note in cells.notes:
            if note not in heard:
                heard.add(note)
                say(note)
        yield cells


def _by_suffix(path: Path) -> Format:
    decoded_lines.check_suffix(path, SUFFIXES)
    suffix = decoded_lines.suffix_of(path)
    suffix = ".jsonl" if suffix in decoded_lines.JSON_SUFFIXES else suffix
    return next((known for known in FORMATS if suffix == f".{known}"), "lines")


def _format(name: str) -> Format:
    for known in FORMATS:
        if name == known:
            return known
    raise ConfigError(f"--format {name!r}: no such format", nearest(name, FORMATS))


class _Pace:
    """Where a window ends: few rows at first, then more, and never to wait for one."""

    def __init__(self, lines: Lines) -> None:
        self.lines, self.size, self.since = lines, FIRST_WINDOW, 0

    def __call__(self, rows: int) -> bool:
        if rows < self.size and self.lines.taken - self.since < WINDOW_CHARACTERS:
            return not self.lines.is_ready()
        self.size, self.since = min(LARGEST_WINDOW, GROWTH * self.size), self.lines.taken
        return True


@dataclass(frozen=True)
class _Look:
    """Decides about the quotes of a TSV: by all of its lines, or by those of a pipe at hand."""

    origin: str
    again: Callable[[], Iterator[str]] | None = None
    is_off: bool = False

    def __call__(self, line: str, lines: Lines) -> Quoting:
        """Decide where the first quote has come, in `line`."""
        if self.is_off:
            return Quoting(False)
        if self.again is None:
            sample = [line, *lines.ahead(0)]
            return recognition.quoting(self.origin, lambda: sample, is_part=True)
        again = self.again

        def readable() -> Iterator[str]:
            with suppress(DataError):  # told when it is its turn
                yield from again()

        return recognition.quoting(self.origin, readable)


class _Reading:
    """A text that is read: where its lines are, how they are laid out, and what they become."""

    def __init__(
        self,
        lines: Lines,
        layout: Layout,
        columns: Sequence[str],
        header: bool = True,
        published: bool = False,
        plain: Fills | None = None,
    ) -> None:
        self.lines, self.layout = lines, layout
        self.form: RecordCollector
        if layout.kind == "lines" and plain is not None and not plain:
            listed = ", ".join(map(short, columns))
            what = f"{lines.origin}: lines without names, and the runs read different columns"
            raise DataError(what, f"give JSON lines, or CSV or TSV, with the columns {listed}")
        if layout.kind == "lines":
            fills = [[name] for name in columns] if plain is None else plain
            self.form = TextRecords(lines.origin, fills)
        elif layout.kind == "jsonl":
            self.form = JsonRecords(lines.origin, columns)
        else:
            self.form = DelimitedRecords(lines.origin, header, published, columns, layout.names)
        self.form.notes += layout.notes

    def windows(self, is_full: Callable[[int], bool], look: _Look) -> Iterator[RawColumns]:
        """Group the rows into windows, each as soon as it is full."""
        form, failure = self.form, None
        if not self.layout.spans and not self.lines.first():
            next(self.lines, None)  # it may have a reason
            form.refuse_empty()
        try:
            for line, record in self._records(look):
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

    def _records(self, look: _Look) -> Iterator[Record]:
        lines, layout = self.lines, self.layout
        if layout.skips:
            next(line for _, line in lines if line.strip())
        if layout.kind == "csv":
            return _csv_records(lines, layout.mark)
        if layout.kind == "tsv":
            return self._tab_records(look)
        if layout.spans:
            lines.cut_at(b"}")
            return json_values.objects(lines.origin, lines)
        return ((number, _bare(line)) for number, line in lines)

    def _tab_records(self, look: _Look) -> Iterator[Record]:
        """Part lines at their tabs, unless quotes show that there is more to it."""
        is_open = True
        for number, line in self.lines:
            if is_open and '"' in line:
                is_open, quoting = False, look(line, self.lines)
                self.form.notes += quoting.notes
                if quoting.is_on:
                    yield from _csv_records(self.lines, "\t", [(number, line)], quoting)
                    return
            bare = _bare(line)
            yield number, bare.split("\t") if bare else []


def _bare(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _csv_records(
    lines: Lines, mark: str, taken: Sequence[tuple[int, str]] = (), quoting: Quoting = QUOTED
) -> Iterator[Record]:
    """Yield each record with the line on which it starts; quoted fields may hold line ends.

    `taken` are lines before those of `found`.
    """
    csv.field_size_limit(decoded_lines.LONGEST_LINE)
    begun, offset = 0, -1

    def pieces() -> Iterator[str]:
        nonlocal offset
        for number, text in chain(taken, lines):
            offset = number - 1 if offset < 0 else offset
            if lines.taken - begun > decoded_lines.LONGEST_LINE:
                raise csv.Error(f"a row of more than {decoded_lines.LONGEST_LINE} characters")
            text = recognition.doubled_quotes(text) if quoting.is_escaped else text
            if "\r" in text.rstrip("\r\n"):  # as lines of old files end
                yield from io.StringIO(text, newline="")
            else:
                yield text

    reader, before = csv.reader(pieces(), delimiter=mark, strict=True), 0
    try:
        for record in reader:
            yield offset + before + 1, record
            before, begun = reader.line_num, lines.taken
    except csv.Error as error:
        hint = "close the quotes; a quote inside a quoted field is written twice"
        what = f"{lines.origin}, line {max(0, offset) + before + 1}: malformed CSV ({error})"
        raise DataError(what, hint) from error


def _parquet(origin: str, content: bytes) -> tuple[parquet.ParquetColumns, dict[str, int]]:
    """Read what a Parquet file declares; return apart which names several columns have."""
    try:
        columns = parquet.ParquetColumns(content)
    except parquet.ERRORS as error:
        what = f"not a Parquet file ({reason(error)})" if content else "empty file"
        raise DataError(f"{origin}: {what}", "write it again, or give .csv or .jsonl") from error
    counts = Counter(columns.names)
    if columns.rows < 1:
        raise DataError(f"{origin}: a header but no rows", GIVE_ROWS)
    columns.names = [name for name in columns.names if counts[name] == 1]
    return columns, {name: count for name, count in counts.items() if count > 1}


def _parquet_windows(origin: str, content: bytes, columns: Sequence[str]) -> Iterator[RawColumns]:
    """Unpack a file's columns a window at a time; the packed file itself is held whole."""
    table, shared = _parquet(origin, content)
    check_names(origin, shared, columns)
    other, notes = recognition.matched(origin, columns, table.names)
    names, start = {name: other.get(name, name) for name in columns}, 0
    try:
        class_names = {
            name: table.class_names[other]
            for name, other in names.items()
            if other in table.class_names
        }
        for batch in table.batches(list(names.values()), LARGEST_WINDOW):
            rows = range(start, start + len(batch[names[columns[0]]]))
            window = {name: batch[column] for name, column in names.items()}
            yield RawColumns(origin, window, rows, notes=notes, names=class_names)
            start = rows.stop
    except parquet.ERRORS as error:
        named = " and ".join(map(short, columns))
        what = f"column {named} cannot be read ({reason(error)})"
        hint = "give texts as UTF-8 strings, labels as strings or numbers"
        raise DataError(f"{origin}: {what}", hint) from error
