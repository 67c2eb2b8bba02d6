"""Tables of plain values on the terminal, and how values are written in them."""

from collections.abc import Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from unipelt_cli.terminal.console import answers
from unipelt_cli.text import plain


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str | Text]], out: Console | None = None
) -> None:
    """Print a plain table, among the answers if nothing else is said.

    Its first column stands left, and numbers right.
    """
    out, view = out or answers(), Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(is_number(str(row[index])) for row in rows)
        justify: JustifyMethod = "right" if numeric else "left"
        name = None if index or not rows else max(cell_len(plain(str(row[0]))) for row in rows)
        least = None if name is None or name > out.width // 2 else name  # names stay whole
        view.add_column(Text(plain(column)), justify=justify, overflow="fold", min_width=least)
    for row in rows:
        view.add_row(*(Text(plain(c)) if isinstance(c, str) else c for c in row))
    out.print(view)


def check_table(
    checks: Sequence[tuple[str, bool | None, str]],
    remedies: Sequence[str | None] = (),
    otherwise: str = "not checked",
) -> None:
    """Print what was checked: whether it holds, what was found, and below it how to mend it."""
    words = {
        True: Text("ok", "green"),
        False: Text("FAILED", "bold red"),
        None: Text(otherwise),
    }
    rows: list[tuple[str, Text, Text]] = []
    for (what, passed, outcome), remedy in zip_longest(checks, remedies):
        cell = Text(plain(outcome))
        if remedy is not None:
            cell = Text.assemble(cell, "\n", ("fix: ", "cyan"), plain(remedy))
        rows.append((what, words[passed], cell))
    table(("check", "", "found"), rows)


def cell(value: object) -> str:
    """Write a value of a table's cell for people."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def is_number(text: str) -> bool:
    """Say whether a cell is a number alone."""
    return text.strip().lstrip("+-").replace(".", "").replace(",", "").replace("%", "").isdigit()


def duration(seconds: float) -> str:
    """Write a time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
