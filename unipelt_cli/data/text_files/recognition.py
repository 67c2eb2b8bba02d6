"""What a text is, where only looking at it can say: JSON, a table and its marks, or plain lines.

Files and pipes are looked at in the same way. What was decided against the obvious is always said.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from unipelt_cli.data.text_files.decoded_lines import LONGEST_LINE, Lines
from unipelt_cli.errors import DataError
from unipelt_cli.files.strict import parse_json
from unipelt_cli.text import short

TextKind = Literal["lines", "jsonl", "csv", "tsv"]
MARKS = {"csv": ",;\t|", "tsv": "\t,;|"}  # what parts the fields, the likeliest first
LOOKED_AT = 200  # lines
LONGEST_NAME, MOST_WORDS = 60, 4  # of a column
_SEPARATOR = re.compile(r'"?sep=([^"\r\n])"?\s*', re.IGNORECASE)
_QUOTED = re.compile(r'"(?:[^"]|"")*+"')
_ESCAPED = re.compile(r'\\"(?=[^\t\r\n])')


@dataclass(frozen=True)
class Layout:
    """How a text is read: what parts its fields, whether it has names, and what is said of that.

    `names`: those of the columns, where no line holds them. `skips` a line that only names the
    mark. `spans`: JSON values that lines do not part.
    """

    kind: TextKind
    mark: str = ","
    names: tuple[str, ...] | None = None
    skips: bool = False
    spans: bool = False
    notes: tuple[str, ...] = ()


def of_kind(text: Lines, kind: TextKind) -> Layout:
    """Look at how a text of a known format is laid out."""
    if kind == "jsonl":
        return Layout(kind, spans=_spans_lines(text.opening()))
    if kind == "lines":
        return Layout(kind)
    first = text.first()
    if separator := _SEPARATOR.fullmatch(first):
        return _marked(text, "csv", separator[1], skips=True)
    bare = _QUOTED.sub("", first)
    return _marked(text, kind, next((mark for mark in MARKS[kind] if mark in bare), MARKS[kind][0]))


def of_pipe(text: Lines, columns: Sequence[str], parts: int) -> Layout:
    """Look at what a pipe holds: `columns` are asked for, of lines without names `parts` texts.

    Raises DataError for a table that has none of them; a second line is waited for only where the
    first one could name columns.
    """
    if _is_json(text.opening()):
        return of_kind(text, "jsonl")
    first = text.first()
    if separator := _SEPARATOR.fullmatch(first):
        return _marked(text, "csv", separator[1], skips=True)
    wanted = {folded(name) for name in columns}
    for mark in MARKS["csv"]:
        names = fields(first, mark)
        if len(names) > 1 and wanted <= set(map(folded, names)):
            return _marked(text, "tsv" if mark == "\t" else "csv", mark)
    if len(wanted) == 1 and {folded(name) for name in fields(first, ",")} == wanted:
        lines = text.ahead(2)[1:LOOKED_AT]
        decision = f"{text.origin}: its first line is taken for the name of the column"
        if lines:
            is_csv = all(len(fields(line, ",")) == 1 for line in lines)
            notes = (f"{decision}; --format lines if it is a text",)
            return (
                Layout("csv", notes=notes) if is_csv else Layout("lines", skips=True, notes=notes)
            )
    for mark in MARKS["csv"]:
        if not (mark == "\t" and parts > 1) and _is_table(text, mark):
            shown = ", ".join(map(short, fields(first, mark)[:20]))
            named = " and ".join(map(short, columns))
            raise DataError(
                f"{text.origin}: a table without {named}; its first line is {shown}",
                f"name a column {short(columns[0])} in its first line; or give --format lines if "
                "each line is a text",
            )
    lines = text.ahead(1)[:LOOKED_AT]
    if len(wanted) == 1 and len(lines) > 1 and all(map(_is_quoted, lines)):
        decision = f"{text.origin}: one column of quoted texts without a name"
        return Layout(
            "csv", names=tuple(columns), notes=(f"{decision}; --format lines keeps quotes",)
        )
    what = "a text" if parts == 1 else f"{parts} texts with tabs between them"
    decision = f"{text.origin}: nothing looks like a table, so each line is {what}"
    return Layout("lines", notes=(f"{decision}; --format lines says so",) if lines else ())


def _marked(text: Lines, kind: TextKind, mark: str, *, skips: bool = False) -> Layout:
    """Say where a table is read with another mark than its kind has."""
    if mark == MARKS[kind][0]:
        return Layout(kind, mark, skips=skips)
    note = f"{Path(text.origin).name}: read with {mark!r} between its fields"
    return Layout("csv", mark, skips=skips, notes=(note,))


def folded(name: str) -> str:
    """Return a name without case and spaces."""
    return "".join(name.split()).casefold()


def fields(line: str, mark: str) -> list[str]:
    """Part one line as a table's, quotes taken off; a line that nothing can part is one field."""
    try:
        return next(csv.reader([line.strip("\r\n")], delimiter=mark), [])
    except csv.Error:
        return [line]


def matched(
    origin: str, wanted: Sequence[str], names: Iterable[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find each wanted column by its name, or by the only one that differs in case and spaces.

    Returns those that differ, with what is to be said; raises DataError for one that is not there.
    """
    every = list(names)
    other: dict[str, str] = {}
    for name in wanted:
        if name in every:
            continue
        close = [column for column in every if folded(column) == folded(name)]
        if len(close) != 1 or close[0] in wanted:
            raise DataError(f"{origin}: no column {short(name)}", nearest_column(name, every))
        other[name] = close[0]
    file = Path(origin).name
    pairs = ((short(column), short(name)) for name, column in other.items())
    return other, tuple(f"{file}: column {column} is taken for {name}" for column, name in pairs)


def nearest_column(name: str, names: Sequence[str]) -> str:
    """Return the hint for a column that is not there: those that are, and what to do."""
    listed = f"columns found: {', '.join(map(short, names[:50]))}"
    by_fold = {folded(column): column for column in names}
    close = get_close_matches(folded(name), by_fold, n=1)
    if close:
        return f"did you mean {short(by_fold[close[0]])}? {listed}; rename it to {short(name)}"
    return f"{listed}; rename the one that is meant to {short(name)}"


def _is_json(opening: str) -> bool:
    """Say whether a text begins as JSON objects do, or as an array of anything but numbers."""
    if not opening.startswith("["):
        return opening.startswith("{")
    first, inside = opening.splitlines()[0].strip(), opening[1:].lstrip()[:1]
    if inside in ("{", "]"):
        return True
    if inside not in ('"', "["):
        return False
    try:
        return isinstance(parse_json(first), list)
    except ValueError:
        return first == "["


def _spans_lines(opening: str) -> bool:
    """Say whether values are those of an array, or objects over several lines."""
    if not opening.startswith("{"):
        return _is_json(opening)
    bare = re.sub(r'"(?:[^"\\]|\\.)*+"', "", opening.splitlines()[0]).rstrip()
    depth = bare.count("{") + bare.count("[") - bare.count("}") - bare.count("]")
    return depth > 0 and '"' not in bare and bare[-1] in "{[,"


def _is_table(text: Lines, mark: str) -> bool:
    """Say whether lines are rows of fields: as many in each, under names or with quotes."""
    first = text.first()
    names = fields(first, mark)
    are_names = _are_names(names)
    if len(names) < 2 or not (are_names or _has_quoted(first, mark)):
        return False
    lines = text.ahead(2)[:LOOKED_AT]
    if len(lines) < 2:
        return False
    if mark in ",;" and all(_is_prose(line, mark) for line in lines):
        return False
    try:
        rows = [row for row in csv.reader(lines, delimiter=mark) if row]
    except csv.Error:
        return False
    if len(rows) > 2 and len(rows[-1]) != len(names):
        rows.pop()  # whose rest may not have come
    same = len(rows) > 1 and all(len(row) == len(names) for row in rows)
    return same and (are_names or all(_has_quoted(line, mark) for line in lines))


def _are_names(names: Sequence[str]) -> bool:
    filled = [name.strip() for name in names if name.strip()]
    if len(filled) < 2 or len(set(filled)) < len(filled):
        return False
    return all(
        len(name) <= LONGEST_NAME and len(name.split()) <= MOST_WORDS and not _is_number(name)
        for name in filled
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_prose(line: str, mark: str) -> bool:
    """Say whether a blank follows every mark, as in sentences."""
    bare = line.rstrip("\r\n")
    return '"' not in bare and bare.count(mark) == bare.count(f"{mark} ")


def _has_quoted(line: str, mark: str) -> bool:
    """Say whether a field of a line is quoted as a table's are."""
    edge = re.escape(mark)
    return re.search(rf'(?:^|{edge})"(?:[^"]|"")*+"(?:{edge}|$)', line.strip("\r\n")) is not None


def _is_quoted(line: str) -> bool:
    return _QUOTED.fullmatch(line.strip("\r\n")) is not None


# Quotes of tab-separated texts: spreadsheets, pandas and R write them, GLUE's files do not.


@dataclass(frozen=True)
class Quoting:
    """Whether quotes around the cells of tab-separated text are taken off, and what is said.

    `is_escaped`: a quote inside of them has a backslash before it, as R writes it, not another.
    """

    is_on: bool
    is_escaped: bool = False
    notes: tuple[str, ...] = ()


def doubled_quotes(line: str) -> str:
    """Write a line's inner quotes twice where a backslash is before them."""
    return _ESCAPED.sub('""', line)


def quoting(origin: str, read: Callable[[], Iterable[str]], *, is_part: bool = False) -> Quoting:
    """Decide from all lines, or from the first part, whether quotes are the writer's or the texts'.

    They are the writer's where every cell with a quote in it begins and ends with one and has none
    inside but doubled ones; a cell may then go over several lines, which are not all whole rows.
    """
    file = Path(origin).name
    for is_escaped in (False, True):
        seen = _Seen(is_escaped)
        is_sound = seen.all_agree(read(), is_part)
        if not seen.begins:
            return Quoting(False)
        if is_sound and seen.cells:
            decision = (
                f"{file}: quotes around cells are taken off, as in tables of pandas, R and Excel"
            )
            return Quoting(True, is_escaped, (decision,))
    decision = (
        f"{file}: quotes are kept as parts of the cells, because not all are around whole ones"
    )
    return Quoting(False, notes=(decision,))


class _Seen:
    """What the records so far show of their quotes."""

    def __init__(self, is_escaped: bool) -> None:
        self.is_escaped, self.begins, self.cells = is_escaped, False, 0
        self._width: int | None = None
        self._raw: list[str] = []

    def all_agree(self, lines: Iterable[str], is_part: bool) -> bool:
        """Say whether all rows are read with quotes; see in any case whether a cell begins so."""
        csv.field_size_limit(LONGEST_LINE)
        source = self._fed(lines)
        try:
            agree = all(map(self._agrees, csv.reader(source, delimiter="\t", strict=True)))
        except csv.Error as error:
            agree = is_part and "end of data" in str(error)
        for _ in source:
            self._raw.clear()
        return agree

    def _fed(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            if '"' in line:
                line = doubled_quotes(line) if self.is_escaped else line
                self.begins = self.begins or line.startswith('"') or '\t"' in line
            self._raw.append(line)
            yield line

    def _agrees(self, row: Sequence[str]) -> bool:
        """Say whether the lines of a row are what quotes make of them, and nothing else."""
        raw, self._raw = self._raw, []
        if self._width is None and row:
            self._width = len(row)
        if not any('"' in line for line in raw):
            return True
        parted = [line.rstrip("\r\n").split("\t") for line in raw]
        cells = [cell for cell in parted[0] if '"' in cell]
        self.cells += len(cells)
        if len(row) != self._width:
            return False
        if len(raw) > 1:
            return not all(len(parts) == self._width for parts in parted)
        return len(parted[0]) != self._width or all(map(_QUOTED.fullmatch, cells))
