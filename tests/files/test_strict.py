"""The JSON of strangers is read as any other, or refused with a plain reason; it never hangs."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unipelt_cli.files.strict import DEEPEST, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(derandomize=True, deadline=None, database=None)
@given(VALUES.filter(lambda value: "inf" not in repr(value)), st.sampled_from([None, 2]))
def test_what_is_written_comes_back(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert parse_json(text) == parse_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ("{} {}", "Extra data: line 1 column 4 (char 3)"),
        ("\ufeff1", "it starts with a byte order mark"),
        (b"\xef\xbb\xbf1", "it starts with a byte order mark"),
        (b'"a\xff"', "not UTF-8 (byte 0xff at offset 2)"),
        ("1".encode("utf-16"), "not UTF-8 (byte 0xff at offset 0)"),
        ('[{"a": 1, "b": 2, "a": 3}]', "key 'a' is there twice"),
        ("[NaN]", "NaN is not a number of JSON"),
        ("-Infinity", "-Infinity is not a number of JSON"),
        ("-1e999", "the number -1e999 is too large"),
        ("-" + "9" * 301, "a number of 301 digits"),
        ("9" * 5000, "a number of 5000 digits"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested more than 64 levels deep"),
        ('{"[":' * 100_000, "nested more than 64 levels deep"),
    ],
    ids=range(14),
)
def test_what_is_odd_is_refused_in_plain_words(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_json(text)
    assert str(caught.value) == reason


def test_depth_is_that_of_brackets_outside_of_strings() -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json('["\\"' + "[" * 1000 + '"]') == ['"' + "[" * 1000]
    assert parse_json("[" + "[]," * 1000 + "[]]") == [[]] * 1001


@pytest.mark.parametrize("part", ['\\"', '"\\', "\\", '"', '["', "[]", '"a'])
def test_no_text_takes_time_by_the_square(part: str) -> None:
    text = '["' + "[" * DEEPEST + part * 1_000_000
    began = time.perf_counter()
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)
    assert time.perf_counter() - began < 5
