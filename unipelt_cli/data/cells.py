"""From the cells of any format to checked, encoded columns; every error names its row.

CSV, TSV, JSONL and Parquet all become `RawColumns`, and the same content gives the same rows
whatever the format. Nothing here knows which rows are wanted or why.
"""

import math
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa

from unipelt_cli.data import parquet
from unipelt_cli.data.label_kind import (
    as_number,
    label_number,
    one_spelling,
    without_train_row,
)
from unipelt_cli.errors import DataError
from unipelt_cli.tasks import Glue, Task
from unipelt_cli.text import reason, short

if TYPE_CHECKING:
    from datasets import Dataset

# Far inside float32's range, so that squares of labels and their sums stay finite.
LARGEST_VALUE = 1e15
FILL_IN = "fill it in, or leave such rows out with --set data.skip_unusable=true"
GIVE_FINITE = "give a number below 1e15"


class RowError(DataError):
    """One row cannot be used: `index` is its place among the cells, and those before it can."""

    def __init__(self, message: str, hint: str, index: int) -> None:
        super().__init__(message, hint)
        self.index = index


@dataclass(frozen=True)
class RawColumns:
    """The unchecked cells of a file or hub split, or of a part, and how an error names their rows.

    `published`: rows that the user cannot mend are taken as they are, empty texts too.
    """

    origin: str
    columns: Mapping[str, Sequence[Any] | pa.ChunkedArray]
    rows: Sequence[int]
    lines: Sequence[int] = ()
    published: bool = False
    notes: tuple[str, ...] = ()
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By column what its numbers are called, where the file says so."""
    shared: Mapping[str, int] = field(default_factory=dict)
    """Names that several columns have, and how many: none of them can be asked for."""

    def refuse(self, index: int, what: str, hint: str = FILL_IN) -> NoReturn:
        """Raise for a row."""
        raise self.refusal(index, what, hint)

    def refusal(self, index: int, what: str, hint: str) -> RowError:
        """Name a row: its line (from 1), or its place (from 0) where there are no lines."""
        where = f"line {self.lines[index]}" if self.lines else f"row {self.rows[index]}"
        return RowError(f"{self.origin}, {where}: {what}", hint, index)

    def first(self, count: int, names: Sequence[str]) -> "RawColumns":
        """Return some columns of so many rows."""
        columns = {name: self.column(name)[:count] for name in names}
        return replace(self, columns=columns, rows=self.rows[:count], lines=self.lines[:count])

    def renamed(self, names: Mapping[str, str]) -> "RawColumns":
        """Return the same rows with columns under the names that a task has for them.

        `names` are those in the file, by the task's. Raises DataError for one that is missing.
        """
        self.require(names.values())
        columns = {task: self.columns[name] for task, name in names.items()}
        labels = {task: self.names[name] for task, name in names.items() if name in self.names}
        return replace(self, columns=columns, names=labels, shared={})

    def require(self, names: Iterable[str]) -> None:
        """Raise DataError for the first of `names` that is no column, or several."""
        wanted = list(names)
        for name in wanted:
            if name in self.shared:
                what = f"{self.shared[name]} columns are called {short(name)}"
                raise DataError(f"{self.origin}: {what}", "give each column its own name")
        require(self.origin, wanted, self.columns)

    def column(self, name: str) -> Sequence[Any]:
        """Return a column's cells; raise DataError if it is missing or of no usable type."""
        self.require([name])
        try:
            values = self.columns[name]
            if not isinstance(values, pa.ChunkedArray):
                return values
            parquet.check_type(values.type)
            cells: list[Any] = values.to_pylist()
        except parquet.ERRORS as error:
            what = f"column {short(name)} cannot be read ({reason(error)})"
            hint = "give texts as UTF-8 strings, labels as strings or numbers"
            raise DataError(f"{self.origin}: {what}", hint) from error
        if values.type in (pa.float16(), pa.float32()):
            # The shortest decimal: 3.8 stays 3.8 whatever file it comes from.
            return [None if cell is None else float(str(np.float32(cell))) for cell in cells]
        return cells

    def rows_of_texts(self, columns: Sequence[str]) -> list[list[str]]:
        """Return text columns as strings; of the two of a pair one may be empty in a row."""
        if len(columns) == 1:
            return [self.texts(columns[0])]
        columns_of_texts = [self.texts(column, or_empty=not self.published) for column in columns]
        for index, texts in enumerate(zip(*columns_of_texts, strict=True)):
            if not self.published and not any(text.strip() for text in texts):
                named = " and ".join(map(short, columns))
                self.refuse(index, f"{named} are {'both' if len(columns) == 2 else 'all'} empty")
        return columns_of_texts

    def texts(self, column: str, *, or_empty: bool = False) -> list[str]:
        """Return a column as strings: numbers are written out, nothing else is."""
        texts = []
        for index, value in enumerate(self.column(column)):
            if value is None or value != value:
                if or_empty:
                    texts.append("")
                    continue
                self.refuse(index, f"{short(column)} is missing")
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                what = f"{short(column)} is not text but {type(value).__name__}"
                self.refuse(index, what, "give a string")
            if isinstance(value, float) and not math.isfinite(value):
                self.refuse(index, f"{short(column)} is not finite", "give a text or a number")
            text = str(value)
            if not text.strip() and not self.published and not or_empty:
                self.refuse(index, f"{short(column)} is empty")
            texts.append(text)
        return texts

    def labels(self, column: str) -> list[str]:
        """Return labels as strings: names where a file has them, a list of one as what is in it."""
        labels, names = [], self.names.get(column, ())
        for index, value in enumerate(self.column(column)):
            try:
                label = label_of(value, names)
            except LabelError as error:
                self.refuse(index, error.message, error.hint)
            if not label:
                self.refuse(index, "the label is missing")
            labels.append(label)
        return labels


class LabelError(DataError):
    """A cell holds something that is no label."""


def label_of(value: Any, names: Sequence[str] = ()) -> str:
    """Return a cell's label as a string, "" where it is missing; `names` are those of numbers.

    Raises LabelError for what is none, or several.
    """
    if isinstance(value, list):
        if len(value) > 1:
            hint = "give each row one label: no model is trained on several a row"
            raise LabelError(f"{len(value)} labels in one row", hint)
        value = value[0] if value else None
    if names and type(value) is int:
        value = names[value] if 0 <= value < len(names) else None
    if isinstance(value, Decimal):
        value = f"{value:f}"
    if value is not None and not isinstance(value, str | int | float):
        what = f"the label is not a name or number but {type(value).__name__}"
        raise LabelError(what, "give a string or a number")
    if isinstance(value, float) and math.isinf(value):
        raise LabelError(f"the label '{value}' is not finite", GIVE_FINITE)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    label = "" if value is None else str(value).strip()
    return "" if label.casefold() == "nan" else label


def require(origin: str, names: Iterable[str], present: Iterable[str]) -> None:
    """Raise DataError for the first of `names` that is no column."""
    columns = list(present)
    for name in names:
        if name not in columns:
            listed = ", ".join(map(short, columns[:50]))
            raise DataError(f"{origin}: no column {short(name)}", f"columns found: {listed}")


@dataclass
class UnknownLabels:
    """Labels of scored rows that their task lacks: whatever is answered there is wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    codes: dict[str, int] = field(default_factory=dict)
    first: RowError | None = None

    def code(self, label: str, task: Task, refusal: RowError) -> int:
        """Return a number beyond those of the task's own labels, one for each name."""
        self.first = self.first or refusal
        self.counts[label] += 1
        return self.codes.setdefault(label, task.outputs + len(self.codes))

    def notes(self, rows: int) -> Iterator[str]:
        """Say what was counted as wrong; raise for the first such row where most are so."""
        if self.first is None:
            return
        if 2 * self.counts.total() > rows:
            raise self.first
        yield without_train_row(self.counts)


def encode_labelled(
    cells: RawColumns,
    task: Task,
    text: Sequence[str],
    label: str,
    unknown: UnknownLabels | None = None,
) -> "Dataset":
    """Build the checked rows of a task from the columns that hold its texts and label.

    Labels that the task lacks are refused, or, where it has more than two, counted in `unknown`.
    """
    cells.require((*text, label))
    return encode(cells, task.text, text, _codes(cells, label, task, unknown))


def encode(
    cells: RawColumns, names: Sequence[str], columns: Sequence[str], labels: pa.Array | None = None
) -> "Dataset":
    """Build checked rows; `names` are our names of the text columns, `columns` the source's."""
    pairs = zip(names, cells.rows_of_texts(columns), strict=True)
    arrays = {name: pa.array(texts, pa.string()) for name, texts in pairs}
    if labels is not None:
        arrays["label"] = labels
    arrays["row"] = pa.array(cells.rows, pa.int64())
    return as_dataset(pa.table(arrays))


def as_dataset(table: pa.Table) -> "Dataset":
    """Wrap a table; a random fingerprint spares hashing it, and nothing here is cached by it."""
    from datasets import Dataset  # reads its offline switches now: columns are guessed before

    return Dataset(table.combine_chunks(), fingerprint=uuid.uuid4().hex[:16])


def _codes(cells: RawColumns, column: str, task: Task, unknown: UnknownLabels | None) -> pa.Array:
    """Return label indices (int64), or values (float64) in regression."""
    labels = cells.labels(column)
    if task.is_regression:
        return pa.array(_values(cells, column, labels, task.decimal_comma), pa.float64())
    aliases = task.source.values if isinstance(task.source, Glue) else ()
    known = {name: code for names in (aliases, task.labels) for code, name in enumerate(names)}
    # Runs of earlier versions have classes such as 1.0: 1 is one of them too.
    known = {one_spelling(name): code for name, code in known.items()} | known
    codes = []
    for index, spelled in enumerate(labels):
        label = spelled if spelled in known else one_spelling(spelled)
        if label in known:
            codes.append(known[label])
            continue
        listed = ", ".join(map(short, task.labels[:20]))
        hint = f"the labels of {task.name} are {listed}"
        refusal = cells.refusal(index, f"unknown label {short(label)}", hint)
        if unknown is None or task.outputs == 2:
            raise refusal
        codes.append(unknown.code(label, task, refusal))
    return pa.array(codes, pa.int64())


def _values(
    cells: RawColumns, column: str, labels: Sequence[str], decimal_comma: bool
) -> Iterator[float]:
    """Yield the values of a regression's labels; only texts can be spelled with a decimal comma."""
    is_spelled_so = any("," in label for label in labels)
    read = cells.column(column) if decimal_comma else labels
    for index, (cell, label) in enumerate(zip(read, labels, strict=True)):
        is_text = isinstance(cell[0] if isinstance(cell, list) else cell, str)
        by_comma = decimal_comma and is_text
        if by_comma and not is_spelled_so and label_number(label, True) != as_number(label):
            hint = "spell labels as the run's train rows do: a decimal comma, no thousands marks"
            cells.refuse(index, f"the label {short(label)} can be read in two ways", hint)
        yield _value(cells, index, label, by_comma)


def _value(cells: RawColumns, index: int, label: str, decimal_comma: bool) -> float:
    value = label_number(label, decimal_comma)
    if value is None:
        hint = "mend the row, or train with --set data.kind=classification if labels are names"
        cells.refuse(index, f"the label {short(label)} is not a number", hint)
    if not abs(value) <= LARGEST_VALUE:
        cells.refuse(index, f"the label {short(label)} is not finite", GIVE_FINITE)
    return value
