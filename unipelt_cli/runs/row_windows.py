"""Rows that a program gives, as windows of text columns, each row checked and named by place."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from unipelt_cli.data.cells import RawColumns
from unipelt_cli.data.unusable import DROP, windows_of_texts
from unipelt_cli.errors import DataError
from unipelt_cli.tasks import Task

Row = str | Sequence[str] | Mapping[str, Any]
"""A text, the texts of a pair, or a run's text columns by name, beside whatever else."""


WINDOW = 4096  # rows whose tokens are held at the same time


def columns_without_names(tasks: Sequence[Task]) -> list[list[str]]:
    """Return the columns that each text of a row without names fills; [] where none can say."""
    if all(len(task.text) == 1 for task in tasks):
        return [list(dict.fromkeys(task.text[0] for task in tasks))]
    return [[name] for name in tasks[0].text] if len({task.text for task in tasks}) == 1 else []


def windows_of_rows(rows: Iterable[Row], tasks: Sequence[Task]) -> Iterator[dict[str, list[str]]]:
    """Yield the checked texts of the tasks' columns, some rows at a time."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        what = f"the rows are {_kind(rows)}, not a list of them"
        raise DataError(what, "put what is to be labelled into a list")
    names = list(dict.fromkeys(name for task in tasks for name in task.text))
    plain, start, rest = columns_without_names(tasks), 0, iter(rows)
    while some := list(islice(rest, WINDOW)):
        columns: dict[str, list[object]] = {name: [] for name in names}
        for number, row in enumerate(some, start):
            for name, text in _parts(number, row, names, plain):
                columns[name].append(text)
        cells = RawColumns("rows", columns, range(start, start + len(some)))
        for window in windows_of_texts([cells], [task.text for task in tasks]):
            yield window.texts
        start += len(some)


def _parts(
    number: int, row: object, names: Sequence[str], plain: Sequence[Sequence[str]]
) -> Iterator[tuple[str, object]]:
    """Yield the cells of a row by column."""
    if isinstance(row, Mapping):
        if missing := [name for name in names if name not in row]:
            raise DataError(f"rows, row {number}: {missing[0]!r} is missing", DROP)
        yield from ((name, row[name]) for name in names)
        return
    texts = [row] if isinstance(row, str) else row
    if not isinstance(texts, list | tuple) or len(texts) != len(plain):
        wanted = " and ".join(map(repr, names))
        expected = "a text" if len(plain) == 1 else "a pair of texts"
        hint = f"give a mapping with {wanted}" + (f", or {expected}" if plain else "")
        raise DataError(f"rows, row {number}: {_kind(row)}", hint)
    for each, text in zip(plain, texts, strict=True):
        yield from ((name, text) for name in each)


def _kind(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} texts"
    return "one text" if isinstance(value, str) else f"of type {type(value).__name__}"
