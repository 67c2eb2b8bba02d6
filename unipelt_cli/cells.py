"""From a file of any format to checked, encoded columns; every error names the row it is about.

CSV, TSV, JSONL and Parquet all become `Cells`, and the same content gives the same rows whatever
the format. Nothing here knows which rows are wanted or why.
"""

import csv
import io
import json
import math
import stat
import sys
import uuid
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
import pyarrow as pa

from unipelt_cli import columnar
from unipelt_cli.errors import DataError
from unipelt_cli.strict import parse_json
from unipelt_cli.tasks import Glue, Task

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# Far inside float32's range, so that squares of labels and their sums stay finite.
LARGEST_VALUE = 1e15
# What is read is held in memory, many times over.
LARGEST_FILE = 2**31
_OTHER_TYPES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), ": in the spreadsheet, save as CSV (UTF-8)"),
    ".json": "; JSON lines have one object a line: jq -c '.[]' FILE.json > FILE.jsonl",
    ".txt": ": rename it to .tsv if tabs part its columns, and .csv if commas do",
}
# By a byte-order mark, or taken for the encoding of older spreadsheets.
_ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
FILL_IN = "fill it in, or drop the row"
GIVE_FINITE = "give a number below 1e15"
GIVE_ROWS = "give a file with labelled rows"


@dataclass(frozen=True)
class Cells:
    """The unchecked cells of one file or hub split, and how an error names their rows.

    `published`: rows that the user cannot mend are taken as they are, empty texts too.
    """

    origin: str
    columns: Mapping[str, Sequence[Any] | pa.ChunkedArray]
    rows: Sequence[int]
    lines: Sequence[int] = ()
    published: bool = False
    notes: tuple[str, ...] = ()

    def refuse(self, index: int, what: str, hint: str = FILL_IN) -> NoReturn:
        """Raise for a row: its line (from 1), or its place (from 0) where there are no lines."""
        place = f"line {self.lines[index]}" if self.lines else f"row {self.rows[index]}"
        raise DataError(f"{self.origin}, {place}: {what}", hint)

    def column(self, name: str) -> Sequence[Any]:
        """Return a column's cells; raise DataError if it is missing or of no usable type."""
        require(self.origin, [name], self.columns)
        try:
            values = self.columns[name]
            if not isinstance(values, pa.ChunkedArray):
                return values
            columnar.check_type(values.type)
            cells: list[Any] = values.to_pylist()
        except columnar.ERRORS as error:
            what = f"column {short(name)} cannot be read ({reason(error)})"
            hint = "give texts as UTF-8 strings, labels as strings or numbers"
            raise DataError(f"{self.origin}: {what}", hint) from error
        if values.type in (pa.float16(), pa.float32()):
            # The shortest decimal: 3.8 stays 3.8 whatever file it comes from.
            return [None if cell is None else float(str(np.float32(cell))) for cell in cells]
        return cells

    def texts(self, column: str) -> list[str]:
        """Return a column as strings: numbers are written out, nothing else is."""
        texts = []
        for index, value in enumerate(self.column(column)):
            if value is None or value != value:
                self.refuse(index, f"{short(column)} is missing")
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                what = f"{short(column)} is not text but {type(value).__name__}"
                self.refuse(index, what, "give a string")
            if isinstance(value, float) and not math.isfinite(value):
                self.refuse(index, f"{short(column)} is not finite", "give a text or a number")
            text = str(value)
            if not text.strip() and not self.published:
                self.refuse(index, f"{short(column)} is empty")
            texts.append(text)
        return texts

    def labels(self, column: str) -> list[str]:
        """Return labels as strings, so that 1, 1.0 and "1" are one label in every file type."""
        labels = []
        for index, value in enumerate(self.column(column)):
            if value is not None and not isinstance(value, str | int | float):
                what = f"the label is not a name or number but {type(value).__name__}"
                self.refuse(index, what, "give a string or a number")
            if isinstance(value, float) and math.isinf(value):
                self.refuse(index, f"the label '{value}' is not finite", GIVE_FINITE)
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            label = "" if value is None else str(value).strip()
            if label.casefold() in ("", "nan"):
                self.refuse(index, "the label is missing")
            labels.append(label)
        return labels


def require(origin: str, names: Iterable[str], found: Iterable[str]) -> None:
    """Raise DataError for the first of `names` that is no column."""
    columns = list(found)
    for name in names:
        if name not in columns:
            listed = ", ".join(map(short, columns[:50]))
            raise DataError(f"{origin}: no column {short(name)}", f"columns found: {listed}")


def encode_labelled(cells: Cells, task: Task, text: Sequence[str], label: str) -> "Dataset":
    """Build the checked rows of a task from the columns that hold its texts and label."""
    require(cells.origin, (*text, label), cells.columns)
    return encode(cells, task.text, text, _codes(cells, label, task))


def encode(
    cells: Cells, names: Sequence[str], columns: Sequence[str], labels: pa.Array | None = None
) -> "Dataset":
    """Build checked rows; `names` are our names of the text columns, `columns` the source's."""
    pairs = zip(names, columns, strict=True)
    arrays = {name: pa.array(cells.texts(column), pa.string()) for name, column in pairs}
    if labels is not None:
        arrays["label"] = labels
    arrays["row"] = pa.array(cells.rows, pa.int64())
    return as_dataset(pa.table(arrays))


def as_dataset(table: pa.Table) -> "Dataset":
    """Wrap a table; a random fingerprint spares hashing it, and nothing here is cached by it."""
    from datasets import Dataset  # reads its offline switches now: columns are guessed before

    return Dataset(table.combine_chunks(), fingerprint=uuid.uuid4().hex[:16])


def _codes(cells: Cells, column: str, task: Task) -> pa.Array:
    """Return label indices (int64), or values (float64) in regression."""
    labels = cells.labels(column)
    if task.is_regression:
        values = [_value(cells, index, label) for index, label in enumerate(labels)]
        return pa.array(values, pa.float64())
    aliases = task.source.values if isinstance(task.source, Glue) else ()
    known = {name: code for names in (aliases, task.labels) for code, name in enumerate(names)}
    for index, label in enumerate(labels):
        if label not in known:
            listed = ", ".join(map(short, task.labels[:20]))
            hint = f"the labels of {task.name} are {listed}"
            cells.refuse(index, f"unknown label {short(label)}", hint)
    return pa.array([known[label] for label in labels], pa.int64())


def _value(cells: Cells, index: int, label: str) -> float:
    value = as_number(label)
    if value is None:
        hint = "mend the row, or use --set data.kind=classification if labels are names"
        cells.refuse(index, f"the label {short(label)} is not a number", hint)
    if not abs(value) <= LARGEST_VALUE:
        cells.refuse(index, f"the label {short(label)} is not finite", GIVE_FINITE)
    return value


def as_number(text: str) -> float | None:
    """Return what Python reads as a float, infinities and nan too; None if it reads none."""
    try:
        return float(text)
    except ValueError:
        return None


def read_cells(path: Path, header: bool = True, published: bool = False) -> Cells:
    """Read a file by its suffix; TSV is read with quoting off."""
    content = read_bytes(path, SUFFIXES)
    origin, suffix = str(path), path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(origin, content)
    text = _decoded(origin, content)
    if not text:
        raise DataError(f"{origin}: empty file", GIVE_ROWS)
    if suffix == ".jsonl":
        return _jsonl(origin, text)
    notes: tuple[str, ...] = ()
    if suffix == ".csv":
        delimiter = _delimiter(text)
        if delimiter != ",":
            notes = (f"{path.name}: read with {delimiter!r} between its fields",)
        records = _csv_records(origin, text, delimiter)
    else:
        records = ((number, line.split("\t")) for number, line in _lines(text))
    return _grid(origin, records, header, published, notes)


def parse_cells(origin: str, content: bytes, columns: Sequence[str]) -> Cells:
    """Read lines that have no file name and no header: JSON objects, if the first looks like one.

    Otherwise a line is the texts of `columns`, a tab between each two; of one column, any line
    that is not blank. Raises DataError naming the line for another number of texts.
    """
    parts = ", a tab, and that of ".join(map(short, columns))
    hint = f"write on each line the text of {parts}; or JSON lines"
    text = _decoded(origin, content)
    if not text:
        raise DataError(f"{origin}: empty", hint)
    if text.lstrip().startswith("{"):
        return _jsonl(origin, text)
    found: dict[str, list[str]] = {name: [] for name in columns}
    numbers = array("q")
    for number, line in _lines(text):
        if len(columns) == 1 and not line.strip():
            continue
        texts = [line] if len(columns) == 1 else line.split("\t")
        if len(texts) != len(columns):
            what = f"texts between tabs: {len(texts)} instead of {len(columns)}"
            raise DataError(f"{origin}, line {number}: {what}", hint)
        _append(found.values(), texts)
        numbers.append(number)
    return Cells(origin, found, range(len(numbers)), numbers)


def read_bytes(path: Path, suffixes: Sequence[str]) -> bytes:
    """Read a regular file of one of these types; raise DataError for what is none, or too large.

    What is no file, such as a pipe that nobody writes to or an endless device, is not opened.
    """
    try:
        found = path.stat()
        if path.suffix.lower() not in suffixes and not stat.S_ISDIR(found.st_mode):
            what = f"unknown file type {path.suffix!r}"
            hint = f"give {', '.join(suffixes)}"
            if suffixes == SUFFIXES:
                hint += _OTHER_TYPES.get(path.suffix.lower(), "")
            raise DataError(f"{path}: {what}", hint)
        if not stat.S_ISREG(found.st_mode):
            what = "Is a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise DataError(f"{path}: {what}", "give the path of a file")
        if found.st_size > LARGEST_FILE:
            what = f"{found.st_size} bytes, more than {LARGEST_FILE}"
            raise DataError(f"{path}: {what}", "split it into smaller files")
        with path.open("rb") as file:
            return file.read(found.st_size)
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: {reason(error)}", "check the path and its rights") from error


def read_input(stream: BinaryIO) -> bytes:
    """Read a pipe to its end; raise DataError where it holds more than a file may."""
    content = bytearray()
    while piece := stream.read(2**20):
        content += piece
        if len(content) > LARGEST_FILE:
            raise DataError(f"stdin: more than {LARGEST_FILE} bytes", "give smaller parts of it")
    return bytes(content)


def _decoded(origin: str, content: bytes) -> str:
    """Return the text without a BOM and the last line ends; "" if all of it is blank."""
    try:
        text = content.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})"
        encoding = _ENCODINGS.get(content[:2], "windows-1252")
        hint = f"save it as UTF-8, for example: iconv -f {encoding} -t utf-8 FILE > NEW"
        raise DataError(f"{origin}, line {line}: {what}", hint) from error
    return text if text.strip() else ""


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines one by one: a list of them all is many times the text."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        yield number, line.removesuffix("\n").removesuffix("\r")


def _delimiter(text: str) -> str:
    """Return what parts the fields: a comma, unless the first line has none, and another does."""
    first = text.partition("\n")[0]
    return next((mark for mark in ",;\t" if mark in first), ",")


def _csv_records(origin: str, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line on which it starts; quoted fields may hold line ends."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for record in reader:
            yield line, record
            line = reader.line_num + 1
    except csv.Error as error:
        hint = "close the quotes; a quote inside a quoted field is written twice"
        raise DataError(f"{origin}, line {line}: malformed CSV ({error})", hint) from error


def _grid(
    origin: str,
    records: Iterator[tuple[int, list[str]]],
    header: bool,
    published: bool,
    notes: tuple[str, ...],
) -> Cells:
    """Turn records into columns; of published files, up to 1 % of garbled rows are left out."""
    start, first = next(records)
    names = first if header else [str(index) for index in range(len(first))]
    _check_names(origin, names)
    columns: list[list[str]] = [[] for _ in names]
    lines, rows = array("q"), array("q")
    bad, wrong = 0, ""
    for row, (line, fields) in enumerate(records if header else chain([(start, first)], records)):
        if len(fields) == len(names):
            _append(columns, fields)
            lines.append(line)
            rows.append(row)
            continue
        bad += 1
        wrong = wrong or (
            f"{origin}, line {line}: {len(fields)} fields, where the first line has {len(names)}"
        )
        if not published:
            break
    if bad > ((len(rows) + bad) // 100 if published else 0):
        hint = (
            "mend the line; .csv fields that hold commas need quotes, .tsv is read without quoting"
        )
        raise DataError(wrong, hint)
    if not rows:
        raise DataError(f"{origin}: a header but no rows", GIVE_ROWS)
    notes += (f"{origin}: garbled rows left out: {bad}",) if bad else ()
    return Cells(origin, dict(zip(names, columns, strict=True)), rows, lines, published, notes)


def _append(columns: Iterable[list[str]], fields: Sequence[str]) -> None:
    for column, field in zip(columns, fields, strict=True):
        column.append(field)


class _Objects(Mapping[str, list[object]]):
    """The columns of JSON objects, each made when it is asked for.

    All at once they would hold a cell for each key of any line in each line.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self._rows = rows
        self._names = dict.fromkeys(name for row in rows for name in row)

    def __getitem__(self, name: str) -> list[object]:
        if name not in self._names:
            raise KeyError(name)
        return [row.get(name) for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _jsonl(origin: str, text: str) -> Cells:
    rows: list[dict[str, object]] = []
    hint = "write one JSON object on each line"
    for number, line in _lines(text):
        try:
            row = parse_json(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # Refuses half a surrogate pair.
        except ValueError as error:
            what = f"malformed JSON ({reason(error)})"
            raise DataError(f"{origin}, line {number}: {what}", hint) from error
        if not isinstance(row, dict):
            what = f"not an object but {type(row).__name__}"
            raise DataError(f"{origin}, line {number}: {what}", hint)
        rows.append({sys.intern(name): value for name, value in row.items()})
    return Cells(origin, _Objects(rows), range(len(rows)), range(1, len(rows) + 1))


def _parquet(origin: str, content: bytes) -> Cells:
    try:
        columns = columnar.ParquetColumns(content)
    except columnar.ERRORS as error:
        what = f"not a Parquet file ({reason(error)})" if content else "empty file"
        raise DataError(f"{origin}: {what}", "write it again, or give .csv or .jsonl") from error
    _check_names(origin, columns.names)
    if columns.rows < 1:
        raise DataError(f"{origin}: a header but no rows", GIVE_ROWS)
    return Cells(origin, columns, range(columns.rows))


def _check_names(origin: str, names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            what = f"{count} columns are called {short(name)}"
            raise DataError(f"{origin}: {what}", "give each column its own name")


def short(value: str) -> str:
    """Quote a value of the user's, cut to what an error message can hold."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def reason(error: BaseException) -> str:
    """Return an error's words in one line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (words.strip().splitlines() or [type(error).__name__])[0][:200]
