"""From the cells of any format to checked, encoded columns; every error names its row.

CSV, TSV, JSONL and Parquet all become `Cells`, and the same content gives the same rows whatever
the format. Nothing here knows which rows are wanted or why.
"""

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa

from unipelt_cli.data import parquet
from unipelt_cli.errors import DataError
from unipelt_cli.tasks import Glue, Task
from unipelt_cli.text import reason, short

if TYPE_CHECKING:
    from datasets import Dataset

# Far inside float32's range, so that squares of labels and their sums stay finite.
LARGEST_VALUE = 1e15
FILL_IN = "fill it in, or drop the row"
GIVE_FINITE = "give a number below 1e15"


class RowError(DataError):
    """One row cannot be used: `index` is its place among the cells, and those before it can."""

    def __init__(self, message: str, hint: str, index: int) -> None:
        super().__init__(message, hint)
        self.index = index


@dataclass(frozen=True)
class Cells:
    """The unchecked cells of a file or hub split, or of a part, and how an error names their rows.

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
        raise RowError(f"{self.origin}, {place}: {what}", hint, index)

    def first(self, count: int, names: Sequence[str]) -> "Cells":
        """Return some columns of so many rows."""
        columns = {name: self.column(name)[:count] for name in names}
        return replace(self, columns=columns, rows=self.rows[:count], lines=self.lines[:count])

    def column(self, name: str) -> Sequence[Any]:
        """Return a column's cells; raise DataError if it is missing or of no usable type."""
        require(self.origin, [name], self.columns)
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
