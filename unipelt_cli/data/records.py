"""What the records of each text format become: columns of cells, as many rows as were added.

A form takes records one by one and is asked for the rows since; a wrong record leaves it as it was.
"""

import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from unipelt_cli.data.cells import Cells
from unipelt_cli.errors import DataError
from unipelt_cli.files.strict import parse_json
from unipelt_cli.text import reason, short

GIVE_ROWS = "give a file with labelled rows"
Fills = Sequence[Sequence[str]]
"""The columns that each text of a line without names fills."""


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


class Plain:
    """Lines of texts, a tab between each two; of one text, any line that is not blank."""

    def __init__(self, origin: str, names: Fills) -> None:
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


class Grid:
    """Records under a header; of published files, up to 1 % of garbled rows are left out."""

    def __init__(
        self, origin: str, header: bool, published: bool, notes: tuple[str, ...] = ()
    ) -> None:
        self.origin, self.published, self.has_header = origin, published, header
        self.notes = notes
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
            check_names(self.origin, self.names)
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
        bad = (f"{self.origin}: garbled rows left out: {self.bad}",) if self.bad else ()
        notes = (*self.notes, *bad)
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


class Objects:
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
        columns = Columns(self.rows, self.wanted if self.start else ())
        self.rows, self.start = [], place.stop
        return Cells(self.origin, columns, place, range(place.start + 1, place.stop + 1))

    def finish(self) -> None:
        pass

    def refuse_empty(self) -> NoReturn:
        raise DataError(f"{self.origin}: empty file", GIVE_ROWS)


class Columns(Mapping[str, list[object]]):
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


def check_names(origin: str, names: Sequence[str]) -> None:
    """Raise DataError for two columns of one name."""
    for name, count in Counter(names).items():
        if count > 1:
            what = f"{count} columns are called {short(name)}"
            raise DataError(f"{origin}: {what}", "give each column its own name")
