"""JSON objects that lines do not part: those of an array, or that follow each other somehow."""

import re
from collections.abc import Iterable, Iterator

from unipelt_cli.data.text_files import decoded_lines
from unipelt_cli.errors import DataError
from unipelt_cli.files.strict import parse_json
from unipelt_cli.text import short

GIVE_OBJECTS = "give an array of objects, or write one JSON object on each line"

_TOKEN = re.compile(r'"((?:[^"\\]++|\\.)*+)("?)|[\[\]{}]', re.DOTALL)
_REST = re.compile(r'((?:[^"\\]++|\\.)*+)("?)', re.DOTALL)


def objects(origin: str, parts: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield the objects of a JSON array, or that follow each other, with the lines they begin on.

    `parts` are numbered pieces of text that end where a brace or a line does; no more than one
    object is held. Raises DataError for anything but objects, and for one above LONGEST_LINE.
    """
    gaps = _Gaps(origin)
    held: list[str] = []
    depth = size = begun = number = 0
    in_string = False
    for number, text in parts:
        start = position = 0
        while match := (_REST.match if in_string else _TOKEN.search)(text, position):
            position = match.end()
            if match[2] is not None:
                in_string = not match[2]
                if in_string:
                    break
                continue
            mark = match[0]
            if mark == "{" and not depth:
                gaps.check("".join([*held, text[start : position - 1]]), number)
                held, size, start, begun, depth = [], 0, position - 1, number, 1
            elif depth:
                depth += 1 if mark in "[{" else -1
                if not depth:
                    yield begun, "".join([*held, text[start:position]])
                    held, size, start = [], 0, position
        held.append(text[start:])
        size += len(held[-1])
        if size > decoded_lines.LONGEST_LINE:
            what = f"a value of more than {decoded_lines.LONGEST_LINE} characters"
            raise DataError(f"{origin}, line {begun or number}: {what}", GIVE_OBJECTS)
    if depth:
        yield begun, "".join(held)
    else:
        gaps.check("".join(held), number, is_end=True)


class _Gaps:
    """What stands around objects: of an array its brackets and commas, or nothing but blanks."""

    def __init__(self, origin: str) -> None:
        self.origin, self.is_array, self.is_first = origin, False, True

    def check(self, gap: str, line: int, is_end: bool = False) -> None:
        """Raise DataError for a gap that should not be as it is."""
        bare = gap.strip()
        if self.is_first and is_end and "".join(bare.split()) == "[]":
            raise DataError(f"{self.origin}: an empty JSON array", "give one with labelled rows")
        expected = "" if not self.is_array else "]" if is_end else ","
        if self.is_first:
            self.is_array, self.is_first = bare == "[", False
            expected = "[" if self.is_array else ""
        if bare == expected:
            return
        where = f"{self.origin}, line {line}"
        for value in (bare, bare.lstrip("[,").rstrip("],")):
            try:
                kind = type(parse_json(value)).__name__
            except ValueError:
                continue
            raise DataError(f"{where}: not an object but {kind}", GIVE_OBJECTS)
        what = "the array does not end" if is_end and not bare else f"{short(bare)} between"
        raise DataError(f"{where}: malformed JSON ({what})", GIVE_OBJECTS)
