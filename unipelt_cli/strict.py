"""Parse JSON and TOML that anybody may have written: what is odd is refused, never guessed.

The standard parsers keep the last of two equal keys, take NaN and infinities, recurse as deep as
a text nests, and one takes memory by the square. Each of these ends as a ValueError.
"""

import json
import math
import re
import tomllib
from typing import Any, NoReturn

# Manifests, tokenizers and headers are far below each of these.
LARGEST_TEXT = 256 * 2**20
DEEPEST = 64
MOST_DIGITS = 300
MOST_BITS = 996  # 300 digits
LARGEST_SETTINGS = 100_000
MOST_DOTS = 100  # of a line: the parser's memory grows with the square of a dotted key's parts
# Every quantifier is possessive, and a string may lack its end: no text makes these look twice.
_JSON_PART = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse_json(text: str | bytes) -> Any:
    """Parse one JSON value; raise ValueError, with the reason in plain words, for what is not one.

    Bytes are UTF-8. Refused besides malformed text: a key twice in one object, NaN and infinities,
    numbers no float can hold, more than 64 levels, more than 256 MB. Escaped halves of surrogate
    pairs are let through: a path that is not UTF-8 is recorded with them.
    """
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"larger than {LARGEST_TEXT // 2**20} MB")
    if isinstance(text, bytes):
        text = _decoded(text)
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(_JSON_PART, text)
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark")
    return _DECODER.decode(text)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raise ValueError, with the reason in plain words, for what is not TOML.

    Refused besides malformed text: more than 64 levels, integers of more than 300 digits, a line
    with more than 100 dots, more than 100 kB.
    """
    if len(text) > LARGEST_SETTINGS:
        raise ValueError(f"larger than {LARGEST_SETTINGS // 1000} kB")
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MOST_DOTS:
            raise ValueError(f"line {number} has more than {MOST_DOTS} dots")
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        if isinstance(part, int) and part.bit_length() > MOST_BITS:
            raise ValueError(f"a number of more than {MOST_DIGITS} digits")
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        waiting += [(own, depth + 1) for own in inner]
    return value


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise ValueError(f"not UTF-8 ({what})") from None


def _check_depth(parts: re.Pattern[str], text: str) -> None:
    """Raise ValueError where brackets, among strings that may hold some, nest too deeply."""
    depth = 0
    for match in parts.finditer(text):
        start = text[match.start()]
        if start in "[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} levels deep")
        elif start in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {_short(key)} is there twice")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_constant=_refuse_constant,
    parse_int=_integer,
    parse_float=_float,
)


def _short(key: str) -> str:
    return repr(key if len(key) <= 60 else key[:57] + "...")
