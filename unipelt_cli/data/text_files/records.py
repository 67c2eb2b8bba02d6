"""What the records of each text format become: columns of cells, as many rows as were added.

A collector takes records one at a time and returns the rows since; a wrong record leaves it as it
was.
"""

import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from unipelt_cli.data.cells import RawColumns
from unipelt_cli.data.text_files import decoded_lines
from unipelt_cli.data.text_files.recognition import matched
from unipelt_cli.errors import DataError
from unipelt_cli.files.strict import parse_json
from unipelt_cli.text import reason, short

GIVE_ROWS = "give a file with labelled rows"
GIVE_OBJECTS = "write one JSON object on each line"
Fills = Sequence[Sequence[str]]
"""The columns that each text of a line without names fills."""


class RecordCollector(Protocol):
    """What is made of a format's records: the rows that were added and not taken yet."""

    notes: list[str]

    def __len__(self) -> int: ...

    def add(self, line: int, record: Any) -> None:
        """Take up a record; raise DataError, and change nothing, for a wrong one."""

    def take(self) -> RawColumns:
        """Return the rows, and begin anew."""

    def finish(self) -> None:
        """Raise DataError where the end should not be here."""

    def refuse_empty(self) -> NoReturn:
        """Raise DataError for an input that holds nothing."""


class TextRecords:
    """Lines of texts that are not blank, a tab between each two texts."""

    def __init__(self, origin: str, names: Fills) -> None:
        self.origin, self.names, self.start = origin, names, 0
        self.notes: list[str] = []
        parts = ", a tab, and that of ".join(short(each[0]) for each in names)
        self.hint = f"write on each line the text of {parts}; or JSON lines"
        self._begin()

    def _begin(self) -> None:
        self.columns: list[list[str]] = [[] for _ in self.names]
        self.numbers = array("q")

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, line: int, text: str) -> None:
        is_alone = len(self.names) == 1
        if not text.strip(" \r\n" if not is_alone else None):
            return
        parts = [text] if is_alone else text.split("\t")
        if len(parts) != len(self.names):
            what = f"texts between tabs: {len(parts)} instead of {len(self.names)}"
            raise DataError(f"{self.origin}, line {line}: {what}", self.hint)
        _append(self.columns, parts)
        self.numbers.append(line)

    def take(self) -> RawColumns:
        filled = zip(self.names, self.columns, strict=True)
        columns = {name: column for names, column in filled for name in names}
        rows = range(self.start, self.start + len(self))
        cells = RawColumns(self.origin, columns, rows, self.numbers, notes=tuple(self.notes))
        self.start = rows.stop
        self._begin()
        return cells

    def finish(self) -> None:
        pass

    def refuse_empty(self) -> NoReturn:
        raise DataError(f"{self.origin}: empty", self.hint)


class DelimitedRecords:
    """Records under a header; blank lines, and empty rows at the end, are none of them.

    Of published files nothing is blank, and up to 1 % of garbled rows are left out.
    """

    def __init__(
        self,
        origin: str,
        header: bool = True,
        published: bool = False,
        wanted: Sequence[str] = (),
        names: Sequence[str] | None = None,
    ) -> None:
        self.origin, self.published, self.has_header = origin, published, header
        self.wanted, self.notes = wanted, list[str]()
        self.names, self.width = names, None if names is None else len(names)
        self.shared: dict[str, int] = {}
        self.kept: Sequence[int] | None = None  # the places of columns that can be asked for
        self.row = self.bad = 0
        self.wrong: DataError | None = None
        self.empty = array("q")  # lines of rows without anything, which may be the last ones
        self._begin()

    def _begin(self) -> None:
        self.columns: list[list[str]] = [[] for _ in self.names or ()]
        self.lines, self.rows = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, line: int, cells: Sequence[str]) -> None:
        if len(cells) == self.width and (self.published or any(map(str.strip, cells))):
            if self.empty:
                self._flush()
            self._append(line, cells)
        elif self.published or not _is_blank(cells, self.width):
            self._add_other(line, cells)

    def _add_other(self, line: int, cells: Sequence[str]) -> None:
        """Take up a record that is not simply a row: the header, a wrong or an empty one."""
        if self.width is None:
            self._name(cells if self.has_header else [str(n) for n in range(len(cells))])
            if not self.has_header:
                self._append(line, cells)
        elif len(cells) != self.width:
            self._flush()
            self._refuse(line, len(cells), self.width)
            self.row += 1
        elif len(self.empty) < decoded_lines.MOST_EMPTY_LINES:
            self.empty.append(line)
        else:
            what = f"more than {decoded_lines.MOST_EMPTY_LINES} rows are empty"
            raise DataError(f"{self.origin}, line {line}: {what}", "cut them")

    def _name(self, names: Sequence[str]) -> None:
        """Take the header up; columns that share a name are left out unless one is wanted."""
        counts = Counter(names)
        self.shared = {name: count for name, count in counts.items() if count > 1}
        check_names(self.origin, self.shared, self.wanted)
        self.width = len(names)
        if self.shared:
            self.kept = [index for index, name in enumerate(names) if counts[name] == 1]
        unique = [name for name in names if counts[name] == 1]
        other, notes = matched(self.origin, self.wanted, unique)
        theirs = {theirs: name for name, theirs in other.items()}
        self.names = [theirs.get(name, name) for name in unique]
        self.notes += notes
        self._begin()

    def _append(self, line: int, cells: Sequence[str]) -> None:
        kept = cells if self.kept is None else [cells[index] for index in self.kept]
        _append(self.columns, kept)
        self.lines.append(line)
        self.rows.append(self.row)
        self.row += 1

    def _flush(self) -> None:
        """Take up empty rows after which others come."""
        for line in self.empty:
            self._append(line, [""] * (self.width or 0))
        self.empty = array("q")

    def _refuse(self, line: int, fields: int, expected: int) -> None:
        hint = "mend the line; a field that holds a line end or what parts fields needs quotes"
        what = f"{fields} fields, where the first line has {expected}"
        self.wrong = self.wrong or DataError(f"{self.origin}, line {line}: {what}", hint)
        self.bad += 1
        if not self.published:
            raise self.wrong

    def take(self) -> RawColumns:
        names = self.names or ()
        bad = (
            (f"{self.origin}: garbled rows left out: {self.bad}",)
            if self.published and self.bad
            else ()
        )
        notes = (*self.notes, *bad)
        columns = dict(zip(names, self.columns, strict=True))
        cells = RawColumns(
            self.origin, columns, self.rows, self.lines, self.published, notes, shared=self.shared
        )
        self._begin()
        return cells

    def finish(self) -> None:
        if self.empty:
            self.notes.append(f"{self.origin}: empty rows at the end left out: {len(self.empty)}")
        if self.wrong is not None and self.bad > self.row // 100:
            raise self.wrong
        if not self.row:
            raise DataError(f"{self.origin}: a header but no rows", GIVE_ROWS)

    def refuse_empty(self) -> NoReturn:
        raise DataError(f"{self.origin}: empty file", GIVE_ROWS)


def _is_blank(cells: Sequence[str], width: int | None) -> bool:
    """Say whether a record is a blank line; in a single column quotes may hold an empty text."""
    return not cells or (width != 1 and len(cells) == 1 and not cells[0].strip())


class JsonRecords:
    """JSON objects, one a line that is not blank, or one after another."""

    def __init__(self, origin: str, wanted: Sequence[str]) -> None:
        self.origin, self.wanted, self.start = origin, wanted, 0
        self.notes: list[str] = []
        self.other: dict[str, str] = {}  # columns that the objects call differently
        self.wrapped: DataError | None = None
        self._begin()

    def _begin(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.lines = array("q")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, line: int, text: str) -> None:
        if not text.strip():
            return
        try:
            row = parse_json(text, takes_constants=True)
            if "\\u" in text:
                json.dumps(row, ensure_ascii=False).encode()  # Refuses half a surrogate pair.
        except ValueError as error:
            what = f"malformed JSON ({reason(error)})"
            raise DataError(f"{self.origin}, line {line}: {what}", GIVE_OBJECTS) from error
        if not isinstance(row, dict):
            what = f"not an object but {type(row).__name__}"
            raise DataError(f"{self.origin}, line {line}: {what}", GIVE_OBJECTS)
        if not self.start and not self.rows:
            self._look_inside(row)
        self.rows.append({sys.intern(name): value for name, value in row.items()})
        self.lines.append(line)

    def _look_inside(self, row: Mapping[str, object]) -> None:
        """See whether the first object holds all rows in one of its lists."""
        lists = [name for name, value in row.items() if _is_table(value)]
        if not lists or (self.wanted and set(self.wanted) <= set(row)):
            return
        named = " or ".join(map(short, lists[:6]))
        key = lists[0] if re.fullmatch(r"[A-Za-z_]\w*", lists[0]) else json.dumps(lists[0])[:60]
        hint = f"take them out: jq -c '.{key}[]' FILE > NEW.jsonl"
        what = f"{self.origin}: one object, with rows in its key {named}"
        self.wrapped = DataError(what, hint)
        if self.wanted:
            raise self.wrapped

    def take(self) -> RawColumns:
        row_numbers = range(self.start, self.start + len(self.rows))
        # A column that the first window has is one of all: later its cells can only be missing.
        columns = Columns(self.rows, self.wanted if self.start else ())
        if self.wanted and not self.start:
            self.other, notes = matched(self.origin, self.wanted, columns)
            self.notes += notes
        if self.other:
            columns = Columns(self.rows, self.wanted, self.other)
        lines, self.start = self.lines, row_numbers.stop
        self._begin()
        return RawColumns(self.origin, columns, row_numbers, lines, notes=tuple(self.notes))

    def finish(self) -> None:
        if self.wrapped is not None and self.start + len(self.rows) == 1:
            raise self.wrapped

    def refuse_empty(self) -> NoReturn:
        raise DataError(f"{self.origin}: empty file", GIVE_ROWS)


def _is_table(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict)


class Columns(Mapping[str, list[object]]):
    """The columns of JSON objects, each made when it is asked for.

    All at once they would hold a cell for each key of any line in each line.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, object]],
        known: Iterable[str],
        other: Mapping[str, str] | None = None,
    ) -> None:
        self._rows, self._other = rows, other or {}
        self._names = dict.fromkeys([*(name for row in rows for name in row), *known])

    def __getitem__(self, name: str) -> list[object]:
        if name not in self._names:
            raise KeyError(name)
        if name in self._other:
            other = self._other[name]
            return [row[name] if name in row else row.get(other) for row in self._rows]
        return [row.get(name) for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _append(columns: Iterable[list[str]], fields: Sequence[str]) -> None:
    for column, field in zip(columns, fields, strict=True):
        column.append(field)


def check_names(origin: str, shared: Mapping[str, int], wanted: Iterable[str]) -> None:
    """Raise DataError for a wanted column whose name several have."""
    for name in wanted:
        if name in shared:
            what = f"{shared[name]} columns are called {short(name)}"
            raise DataError(f"{origin}: {what}", "give each column its own name")
