"""Text files and pipes are recognised by looking at them, and what was decided is said."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pandas as pd
import pytest
from support.command import error_of, invoke

from unipelt_cli.data import readers
from unipelt_cli.data.cells import RawColumns
from unipelt_cli.data.text_files import byte_sources, decoded_lines
from unipelt_cli.data.unusable import windows_of_texts
from unipelt_cli.errors import ConfigError, DataError

WORDS = ("kettle", "lamp, with shade", 'so called "expert"', "naïve ☃", "two\nlines", "tab\there")
ROWS = [(f"the {WORDS[n % 6]} of order {n}", ("late", "broken")[n % 2]) for n in range(36)]
FLAT = [(text.replace("\n", " ").replace("\t", " "), label) for text, label in ROWS]
OBJECTS = [{"text": text, "label": label} for text, label in ROWS]


def of_cells(cells: RawColumns) -> list[tuple[str, str]]:
    return list(zip(cells.texts("text"), cells.labels("label"), strict=True))


def read(path: Path, content: str | bytes, encoding: str | None = None) -> RawColumns:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return readers.read_cells(path, encoding=encoding)


def streamed(path: Path, **options: str) -> list[tuple[str, str]]:
    windows = list(readers.read_file(path, ["text", "label"], **options))
    return [row for cells in windows for row in of_cells(cells)]


def table(mark: str = ",", rows: list[tuple[str, str]] = ROWS, **options: object) -> str:
    out = io.StringIO()
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(out, sep=mark, index=False, **options)
    return out.getvalue()


def piped(
    content: str | bytes, columns: tuple[str, ...] = ("text",)
) -> tuple[list[str], list[str]]:
    """Return the texts of the first column, and the notes."""
    raw = content if isinstance(content, bytes) else content.encode()
    notes: list[str] = []
    windows = readers.noted(readers.read_input(io.BytesIO(raw), columns), notes.append)
    parts = windows_of_texts(windows, [columns])
    return [text for part in parts for text in part.texts[columns[0]]], notes


BLANKS_OF_ROWS = "\n" + table().replace("\n", "\n\n \n", 3)
CONTENTS = {
    "lines.json": "".join(json.dumps(row) + "\n" for row in OBJECTS),
    "lines.ndjson": "".join(json.dumps(row) + "\n" for row in OBJECTS),
    "blank.jsonl": "\n\n" + "".join(json.dumps(row) + "\n\n \n" for row in OBJECTS),
    "array.json": json.dumps(OBJECTS),
    "array.jsonl": json.dumps(OBJECTS, ensure_ascii=False),
    "indented.json": json.dumps(OBJECTS, indent=1),
    "rows.json": "[" + ",\n".join(json.dumps(row) for row in OBJECTS) + "]\n",
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in OBJECTS),
    "nan.jsonl": "".join(json.dumps({**row, "x": [float("nan")]}) + "\n" for row in OBJECTS),
    "plain.csv": table(),
    "semicolon.csv": table(";"),
    "bar.csv": table("|"),
    "named.csv": "sep=;\r\n" + table(";"),
    "rows.csv": table() + ",\n,\n",
    "blank.csv": BLANKS_OF_ROWS,
    "minimal.tsv": table("\t"),
    "all.tsv": table("\t", quoting=csv.QUOTE_ALL),
    "comma.tsv": table(","),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_every_layout_gives_the_rows_of_a_plain_csv(name: str, tmp_path: Path) -> None:
    content = CONTENTS[name]
    assert of_cells(read(tmp_path / name, content)) == ROWS
    assert streamed(tmp_path / name) == ROWS
    if not name.startswith("rows."):
        assert piped(content)[0] == [text for text, _ in ROWS]
    packed = tmp_path / f"{name}.gz"
    parts = (content[:50].encode(), content[50:].encode())
    assert of_cells(read(packed, b"".join(map(gzip.compress, parts)))) == ROWS
    assert streamed(packed) == ROWS
    for encoding in ("utf-16", "utf-32", "utf-16-be"):
        mark = "\ufeff" if encoding == "utf-16-be" else ""
        assert of_cells(read(tmp_path / name, (mark + content).encode(encoding))) == ROWS


def test_a_byte_order_mark_wins_over_the_option(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert of_cells(read(path, table().encode("utf-8-sig"), "windows-1252")) == ROWS
    assert of_cells(read(path, table().encode("utf-16"), "utf-8")) == ROWS
    assert of_cells(read(path, table().encode("utf-16-le"), "utf-16-le")) == ROWS
    with pytest.raises(DataError, match=r"line 2: not ascii \(byte 0xc3 at offset 15\)"):
        read(path, "text,label\nnaïve,a\n".replace("na", "nain"), "ascii")


@pytest.mark.parametrize(
    "name", ["zip", "rot13", "utf-7", "idna", "unicode_escape", "", "\0", "x" * 9]
)
def test_what_is_no_encoding_of_text_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no such encoding"):
        byte_sources.check_encoding(name)


# Quotes of TSV


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('text\tlabel\n"all" of it\ta\n"so"\tb\n', "kept"),
        ('text\tlabel\n"so"\ta\nfive" wide\tb\n', "kept"),
        ('text\tlabel\n"all of it\ta\nof it"\tb\n', "kept"),
        ('text\tlabel\n"opens\ta\nand never ends\tb\n', "kept"),
        ('text\tlabel\nsaid " so\ta\n', ""),
        ("text\tlabel\nplain\ta\n", ""),
    ],
)
def test_quotes_that_are_not_a_writers_stay(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    cells = read(path, content)
    assert of_cells(cells) == [tuple(line.split("\t")) for line in content.splitlines()[1:]]
    assert streamed(path) == of_cells(cells)
    note = "a.tsv: quotes are kept as parts of the cells, because not all are around whole ones"
    assert cells.notes == ((note,) if said else ())


def test_quotes_of_a_writer_are_taken_off_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    cells = read(path, '"text"\t"label"\r\n"say \\"now\\""\t"a"\r\n"C:\\"\t"b"\r\n')
    assert of_cells(cells) == [('say "now"', "a"), ("C:\\", "b")]
    note = "a.tsv: quotes around cells are taken off, as in tables of pandas, R and Excel"
    assert cells.notes == (note,)
    content = table("\t")
    assert of_cells(read(path, content)) == ROWS
    with pytest.raises(DataError, match=r"a\.tsv, line 44: 'text' is empty"):
        of_cells(read(path, content + '\tbroken\n"x"\tlate\n'))
    assert piped(content)[1] == [note.replace("a.tsv", "stdin")]
    read(path, table("\t", FLAT))
    kept = readers.read_cells(path, published=True).column("text")
    assert kept[2] == '"the so called ""expert"" of order 2"'
    assert list(readers.read_cells(path, quotes=False).column("text")) == list(kept)


# Columns


def test_columns_without_a_name_of_their_own_harm_only_who_asks_for_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = "".join(f"ham,text {n},,x,y\n" for n in range(4))
    cells = read(path, "v1,v2,,n,n\n" + rows.replace(",,x", ",,x"))
    assert cells.texts("v2") == [f"text {n}" for n in range(4)]
    read(path, "v1,v2,,,\n" + rows)
    assert [cells.texts("v2") for cells in readers.read_file(path, ["v2"])] == [cells.texts("v2")]
    for name, message in (("", "3 columns are called ''"), ("v3", "no column 'v3'")):
        with pytest.raises(DataError) as whole:
            readers.read_cells(path).column(name)
        with pytest.raises(DataError) as windows:
            list(readers.read_file(path, [name]))
        assert whole.value.message == windows.value.message == f"{path}: {message}"
    path.write_text("text,label,text\n" + "a,b,c\n" * 9)
    assert error_of("prepare", "--train-file", path) == (
        f"{path}: 2 columns are called 'text'",
        "give each column its own name",
    )


@pytest.mark.parametrize(
    ("content", "texts", "note"),
    [
        ("Text,id\na,1\nb,2\n", ["a", "b"], "column 'Text' is taken for 'text'"),
        ("id; TEXT \n1;a\n2;b\n", ["a", "b"], "column ' TEXT ' is taken for 'text'"),
        ('{"Text": "a"}\n{"Text": "b"}\n', ["a", "b"], "column 'Text' is taken for 'text'"),
        ("id;text\n1;a\n", ["a"], "read with ';' between its fields"),
        ("text\none, two\nthree\n", ["one, two", "three"],
         "its first line is taken for the name of the column; --format lines if it is a text"),
        ('Text\n"one, two"\nthree\n', ["one, two", "three"],
         "its first line is taken for the name of the column; --format lines if it is a text"),
        ('"one, two"\n"three ""x"""\n', ["one, two", 'three "x"'],
         "one column of quoted texts without a name; --format lines keeps quotes"),
        ("good, and cheap\nbad, and dear\n", ["good, and cheap", "bad, and dear"],
         "nothing looks like a table, so each line is a text; --format lines says so"),
        ("text\n", ["text"],
         "nothing looks like a table, so each line is a text; --format lines says so"),
    ],
)  # fmt: skip
def test_what_a_pipe_holds_is_decided_and_said(content: str, texts: list[str], note: str) -> None:
    found, notes = piped(content)
    assert found == texts
    assert f"stdin: {note}" in notes


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("body,id\na,1\nb,2\n", "stdin: a table without 'text'; its first line is 'body', 'id'",
         "name a column 'text' in its first line; or give --format lines if each line is a text"),
        ('"a, b",1\n"c",2\n', "stdin: a table without 'text'; its first line is 'a, b', '1'",
         "name a column 'text' in its first line; or give --format lines if each line is a text"),
        ('[{"body": "a"}]', "stdin: no column 'text'",
         "columns found: 'body'; rename the one that is meant to 'text'"),
        ('{"texts": "a"}', "stdin: no column 'text'",
         "did you mean 'texts'? columns found: 'texts'; rename it to 'text'"),
        ('["a", "b"]', "stdin, line 1: not an object but list",
         "give an array of objects, or write one JSON object on each line"),
        ('[{"text": "a"}, 7]', "stdin, line 1: not an object but int",
         "give an array of objects, or write one JSON object on each line"),
        ('[{"text": "a"},', "stdin, line 1: malformed JSON (',' between)",
         "give an array of objects, or write one JSON object on each line"),
        ("[]", "stdin: an empty JSON array", "give one with labelled rows"),
        ('{"n": 1, "data": [{"text": "a"}]}', "stdin: one object, with rows in its key 'data'",
         "take them out: jq -c '.data[]' FILE > NEW.jsonl"),
        ('{\n "my rows": [\n  {"text": "a"}\n ]\n}\n',
         "stdin: one object, with rows in its key 'my rows'",
         "take them out: jq -c '.\"my rows\"[]' FILE > NEW.jsonl"),
    ],
)  # fmt: skip
def test_what_a_pipe_does_not_hold_is_told(content: str, message: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        piped(content)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_rows_in_a_key_of_one_object_are_told_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": OBJECTS}))
    assert error_of("prepare", "--train-file", path) == (
        f"{path}: one object, with rows in its key 'data'",
        "take them out: jq -c '.data[]' FILE > NEW.jsonl",
    )


# Bounds


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz", "a.jsonl.gz"])
def test_gzip_that_unpacks_beyond_its_size_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"text,label\n" + (b"a" * 2**13 + b",b\n") * 2**13))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"it unpacks to \d+ bytes or more from \d+") as caught:
        list(readers.read_file(path, ["text"], "csv"))
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()
    assert caught.value.hint == "unpack it with gzip -d if it is yours, and give that"


def test_damaged_gzip_is_told_after_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    packed = gzip.compress(
        ("text,label\n" + "".join(f"row {n},a\n" for n in range(99999))).encode()
    )
    path.write_bytes(packed[:-2000])
    seen: list[RawColumns] = []
    with pytest.raises(DataError, match=r"damaged gzip \(it ends before its end\)"):
        seen.extend(readers.read_file(path, ["text"]))
    assert sum(len(cells.rows) for cells in seen) > 9000
    path.write_bytes(packed + b"more")
    with pytest.raises(DataError, match=r"damaged gzip \(Error -3"):
        readers.read_cells(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_any_size_takes_no_more_memory(
    indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LARGEST_WINDOW", 256)
    monkeypatch.setattr(decoded_lines, "LONGEST_LINE", 2**17)
    monkeypatch.setattr(decoded_lines, "PIECE", 2**12)
    path = tmp_path / "a.json"
    peaks = []
    for count in (4000, 4000, 12_000):
        rows = [{"text": f"row {n} }} of {{", "label": "a"} for n in range(count)]
        path.write_text(json.dumps(rows, indent=indent))
        tracemalloc.start()
        assert sum(len(cells.rows) for cells in readers.read_file(path, ["text"])) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1] + 2**19, peaks
    path.write_text('[{"text": "' + "}" * 2**18 + '"}]')
    with pytest.raises(DataError, match="a value of more than 131072 characters"):
        list(readers.read_file(path, ["text"]))


# Commands


def test_the_encoding_is_recorded_and_used_again(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(table(rows=[(t.replace("☃", "é"), x) for t, x in FLAT]).encode("cp1252"))
    options = ("--k", "12", "--dev-size", "6", "--out", tmp_path / "ready")
    code, _, stderr = invoke(
        "prepare", "--train-file", path, "--encoding", "windows-1252", *options
    )
    assert code == 0, stderr
    manifest = json.loads((tmp_path / "ready/manifest.json").read_text())
    assert manifest["source"]["encoding"] == "windows-1252"
    assert error_of("prepare", "--task", "demo", "--encoding", "utf-8") == (
        "data.encoding is set without data.train_file",
        "give --train-file FILE as well",
    )
    assert error_of("prepare", "--train-file", path, "--encoding", "utf8x")[0] == (
        "data.encoding = 'utf8x': no such encoding"
    )
