"""What a label column is: names of classes, or values to regress on. It is decided here alone.

Words are names. Numbers are names where they repeat as names do, and values otherwise; they may
have decimal commas and thousands marks.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from unipelt_cli.text import short

Kind = Literal["auto", "classification", "regression"]
FEW_VALUES = 20  # more different numbers are values, unless they count classes
ROWS_A_CLASS = 3
ROWS_A_NUMBERED_CLASS = 5
FEW_ROWS = 10  # up to so many names may stand once each
MOST_NAMES = 0.8  # of the rows, that may be different names
SLACK = 0.15  # of a step, by which rounded values are off it
PERCENT = 100
MOST_ALIKE = 5
MOST_LISTED = 20
_SIGN, _WHOLE = r"[+-]?", r"[1-9]\d{0,2}"
_GROUPED = re.compile(
    rf"{_SIGN}{_WHOLE}(?:([,'\u2019 \u00a0\u202f])\d{{3}})(?:\1\d{{3}})*(?:\.\d+)?"
)
_GROUPED_COMMA = re.compile(
    rf"{_SIGN}{_WHOLE}(?:([.'\u2019 \u00a0\u202f])\d{{3}})(?:\1\d{{3}})*(?:,\d+)?"
)
_COMMA = re.compile(rf"{_SIGN}\d+,\d+")
_MARKS = re.compile(r"['\u2019 \u00a0\u202f]")
_POINT_ZERO = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")
_IDENTIFIER = re.compile(r"0\d.*")  # 007 is no number that anybody regresses on
_CODE = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class LabelKind:
    """What labels are, in words as well; `doubtful` where numbers could be either."""

    is_regression: bool
    words: str
    decimal_comma: bool = False
    doubtful: bool = False

    @property
    def name(self) -> Literal["classification", "regression"]:
        return "regression" if self.is_regression else "classification"

    @property
    def way_out(self) -> str:
        """The flag that makes it the other kind."""
        return f"--set data.kind={'classification' if self.is_regression else 'regression'}"


def decide(labels: Sequence[str], asked: Kind = "auto") -> LabelKind:
    """Say whether the labels of all rows are names or values, unless it is asked for.

    A few words among values are no reason for names: each is an error of its own.
    """
    distinct = set(labels)
    names = LabelKind(False, f"{len(distinct)} label{'s' if len(distinct) > 1 else ''}")
    if asked == "classification":
        return names
    comma = has_decimal_comma(distinct)
    numbers = {
        label: number
        for label in distinct
        if (number := label_number(label, comma)) is not None and not math.isnan(number)
    }
    rows = sum(label in numbers for label in labels)
    values = LabelKind(True, _values_in_words(numbers, comma), comma, asked == "auto")
    if asked == "regression":
        return values
    if 2 * rows < len(labels) or any(map(_IDENTIFIER.fullmatch, distinct)):
        return names
    if _are_values(numbers, rows):
        return values
    is_plain = len(numbers) <= FEW_VALUES and all(map(_is_whole, numbers.values()))
    if is_plain or len(numbers) < len(distinct):
        return names
    return LabelKind(False, f"{names.words}: numbers that repeat", doubtful=True)


def are_too_many(labels: Sequence[str]) -> bool:
    """Say whether names are nearly as many as rows, and not a few: classes do not stand once each.

    A hundred rows of 77 classes show about 56 of them, of 150 about 73.
    """
    distinct = len(set(labels))
    return distinct > FEW_ROWS and distinct > MOST_NAMES * len(labels)


def without_train_row(counts: Mapping[str, int]) -> str:
    """Say which labels, and how many rows, are of classes that no train row shows."""
    total, names = sum(counts.values()), [short(label) for label in counts]
    listed = ", ".join([*names[:MOST_LISTED], *(["..."] if len(names) > MOST_LISTED else [])])
    rows = f"{total} rows have" if total > 1 else "1 row has"
    labels = "labels" if len(names) > 1 else "a label"
    return f"{rows} {labels} that no train row has: {listed}"


def _are_values(numbers: Mapping[str, float], rows: int) -> bool:
    """Say whether different numbers of so many rows are values, and not the names of classes."""
    values = sorted({number for number in numbers.values() if math.isfinite(number)})
    is_many, is_whole = len(numbers) > FEW_VALUES, all(map(_is_whole, values))
    repeats = rows >= ROWS_A_CLASS * len(numbers)
    if is_whole and not is_many:
        return len(numbers) > FEW_ROWS and rows < 2 * len(numbers)
    if is_whole:
        return not _count_classes(values, rows)
    if not repeats or not all(map(_CODE.fullmatch, numbers)):
        return True
    if len(values) < len(numbers):  # 1.1 and 1.10 are two names of one number
        return False
    return is_many or _is_scale(values)


def _count_classes(values: Sequence[float], rows: int) -> bool:
    """Say whether whole numbers count classes: without a gap from 0 or 1, each for many rows."""
    first, last = values[0], values[-1]
    is_gapless = first in (0, 1) and last - first + 1 == len(values)
    return is_gapless and last != PERCENT and rows >= ROWS_A_NUMBERED_CLASS * len(values)


def _is_scale(values: Sequence[float]) -> bool:
    """Say whether values lie on even steps, at least every other one of them taken: 1, 1.5, 2."""
    if len(values) < 2:
        return True
    low, high = values[0], values[-1]
    steps = round((high - low) / min(b - a for a, b in pairwise(values)))
    if len(values) < (steps + 1) / 2:
        return False
    places = [(value - low) / (high - low) * steps for value in values]
    return all(abs(position - round(position)) <= SLACK for position in places)


def _is_whole(number: float) -> bool:
    return not math.isfinite(number) or number.is_integer()


def _values_in_words(numbers: Mapping[str, float], comma: bool) -> str:
    marked = sorted(label for label in numbers if as_number(label) is None)
    how = " with decimal commas" if comma else ""
    if marked and not comma:
        how = f" with thousands marks, {short(marked[0])} is {numbers[marked[0]]:.10g}"
    return f"{len(numbers)} different numbers{how}: regression"


def as_number(text: str) -> float | None:
    """Return what Python reads as a float, infinities and nan too; None if it reads none."""
    try:
        return float(text)
    except ValueError:
        return None


def label_number(text: str, decimal_comma: bool = False) -> float | None:
    """Return the number that a label spells: 3.8, 1,234.5, 1'234; None for a word.

    With `decimal_comma`: 3,8 and 1.234,5.
    """
    if decimal_comma and (_GROUPED_COMMA.fullmatch(text) or _COMMA.fullmatch(text)):
        text = _MARKS.sub("", text).replace(".", "").replace(",", ".")
    elif not decimal_comma and _GROUPED.fullmatch(text):
        text = _MARKS.sub("", text).replace(",", "")
    return as_number(text)


def has_decimal_comma(labels: Iterable[str]) -> bool:
    """Say whether labels are numbers whose fraction follows a comma: 4,5 but never 1,234.5."""
    is_decimal = False
    for label in labels:
        by_point, by_comma = (label_number(label, comma) for comma in (False, True))
        if by_point is not None and by_comma is None:
            return False
        is_decimal |= by_point is None and by_comma is not None
    return is_decimal


def one_spelling(label: str) -> str:
    """Write a whole number without a fraction of zeros: 1.0 and 1 are one label."""
    match = _POINT_ZERO.fullmatch(label)
    return label if match is None else "0" if match[1] == "-0" else match[1]


def alike(labels: Iterable[str]) -> Iterator[str]:
    """Say which classes differ by nothing that a reader sees, or by case: they stay apart."""
    counts = Counter(labels)
    groups = defaultdict(list)
    for label in sorted(counts):
        groups[_looks(label)].append(label)
    alike = [names for names in groups.values() if len(names) > 1]
    for names in alike[:MOST_ALIKE]:
        listed = ", ".join(f"{_visible(name)} {counts[name]}" for name in names)
        yield (
            f"labels that differ only by case, spaces, invisible characters or Unicode form are "
            f"classes of their own: {listed}"
        )
    if len(alike) > MOST_ALIKE:
        yield f"labels that look alike: {len(alike) - MOST_ALIKE} more groups"


def _looks(label: str) -> str:
    folded = unicodedata.normalize("NFKC", label).casefold()
    seen = "".join(c for c in folded if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    return " ".join(unicodedata.normalize("NFKC", seen).split())


def _visible(label: str) -> str:
    """Quote a label; what looks like another character is written as its number."""
    is_plain = unicodedata.normalize("NFKC", label) == label
    return short(label) if is_plain else ascii(label[:60])
