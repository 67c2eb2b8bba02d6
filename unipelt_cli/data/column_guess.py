"""Which columns of somebody's file hold the text and the label, where nobody says so.

Names decide first, then what the columns hold. What could be two things is an error, not a choice,
and what was chosen is always said.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from unipelt_cli.data.cells import LabelError, RawColumns, label_of
from unipelt_cli.data.label_kind import (
    Kind,
    LabelKind,
    decide,
    has_decimal_comma,
    label_number,
    one_spelling,
)
from unipelt_cli.data.own_files import OwnFiles
from unipelt_cli.errors import DataError
from unipelt_cli.text import short

ROWS = 5000  # that are looked at
MOST_LABELS = 50
ROWS_A_LABEL = 3
TEXT_WORDS = 3
LONGER = 2  # times as long as the next one, a text needs no name
PAIRS = (
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "answer"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
    *(("title", body) for body in ("text", "body", "content", "description", "abstract", "review")),
)
TEXTS = (
    *("text", "sentence", "message", "review", "content", "body", "comment", "utterance"),
    *("tweet", "post", "document", "description", "abstract", "summary", "feedback", "prompt"),
    *("question", "query", "title", "headline", "subject", "input", "email", "ticket"),
)
LABELS = (
    *("label", "labels", "class", "category", "target", "topic", "intent", "sentiment", "score"),
    *("rating", "stars", "y", "gold", "gold_label", "tag", "type", "emotion", "polarity"),
    *("label_text", "label_name", "class_name", "is_spam", "is_duplicate"),
)
FLAGS = ("text", "text_pair", "label")
SURE = ("text", "label")  # names that no other one disputes
_ID = re.compile(r"(|unnamed.*|(.*[_ -])?(id|idx|index|guid|uuid|key|row)|(id|idx|index)[_ -].*)")


@dataclass(frozen=True)
class Guess:
    """Settings of the data section, and a sentence that says what was guessed."""

    settings: dict[str, str]
    note: str


@dataclass(frozen=True)
class _Column:
    """What the first rows hold in one column."""

    name: str
    values: tuple[str, ...]

    @cached_property
    def distinct(self) -> int:
        return len(set(self.values))

    @cached_property
    def words(self) -> float:
        """The mean number of words."""
        return sum(len(value.split()) for value in self.values) / len(self.values)

    @cached_property
    def numbers(self) -> list[float] | None:
        """The numbers, where they are all numbers."""
        comma = has_decimal_comma(self.values)
        readings = [label_number(value, comma) for value in self.values]
        numbers = [number for number in readings if number is not None]
        return numbers if len(numbers) == len(self.values) else None

    @property
    def is_text(self) -> bool:
        return self.words >= TEXT_WORDS and self.distinct > len(self.values) / 3

    @property
    def is_values(self) -> bool:
        """Whether the numbers are values, not names."""
        return self.numbers is not None and decide(self.values).is_regression

    @property
    def is_label(self) -> bool:
        most = min(MOST_LABELS, len(self.values) // ROWS_A_LABEL)
        return 2 <= self.distinct <= most or self.is_values

    @property
    def is_id(self) -> bool:
        """Whether it only numbers or names the rows."""
        if _ID.fullmatch(self.name.casefold()):
            return True
        if len(self.values) < 10 or self.distinct < len(self.values):
            return False
        if self.numbers is None:
            return self.words == 1
        return max(self.numbers) - min(self.numbers) + 1 == len(self.values)


def columns(
    path: Path,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    kind: Kind = "auto",
    encoding: str | None = None,
    files: OwnFiles | None = None,
) -> Guess:
    """Guess what is not given: the text column, or the two of a pair, and the label column.

    `files` hold what was read, for who draws its rows. Raises DataError where nothing looks like
    one, where several do, and for a file without names.
    """
    cells = (files or OwnFiles()).look_at(path, encoding)
    cells.require(name for name in cells.shared if name.casefold() in (*TEXTS, *LABELS))
    every = [column for name in cells.columns if (column := _column(cells, name)) is not None]
    _check_header(path, list(cells.columns), every)
    asked = {"text": text, "text_pair": text_pair, "label": label}
    settings = {key: value for key, value in asked.items() if value is not None}
    left = [column for column in every if column.name not in settings.values() and not column.is_id]
    guesses, named = [], None
    decided: LabelKind | None = None
    if label is None:
        named = _named(left, LABELS, "label", path)
        left = [column for column in left if column is not named]
        if named is not None and named.name.casefold() not in SURE:
            _refuse_others(named, left, path)
    if text is None:
        texts = _texts(path, left, every)
        left = [column for column in left if column not in texts]
        settings |= zip(("text", "text_pair"), [column.name for column in texts], strict=False)
        names = " and ".join(short(column.name) for column in texts)
        guesses.append(f"{'texts' if len(texts) > 1 else 'text'} {names}")
    if label is None:
        chosen = named or _only([column for column in left if column.is_label], every, path)
        settings["label"] = chosen.name
        decided = decide(_labels(cells, chosen.name), kind)
        guesses.append(f"label {short(chosen.name)} ({decided.words})")
    flags = [
        f"--{key.replace('_', '-')} COLUMN" for key in FLAGS if settings.get(key) != asked[key]
    ]
    if decided is not None and decided.doubtful:
        settings["kind"] = decided.name
        flags.append(decided.way_out)
    sentence = f"{path.name}: guessed {', '.join(guesses)}; to choose: {' '.join(flags)}"
    return Guess(settings, sentence)


def _refuse_others(named: _Column, left: Sequence[_Column], path: Path) -> None:
    """Raise DataError where another column looks like a label as well: a name alone is no proof."""
    others = [
        column.name
        for column in left
        if column.is_label and not column.is_values and not column.is_text
    ]
    if others:
        raise DataError(
            f"{path}: {_listed([named.name, *others])} could each be the label",
            "give --label with one of them",
        )


def _column(cells: RawColumns, name: str) -> _Column | None:
    """Return a column's first cells as strings; None where it holds neither text nor numbers."""
    try:
        names = dict(enumerate(cells.names.get(name, ())))
        values = tuple(
            str(names.get(value, value) if names else value)
            for value in islice(cells.column(name), ROWS)
        )
    except DataError:
        return None
    return _Column(name, values) if values else None


def _check_header(path: Path, names: Sequence[str], every: Sequence[_Column]) -> None:
    """Raise DataError where the names of the columns are the first row.

    Then one of them is among the values below it. Only a table's numbered columns are called so.
    """
    if path.suffix.lower() not in (".csv", ".tsv") or names == [str(n) for n in range(len(names))]:
        return
    for column in every:
        if column.name in column.values and column.distinct < len(column.values):
            listed = ", ".join(short(name) for name in names[:3])
            example = ",".join(["text", "label", "other"][: len(names)])
            raise DataError(
                f"{path}: its first line looks like a row, not like the names of columns: {listed}",
                f"write their names on a line before it, for example {example}",
            )


def _texts(path: Path, left: Sequence[_Column], every: Sequence[_Column]) -> list[_Column]:
    """Return the text column, or the two of a pair, of what is left of every column."""
    by_name = {column.name.casefold(): column for column in left}
    for pair in PAIRS:
        if all(name in by_name and not by_name[name].is_values for name in pair):
            return [by_name[name] for name in pair]
    named = _named(left, TEXTS, "text", path)
    if named is not None:
        return [named]
    texts = sorted((column for column in left if column.is_text), key=lambda column: -column.words)
    if len(texts) > 1 and texts[0].words < LONGER * texts[1].words:
        names = [column.name for column in texts]
        raise DataError(
            f"{path}: {_listed(names)} could each be the text",
            f"give --text {_quoted(names[0])}, or both of a pair: "
            f"--text {_quoted(names[0])} --text-pair {_quoted(names[1])}",
        )
    texts = texts or [column for column in left if column.numbers is None and not column.is_label]
    if len(texts) == 1 or (texts and texts[0].is_text):
        return texts[:1]
    raise DataError(f"{path}: no column looks like the text", _name_it("text", every))


def _named(left: Sequence[_Column], names: Sequence[str], what: str, path: Path) -> _Column | None:
    """Return the column that is called as such columns are; raise DataError for several."""
    named = {column.name.casefold(): column for column in left if column.name.casefold() in names}
    sure = next((named[name] for name in SURE if name in named), None)
    if sure is None and len(named) > 1:
        raise DataError(
            f"{path}: {_listed([each.name for each in named.values()])} could each be the {what}",
            f"give --{what} with one of them",
        )
    return sure or next(iter(named.values()), None)


def _only(labels: Sequence[_Column], every: Sequence[_Column], path: Path) -> _Column:
    """Return the one column that can be the label by what it holds."""
    few = [column for column in labels if not column.is_values] or labels
    if len(few) > 1:
        raise DataError(
            f"{path}: {_listed([column.name for column in few])} could each be the label",
            "give --label with one of them",
        )
    if not few:
        raise DataError(f"{path}: no column looks like the label", _name_it("label", every))
    return few[0]


def _labels(cells: RawColumns, name: str) -> list[str]:
    """Return the labels of all rows that have a usable one: what is wrong is said by who reads."""
    labels, names = [], cells.names.get(name, ())
    for value in cells.column(name):
        try:
            labels.append(one_spelling(label_of(value, names)))
        except LabelError:
            continue
    return [label for label in labels if label]


def _name_it(what: str, every: Sequence[_Column]) -> str:
    names = ", ".join(short(column.name) for column in every[:20])
    return f"name it with --{what}; columns found: {names}"


def _listed(names: Sequence[str]) -> str:
    shown = [short(name) for name in names[:6]]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name) else short(name)
