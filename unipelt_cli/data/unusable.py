"""Rows that lack what is asked of them: left out and counted, or answered with nothing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unipelt_cli.data.cells import FILL_IN, LabelError, RawColumns, RowError, label_of
from unipelt_cli.errors import DataError

DROP = "fill it in, or drop the row"
MOST_NAMED = 5


@dataclass(frozen=True)
class Window:
    """The texts of some rows by column; `usable` says which of the rows came they are of."""

    texts: dict[str, list[str]]
    usable: tuple[bool, ...]


class LeftOut:
    """The rows of a file without a text or without a label, left out window by window."""

    def __init__(self) -> None:
        self.kept = self.count = 0
        self.first: list[str] = []

    def keep(self, cells: RawColumns, text: Sequence[str], label: str) -> RawColumns:
        """Return the rows that have both; of a pair one text is enough."""
        cells.require((*text, label))
        names, has_text = cells.names.get(label, ()), _with_text(cells, text)
        kept, places = [], cells.lines or cells.rows
        for index, value in enumerate(cells.column(label)):
            if has_text[index] and not _is_no_label(value, names):
                kept.append(index)
            elif len(self.first) < MOST_NAMED:
                self.first.append(str(places[index]))
        self.kept += len(kept)
        self.count += len(cells.rows) - len(kept)
        self.what = "line" if cells.lines else "row"
        return cells if len(kept) == len(cells.rows) else _chosen(cells, (*text, label), kept)

    def notes(self, origin: str) -> tuple[str, ...]:
        """Count them in a sentence, if there were any; raise DataError where no row was left."""
        if not self.kept:
            what = f"{origin}: none of {self.count} rows has a text and a label"
            raise DataError(what, "name the right columns with --text and --label")
        if not self.count:
            return ()
        named = ", ".join([*self.first, *(["..."] if self.count > len(self.first) else [])])
        what = self.what + ("s" if self.count > 1 else "")
        return (f"{origin}: rows without a text or label left out: {self.count} ({what} {named})",)


def without_unusable(cells: RawColumns, text: Sequence[str], label: str) -> RawColumns:
    """Leave such rows out of a whole file, and count them in a note of its cells."""
    left_out = LeftOut()
    kept = left_out.keep(cells, text, label)
    return replace(kept, notes=(*cells.notes, *left_out.notes(cells.origin)))


def refuse_repeated_header(cells: RawColumns, text: Sequence[str], label: str) -> None:
    """Raise DataError for a row that holds the names of the columns, as in joined files."""
    for index, value in enumerate(cells.column(label)):
        if value == label and all(cells.column(name)[index] == name for name in text):
            cells.refuse(index, "the names of the columns once more", "drop the line")


def windows_of_texts(
    windows: Iterable[RawColumns],
    groups: Sequence[Sequence[str]],
    hint: str = DROP,
    *,
    skip: bool = False,
) -> Iterator[Window]:
    """Yield the checked texts of each window; those before a row that cannot be used come first.

    `groups` are the text columns of each run that asks. With `skip`, rows without a text for one of
    them are passed over; without it the first ends all, with `hint`.
    """
    for cells in windows:
        usable = (True,) * len(cells.rows)
        if skip:
            each = [_with_text(cells, group) for group in groups]
            usable = tuple(map(all, zip(*each, strict=True)))
            kept = [index for index, is_usable in enumerate(usable) if is_usable]
            cells = _chosen(cells, _columns(groups), kept)
        failure: RowError | None = None
        while True:
            try:
                texts = texts_by_column(cells, groups)
                break
            except RowError as error:
                failure = error
                usable = _up_to(usable, error.index)
                cells = cells.first(error.index, _columns(groups))
        if usable:
            yield Window(texts, usable)
        if failure is not None:
            remedy = hint if failure.hint == FILL_IN else failure.hint
            raise RowError(failure.message, remedy, failure.index)


def texts_by_column(cells: RawColumns, groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Return the checked texts of every column that a group reads; raise for the first bad row."""
    texts_of: dict[str, list[str]] = {}
    failure: RowError | None = None
    for group in groups:
        try:
            texts_of |= zip(group, cells.rows_of_texts(group), strict=True)
        except RowError as error:
            failure = error if failure is None or error.index < failure.index else failure
    if failure is not None:
        raise failure
    return texts_of


def _columns(groups: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _up_to(usable: tuple[bool, ...], count: int) -> tuple[bool, ...]:
    """Cut what is said of rows before the usable one of this number (from 0)."""
    places = [index for index, is_usable in enumerate(usable) if is_usable]
    return usable[: places[count]]


def _chosen(cells: RawColumns, names: Iterable[str], places: Sequence[int]) -> RawColumns:
    """Return some columns of the rows at some places."""
    columns = {}
    for name in names:
        values = cells.column(name)
        columns[name] = [values[index] for index in places]
    lines = [cells.lines[index] for index in places] if cells.lines else ()
    return replace(cells, columns=columns, rows=[cells.rows[p] for p in places], lines=lines)


def _with_text(cells: RawColumns, columns: Sequence[str]) -> list[bool]:
    """Say of each row whether any of the columns holds a text."""
    each = zip(*map(cells.column, columns), strict=True)
    return [not all(map(_is_missing, values)) for values in each]


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _is_no_label(value: Any, names: Sequence[str]) -> bool:
    try:
        return not label_of(value, names)
    except LabelError:
        return False  # said by who reads the labels
