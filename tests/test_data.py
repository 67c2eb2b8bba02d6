import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation, readers
from unipelt_cli.data.manifest import digest_rows
from unipelt_cli.data.prepared_directory import load_prepared, save_prepared
from unipelt_cli.errors import DataError, RunError, UnipeltError
from unipelt_cli.tasks import TASKS, get_task
from unipelt_cli.terminal import summaries

OWN = {"text": "text", "label": "label"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("UNIPELT_DATA", raising=False)


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


TEXT = ["text"]
PAIR = ["question", "answer"]


def texts_of(windows, columns):
    """Return the texts of each column in all windows."""
    found = list(readers.texts(windows, columns))
    return [[text for one in found for text in one[column]] for column in columns]


def of_file(path, columns):
    return texts_of(readers.read_file(path, columns), columns)


def of_stdin(content, columns):
    return texts_of(readers.read_input(io.BytesIO(content), columns), columns)


def own_file(folder, rows=50, labels=("bad", "good"), name="own.csv"):
    lines = [f"message number {n},{labels[n % len(labels)]}" for n in range(rows)]
    return write(folder / name, "\n".join(["text,label", *lines]) + "\n")


def prepare_own(path, **settings):
    return preparation.prepare(DataSettings(train_file=str(path), **{**OWN, **settings}))


def glue_line(task, n):
    """Return one line of a task's made-up file, as GLUE has its columns."""
    pair = f"first {task} {n}\tsecond {n}"
    values = TASKS[task].source.values
    value = values[n % len(values)] if values else f"{n % 6}.250"
    return {
        "cola": f"gj04\t{value}\t\tsentence {n}",
        "sst2": f"a sentence {n} \t{value}",
        "mrpc": f"{value}\t{n}\t{n}\t{pair}",
        "stsb": f"{n}\tg\tf\ty\to\ts\ts\t{pair}\t{value}",
        "qqp": f"{n}\t{pair}\t{value}",
        "mnli": f"{n}\t{pair}\t{value}",
        "qnli": f"{n}\t{pair}\t{value}",
        "rte": f"{n}\t{pair}\t{value}",
    }[task]


HEADERS = {
    "sst2": "sentence\tlabel",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\ts1\ts2\tsentence1\tsentence2\tscore",
    "qqp": "id\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tsentence1\tsentence2\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
}
GLUE_TASKS = ["cola", *HEADERS]


def glue(root, task, train=60, dev=12, folder=None, end="\n"):
    source = TASKS[task].source
    for name, rows, start in (("train", train, 0), (source.dev, dev, 1000)):
        lines = [glue_line(task, start + n) for n in range(rows)]
        lines = [HEADERS[task], *lines] if task in HEADERS else lines
        write(root / (folder or source.folder) / f"{name}.tsv", end.join(lines) + end)
    return root


def prepare_glue(root, task, **settings):
    return preparation.prepare(DataSettings(task=task, source=str(root), **settings))


# The draw


@pytest.mark.parametrize("seed", [0, 111, 2**63 - 1])
def test_the_draw_is_the_shuffle_of_datasets(tmp_path, seed):
    prepared = prepare_glue(glue(tmp_path, "mrpc"), "mrpc", k=10, dev_size=20, data_seed=seed)
    order = np.random.default_rng(seed).permutation(60)
    assert prepared.splits["train"][:]["row"] == order[:10].tolist()
    assert prepared.splits["dev"][:]["row"] == order[10:30].tolist()
    assert prepared.splits["test"][:]["row"] == list(range(12))


def test_a_larger_k_holds_the_smaller_one(tmp_path):
    glue(tmp_path, "rte")
    small, large = (prepare_glue(tmp_path, "rte", k=k).splits["train"][:] for k in (10, 20))
    assert large["sentence1"][:10] == small["sentence1"]


def test_without_k_dev_is_first_and_train_is_the_rest(tmp_path):
    prepared = prepare_glue(glue(tmp_path, "cola"), "cola", dev_size=20)
    order = np.random.default_rng(111).permutation(60).tolist()
    assert prepared.splits["dev"][:]["row"] == order[:20]
    assert prepared.splits["train"][:]["row"] == order[20:]
    assert prepared.manifest["notes"] == [
        "dev: the first 20 of the shuffled rows; train: the rest",
    ]


def test_labels_that_training_never_shows_are_said(tmp_path):
    order = np.random.default_rng(111).permutation(50).tolist()
    rare = {order[10]: "ugly", order[0]: "odd", order[1]: "ugly", order[2]: "odd"}
    lines = [f"message {n},{rare.get(n, ('bad', 'good')[n % 2])}" for n in range(50)]
    path = write(tmp_path / "own.csv", "\n".join(["text,label", *lines]))
    notes = prepare_own(path, k=20, dev_size=5).manifest["notes"]
    assert notes[1:] == ["test: 2 rows have a label that no train row has: 'odd'"]
    notes = prepare_own(path, k=2, dev_size=5).manifest["notes"]
    assert notes[1:] == [
        "dev: 1 row has a label that no train row has: 'bad'",
        "test: 7 rows have labels that no train row has: 'bad', 'odd'",
    ]


def test_what_the_splits_hold_twice_is_shown(tmp_path, capsys):
    lines = [f"message {n % 20},{('bad', 'good')[n % 3 % 2]}" for n in range(50)]
    path = write(tmp_path / "own.csv", "\n".join(["text,label", *lines]))
    manifest = prepare_own(path).manifest
    summaries.data_summary(manifest)
    shown = capsys.readouterr().err.splitlines()
    within = "12 within train, 2 within dev, 2 within test"
    equal = f"{within}, 6 train and dev, 9 train and test, 1 dev and test"
    assert shown[-2:] == [
        f"note: rows with equal texts: {equal}",
        "note: texts with more than one label: 17",
    ]
    summaries.data_summary(prepare_own(own_file(tmp_path)).manifest)
    assert "equal texts" not in capsys.readouterr().err


def test_dev_takes_what_is_left_and_says_so(tmp_path):
    prepared = prepare_glue(glue(tmp_path, "rte"), "rte", k=50)
    assert {name: len(rows) for name, rows in prepared.splits.items()} == {
        "train": 50,
        "dev": 10,
        "test": 12,
    }
    assert prepared.manifest["notes"] == ["dev: 10 rows instead of 1000, because there are too few"]


def test_without_k_dev_is_never_more_than_half(tmp_path):
    splits = prepare_glue(glue(tmp_path, "rte"), "rte").splits
    assert (len(splits["train"]), len(splits["dev"])) == (30, 30)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (30, 10, 10)),
        ({"k": 20}, (20, 20, 10)),
        ({"k": 20, "dev_size": 5}, (20, 5, 10)),
        ({"dev_size": 5}, (35, 5, 10)),
        ({"k": 39}, (39, 1, 10)),
        ({"dev_file": "dev.csv"}, (40, 7, 10)),
        ({"test_file": "test.csv"}, (40, 10, 9)),
        ({"dev_file": "dev.csv", "test_file": "test.csv"}, (50, 7, 9)),
        ({"dev_file": "dev.csv", "test_file": "test.csv", "k": 50}, (50, 7, 9)),
        ({"dev_file": "dev.csv", "k": 40}, (40, 7, 10)),
    ],
)
def test_own_files_are_carved_where_a_split_is_missing(tmp_path, monkeypatch, settings, sizes):
    monkeypatch.chdir(tmp_path)
    own_file(tmp_path)
    own_file(tmp_path, 7, name="dev.csv")
    own_file(tmp_path, 9, name="test.csv")
    prepared = prepare_own("own.csv", **settings)
    splits = prepared.splits
    assert list(splits) == ["train", "dev", "test"]
    assert tuple(len(rows) for rows in splits.values()) == sizes
    given = {"train", *(key.removesuffix("_file") for key in settings if key.endswith("_file"))}
    carved = [
        row for name in splits if name not in given - {"train"} for row in splits[name]["row"]
    ]
    assert len(carved) == len(set(carved))
    if "test" not in given:
        order = np.random.default_rng(111).permutation(50).tolist()
        assert splits["test"][:]["row"] == order[:10]
        assert prepared.manifest["notes"][0] == (
            "test: the first 10 of the shuffled train rows (20 %, at most 1000)"
        )


def test_no_more_than_a_thousand_rows_are_carved(tmp_path):
    splits = prepare_own(own_file(tmp_path, 6000)).splits
    assert tuple(len(rows) for rows in splits.values()) == (4000, 1000, 1000)


# GLUE


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_every_task_of_glue_is_read(tmp_path, task):
    prepared = prepare_glue(glue(tmp_path, task), task, k=20, dev_size=10)
    assert prepared.task == get_task(task)
    rows = prepared.splits["test"]
    assert rows.column_names == [*get_task(task).text, "label", "row"]
    features = rows.features
    assert {features[name].dtype for name in get_task(task).text} == {"string"}
    assert features["row"].dtype == "int64"
    assert features["label"].dtype == ("float64" if task == "stsb" else "int64")
    classes = len(get_task(task).labels)
    expected = [n % classes if classes else n % 6 + 0.25 for n in range(1000, 1012)]
    assert rows[:]["label"] == expected
    assert "1003" in rows[3][get_task(task).text[0]]


def test_line_ends_and_quotes_do_not_change_the_rows(tmp_path):
    glue(tmp_path / "lf", "mrpc")
    glue(tmp_path / "crlf", "mrpc", end="\r\n")
    lf, crlf = (prepare_glue(tmp_path / name, "mrpc", k=20) for name in ("lf", "crlf"))
    assert lf.manifest["splits"] == crlf.manifest["splits"]
    line = '0\tsaid " so\t"all of it\tentailment\n1\ta\x85b\u2028c\td\tnot_entailment\n'
    write(tmp_path / "q/RTE/train.tsv", HEADERS["rte"] + "\n" + line * 3)
    write(tmp_path / "q/RTE/dev.tsv", HEADERS["rte"] + "\n" + line)
    test = prepare_glue(tmp_path / "q", "rte").splits["test"]
    assert test[0]["sentence1"] == 'said " so'
    assert test[0]["sentence2"] == '"all of it'
    assert test[1]["sentence1"] == "a\x85b\u2028c"


@pytest.mark.parametrize("folder", ["SST-2", "sst-2", "sst2"])
def test_the_folder_may_be_lower_case(tmp_path, folder):
    assert prepare_glue(glue(tmp_path, "sst2", folder=folder), "sst2", k=10)


def test_the_source_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIPELT_DATA", str(glue(tmp_path, "rte")))
    manifest = preparation.prepare(DataSettings(task="rte", k=10)).manifest
    assert manifest["source"] == {"kind": "directory", "path": str(tmp_path)}


def test_a_few_garbled_rows_of_glue_are_left_out_and_said(tmp_path):
    glue(tmp_path, "qqp", train=200)
    path = tmp_path / "QQP/train.tsv"
    lines = path.read_text().split("\n")
    lines[6] = "5\tonly one question"
    lines[9] = "8\tquestion\t\t0"
    path.write_text("\n".join(lines))
    prepared = prepare_glue(tmp_path, "qqp", k=150, dev_size=49)
    assert prepared.manifest["notes"] == [f"{path}: garbled rows left out: 1"]
    rows = {row for name in ("train", "dev") for row in prepared.splits[name]["row"]}
    assert rows == set(range(200)) - {5}


def test_the_demo_is_in_the_package():
    prepared = preparation.prepare(DataSettings(task="demo", k=100, dev_size=300))
    assert {name: len(rows) for name, rows in prepared.splits.items()} == {
        "train": 100,
        "dev": 300,
        "test": 300,
    }
    assert prepared.manifest["source"] == {"kind": "packaged", "name": "demo"}
    assert prepared.manifest["leakage"] == {"train_dev": 0, "train_test": 0, "dev_test": 0}


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
        (["1.0", "2.0"], ("1.0", "2.0")),
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
        (b"q\ta\n\nr\tb\n", PAIR, "stdin, line 2: texts between tabs: 1 instead of 2"),
        (b"q\ta\nr\t \n", PAIR, "stdin, line 2: 'answer' is empty"),
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
        '{"text": "a"}\n\n{"text": "b"}\n',
        '\n{"text": "a"}\n',
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


# The manifest


def test_the_manifest_describes_the_rows(tmp_path):
    texts = ["Same  Text", "same text", "SAME TEXT", "one", "two three four", "five six"]
    lines = [f"{text},{label}" for text, label in zip(texts, "aababa", strict=True)]
    path = write(tmp_path / "a.csv", "\n".join(["text,label", *lines]))
    dev = write(tmp_path / "dev.csv", "text,label\none,a\nnew,a\n")
    test = write(tmp_path / "test.csv", "text,label\none,b\nONE,b\nnew,a\n")
    prepared = prepare_own(path, dev_file=str(dev), test_file=str(test))
    manifest = prepared.manifest
    assert manifest["format"] == 1
    assert manifest["task"] == "a"
    assert manifest["source"] == {
        "kind": "files",
        "train": str(path),
        "dev": str(dev),
        "test": str(test),
        "text": ["text"],
        "label": "label",
    }
    assert (manifest["k"], manifest["data_seed"], manifest["dev_size"]) == (None, 111, 1000)
    train = manifest["splits"]["train"]
    assert train["rows"] == 6
    assert train["row_ids"] == np.random.default_rng(111).permutation(6).tolist()
    assert train["labels"] == {"a": 4, "b": 2}
    assert train["words"] == {"min": 1, "p25": 2, "p50": 2, "p75": 2, "p95": 2, "max": 3}
    assert train["duplicates"] == 2
    assert train["digest"] == digest_rows(prepared.splits["train"])
    assert manifest["leakage"] == {"train_dev": 1, "train_test": 2, "dev_test": 3}
    assert manifest["conflicts"] == 2
    assert manifest["notes"] == []


def test_two_preparations_are_the_same_bytes(tmp_path):
    glue(tmp_path / "glue", "stsb")
    for name in ("one", "two"):
        prepared = prepare_glue(tmp_path / "glue", "stsb", k=20, dev_size=10)
        save_prepared(prepared, tmp_path / name)
    for name in ("manifest.json", "train.arrow", "dev.arrow", "test.arrow"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    text = (tmp_path / "one/manifest.json").read_text(encoding="utf-8")
    assert text == (
        json.dumps(prepared.manifest, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    )


def test_the_digest_sees_content_and_order_but_not_chunks():
    table = pa.table({"text": ["a", "b", "c"], "label": [0, 1, 0], "row": [0, 1, 2]})
    whole = Dataset(table)
    pieces = Dataset(pa.concat_tables([table.slice(0, 1), table.slice(1)]))
    assert digest_rows(whole) == digest_rows(pieces)
    assert digest_rows(whole) == digest_rows(Dataset(table.set_column(2, "row", [[7, 8, 9]])))
    assert digest_rows(whole) != digest_rows(whole.select([1, 0, 2]))
    assert digest_rows(whole) != digest_rows(Dataset(table.set_column(1, "label", [[0, 1, 1]])))
    assert digest_rows(whole) != digest_rows(
        Dataset(table.set_column(0, "text", [["a", "bc", ""]]))
    )


# The prepared directory


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_a_prepared_directory_comes_back_unchanged(tmp_path, task):
    prepared = prepare_glue(glue(tmp_path / "glue", task), task, k=20, dev_size=10)
    save_prepared(prepared, tmp_path / "deep/in/one")
    loaded = load_prepared(tmp_path / "deep/in/one")
    assert loaded.task == prepared.task
    assert loaded.manifest == prepared.manifest
    for name, rows in prepared.splits.items():
        assert loaded.splits[name][:] == rows[:]
        assert loaded.splits[name].features == rows.features
    save_prepared(loaded, tmp_path / "two")
    for path in (tmp_path / "two").iterdir():
        assert path.read_bytes() == (tmp_path / "deep/in/one" / path.name).read_bytes()
    assert Dataset.from_file(str(tmp_path / "two/dev.arrow"))[:] == prepared.splits["dev"][:]


def test_a_prepared_directory_is_a_source(tmp_path):
    prepared = prepare_glue(glue(tmp_path / "glue", "rte"), "rte", k=20, data_seed=5)
    save_prepared(prepared, tmp_path / "ready")
    for settings in (
        DataSettings(prepared=str(tmp_path / "ready")),
        DataSettings(prepared=str(tmp_path / "ready"), task="rte", k=20, data_seed=5),
        DataSettings(source=str(tmp_path / "ready"), task="rte", k=20),
    ):
        assert preparation.prepare(settings).manifest == prepared.manifest
    changed = preparation.prepare(DataSettings(prepared=str(tmp_path / "ready"), metric="f1"))
    assert (changed.task.metric, changed.task.also) == ("f1", ("accuracy",))
    save_prepared(changed, tmp_path / "changed")
    assert load_prepared(tmp_path / "changed").task == changed.task


def test_own_rows_come_back_too(tmp_path):
    prepared = prepare_own(own_file(tmp_path, labels=("ä", "☃", "\x7f")), task="mrpc")
    save_prepared(prepared, tmp_path / "ready")
    assert load_prepared(tmp_path / "ready").task == prepared.task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "cola"}, "data.task = 'cola': {} was prepared with 'rte'"),
        ({"k": 30}, "data.k = 30: {} was prepared with 20"),
        ({"data_seed": 111}, "data.data_seed = 111: {} was prepared with 5"),
        ({"metric": "mse"}, "data.metric = 'mse': rte is classification"),
    ],
)
def test_a_prepared_directory_must_be_what_is_asked_for(tmp_path, settings, message):
    glue(tmp_path / "glue", "rte")
    ready = tmp_path / "ready"
    save_prepared(prepare_glue(tmp_path / "glue", "rte", k=20, data_seed=5), ready)
    with pytest.raises(DataError) as caught:
        preparation.prepare(DataSettings(prepared=str(ready), **settings))
    assert caught.value.message == message.format(ready)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    place = content.index(b"message number")
    content[place] ^= 1
    path.write_bytes(content)


def break_unicode(path):
    path.write_bytes(path.read_bytes().replace(b"message number", b"\xffessage number", 1))


def edit(change):
    def damage(path):
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", Path.unlink, "not a prepared directory (no manifest.json)"),
        ("manifest.json", truncate, "damaged (manifest.json: "),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "damaged (manifest.json: "),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), "damaged (manifest.json: "),
        ("manifest.json", lambda path: path.write_text("[]"), "its manifest.json is not one of"),
        ("manifest.json", lambda path: path.write_text("{}"), "its manifest.json is not one of"),
        ("manifest.json", edit(lambda m: m.update(format=2)), "format 2, but this version reads"),
        ("manifest.json", edit(lambda m: m.update(k=7)), "damaged (manifest.json was changed)"),
        ("manifest.json", edit(lambda m: m.pop("task")), "damaged (manifest.json was changed)"),
        ("train.arrow", Path.unlink, "No such file or directory"),
        ("train.arrow", truncate, "damaged (train.arrow: "),
        ("train.arrow", lambda path: path.write_bytes(b""), "damaged (train.arrow: "),
        ("train.arrow", break_unicode, "damaged (train.arrow: "),
        ("dev.arrow", flip, "damaged (dev.arrow does not hold the rows of manifest.json)"),
    ],
)
def test_a_damaged_directory_is_told(tmp_path, name, damage, message):
    ready = tmp_path / "ready"
    save_prepared(prepare_own(own_file(tmp_path)), ready)
    damage(ready / name)
    with pytest.raises(DataError) as caught:
        load_prepared(ready)
    assert caught.value.message.startswith(str(ready))
    assert message in caught.value.message


def test_swapped_splits_are_told(tmp_path):
    ready = tmp_path / "ready"
    save_prepared(prepare_own(own_file(tmp_path)), ready)
    (ready / "test.arrow").rename(ready / "kept")
    (ready / "dev.arrow").rename(ready / "test.arrow")
    (ready / "kept").rename(ready / "dev.arrow")
    with pytest.raises(DataError, match="does not hold the rows"):
        load_prepared(ready)


def test_saving_never_overwrites(tmp_path):
    prepared = prepare_own(own_file(tmp_path))
    (tmp_path / "there").mkdir()
    for name in ("there", "own.csv"):
        with pytest.raises(RunError) as caught:
            save_prepared(prepared, tmp_path / name)
        assert caught.value.message == f"{tmp_path / name}: exists already"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_is_whole_or_nothing(tmp_path, monkeypatch, failure):
    prepared = prepare_own(own_file(tmp_path / "in"))

    def fail(*_arguments):
        raise failure

    monkeypatch.setattr(preparation.Path, "write_bytes", fail)
    with pytest.raises((RunError, KeyboardInterrupt)) as caught:
        save_prepared(prepared, tmp_path / "out/ready")
    if isinstance(failure, OSError):
        expected = f"{tmp_path / 'out/ready'}: cannot be written (No space left on device)"
        assert str(caught.value) == expected
    assert list((tmp_path / "out").iterdir()) == []


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
            "text,label\na,b\n".encode("utf-16"),
            "{}, line 1: not UTF-8 (byte 0xff at offset 0)",
        ),
        ("a.csv", "body,label\na,b\n", "{}: no column 'text'"),
        ("a.csv", "text;other\na;b\n", "{}: no column 'label'"),
        ("a.jsonl", '{"text": "a"}\n', "{}: no column 'label'"),
        ("a.csv", "text,label\na,\n", "{}, line 2: the label is missing"),
        ("a.csv", "text,label\na,x\nb,NaN\n", "{}, line 3: the label is missing"),
        ("a.jsonl", '{"text": "a", "label": null}', "{}, line 1: the label is missing"),
        (
            "a.jsonl",
            '{"text": "a", "label": NaN}',
            "{}, line 1: malformed JSON (NaN is not a number of JSON)",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}',
            "{}, line 2: the label is missing",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": [1]}',
            "{}, line 1: the label is not a name or number but list",
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
            "text\tlabel\na\tb\n\nc\td\n",
            "{}, line 3: 1 fields, where the first line has 2",
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


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        (
            {"k": 40},
            "data.k = 40: own has 50 train rows, 10 of them held for test",
            "the largest usable k is 39, which leaves one row for dev",
        ),
        (
            {"k": 41, "dev_file": "own.csv"},
            "data.k = 41: own has 50 train rows, 10 of them held for test",
            "the largest usable k is 40",
        ),
        (
            {"k": 51, "dev_file": "own.csv", "test_file": "own.csv"},
            "data.k = 51: own has 50 train rows",
            "the largest usable k is 50",
        ),
        (
            {"metric": "spearman"},
            "data.metric = 'spearman': own is classification",
            "choose one of accuracy, f1, matthews",
        ),
        (
            {"kind": "regression"},
            "own.csv, line 2: the label 'bad' is not a number",
            "mend the row, or use --set data.kind=classification if labels are names",
        ),
        (
            {"text_pair": "text"},
            "a column is named twice: 'text', 'text', 'label'",
            "give --text, --text-pair and --label different columns",
        ),
        (
            {"text": "label", "label": "text"},
            "text column 'label': unipelt needs this name itself",
            "rename the column in the file",
        ),
        (
            {"test_file": "other.csv"},
            "other.csv, line 3: unknown label 'ugly'",
            "the labels of own are 'bad', 'good'",
        ),
        (
            {"dev_file": "other.csv"},
            "other.csv, line 3: unknown label 'ugly'",
            "the labels of own are 'bad', 'good'",
        ),
    ],
)
def test_settings_that_the_rows_contradict_are_told(tmp_path, monkeypatch, settings, message, hint):
    monkeypatch.chdir(tmp_path)
    own_file(tmp_path)
    own_file(tmp_path, 4, ("good", "ugly"), "other.csv")
    with pytest.raises(DataError) as caught:
        prepare_own("own.csv", **settings)
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("rows", "labels", "k", "message"),
    [
        (50, ("x",), None, "own: every row has the label 'x'"),
        (50, ("x", "y"), 1, "data.k = 1: every train row of own has the label"),
        (1, ("x",), None, "own: too few rows (1)"),
        (2, ("x", "y"), None, "own: too few rows (2)"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_told(tmp_path, rows, labels, k, message):
    path = own_file(tmp_path, rows, labels)
    with pytest.raises(DataError) as caught:
        prepare_own(path, k=k)
    assert caught.value.message.startswith(message)


# Errors in GLUE's layout


def test_too_large_a_k_is_told_with_the_largest(tmp_path):
    glue(tmp_path, "mrpc")
    with pytest.raises(DataError) as caught:
        prepare_glue(tmp_path, "mrpc", k=5000)
    assert caught.value.message == "data.k = 5000: mrpc has 60 train rows"
    assert caught.value.hint == "the largest usable k is 59, which leaves one row for dev"
    assert prepare_glue(tmp_path, "mrpc", k=59)


def test_a_missing_task_is_told_with_the_folders_found(tmp_path):
    glue(tmp_path, "rte")
    glue(tmp_path, "cola")
    with pytest.raises(DataError) as caught:
        prepare_glue(tmp_path, "mrpc")
    assert caught.value.message == f"{tmp_path}: no folder 'MRPC' for task mrpc"
    assert caught.value.hint == "folders found: CoLA, RTE"


def test_a_missing_directory_or_file_is_told(tmp_path):
    with pytest.raises(DataError) as caught:
        prepare_glue(tmp_path / "none", "mrpc")
    assert caught.value.message == (
        f"data source {str(tmp_path / 'none')!r}: No such file or directory"
    )
    (tmp_path / "MRPC").mkdir()
    with pytest.raises(DataError, match=r"MRPC/train\.tsv: No such file"):
        prepare_glue(tmp_path, "mrpc")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0\ta\tb\tmaybe", "line 62: unknown label 'maybe'"),
        ("0\ta\tb\t", "line 62: the label is missing"),
        ("0\ta\tb", "line 62: 3 fields, where the first line has 4"),
    ],
)
def test_wrong_rows_of_glue_are_told(tmp_path, line, message):
    glue(tmp_path, "rte")
    path = tmp_path / "RTE/train.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError) as caught:
        prepare_glue(tmp_path, "rte")
    assert caught.value.message == f"{path}, {message}"


def test_a_file_of_another_task_is_told(tmp_path):
    glue(tmp_path, "sst2", folder="RTE")
    with pytest.raises(DataError) as caught:
        prepare_glue(tmp_path, "rte")
    assert caught.value.message == f"{tmp_path / 'RTE/train.tsv'}: no column 'sentence1'"
    assert caught.value.hint == "columns found: 'sentence', 'label'"


def test_an_unknown_task_is_told():
    with pytest.raises(UnipeltError, match="no such task"):
        preparation.prepare(DataSettings(task="mprc"))


# The hub, without a network


@pytest.fixture
def hub(monkeypatch):
    """Answer `load_dataset` from a dictionary; its last call is kept."""
    stored = {}

    def load(name, config=None):
        found = stored.get((name, config))
        if isinstance(found, Exception):
            raise found
        return DatasetDict({split: Dataset.from_list(*rows) for split, rows in found.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return stored


def test_glue_on_the_hub_gives_the_rows_of_the_files(tmp_path, hub):
    local = prepare_glue(glue(tmp_path, "mnli"), "mnli", k=20)
    features = Features(
        premise=Value("string"),
        hypothesis=Value("string"),
        label=ClassLabel(names=["entailment", "neutral", "contradiction"]),
        idx=Value("int32"),
    )

    def rows(start, count):
        numbers = range(start, start + count)
        found = [
            {"premise": f"first mnli {n}", "hypothesis": f"second {n}", "label": n % 3, "idx": n}
            for n in numbers
        ]
        return found, features

    hub["nyu-mll/glue", "mnli"] = {"train": rows(0, 60), "validation_matched": rows(1000, 12)}
    prepared = preparation.prepare(DataSettings(task="mnli", k=20))
    assert prepared.manifest["splits"] == local.manifest["splits"]
    assert prepared.manifest["source"] == {
        "kind": "hub",
        "dataset": "nyu-mll/glue",
        "config": "mnli",
    }


def hub_rows(count, label):
    return ([{"body": f"row {n}", "stars": label(n)} for n in range(count)],)


@pytest.mark.parametrize(
    ("others", "sizes", "notes"),
    [
        ({}, (12, 4, 4), 3),
        ({"test": hub_rows(5, lambda n: n % 2)}, (16, 4, 5), 2),
        (
            {"test": hub_rows(5, lambda n: -1), "validation": hub_rows(6, lambda n: 1)},
            (16, 4, 6),
            2,
        ),
        ({"test": ([{"body": "x"}],), "validation": hub_rows(6, lambda n: 1)}, (16, 4, 6), 2),
    ],
)
def test_own_hub_data_use_a_labelled_split_as_test(hub, others, sizes, notes):
    hub["owner/name", "plain"] = {"train": hub_rows(20, lambda n: n % 2), **others}
    settings = DataSettings(dataset="owner/name:plain", text="body", label="stars")
    prepared = preparation.prepare(settings)
    assert tuple(len(rows) for rows in prepared.splits.values()) == sizes
    assert (prepared.task.name, prepared.task.labels) == ("name", ("0", "1"))
    assert len(prepared.manifest["notes"]) == notes


def test_hub_labels_are_named_and_rows_without_one_are_left_out(hub):
    features = Features(body=Value("string"), stars=ClassLabel(names=["no", "yes"]))
    rows = [{"body": f"row {n}" if n else "", "stars": n % 3 - 1} for n in range(30)]
    hub["owner/name", None] = {"train": (rows, features)}
    prepared = preparation.prepare(DataSettings(dataset="owner/name", text="body", label="stars"))
    assert prepared.task.labels == ("no", "yes")
    assert sum(map(len, prepared.splits.values())) == 20
    assert prepared.manifest["notes"][0] == "owner/name, train: rows without a label left out: 10"
    assert all(row % 3 for row in prepared.splits["train"]["row"])


@pytest.mark.parametrize(
    ("settings", "failure", "message"),
    [
        (
            {"task": "mrpc"},
            ConnectionError(
                "Couldn't reach 'nyu-mll/glue' on the Hub (OfflineModeIsEnabled)\nmore"
            ),
            "data.source = 'hub': nyu-mll/glue:mrpc: cannot be read (ConnectionError: "
            "Couldn't reach 'nyu-mll/glue' on the Hub (OfflineModeIsEnabled))",
        ),
        (
            {"dataset": "owner/name", "text": "body", "label": "stars"},
            ValueError("Config name is missing."),
            "data.dataset = 'owner/name': cannot be read (ValueError: Config name is missing.)",
        ),
    ],
)
def test_a_failing_hub_is_told_with_a_way_out(hub, settings, failure, message):
    hub["nyu-mll/glue", "mrpc"] = hub["owner/name", None] = failure
    with pytest.raises(DataError) as caught:
        preparation.prepare(DataSettings(**settings))
    assert caught.value.message == message
    assert "--source DIR" in caught.value.hint
    assert "unipelt train --task demo" in caught.value.hint


def test_a_hub_data_set_without_what_is_needed_is_told(hub):
    hub["owner/name", None] = {"test": hub_rows(5, lambda n: n)}
    settings = {"dataset": "owner/name", "text": "body"}
    with pytest.raises(DataError, match="no train split") as caught:
        preparation.prepare(DataSettings(label="stars", **settings))
    assert caught.value.hint == "splits found: test"
    hub["owner/name", None] = {"train": hub_rows(5, lambda n: n)}
    with pytest.raises(DataError, match="owner/name, train: no column 'label'") as caught:
        preparation.prepare(DataSettings(label="label", **settings))
    assert caught.value.hint == "columns found: 'body', 'stars'"
