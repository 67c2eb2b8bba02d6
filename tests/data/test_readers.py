"""Every type of file gives the same rows, or says what is wrong and where."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command import error_of, rows_options
from support.data_files import (
    PAIR,
    TEXT,
    of_file,
    of_stdin,
    own_file,
    prepare_glue,
    prepare_own,
    write,
)
from support.rows import sentence, write_table

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation
from unipelt_cli.data.prepared_directory import load_prepared, save_prepared
from unipelt_cli.errors import DataError, RunError
from unipelt_cli.tasks import get_task

# Own rows


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "CSV"])
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    texts = ["plain", "a comma, and 'quotes'", "naïve ☃ 你好", " spaces ", "7", "x" * 200_000]
    rows = [{"text": text, "label": n % 2, "other": None} for n, text in enumerate(texts * 3)]
    path = tmp_path / f"own.{suffix}"
    match suffix:
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case "jsonl":
            write(path, "".join(json.dumps(row) + "\n" for row in rows))
        case "tsv":
            write(path, "text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
        case _:
            lines = [f'"{row["text"]}",{row["label"]}\r\n' for row in rows]
            write(path, "\ufefftext,label\r\n" + "".join(lines))
    prepared = prepare_own(path, k=8, data_seed=3)
    assert prepared.task.labels == ("0", "1")
    assert prepared.task.name == "own"
    order = np.random.default_rng(3).permutation(18).tolist()
    assert prepared.splits["train"][:]["text"] == [(texts * 3)[row] for row in order[3:11]]
    assert prepared.splits["train"][:]["label"] == [row % 6 % 2 for row in order[3:11]]


def test_csv_quotes_may_hold_line_ends_and_errors_name_the_first_line(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",a\n"say ""hi""",b\n')
    assert of_file(path, TEXT) == [["two\nlines", 'say "hi"']]
    write(path, 'text,label\n"two\nlines",a\n,b\n')
    with pytest.raises(DataError, match=r"a\.csv, line 4: 'text' is empty"):
        of_file(path, TEXT)


def test_pairs_keep_the_names_of_their_columns(tmp_path):
    lines = [f"q {n}\ta {n}\t{n % 2}" for n in range(20)]
    path = write(tmp_path / "a.tsv", "\n".join(["question\tanswer\tlabel", *lines]))
    prepared = prepare_own(path, text="question", text_pair="answer", task="mine")
    assert prepared.task.text == ("question", "answer")
    assert prepared.task.name == "mine"
    assert prepared.splits["train"].column_names == ["question", "answer", "label", "row"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["b", "B", "a"], ("B", "a", "b")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([True, False], ("False", "True")),
        ([1.0, 2.0], ("1", "2")),
        (["1.0", "2.0"], ("1", "2")),
        ([f"class {n:03}" for n in range(300)], tuple(f"class {n:03}" for n in range(300))),
    ],
)
def test_labels_are_found_and_sorted(tmp_path, values, labels):
    rows = [{"text": f"t {n}", "label": value} for n, value in enumerate(values * 6)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    prepared = prepare_own(path)
    assert prepared.task.labels == labels
    assert prepared.task.metric == "accuracy"
    assert prepared.task.also == ("f1", "matthews")
    assert sum(prepared.manifest["splits"]["train"]["labels"].values()) == len(
        prepared.splits["train"]
    )


@pytest.mark.parametrize(
    ("values", "kind"),
    [([0.5, 1.25, 2], "auto"), (["1.5", "-2e0", "3"], "auto"), ([1, 2], "regression")],
)
def test_regression_is_asked_for_or_seen_in_fractions(tmp_path, values, kind):
    rows = [{"text": f"t {n}", "label": value} for n, value in enumerate(values * 6)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    prepared = prepare_own(path, kind=kind, metric="mse")
    task = prepared.task
    assert task.is_regression
    assert (task.metric, task.also) == ("mse", ("spearman", "pearson"))
    assert prepared.splits["train"].features["label"].dtype == "float64"
    found = prepared.manifest["splits"]["train"]["labels"]
    labels = prepared.splits["train"][:]["label"]
    assert (found["min"], found["max"]) == (min(labels), max(labels))
    assert found["mean"] == pytest.approx(np.mean(labels))


def test_fractions_may_be_classes_when_asked(tmp_path):
    path = own_file(tmp_path, labels=("0.5", "1.5"))
    assert prepare_own(path, kind="classification").task.labels == ("0.5", "1.5")


def test_single_precision_values_are_the_decimals_that_were_meant(tmp_path):
    table = pa.table(
        {"text": ["a", "b", "c"] * 5, "label": pa.array([3.8, 0.1, 2] * 5, pa.float32())}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert set(prepare_own(tmp_path / "a.parquet").splits["train"]["label"]) <= {3.8, 0.1, 2.0}


def test_numbers_are_written_out_as_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": 7}\n{"text": 0.5}\n')
    assert of_file(path, TEXT) == [["7", "0.5"]]


def test_reading_own_files_writes_nothing(tmp_path, monkeypatch):
    def refuse(*_arguments, **_keywords):
        raise AssertionError("the cache was asked for")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    path = own_file(tmp_path / "in")
    prepare_own(path, k=10)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
    assert [entry.name for entry in path.parent.iterdir()] == ["own.csv"]


# Rows for predict and eval


def test_rows_are_read_in_order_with_their_columns(tmp_path):
    path = write(tmp_path / "a.tsv", "b\ta\tc\n1\t2\t3\n4\t5\t6\n")
    assert of_file(path, ["a", "b"]) == [["2", "5"], ["1", "4"]]


def test_labelled_rows_take_names_or_values(tmp_path):
    content = "gold,sentence2,sentence1\n1,b,a\nequivalent,d,c\nnot_equivalent,f,e\n0,h,g\n"
    path = write(tmp_path / "a.csv", content)
    [rows] = preparation.labelled_rows(path, get_task("mrpc"), "gold")
    assert rows.column_names == ["sentence1", "sentence2", "label", "row"]
    assert rows[:]["label"] == [1, 1, 0, 0]
    write(path, "gold,sentence2,sentence1\n2,b,a\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2: unknown label '2'") as caught:
        list(preparation.labelled_rows(path, get_task("mrpc"), "gold"))
    assert caught.value.hint == "the labels of mrpc are 'not_equivalent', 'equivalent'"


def test_labelled_rows_of_a_regression_are_numbers(tmp_path):
    path = write(tmp_path / "a.csv", "label,sentence1,sentence2\n2.5,a,b\n3,c,d\n")
    [rows] = preparation.labelled_rows(path, get_task("stsb"), "label")
    assert rows[:]["label"] == [2.5, 3.0]


@pytest.mark.parametrize(
    ("content", "columns", "texts"),
    [
        ("one\ntwo\n", TEXT, [["one", "two"]]),
        ("one", TEXT, [["one"]]),
        ("\ufeffone, two\r\n\r\n \r\na\tb \r\n", TEXT, [["one, two", "a\tb "]]),
        ("\n\nnaïve ☃\x85\u2028\n\n", TEXT, [["naïve ☃\x85\u2028"]]),
        ('"{"\n', TEXT, [['"{"']]),
        ("[1]\n{\n", TEXT, [["[1]", "{"]]),
        ("q\ta\nr\tb\n", PAIR, [["q", "r"], ["a", "b"]]),
        ("\ufeffq\ta\r\n r \t b \r\n\r\n", PAIR, [["q", " r "], ["a", " b "]]),
        ('{"text": "one"}\n{"text": 2, "other": null}\n', TEXT, [["one", "2"]]),
        ('\ufeff {"text": "a\\nb"}\r\n{"text": "\\u2603"}\r\n\r\n', TEXT, [["a\nb", "☃"]]),
        ('{"answer": "a", "question": "q", "label": 1}', PAIR, [["q"], ["a"]]),
    ],
)
def test_lines_are_plain_texts_or_json(content, columns, texts):
    assert of_stdin(content.encode(), columns) == texts


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (b"", TEXT, "stdin: empty"),
        (b"\xef\xbb\xbf \r\n\n", PAIR, "stdin: empty"),
        (b"fine\ncaf\xe9\n", TEXT, "stdin, line 2: not UTF-8 (byte 0xe9 at offset 8)"),
        (b"q\ta\nq a\n", PAIR, "stdin, line 2: texts between tabs: 1 instead of 2"),
        (b"q\ta\tb\n", PAIR, "stdin, line 1: texts between tabs: 3 instead of 2"),
        (b"q\ta\n\nr b\n", PAIR, "stdin, line 3: texts between tabs: 1 instead of 2"),
        (b"q\ta\n \t \n", PAIR, "stdin, line 2: 'question' and 'answer' are both empty"),
    ],
)
def test_lines_that_are_no_texts_are_told(content, columns, message):
    with pytest.raises(DataError) as caught:
        of_stdin(content, columns)
    assert caught.value.message == message
    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        '\n{"text": "a"}\n\n{"text": " "}\n',
        '{"text": "a"}\nplain\n',
        '{"text": "a"}\n["b"]\n',
        '{"body": "a"}\n',
        '{"text": "a"}\n{"body": "b"}\n',
        '{"text": " "}\n',
        '{"text": ["a"]}\n',
        '{"text": "\\ud800"}\n',
        "{plain}\n",
    ],
)
def test_json_lines_are_checked_as_those_of_a_file(tmp_path, content):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError) as from_file:
        of_file(path, TEXT)
    with pytest.raises(DataError) as from_stdin:
        of_stdin(content.encode(), TEXT)
    assert from_stdin.value.message == from_file.value.message.replace(str(path), "stdin")
    assert from_stdin.value.hint == from_file.value.hint


# Errors in own files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "{}: empty file"),
        ("a.csv", "\ufeff\r\n \n", "{}: empty file"),
        ("a.jsonl", "\n", "{}: empty file"),
        ("a.parquet", "", "{}: empty file"),
        ("a.csv", "text,label\n", "{}: a header but no rows"),
        ("a.tsv", "text\tlabel\r\n", "{}: a header but no rows"),
        ("a.csv", b"text,label\ncaf\xe9,x\n", "{}, line 2: not UTF-8 (byte 0xe9 at offset 14)"),
        (
            "a.csv",
            "text,label\na,b\n".encode("utf-16")[:-1],
            "{}, line 2: not utf-16-le (cut off at its end)",
        ),
        ("a.csv", "body,label\na,b\n", "{}: no column 'text'"),
        ("a.csv", "text;other\na;b\n", "{}: no column 'label'"),
        ("a.jsonl", '{"text": "a"}\n', "{}: no column 'label'"),
        ("a.csv", "text,label\na,\n", "{}, line 2: the label is missing"),
        ("a.csv", "text,label\na,x\nb,NaN\n", "{}, line 3: the label is missing"),
        ("a.jsonl", '{"text": "a", "label": null}', "{}, line 1: the label is missing"),
        ("a.jsonl", '{"text": "a", "label": NaN}', "{}, line 1: the label is missing"),
        ("a.jsonl", '{"text": NaN, "label": 1}', "{}, line 1: 'text' is missing"),
        ("a.jsonl", '{"text": Infinity, "label": 1}', "{}, line 1: 'text' is not finite"),
        (
            "a.json",
            '{"text": "a", "label": -Infinity}',
            "{}, line 1: the label '-inf' is not finite",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}',
            "{}, line 2: the label is missing",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": [1, 2]}',
            "{}, line 1: 2 labels in one row",
        ),
        ("a.csv", "text,label\na,0.5\nb,inf\n", "{}, line 3: the label 'inf' is not finite"),
        ("a.csv", "text,label\na,0.5\nb,1e300\n", "{}, line 3: the label '1e300' is not finite"),
        ("a.csv", "text,label\na,0.5\nb,n/a\n", "{}, line 3: the label 'n/a' is not a number"),
        ("a.csv", "text,label\n,x\n", "{}, line 2: 'text' is empty"),
        ("a.tsv", "text\tlabel\na\tx\n \ty\n", "{}, line 3: 'text' is empty"),
        ("a.jsonl", '{"text": "", "label": 1}', "{}, line 1: 'text' is empty"),
        ("a.jsonl", '{"text": null, "label": 1}', "{}, line 1: 'text' is missing"),
        (
            "a.jsonl",
            '{"text": 1e999, "label": 1}',
            "{}, line 1: malformed JSON (the number 1e999 is too large)",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1, "text": "b"}',
            "{}, line 1: malformed JSON (key 'text' is there twice)",
        ),
        ("a.jsonl", '{"text": ["a"], "label": 1}', "{}, line 1: 'text' is not text but list"),
        ("a.jsonl", '{"text": {"a": 1}, "label": 1}', "{}, line 1: 'text' is not text but dict"),
        ("a.jsonl", '{"text": true, "label": 1}', "{}, line 1: 'text' is not text but bool"),
        ("a.txt", "text,label\na,b\n", "{}: unknown file type '.txt'"),
        ("a", "text,label\na,b\n", "{}: unknown file type ''"),
        (
            "a.csv",
            "text,label\na,b\nc,d,e\n",
            "{}, line 3: 3 fields, where the first line has 2",
        ),
        (
            "a.tsv",
            "text\tlabel\na\tb\n\nc\n",
            "{}, line 4: 1 fields, where the first line has 2",
        ),
        ("a.csv", 'text,label\na,b\n"c,d\n', "{}, line 3: malformed CSV (unexpected end of data)"),
        (
            "a.csv",
            'text,label\n"a"b,c\n',
            "{}, line 2: malformed CSV (',' expected after '\"')",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text"\n',
            "{}, line 2: malformed JSON (Expecting ':' delimiter: line 1 column 8 (char 7))",
        ),
        ("a.jsonl", "[1]\n", "{}, line 1: not an object but list"),
        ("a.jsonl", "7\n", "{}, line 1: not an object but int"),
        ("a.csv", "text,label,text\na,b,c\n", "{}: 2 columns are called 'text'"),
    ],
)
def test_unusable_files_are_told(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        prepare_own(path)
    assert caught.value.message == message.format(path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", "PAR1 but not really", "{}: not a Parquet file ("),
        ("a.jsonl", "[" * 100_000, "{}, line 1: malformed JSON ("),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', "{}, line 1: malformed JSON ("),
        ("a.jsonl", '{"text": 1' + "0" * 5000 + "}", "{}, line 1: malformed JSON ("),
    ],
)
def test_unreadable_content_is_told_in_the_words_of_its_library(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        prepare_own(path)
    assert caught.value.message.startswith(message.format(path))
    assert "\n" not in caught.value.message


def parquet_bytes(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            parquet_bytes(text=pa.array([], pa.string()), label=pa.array([], pa.int64())),
            ": a header but no rows",
        ),
        (parquet_bytes(text=["a", None], label=[0, 1]), ", row 1: 'text' is missing"),
        (parquet_bytes(text=["a", "b"], label=[0.0, None]), ", row 1: the label is missing"),
        (
            parquet_bytes(text=["a", "b"], label=[0.5, float("inf")]),
            ", row 1: the label 'inf' is not finite",
        ),
        (parquet_bytes(text=[b"a", b"b"], label=[0, 1]), ", row 0: 'text' is not text but bytes"),
        (parquet_bytes(body=["a"], label=[0]), ": no column 'text'"),
    ],
)
def test_unusable_parquet_rows_are_told_by_their_place(tmp_path, content, message):
    path = write(tmp_path / "a.parquet", content)
    with pytest.raises(DataError) as caught:
        prepare_own(path)
    assert caught.value.message == f"{path}{message}"


def test_parquet_text_that_is_not_unicode_is_told(tmp_path):
    broken = parquet_bytes(text=["abcdefgh"] * 3, label=[0, 1, 0]).replace(
        b"abcdefgh", b"\xffbcdefgh"
    )
    path = write(tmp_path / "a.parquet", broken)
    with pytest.raises(DataError, match="column 'text' cannot be read"):
        prepare_own(path)


def test_missing_columns_are_told_with_those_found(tmp_path):
    path = write(tmp_path / "a.csv", "body,class\na,b\n")
    with pytest.raises(DataError) as caught:
        prepare_own(path)
    assert caught.value.hint == "columns found: 'body', 'class'"


def test_paths_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for path, reason in (
        (tmp_path / "a.csv", "Is a directory"),
        (tmp_path / "none.csv", "No such file or directory"),
        (tmp_path / "nul\0.csv", "embedded null byte"),
    ):
        with pytest.raises(DataError) as caught:
            prepare_own(path)
        assert caught.value.message == f"{path}: {reason}"


def test_a_name_that_no_file_system_takes_is_told(tmp_path):
    name = str(tmp_path / ("x" * 300))
    prepared = prepare_own(own_file(tmp_path))
    for use in (
        lambda: load_prepared(Path(name)),
        lambda: save_prepared(prepared, Path(name)),
        lambda: prepare_glue(name, "rte"),
        lambda: prepare_own(name + ".csv"),
    ):
        with pytest.raises((DataError, RunError), match="File name too long"):
            use()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_rights_is_told(tmp_path):
    path = own_file(tmp_path)
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        prepare_own(path)


def test_a_refused_file_is_told(tmp_path, monkeypatch):
    def refuse(*_arguments, **_keywords):
        raise PermissionError(13, "Permission denied")

    path = own_file(tmp_path)
    monkeypatch.setattr(preparation.Path, "open", refuse)
    with pytest.raises(DataError) as caught:
        prepare_own(path)
    assert caught.value.message == f"{path}: Permission denied"


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_spreadsheets_semicolons_are_read_and_said(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write_table(path, f"text{mark}label", lambda n: f"{sentence(n)}, and{mark}{n % 2}")
    prepared = preparation.prepare(
        DataSettings(train_file=str(path), text="text", label="label", k=20)
    )
    assert prepared.splits["train"].num_rows == 20
    assert prepared.manifest["notes"][0] == f"mine.csv: read with {mark!r} between its fields"


FILES = [
    ("x.xlsx", b"PK", "unknown file type '.xlsx'",
     "give .csv, .tsv, .jsonl, .parquet: in the spreadsheet, save as CSV (UTF-8)"),
    ("x.parq", b"PAR1", "unknown file type '.parq'",
     "give .csv, .tsv, .jsonl, .parquet: rename it to .parquet if it is Parquet"),
    ("x.xml.gz", b"", "unknown file type '.gz'",
     "give .csv, .tsv, .jsonl, .parquet; or the first three packed by gzip, as NAME.csv.gz"),
    ("x.txt", b"a", "unknown file type '.txt'",
     "give .csv, .tsv, .jsonl, .parquet: rename it to .tsv if tabs part its columns, and .csv if "
     "commas do"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message", "hint"), FILES)
def test_other_file_types_say_how_they_are_converted(
    name: str, content: bytes, message: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert error_of("train", "--train-file", path) == (f"{path}: {message}", hint)


def test_another_encoding_says_how_it_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("text,label\ncaf\u00e9,a\n", encoding="latin-1")
    assert error_of("prepare", "--train-file", path) == (
        f"{path}, line 2: not UTF-8 (byte 0xe9 at offset 14)",
        "save it as UTF-8, for example: iconv -f windows-1252 -t utf-8 FILE > NEW; or give "
        "--encoding windows-1252",
    )


def test_one_label_alone_is_told_before_anything_else(tmp_path: Path) -> None:
    path = write_table(tmp_path / "one.csv", "text,label", lambda n: f"{sentence(n)},same")
    assert error_of("prepare", *rows_options(path)) == (
        "one: every row has the label 'same'",
        "give rows of at least two classes, or another column with --label",
    )
