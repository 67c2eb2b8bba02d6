"""A comparison's tables on a terminal: in the width there is, readable without colours."""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from unipelt_cli.comparison.tables import Sheet
from unipelt_cli.terminal.console import answers
from unipelt_cli.terminal.tables import is_number
from unipelt_cli.text import plain

GAP = 2
LABEL_CELLS = 24  # of the column that every block repeats
LEAST_CELLS = 8  # of a column that folds
Row = tuple[str, ...]


def show(sheet: Sheet) -> None:
    """Print a titled table: long texts fold, and a table of many columns stands in blocks."""
    out = answers()
    out.print(Text(plain(sheet.title), style="bold"))
    clean = [tuple(map(plain, row)) for row in (sheet.columns, *sheet.rows)]
    if sheet.grouped:
        _show_groups(clean[0], clean[1:], out.width)
    else:
        for header, *rows in _blocks(clean, out.width):
            _show(header, rows, _widths([header, *rows], out.width))
    if sheet.note:
        out.print(Text(plain(sheet.note)))
    out.print()


def _show(
    header: Row | None, rows: Sequence[Row], widths: Sequence[int], like: Sequence[Row] = ()
) -> None:
    """Print rows; numbers stand right where all rows `like` these have numbers there."""
    view = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=header is not None)
    for index, width in enumerate(widths):
        numeric = all(is_number(row[index]) or row[index] == "-" for row in like or rows)
        justify: JustifyMethod = "right" if numeric else "left"
        heading = Text(header[index] if header else "")
        view.add_column(heading, width=width, justify=justify, overflow="fold")
    for row in rows:
        view.add_row(*map(Text, row))
    answers().print(view)


def _show_groups(header: Row, rows: Sequence[Row], width: int) -> None:
    """Print rows below the first cell that they share, all in the same columns."""
    indented = [(f" {row[1]}", *row[2:]) for row in rows]
    widths = _widths([header[1:], *indented], width)
    _show(header[1:], [], widths, indented)
    for name in dict.fromkeys(row[0] for row in rows):
        answers().print(Text(name, style="bold"))
        members = [cells for row, cells in zip(rows, indented, strict=True) if row[0] == name]
        _show(None, members, widths, indented)


def _widths(rows: Sequence[Row], room: int) -> list[int]:
    """Return the columns' widths: where they need more than there is, the widest text gives way."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    folds = [
        index
        for index, column in enumerate(zip(*rows[1:], strict=True))
        if any(" " in cell.strip() or not is_number(cell) for cell in column)
    ]
    while folds and sum(widths) + GAP * (len(widths) - 1) > room:
        widest = max(folds, key=lambda index: widths[index])
        if widths[widest] <= LEAST_CELLS:
            break
        widths[widest] -= 1
    return widths


def _blocks(rows: Sequence[Row], width: int) -> Iterator[list[Row]]:
    """Yield the columns, header first, in parts that fit beside the first one."""
    sizes = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    sizes[0] = min(sizes[0], LABEL_CELLS)
    places: list[int] = []
    for index in range(1, len(sizes)):
        used = sizes[0] + sum(sizes[column] + GAP for column in places)
        if places and used + sizes[index] + GAP > width:
            yield [(row[0], *(row[column] for column in places)) for row in rows]
            places = []
        places.append(index)
    yield [(row[0], *(row[column] for column in places)) for row in rows]
