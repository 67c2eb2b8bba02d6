"""Parse JSON and TOML that anybody may have written: what is odd is refused, never guessed.

The standard parsers keep the last of two equal keys, take NaN and integers of any length, and
recurse, or take time by the square, as deep as a text nests. Each of these ends as a ValueError.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable
from typing import Any, NoReturn

from unipelt_cli.text import short

# Manifests, tokenizers and headers are far below each of these.
LARGEST_TEXT = 256 * 2**20
DEEPEST = 64
MOST_DIGITS = 300
# Every quantifier is possessive, and a string may lack its end: no text makes these look twice.
_JSON_PART = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_TOML_QUOTED = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+(?:"{3,5}+)?'
    r"|'''(?:[^']++|'(?!''))*+(?:'{3,5}+)?"
    r'|"(?:[^"\\\n]++|\\.)*+"?'
    r"|'[^'\n]*+'?|#[^\n]*+",
    re.DOTALL,
)
_DOTTED = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{DEEPEST}}}")
_BRACKET = re.compile(r"[\[\]{}]")


def parse_json(text: str | bytes, *, takes_constants: bool = False) -> Any:
    """Parse one JSON value; raise ValueError, with the reason in plain words, for what is not one.

    Bytes are UTF-8. Refused besides malformed text: a key twice in one object, NaN and infinities,
    numbers no float can hold, more than 64 levels, more than 256 MB. Escaped halves of surrogate
    pairs are let through: a path that is not UTF-8 is recorded with them. With `takes_constants`
    NaN and infinities become floats, for whoever looks only at some of an object's values.
    """
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"larger than {LARGEST_TEXT // 2**20} MB")
    if isinstance(text, bytes):
        text = _decoded(text)
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(_JSON_PART, text)
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark")
    return (_ROW_DECODER if takes_constants else _DECODER).decode(text)


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raise ValueError, with the reason in plain words, for what is not.

    Refused besides malformed text: integers of more than TOML's 64 bits, more than 64 levels of
    brackets or of dotted keys, more than 256 MB.
    """
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"larger than {LARGEST_TEXT // 2**20} MB")
    bare = _TOML_QUOTED.sub("_", text)
    _check_depth(_BRACKET, bare)
    if _DOTTED.search(bare):
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise ValueError("an integer of more than 64 bits") from None
    waiting: list[Any] = [parsed]
    while waiting:
        match waiting.pop():
            case int() as number if not -(2**63) <= number < 2**63:
                raise ValueError("an integer of more than 64 bits")
            case dict() as table:
                waiting += table.values()
            case list() as values:
                waiting += values
    return parsed


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
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {short(key)} is there twice")
            seen.add(key)
    return result


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


def _decoder(parse_constant: Callable[[str], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object,
        parse_constant=parse_constant,
        parse_int=_integer,
        parse_float=_float,
    )


_DECODER, _ROW_DECODER = _decoder(_refuse_constant), _decoder(float)
