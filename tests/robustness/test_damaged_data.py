"""Whatever bytes are there, reading gives checked rows or settings, or two plain sentences.

A test of many cases holds them to least numbers of both, since one that only ever accepts or
refuses shows nothing.
"""

import gzip
import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.command import error_of
from support.fuzzing import tell

from unipelt_cli.config.experiment import resolve as experiment_resolve
from unipelt_cli.config.presets import read_preset
from unipelt_cli.config.sections import SECTIONS, DataSettings
from unipelt_cli.config.toml import dump, parse_assignment
from unipelt_cli.data import cells, preparation, readers
from unipelt_cli.data.manifest import digest_rows
from unipelt_cli.data.prepared_directory import Prepared, load_prepared, save_prepared
from unipelt_cli.data.splits import SPLITS
from unipelt_cli.data.text_files import decoded_lines
from unipelt_cli.data.unusable import windows_of_texts
from unipelt_cli.errors import UnipeltError

MEGABYTE = 2**20
SECONDS = 10
PROPERTY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Hang(BaseException):
    """A case took too long; no handler of errors must take it for one."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(read: Callable[[], Any]) -> str | None:
    """Read; return None, or the message. Anything but a result or a UnipeltError is a failure."""
    with limited():
        try:
            read()
        except UnipeltError as error:
            for sentence in (error.message, error.hint):
                assert sentence.strip()
                assert len(sentence) < 10_000
            return error.message
    return None


def check_outcomes(messages: list[str | None], accepted: int, refused: int) -> None:
    """Check that of many cases so many at least were accepted, and so many refused."""
    taken = messages.count(None)
    tell("cases", Counter(accepted=taken, refused=len(messages) - taken))
    assert taken >= accepted
    assert len(messages) - taken >= refused


def check_rows(prepared: Prepared) -> None:
    """Assert that rows are what the rest of the program takes them for."""
    task = prepared.task
    assert prepared.splits.keys() == prepared.manifest["splits"].keys()
    assert {"train"} <= prepared.splits.keys() <= set(SPLITS)  # folds leave no other to hold
    for split in prepared.splits:
        rows = prepared.splits[split][:]
        assert len(rows["row"]) == prepared.manifest["splits"][split]["rows"] > 0
        for column in task.text:
            assert all(isinstance(text, str) and text.strip() for text in rows[column])
            " ".join(rows[column]).encode()
        if task.is_regression:
            assert all(abs(label) <= cells.LARGEST_VALUE for label in rows["label"])
        else:
            assert all(0 <= label < len(task.labels) for label in rows["label"])


def prepare_file(path: Path) -> None:
    own = {"text": "text", "label": "label"}
    check_rows(preparation.prepare(DataSettings(train_file=str(path), **own)))


def read_content(kind: str, folder: Path, content: bytes) -> str | None:
    path = folder / f"a.{kind}"
    path.write_bytes(content)
    return attempt(lambda: prepare_file(path))


# Mutations of valid files

ROWS = [
    (f"message number {n}, which is café {n * 37 % 11}", ("bad", "good")[n % 2]) for n in range(24)
]
HUGE = [
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 3,
    b"\xff" * 3 + b"\x7f",
    b"\0" * 8,
    b"\xfe\xff\xff\xff\x0f",
]
ODD = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\r",
        b"\r\n",
        b"\n",
        b"\t",
        b'"',
        b"'",
        b",",
        b"\\",
    ),
    *(
        b"NaN",
        b"Infinity",
        b"-1e999",
        b"9" * 400,
        b"9" * 5000,
        b"[" * 2000,
        b"{" * 2000,
        b'{"a":' * 500,
    ),
    *(
        b"\\ud800",
        b"\xed\xa0\x80",
        "\u2028".encode(),
        b"\x1b[31m",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"=",
    ),
]


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Damage a file in one to three places, as transfers, editors and attackers do."""
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = chance.randrange(len(damaged) + 1)
        stop = min(len(damaged), place + chance.choice((1, 2, 8, 60)))
        match chance.randrange(8):
            case 0 if place < len(damaged):
                damaged[place] ^= 1 << chance.randrange(8)
            case 1 if place:
                del damaged[place:]
            case 2:
                damaged[place:place] = chance.choice(ODD)
            case 3:
                damaged[place:place] = damaged[place:stop] * chance.choice((1, 1, 50))
            case 4:
                del damaged[place:stop]
            case 5:
                damaged[place : place + 8] = chance.choice(HUGE)
            case 6:
                damaged[place:stop] = chance.randbytes(stop - place)
            case _:
                other = chance.randrange(len(damaged) + 1)
                damaged[place:stop] = damaged[other : other + stop - place]
    return bytes(damaged)


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue().to_pybytes())


def table(rows: list[tuple[str, str]] = ROWS) -> pa.Table:
    texts, labels = zip(*rows, strict=True)
    return pa.table({"text": pa.array(texts), "label": pa.array(labels)})


DELTA = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
QUOTED = [*ROWS[:-1], ('a "quoted" piece\n\ttext', "bad")]
QUOTED_TSV = "text\tlabel\n" + "".join(
    '"{}"\t"{}"\n'.format(text.replace('"', '""'), label) for text, label in QUOTED
)
OBJECTS = [{"text": text, "label": label, "n": [1.5]} for text, label in ROWS]
VALID: dict[str, list[bytes]] = {
    "csv": [
        ("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS)).encode(),
        ("\ufefflabel,text\r\n" + "".join(f"{n / 4},row {n}\r\n" for n in range(20))).encode(),
    ],
    "tsv": [("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)).encode()],
    "jsonl": [
        "".join(json.dumps({"text": a, "label": b, "n": [1.5]}) + "\n" for a, b in ROWS).encode()
    ],
    "json": [json.dumps(OBJECTS).encode(), json.dumps(OBJECTS, indent=1).encode()],
    "quoted.tsv": [QUOTED_TSV.encode(), QUOTED_TSV.replace('""', '\\"').encode("utf-16")],
    "csv.gz": [
        gzip.compress(QUOTED_TSV.encode()),
        gzip.compress(b"sep=;\ntext;label\n" + b"a;b\nc;d\n" * 9),
    ],
    "parquet": [
        parquet(table()),
        parquet(table(), compression="zstd", data_page_version="2.0"),
        parquet(table(), compression="gzip", row_group_size=10, write_statistics=False),
        parquet(table(), compression="none", **DELTA),
    ],
}
MUTATIONS = {
    "csv": (330, 60, 180),
    "tsv": (220, 60, 80),
    "jsonl": (330, 30, 200),
    "json": (160, 12, 100),
    "quoted.tsv": (160, 30, 60),
    "csv.gz": (120, 0, 90),
    "parquet": (520, 20, 350),
}
"""How many to make of a kind, and how many of these are at least accepted and refused."""


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_damaged_file_gives_rows_or_an_error(kind: str, tmp_path: Path) -> None:
    chance, valid = random.Random(f"damaged {kind}"), VALID[kind]
    for content in valid:
        assert read_content(kind, tmp_path, content) is None
    count, accepted, refused = MUTATIONS[kind]
    damaged = [mutate(valid[number % len(valid)], chance) for number in range(count)]
    messages = [read_content(kind, tmp_path, content) for content in damaged]
    check_outcomes(messages, accepted, refused)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_cut_anywhere_gives_rows_or_an_error(kind: str, tmp_path: Path) -> None:
    content = VALID[kind][0]
    cut = [content[:stop] for stop in range(0, len(content), len(content) // 40)]
    assert read_content(kind, tmp_path, content) is None
    check_outcomes([read_content(kind, tmp_path, part) for part in cut], 0, 30)


CELLS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "NaN", "inf", "1e999", "9" * 400, "9" * 5000, "1_0.5", "\0", "٣"]),
)


def test_any_cells_give_rows_or_an_error(tmp_path: Path) -> None:
    messages = []

    @PROPERTY
    @given(
        rows=st.lists(st.tuples(CELLS, CELLS), max_size=6),
        end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
        encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"]),
        kind=st.sampled_from(["csv", "tsv"]),
    )
    def read(rows: list[tuple[str, str]], end: str, encoding: str, kind: str) -> None:
        separator = "," if kind == "csv" else "\t"
        whole = [("text", "label"), *ROWS[:8], *rows]
        content = end.join(separator.join(row) for row in whole).encode(encoding, "replace")
        messages.append(read_content(kind, tmp_path, content))

    read()
    check_outcomes(messages, 5, 50)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | CELLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELLS, inner, max_size=3),
    max_leaves=8,
)


OBJECTS = st.dictionaries(st.sampled_from(["text", "label", "x"]), VALUES)


def test_any_json_gives_rows_or_an_error(tmp_path: Path) -> None:
    messages = []

    @PROPERTY
    @given(more=st.lists(OBJECTS, max_size=4))
    def read(more: list[Any]) -> None:
        rows = [{"text": text, "label": label} for text, label in ROWS[:6]] + more
        content = "\n".join(map(json.dumps, rows)).encode()
        messages.append(read_content("jsonl", tmp_path, content))

    read()
    check_outcomes(messages, 1, 50)


@PROPERTY
@given(kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]), content=st.binary(max_size=80))
def test_any_bytes_are_refused(kind: str, content: bytes, tmp_path: Path) -> None:
    assert read_content(kind, tmp_path, content) is not None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a", "label": 1, "label": 2}', "key 'label' is there twice"),
        ('{"text": "a", "label": 1e400}', "the number 1e400 is too large"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "a number of 5000 digits"),
        ('{"text": "a", "label": 1, "x": ' + "[" * 100 + "]" * 100 + "}", "nested more than 64"),
        ('{"text": "\\ud800", "label": 1}', "surrogates not allowed"),
    ],
)
def test_json_of_odd_meaning_is_refused_with_its_line(
    tmp_path: Path, line: str, reason: str
) -> None:
    content = VALID["jsonl"][0] + line.encode()
    message = read_content("jsonl", tmp_path, content)
    assert message is not None
    assert f"line {len(ROWS) + 1}: malformed JSON (" in message
    assert reason in message


def test_lines_of_stdin_give_texts_or_an_error() -> None:
    chance = random.Random("stdin")
    plain = "\n".join(text for text, _ in ROWS).encode()
    paired = b"\n".join(line + b"\t" + line for line in plain.split(b"\n"))
    objects = VALID["jsonl"][0]

    def read(content: bytes, columns: list[str]) -> None:
        windows = readers.read_input(io.BytesIO(content), columns)
        for found in windows_of_texts(windows, [columns]):
            for texts in zip(*found.texts.values(), strict=True):
                assert all(isinstance(text, str) for text in texts)
                assert any(text.strip() for text in texts)

    tables = [
        content for kind in ("csv", "json", "quoted.tsv", "csv.gz") for content in VALID[kind]
    ]
    kinds = [(plain, ["text"]), (paired, ["a", "b"]), (objects, ["text"])]
    messages = []
    for content, columns in [*kinds, *((content, ["text"]) for content in tables)]:
        for _ in range(90):
            damaged = mutate(content, chance)
            messages.append(attempt(lambda: read(damaged, columns)))  # noqa: B023
    check_outcomes(messages, 150, 500)


# Types and sizes that Parquet can declare

ODD_COLUMNS = {
    "list": pa.array([["a"]] * 24),
    "large list": pa.array([["a"]] * 24, pa.large_list(pa.string())),
    "fixed list": pa.array([["a"]] * 24, pa.list_(pa.string(), 1)),
    "struct": pa.array([{"a": "b"}] * 24),
    "map": pa.array([[("a", "b")]] * 24, pa.map_(pa.string(), pa.string())),
    "decimal": pa.array(["1.5"] * 24).cast(pa.decimal128(9, 2)),
    "decimal256": pa.array(["1.5"] * 24).cast(pa.decimal256(60, 2)),
    "timestamp": pa.array([2**62] * 24, pa.timestamp("ns", "No/Where")),
    "seconds": pa.array([2**62] * 24, pa.timestamp("ms")),
    "date": pa.array([2**31 - 1] * 24, pa.date32()),
    "time": pa.array([86_400_000_001] * 24, pa.time64("us")),
    "duration": pa.array([2**63 - 1] * 24, pa.duration("s")),
    "binary": pa.array([b"a"] * 24),
    "fixed binary": pa.array([b"ab"] * 24, pa.binary(2)),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16] * 24, pa.binary(16))),
    "bool": pa.array([True] * 24),
    "null": pa.nulls(24),
    "missing": pa.array(["a"] * 23 + [None]),
    "nan": pa.array([float("nan")] * 24),
    "float16": pa.array(np.array([np.inf] * 24, np.float16)),
    "dictionary of time": pa.array([1] * 24, pa.timestamp("ns")).dictionary_encode(),
    "large string": pa.array([text for text, _ in ROWS], pa.large_string()),
    "string view": pa.array([text for text, _ in ROWS], pa.string_view()),
    "dictionary": pa.array([text for text, _ in ROWS]).dictionary_encode(),
    "integer": pa.array([2**64 - 1] * 24, pa.uint64()),
    "float": pa.array([0.1] * 24, pa.float32()),
}
USABLE = {"large string", "string view", "dictionary", "integer", "float"}


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_parquet_types_are_read_as_text_or_refused_by_name(tmp_path: Path, name: str) -> None:
    labels = table()["label"]
    content = parquet(pa.table({"text": ODD_COLUMNS[name], "label": labels}))
    message = read_content("parquet", tmp_path, content)
    assert (message is None) == (name in USABLE)
    assert message is None or "text" in message
    as_label = parquet(pa.table({"text": table()["text"], "label": ODD_COLUMNS[name]}))
    read_content("parquet", tmp_path, as_label)
    # A column that nobody asks for may hold anything.
    beside = parquet(table().append_column("x", ODD_COLUMNS[name]))
    assert read_content("parquet", tmp_path, beside) is None


def test_names_of_parquet_columns_do_not_mix(tmp_path: Path) -> None:
    columns = {"text.a": pa.array([["x"]] * 24), "text": table()["text"]}
    content = parquet(pa.table({**columns, "label": table()["label"], "label.b": pa.nulls(24)}))
    assert read_content("parquet", tmp_path, content) is None
    twice = pa.Table.from_arrays([*table().columns, table()["text"]], ["text", "label", "text"])
    message = read_content("parquet", tmp_path, parquet(twice))
    assert message is not None
    assert message.endswith("2 columns are called 'text'")


def lying_page(size: int) -> bytes:
    """Write a first page whose header says that it unpacks to `size` bytes."""
    rows = table().select(["label", "text"])
    content = parquet(rows, compression="zstd", use_dictionary=False, write_statistics=False)
    # Type 0 in field 1, then the size as a zigzag varint of two bytes in field 2.
    assert content[4:7] == b"\x15\x00\x15"
    assert content[7] >= 128 > content[8]
    varint, rest = bytearray(), size << 1
    while rest > 127:
        varint.append(rest & 127 | 128)
        rest >>= 7
    return content[:7] + bytes([*varint, rest]) + content[9:]


def pointers(text: str, count: int) -> pa.Table:
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))
    return pa.table({"text": shared, "label": pa.array(np.arange(count) % 2)})


def plain_pages(pieces: int, size: int, **options: Any) -> bytes:
    text = pa.array([f"{n}" + "x" * size for n in range(pieces)])
    return parquet(pa.table({"text": text, "label": np.arange(pieces) % 2}), **options)


def declared_rows(count: int) -> bytes:
    """Write runs of one value: a few bytes hold any number of rows."""
    rows = pa.table({"text": pa.repeat("a", count), "label": pa.repeat(1, count)})
    return parquet(rows, compression="zstd", row_group_size=count)


BOMBS: dict[str, Callable[[], bytes]] = {
    "rows": lambda: declared_rows(4_000_000),
    "zstd": lambda: plain_pages(64, MEGABYTE, compression="zstd", use_dictionary=False),
    "gzip": lambda: plain_pages(64, MEGABYTE, compression="gzip", use_dictionary=False),
    "brotli": lambda: plain_pages(64, MEGABYTE, compression="brotli", use_dictionary=False),
    "dictionary page": lambda: plain_pages(
        64, MEGABYTE, compression="zstd", dictionary_pagesize_limit=2**30
    ),
    "pointers": lambda: parquet(pointers("x" * MEGABYTE, 50_000), compression="zstd"),
    "plain pointers": lambda: parquet(
        pointers("x" * MEGABYTE, 50_000), compression="zstd", store_schema=False
    ),
    "prefixes": lambda: plain_pages(2000, 50_000, compression="zstd", **DELTA),
    "lying page": lambda: lying_page(2**31 - 1),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, make in BOMBS.items():
        (folder / f"{name}.parquet").write_bytes(make())
    return {name: folder / f"{name}.parquet" for name in BOMBS}


def test_a_parquet_file_that_unpacks_beyond_its_size_is_refused(bombs: dict[str, Path]) -> None:
    for name, path in bombs.items():
        message = attempt(lambda: prepare_file(path))  # noqa: B023
        assert message is not None, name
        assert "it unpacks to" in message or "it declares" in message, message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much it was")
def test_refusing_costs_little_memory(bombs: dict[str, Path]) -> None:
    """In a process of its own, whose largest size is that of nothing else."""
    code = (
        "import re, sys\n"
        "from unipelt_cli.data.preparation import labelled_rows\n"
        "from unipelt_cli.errors import DataError\n"
        "from unipelt_cli.tasks import Task\n"
        "from pathlib import Path\n"
        "task = Task('a', ('text',), ('0', '1'), 'accuracy')\n"
        "status = Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])\n"
        "list(labelled_rows(Path(sys.argv[1]), task, 'label'))\n"
        "for path in sys.argv[2:]:\n"
        "    before = peak()\n"
        "    try:\n"
        "        list(labelled_rows(Path(path), task, 'label'))\n"
        "        print('accepted')\n"
        "    except DataError:\n"
        "        print(peak() - before)\n"
    )
    valid = bombs["rows"].with_name("valid.parquet")
    valid.write_bytes(parquet(pa.table({"text": ["a", "b"], "label": [0, 1]})))
    paths = [str(valid), *map(str, bombs.values())]
    command = [sys.executable, "-c", code, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    grown = dict(zip(bombs, map(int, result.stdout.split()), strict=True))
    for name, kilobytes in grown.items():
        allowed = 64 * MEGABYTE + 200 * bombs[name].stat().st_size
        assert kilobytes * 1024 < allowed, (name, kilobytes)


POOLS: list[pa.MemoryPool] = []  # what is freed later is given back to the one that it came from


@contextmanager
def measured() -> Iterator[list[int]]:
    """Give, at the block's end, the most bytes that Python and Arrow held inside of it."""
    peaks: list[int] = []
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield peaks
        peaks += [tracemalloc.get_traced_memory()[1], pool.max_memory()]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


def many(line: Callable[[int], str], count: int, header: str = "") -> bytes:
    return (header + "".join(line(n) + "\n" for n in range(count))).encode()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("csv", many(lambda n: f"{n},{n % 2}", 40_000, "text,label\n")),
        ("tsv", many(lambda n: "\t", 300_000, "text\tlabel\n")),
        ("tsv", many(lambda n: "", 300_000, "text\tlabel\n") + b"a\tb"),
        ("csv", many(lambda n: "", 300_000, "text,label\n") + b"a,b"),
        ("csv", b"a," * 200_000 + b"\n1"),
        ("csv", b'text,label\n"' + b"a\n" * 300_000),
        ("jsonl", b"{}\n" * 100_000),
        ("jsonl", many(lambda n: f'{{"k{n}": 1}}', 30_000)),
        ("jsonl", b'{"text": [' + b"[]," * 200_000 + b"[]]}"),
        ("jsonl", b'{"text": "a", "x": [' + b"{}," * 200_000 + b"{}]}"),
        ("jsonl", b'{"x":' * 100_000),
    ],
    ids=range(11),
)
def test_reading_takes_a_small_multiple_of_the_file(
    tmp_path: Path, kind: str, content: bytes
) -> None:
    with measured() as peaks:
        read_content(kind, tmp_path, content)
    python, arrow = peaks
    assert python < 60 * len(content) + 4 * MEGABYTE
    assert arrow < 10 * len(content) + 4 * MEGABYTE


# What is no file


def special(folder: Path, kind: str, name: str) -> Path:
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.symlink_to(kind)
    return path


SPECIAL = ["pipe", "folder", "sparse", "loop", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/kmsg"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "txt"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, suffix: str) -> None:
    path = special(tmp_path, kind, f"a.{suffix}")
    began = time.perf_counter()
    assert attempt(lambda: prepare_file(path)) is not None
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "/proc/kmsg"])
def test_settings_that_are_no_file_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = special(tmp_path, kind, "a.toml")
    assert attempt(lambda: read_preset(str(path))) is not None


@pytest.mark.parametrize("kind", [None, "lines", "jsonl", "csv", "tsv"])
def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    monkeypatch.setattr(decoded_lines, "LONGEST_LINE", 5 * MEGABYTE)
    with open("/dev/zero", "rb") as endless, measured() as peaks:  # noqa: PTH123
        windows = readers.read_input(endless, ["text"], kind)
        said = attempt(lambda: list(windows))
    assert said is not None
    assert said.startswith("stdin, line 1: longer than 5242880 bytes")
    assert peaks[0] < 20 * MEGABYTE


@pytest.mark.parametrize("kind", ["lines", "jsonl", "csv"])
def test_endless_empty_lines_and_quotes_are_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(decoded_lines, "LONGEST_LINE", MEGABYTE // 4)
    monkeypatch.setattr(decoded_lines, "MOST_EMPTY_LINES", 2**17)
    repeated, first = (b"a\n", b'text\n"') if kind == "csv" else (b"\n", b"\n")
    pieces = itertools.chain([first], itertools.repeat(repeated * 2**15))
    monkeypatch.setattr(
        decoded_lines, "of_pipe", lambda *_: decoded_lines.Lines("stdin", lambda: next(pieces))
    )
    with measured() as peaks:
        windows = readers.read_input(io.BytesIO(), ["text"], kind)
        said = attempt(lambda: list(windows))
    assert said is not None
    assert ("more than 131072 lines are empty" in said) == (kind != "csv"), said
    assert peaks[0] < 10 * MEGABYTE


# Prepared directories


@pytest.fixture
def ready(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a prepared directory that a test may damage: of three splits, or with folds of one."""
    (tmp_path / "own.csv").write_bytes(VALID["csv"][0])
    file, folds = str(tmp_path / "own.csv"), getattr(request, "param", 0)
    own = DataSettings(train_file=file, text="text", label="label", folds=folds)
    save_prepared(preparation.prepare(own), tmp_path / "ready")
    return tmp_path / "ready"


def load(directory: Path) -> None:
    check_rows(load_prepared(directory))
    [manifest] = preparation.read_drawn(DataSettings(prepared=str(directory)))
    assert manifest["splits"]["train"]["rows"]


def seal(manifest: dict[str, Any]) -> bytes:
    """Write a manifest with the checksum that a careful forger would give it."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    total = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
    return json.dumps(content | {"checksum": total}).encode()


@pytest.mark.parametrize("name", ["manifest.json", "train.arrow", "test.arrow"])
def test_a_damaged_prepared_file_gives_rows_or_an_error(ready: Path, name: str) -> None:
    chance = random.Random(f"damaged {name}")
    content = (ready / name).read_bytes()
    cut = [content[:stop] for stop in range(0, len(content), len(content) // 30)]
    messages = []
    for damaged in [*(mutate(content, chance) for _ in range(160)), *cut]:
        (ready / name).write_bytes(damaged)
        messages.append(attempt(lambda: load(ready)))
    check_outcomes(messages, 2, 140)


FORGED: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        2**63,
        10**290,
        0.5,
        1e300,
        "",
        "x",
        "../../x",
        "/etc/passwd",
        "\0",
        "\ud800",
    ),
    *(
        [],
        {},
        [None],
        [[]],
        ["a", "a"],
        ["text", "label"],
        {"a": None},
        {"a": "b"},
        [-1],
        [10**200],
    ),
]


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every field of nested dictionaries, and to the first item of lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*place, key)
            yield from places(inner, (*place, key))
    elif isinstance(value, list) and value:
        yield (*place, 0)


@pytest.mark.parametrize("ready", [0, "auto"], ids=["cut", "folds"], indirect=True)
def test_a_forged_manifest_gives_rows_or_an_error(ready: Path) -> None:
    text = (ready / "manifest.json").read_text()
    messages = []

    def forge(change: Callable[[Any], None], *place: Any) -> None:
        manifest = holder = json.loads(text)
        for key in place[:-1]:
            holder = holder[key]
        change(holder)
        (ready / "manifest.json").write_bytes(seal(manifest))
        messages.append(attempt(lambda: load(ready)))

    # The three splits are alike: one of them in full, of the others what is theirs alone.
    ways = [way for way in places(json.loads(text)) if way[:1] != ("checksum",)]
    ways = [way for way in ways if len(way) < 3 or way[1] == "train"]
    assert len(ways) >= 40
    for way in ways:
        forge(lambda holder: holder.pop(way[-1]), *way)  # noqa: B023
        for value in FORGED:
            forge(lambda holder: holder.__setitem__(way[-1], value), *way)  # noqa: B023
        if not isinstance(way[-1], int):
            forge(lambda holder: holder.__setitem__("more", 1), *way)
    check_outcomes(messages, 80, 700)


def test_equal_keys_in_a_manifest_are_refused_by_name(ready: Path) -> None:
    text = (ready / "manifest.json").read_text()
    (ready / "manifest.json").write_text(text.replace("{", '{"task": "other",', 1))
    message = attempt(lambda: load(ready))
    assert message == f"{ready}: damaged (manifest.json: key 'task' is there twice)"


def forge_split(ready: Path, columns: pa.Table, **options: Any) -> None:
    """Replace the train rows, with the digest and ids that belong to the new ones if they can."""
    with pa.OSFile(str(ready / "train.arrow"), "wb") as file:
        writing = pa.ipc.IpcWriteOptions(**options)
        with pa.ipc.new_stream(file, columns.schema, options=writing) as stream:
            stream.write_table(columns)
    manifest = json.loads((ready / "manifest.json").read_text())
    recorded = manifest["splits"]["train"]
    recorded["digest"] = digest_rows(cells.as_dataset(columns))
    recorded["row_ids"] = columns["row"].to_pylist()
    recorded["rows"] = len(columns)
    (ready / "manifest.json").write_bytes(seal(manifest))


def split(**changes: Any) -> pa.Table:
    """Return rows as a prepared directory holds them, some columns replaced."""
    columns = {"text": pa.array(["a", "b"]), "label": pa.array([0, 1]), "row": pa.array([5, 6])}
    return pa.table({name: changes.get(name, column) for name, column in columns.items()})


def test_a_split_forged_with_its_digest_is_read_if_its_rows_are_right(ready: Path) -> None:
    forge_split(ready, split())
    assert attempt(lambda: load(ready)) is None


@pytest.mark.parametrize(
    "columns",
    [
        split(label=pa.array([0, 2])),
        split(label=pa.array([-1, 0])),
        split(label=pa.array([None, 0], pa.int64())),
        split(label=pa.array([0.0, 1.0])),
        split(label=pa.array([0, 1], pa.int32())),
        split(text=pa.array(["a", None])),
        split(text=pa.array(["a", "b"], pa.large_string())),
        split(text=pa.array(["a", "b"], pa.string_view())),
        split(text=pa.array(["a", "b"]).dictionary_encode()),
        split(text=pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["a"]))),
        split(text=pa.UnionArray.from_dense(
            pa.array([0, 0], pa.int8()), pa.array([0, 1], pa.int32()), [pa.array(["a", "b"])]
        )),
        split(text=pa.array([["a"], ["b"]])),
        split(text=pa.array([[("a", "b")]] * 2, pa.map_(pa.string(), pa.string()))),
        split(text=pa.nulls(2)),
        split(row=pa.array([5, -6])),
        split(row=pa.array([5, None])),
        split().append_column("more", pa.array([1, 2])),
        split().drop_columns(["text"]).append_column("text", pa.array(["a", "b"])),
        split().slice(0, 0),
        split().rename_columns(["text", "label", "text"]).rename_columns(["other", "label", "row"]),
    ],
    ids=range(20),
)  # fmt: skip
def test_forged_cells_are_refused(ready: Path, columns: pa.Table) -> None:
    try:
        forge_split(ready, columns)
    except (TypeError, ValueError, pa.ArrowException):
        # No digest can be made of such rows: the file alone is replaced.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, columns.schema) as stream:
            stream.write_table(columns)
        (ready / "train.arrow").write_bytes(sink.getvalue().to_pybytes())
    assert attempt(lambda: load(ready)) is not None


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_arrow_streams_are_refused_unread(ready: Path, compression: str) -> None:
    bomb = split(text=pa.array(["a" * 40 * MEGABYTE, "b"]))
    forge_split(ready, bomb, compression=compression)
    del bomb
    content = (ready / "train.arrow").read_bytes()
    with measured() as peaks:
        message = attempt(lambda: load(ready))
    assert message is not None
    assert message.endswith("(train.arrow: it holds compressed buffers)")
    assert sum(peaks) < 10 * len(content) + MEGABYTE
    # The length that a buffer of its own gives before its bytes.
    for size in (0, 1, 2**31, 2**62, 2**64 - 1):
        length = (40 * MEGABYTE + 1).to_bytes(8, "little")
        lying = content.replace(length, size.to_bytes(8, "little"))
        assert lying != content
        (ready / "train.arrow").write_bytes(lying)
        assert attempt(lambda: load(ready)) is not None


def test_arrays_that_share_bytes_are_refused() -> None:
    from unipelt_cli.data.parquet import ERRORS
    from unipelt_cli.data.prepared_directory import read_stream

    schema = pa.schema([("text", pa.string()), ("pair", pa.string())])
    texts = pa.array(["a" * 100_000] * 3)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(pa.table({"text": texts, "pair": texts}))
    content = sink.getvalue().to_pybytes()
    assert read_stream(content, schema).num_rows == 3
    # Let the second column's bytes be the first's: their place is in the batch's list of buffers.
    body = pa.ipc.MessageReader.open_stream(pa.BufferReader(content))
    body.read_next_message()
    metadata = body.read_next_message().metadata.to_pybytes()
    place = content.index(metadata) + metadata.rindex((300_000).to_bytes(8, "little")) - 8
    cut = content[:place] + bytes(8) + content[place + 8 :]
    with pytest.raises(ERRORS):
        read_stream(cut[: len(cut) - 300_000], schema)


@pytest.mark.parametrize("name", ["manifest.json", "train.arrow", "dev.arrow"])
def test_a_link_out_of_a_prepared_directory_is_refused(ready: Path, name: str) -> None:
    inside, outside = ready / "kept", ready.parent / f"secret{Path(name).suffix}"
    (ready / name).rename(inside)
    (ready / name).symlink_to(inside)
    assert attempt(lambda: load(ready)) is None
    outside.write_bytes(inside.read_bytes())
    for target in (outside, Path("..") / outside.name, Path("..") / "ready" / ".." / outside.name):
        (ready / name).unlink()
        (ready / name).symlink_to(target)
        message = attempt(lambda: load(ready))
        assert message == f"{ready / name}: a link out of the directory"
    moved = ready.rename(ready.parent / "moved")
    ready.symlink_to(moved)
    (moved / name).unlink()
    (moved / "kept").rename(moved / name)
    assert attempt(lambda: load(ready)) is None


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["manifest.json", "train.arrow"])
def test_what_is_no_file_in_a_prepared_directory_is_refused(
    ready: Path, name: str, kind: str
) -> None:
    (ready / name).unlink()
    special(ready, kind, name)
    assert attempt(lambda: load(ready)) is not None


def test_a_task_of_a_stranger_names_no_place_outside(
    ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ready.parent)
    manifest = json.loads((ready / "manifest.json").read_text())
    manifest["task"] = "../../../outside"
    (ready / "manifest.json").write_bytes(seal(manifest))
    from support.command import invoke

    before = set(ready.parent.parent.iterdir())
    code, _, stderr = invoke("prepare", "--set", f"data.prepared={ready}")
    assert code == 0, stderr
    assert set(ready.parent.parent.iterdir()) == before
    assert [path.parent.name for path in ready.parent.glob("prepared/*/manifest.json")]


# Settings

PRESET = """\
[data]
train_file = "rows.csv"
text = "text"
label = "label"
k = 24
[model]
backbone = 'minilm'
head_dropout = 0.1
[method]
name = "unipelt-apl"
parts = ["adapter", "lora"]
gated = true
[train]
learning_rate = 5e-4
epochs = 3 # few
seed = 0x2a
"""


RTE: tuple[str, dict[str, Any]] = ("", {"data": {"task": "rte"}})


def resolve(path: Path) -> None:
    experiment = experiment_resolve([("", read_preset(str(path)))])
    assert experiment_resolve([("", experiment.settings())]) == experiment
    path.write_text(dump(experiment), encoding="utf-8", errors="strict")
    assert experiment_resolve([("", read_preset(str(path)))]) == experiment


def read_toml(folder: Path, content: bytes) -> str | None:
    path = folder / "a.toml"
    path.write_bytes(content)
    return attempt(lambda: resolve(path))


def test_damaged_settings_are_taken_or_refused(tmp_path: Path) -> None:
    chance = random.Random("damaged toml")
    assert read_toml(tmp_path, PRESET.encode()) is None
    damaged = [mutate(PRESET.encode(), chance) for _ in range(420)]
    cut = [PRESET.encode()[:stop] for stop in range(0, len(PRESET), 7)]
    check_outcomes([read_toml(tmp_path, content) for content in [*damaged, *cut]], 15, 350)


ODD_TOML = [
    *(
        "9" * 400,
        "-" + "9" * 5000,
        "0x" + "f" * 5000,
        "9223372036854775808",
        "nan",
        "-inf",
        "1e999",
    ),
    *(
        "[" * 5000,
        "[" * 5000 + "]" * 5000,
        "{a=" * 5000,
        "{" + "a." * 5000 + "a=1}",
        "[" * 60 + "]" * 60,
    ),
    *(
        "{" + '"a".' * 5000 + "a=1}",
        '["""a"""", ' + "[" * 5000,
        "1979-05-27",
        "07:32:00",
        "true",
        "''",
    ),
    *("[1, 'a']", "[[]]", "{}", "[{}]", '"\\ud800"', '"\\u0000"', "'" + "x" * 100_000 + "'", "1_0"),
]
KEYS = {
    **dict.fromkeys(("data.task", "data.k", "train.clip", "train.seed", "method.reduction"), 2),
    **dict.fromkeys(("data.prepared", "model.backbone"), 5),
    **dict.fromkeys(("data.tasks", "data.kind", "method.name", "method.parts"), 0),
    **dict.fromkeys(("data._fields_set", "data.cls", "method.self", "data.prepared.a"), 0),
    **dict.fromkeys(("method.__dataclass_self__", "other.key", "data"), 0),
}
"""Keys of settings and what is none, and how many of the odd values each takes at least."""


@pytest.mark.parametrize("key", KEYS)
def test_odd_values_of_settings_are_taken_or_refused(tmp_path: Path, key: str) -> None:
    base = 'data.train_file="a.csv"\ndata.text="t"\ndata.label="l"\n'
    messages = []
    for value in ODD_TOML:
        for before in ("", base, 'data.tasks="rte,mrpc"\n'):
            messages.append(read_toml(tmp_path, f"{before}{key} = {value}\n".encode()))

        def assign(value: str = value) -> None:
            experiment_resolve([RTE, ("", parse_assignment(f"{key}={value}"))])

        messages.append(attempt(assign))
    check_outcomes(messages, KEYS[key], 90)


def test_every_key_takes_odd_values_or_refuses_them() -> None:
    values = [2**62, -(2**63), 1e308, -1e308, "", "x" * 10_000, "\0", [], [[]], {}, {"a": {}}, True]
    messages = []
    for section, schema in SECTIONS.items():
        for key in schema.model_fields:
            for value in values:
                layers = [RTE, ("", {section: {key: value}})]
                messages.append(attempt(lambda: experiment_resolve(layers)))  # noqa: B023
    check_outcomes(messages, 25, 400)


def test_any_assignment_is_taken_or_refused() -> None:
    messages = []

    @PROPERTY
    @given(text=st.text(max_size=30), key=st.sampled_from(["train.epochs", "data.task", "x.y"]))
    def assign(text: str, key: str) -> None:
        attempt(lambda: parse_assignment(text))
        for name in (key, "model.backbone"):
            messages.append(
                attempt(
                    lambda: experiment_resolve([RTE, ("", parse_assignment(f"{name}={text}"))])  # noqa: B023
                )
            )

    assign()
    check_outcomes(messages, 60, 60)


def test_a_word_of_several_lines_sets_nothing_else() -> None:
    word = "1\nvalue2 = 3"
    assert parse_assignment(f"train.epochs={word}") == {"train": {"epochs": word}}


@pytest.mark.parametrize(
    "content",
    [
        "[" + "a." * 400_000 + "a]",
        "[" + '"a".' * 200_000 + "a]",
        "a." * 400_000 + "a = 1",
        "x = [" * 150_000,
        "x = {a = " * 100_000,
        "[train]\n" + "".join(f"epoch{n} = 1\n" for n in range(50_000)),
        "".join(f"[train{n}]\n" for n in range(50_000)),
        "x = '''" + "''" * 400_000,
        'x = """' + '\\"' * 400_000,
        "[data]\ntasks = [" + "'rtx'," * 100_000 + "]",
        "a" * 900_000,
        "a = 1 " * 150_000,
        "#" * 900_000,
    ],
    ids=range(13),
)
def test_no_settings_take_time_by_the_square(tmp_path: Path, content: str) -> None:
    began = time.perf_counter()
    assert read_toml(tmp_path, content.encode()) is not None
    assert time.perf_counter() - began < 5


# The command itself

COMMANDS: list[tuple[str, bytes, list[str]]] = [
    *(("a.csv", content, []) for content in (b"", b"\0", b"\xff\xfea", b"text\n1")),
    *(("a.csv", b"text,label\n" + rest, []) for rest in (b'"a,b', b"a\0,\n", b"\r" * 9 + b"a")),
    *(("a.tsv", b"text\tlabel\n" + rest, []) for rest in (b"\xed\xa0\x80", b"\t", b"a\tb\tc")),
    ("a.jsonl", b'{"text": "a", "text": "b", "label": 1}', []),
    ("a.jsonl", b'{"text": NaN, "label": 1}', []),
    ("a.jsonl", b'{"text": "a", "label": Infinity}', []),
    ("a.jsonl", b"[" * 100_000, []),
    ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", []),
    ("a.jsonl", b'{"text": "\\ud800", "label": 1}', []),
    ("a.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1", []),
    ("a.parquet", parquet(pa.table({"text": pa.array([["a"]]), "label": [1]})), []),
    ("a.parquet", lying_page(2**31 - 1), []),
    ("a.parquet", VALID["parquet"][0][:-20], []),
    *(
        ("a.csv", VALID["csv"][0], ["--set", text])
        for text in (
            "data.k=" + "9" * 400,
            "data.k=" + "9" * 5000,
            "data.k=0x" + "f" * 5000,
            "data.k=[" + "[" * 5000,
            "data.k={" + "a." * 5000 + "a=1}",
            "data.k=nan",
            "data.k=-1",
            "data._fields_set=1",
            "data.cls=1",
            "data.prepared=5",
            "data.tasks=0",
            "data.metric=",
            "nothing",
            "data.dev_size=1e999",
            "data.prepared=~nobody-of-this-name/x",
            "data.metric=\x1b[31m",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(COMMANDS)))
def test_the_command_says_two_sentences(tmp_path: Path, place: int) -> None:
    name, content, arguments = COMMANDS[place]
    path = tmp_path / name
    path.write_bytes(content)
    own = ["--train-file", str(path), "--text", "text", "--label", "label"]
    with limited():
        error_of("prepare", *own, *arguments, "--json", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda ready: (ready / "manifest.json").write_bytes(b"{}"),
        lambda ready: (ready / "manifest.json").write_bytes(b'{"a": 1, "a": 2}'),
        lambda ready: (ready / "manifest.json").write_bytes(seal({"format": 1})),
        lambda ready: (ready / "train.arrow").write_bytes(b"\xff" * 100),
        lambda ready: special((ready / "dev.arrow").unlink() or ready, "pipe", "dev.arrow"),
        lambda ready: special((ready / "dev.arrow").unlink() or ready, "/dev/zero", "dev.arrow"),
    ],
)
def test_the_command_says_two_sentences_of_a_prepared_directory(
    ready: Path, damage: Callable[[Path], object]
) -> None:
    damage(ready)
    with limited():
        error_of("prepare", "--set", f"data.prepared={ready}", "--json", "--out", ready / "out")
