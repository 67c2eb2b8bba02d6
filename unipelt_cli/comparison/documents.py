"""A comparison as a file: Markdown, LaTeX, CSV or JSON, by the file's ending."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from unipelt_cli.comparison.results import Comparison
from unipelt_cli.comparison.tables import Sheet, notes, sheets
from unipelt_cli.errors import ConfigError
from unipelt_cli.files import atomic
from unipelt_cli.files.as_json import as_json
from unipelt_cli.text import plain

FORMULA = ("=", "+", "-", "@", "\t", "\r")
CSV_KEYS = (
    *("backbone", "k", "task", "method", "label", "metric", "seeds", "mean", "standard_deviation"),
    *("interval_low", "interval_high", "rows_low", "rows_high", "collapsed", "mean_not_collapsed"),
    *("trainable_parameters", "stored_parameters", "median_seconds", "peak_memory_bytes"),
)
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"[": "{[}", "]": "{]}"},  # a row that begins with one would be read as a distance
    **{"±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


def check(path: Path) -> None:
    """Raise ConfigError for a file whose ending names none of the formats."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--write {str(path)!r}: no such format",
            f"give a path ending in {', '.join(FORMATS)}",
        )


def write(comparison: Comparison, path: Path) -> None:
    """Write a comparison, whole or not at all; raise RunError where nothing can be written."""
    atomic.write(path, FORMATS[path.suffix.lower()](comparison).encode("utf-8", "backslashreplace"))


def markdown(comparison: Comparison) -> str:
    """Return all tables as GitHub's Markdown, with the notes below them."""
    parts = []
    for sheet in sheets(comparison):
        lines = [f"### {_markdown(sheet.title)}", ""]
        lines += [_bar(map(_markdown, sheet.columns)), _bar(_rules(sheet, "---", "--:"))]
        lines += [_bar(map(_markdown, row)) for row in sheet.rows]
        lines += ["", _markdown(sheet.note)] if sheet.note else []
        parts.append("\n".join(lines))
    if doubts := notes(comparison):
        parts.append("\n".join(f"- {_markdown(note)}" for note in doubts))
    return "\n\n".join(parts) + "\n"


def latex(comparison: Comparison) -> str:
    """Return all tables for a document that loads booktabs."""
    parts = [r"% \usepackage{booktabs}"]
    for sheet in sheets(comparison):
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(sheet.title)}}}"]
        lines += [rf"\begin{{tabular}}{{{''.join(_rules(sheet, 'l', 'r'))}}}", r"\toprule"]
        lines += [_line(sheet.columns), r"\midrule", *map(_line, sheet.rows), r"\bottomrule"]
        lines.append(r"\end{tabular}")
        lines += [rf"\par {_latex(sheet.note)}"] if sheet.note else []
        parts.append("\n".join([*lines, r"\end{table}"]))
    parts += [rf"\par {_latex(note)}" for note in notes(comparison)]
    return "\n\n".join(parts) + "\n"


def csv_table(comparison: Comparison) -> str:
    """Return a line for each task, k, backbone and method; no cell is read as a formula."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_KEYS)
    for group in comparison.groups:
        low, high = group.interval or (None, None)
        rows_low, rows_high = group.interval_by_rows or (None, None)
        values = {
            **as_json(group),
            **{"k": "all" if group.k is None else group.k, "seeds": len(group.seeds)},
            **{"interval_low": low, "interval_high": high},
            **{"rows_low": rows_low, "rows_high": rows_high},
        }
        writer.writerow([_csv(values[key]) for key in CSV_KEYS])
    return file.getvalue()


def _json(comparison: Comparison) -> str:
    return atomic.dumps(as_json(comparison))


FORMATS: Mapping[str, Callable[[Comparison], str]] = MappingProxyType(
    {".md": markdown, ".tex": latex, ".csv": csv_table, ".json": _json}
)


def _rules(sheet: Sheet, left: str, right: str) -> Iterator[str]:
    """Yield a column's alignment: numbers to the right."""
    for column in zip(*sheet.rows, strict=True):
        yield right if all(cell[:1] in "+-<0123456789" for cell in column) else left


def _bar(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", plain(text))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in plain(text))


def _csv(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{plain(value)}" if value.startswith(FORMULA) else plain(value)
