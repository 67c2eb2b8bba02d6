"""What a label column is: decided once, said, recorded, and asked for where that is wrong."""

import json
from pathlib import Path

import pytest
from support.command import FAST, error_of, invoke, rows_options
from support.data_files import prepare_own, write
from support.rows import sentence, write_table

from unipelt_cli.config.presets import read_preset
from unipelt_cli.data.label_kind import alike, decide, label_number, one_spelling
from unipelt_cli.data.preparation import labelled_rows
from unipelt_cli.errors import DataError

CODES = ["1.1", "1.10", "2.1"]
THIRDS = ["1", "1.33", "1.67", "2", "2.33", "2.67", "3"]
COMMAS = [f"{n // 10},{n % 10}" for n in range(60)]


@pytest.mark.parametrize(
    ("labels", "is_regression", "words"),
    [
        (["yes", "no"] * 9, False, "2 labels"),
        (["0", "1"] * 9, False, "2 labels"),
        ([str(n % 5) for n in range(40)], False, "5 labels"),
        (CODES * 9, False, "3 labels: numbers that repeat"),
        (["1.1", "1.2", "2.1"] * 9, False, "3 labels: numbers that repeat"),
        (["1.1", "1.2", "2.1"] * 2, True, "3 different numbers: regression"),
        (THIRDS * 9, True, "7 different numbers: regression"),
        (["1", "1.5", "2", "2.5"] * 9, True, "4 different numbers: regression"),
        (["-1.5", "2.25", "7"] * 9, True, "3 different numbers: regression"),
        ([str(n * 7 % 100) for n in range(60)], True, "60 different numbers: regression"),
        ([str(n % 77) for n in range(770)], False, "77 labels: numbers that repeat"),
        ([str(n % 101) for n in range(2020)], True, "101 different numbers: regression"),
        (["007", "012", "345"] * 9, False, "3 labels"),
        (COMMAS, True, "60 different numbers with decimal commas: regression"),
        (
            [f"{n + 1},250" for n in range(60)],
            True,
            "60 different numbers with thousands marks, '1,250' is 1250: regression",
        ),
    ],
)
def test_numbers_are_names_where_they_repeat_as_names_do(
    labels: list[str], is_regression: bool, words: str
) -> None:
    found = decide(labels)
    assert (found.is_regression, found.words) == (is_regression, words)
    assert decide(labels, "classification").is_regression is False
    assert decide(labels, "regression").is_regression is True


@pytest.mark.parametrize(
    ("label", "comma", "number"),
    [
        ("3.8", False, 3.8),
        ("1,234.5", False, 1234.5),
        ("1'234", False, 1234),
        ("12 345", False, 12345),
        ("0,4", False, None),
        ("1,23,4", False, None),
        ("0,4", True, 0.4),
        ("1.234,5", True, 1234.5),
        ("-1\u202f234,5", True, -1234.5),
        ("4.5", True, 4.5),
        ("four", True, None),
    ],
)
def test_numbers_are_read_as_they_are_spelled(
    label: str, comma: bool, number: float | None
) -> None:
    assert label_number(label, comma) == number


def test_whole_numbers_have_one_spelling_and_codes_keep_theirs(tmp_path: Path) -> None:
    assert [one_spelling(label) for label in ("1.0", "-0.00", "1.10", "01.0", "x.0")] == [
        *("1", "0", "1.10", "01.0", "x.0")
    ]
    spelled = ("0", "0.0", "1", "1.0")
    path = write_table(tmp_path / "a.csv", "text,label", lambda n: f"t {n},{spelled[n % 4]}")
    test = write(tmp_path / "b.csv", "text,label\na,1.00\nb,0\n")
    prepared = prepare_own(path, test_file=str(test))
    assert prepared.task.labels == ("0", "1")
    assert prepared.splits["test"][:]["label"] == [1, 0]


def test_the_note_and_the_run_agree_and_the_kind_is_recorded(bert: Path, tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "codes.csv", "text,section", lambda n: f"{sentence(n)},{CODES[n % 3]}"
    )
    out = tmp_path / "run"
    given = ("train", "--train-file", path, "--k", "24", "--model", bert, *FAST)
    code, stdout, stderr = invoke(*given, "--out", out, "--json")
    assert code == 0, stderr
    assert stderr.splitlines()[0] == (
        "note: codes.csv: guessed text 'text', label 'section' (3 labels: numbers that repeat); "
        "to choose: --text COLUMN --label COLUMN --set data.kind=regression"
    )
    assert json.loads(stdout)["metric"] == "accuracy"
    assert json.loads((out / "environment.json").read_text())["data"]["labels"] == CODES
    assert read_preset(str(out / "experiment.toml"))["data"]["kind"] == "classification"
    named = (*given, "--text", "text", "--label", "section")
    _, _, stderr = invoke(*named, "--dry-run")
    assert (
        "note: label 'section': 3 labels: numbers that repeat; otherwise: "
        "--set data.kind=regression" in stderr.splitlines()
    )
    code, stdout, stderr = invoke(*given, "--set", "data.kind=regression", "--dry-run", "--json")
    assert json.loads(stdout)["labels"]["train"].keys() == {"min", "mean", "max"}
    assert stderr.splitlines()[0].endswith("label 'section' (3 different numbers: regression); "
                                           "to choose: --text COLUMN --label COLUMN")  # fmt: skip


def test_a_run_on_decimal_commas_scores_other_files_of_them(bert: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", "text;score", lambda n: f"{sentence(n)};{COMMAS[n]}")
    out = tmp_path / "run"
    given = ("--k", "24", "--model", bert, *FAST, "--out", out)
    assert invoke("train", "--train-file", path, *given)[0] == 0
    other = write(tmp_path / "b.csv", "text;score\nlate parcel;1,5\nblue shirt;0,5\n")
    code, stdout, stderr = invoke("eval", out, "--file", other, "--json")
    assert (code, json.loads(stdout)["rows"]) == (0, 2), stderr
    prepared = prepare_own(path, text="text", label="score")
    assert max(prepared.splits["train"][:]["label"]) < 6
    assert prepared.manifest["decimal_comma"] is True


def test_labels_that_are_nearly_as_many_as_rows_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", "text,label", lambda n: f"{sentence(n)},w{n // 2 * 2}x{n % 3}")  # fmt: skip  # noqa: E501
    given = ("prepare", "--train-file", path, "--text", "text", "--label", "label")
    assert error_of(*given) == (
        f"{path}: 60 different labels in 60 rows",
        "name another column with --label; --set data.kind=classification takes them as classes "
        "all the same",
    )
    out = ("--set", "data.kind=classification", "--out", tmp_path / "ready")
    assert invoke(*given, *out)[0] == 0


def test_a_header_among_the_rows_is_told(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.csv", "text,label", lambda n: "text,label" if n == 30 else f"t {n},{n % 2}x"
    )
    assert error_of("prepare", "--train-file", path, "--text", "text", "--label", "label") == (
        f"{path}, line 32: the names of the columns once more",
        "drop the line",
    )


def test_labels_that_look_alike_are_said_and_stay_apart(tmp_path: Path) -> None:
    names = ("Yes", "yes", "no", "n\u200bo", "cafe\u0301", "caf\xe9")
    path = write_table(tmp_path / "a.csv", "text,label", lambda n: f"t {n},{names[n % 6]}")
    prepared = prepare_own(path)
    start = "labels that differ only by case, spaces, invisible characters or Unicode form are "
    start += "classes of their own: "
    assert len(prepared.task.labels) == 6
    assert [note for note in prepared.manifest["notes"] if note.startswith("labels")] == [
        f"{start}'Yes' 10, 'yes' 10",
        f"{start}'cafe\\u0301' 10, 'caf\xe9' 10",
        f"{start}'no' 10, 'n\\u200bo' 10",
    ]
    assert list(alike(["a", "b"])) == []


def test_many_labels_are_cut_in_the_table_with_a_count(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.csv", "text,label", lambda n: f"{sentence(n)},c{n % 77:02}", 770
    )
    given = (*rows_options(path), "--out", tmp_path / "ready", "--json")
    code, stdout, stderr = invoke("prepare", *given)
    assert code == 0
    assert stderr.count("and 53 more labels") == 3
    assert "c24" not in stderr
    assert len(json.loads(stdout)["splits"]["train"]["labels"]) == 77


def test_numbers_of_a_file_are_never_read_by_the_decimal_comma_of_others(tmp_path: Path) -> None:
    commas = [f"message {n};{n // 7},{n % 7}25" for n in range(60)]
    train = write(tmp_path / "train.csv", "\n".join(["text;label", *commas]))
    rows = [json.dumps({"text": f"message {n}", "label": 12.345 + n}) for n in range(9)]
    test = write(tmp_path / "test.jsonl", "\n".join(rows))
    prepared = prepare_own(train, test_file=str(test), k=20, dev_size=10)
    assert prepared.task.decimal_comma
    assert prepared.splits["test"]["label"][:] == pytest.approx([12.345 + n for n in range(9)])
    points = write(tmp_path / "points.csv", "text;label\na;12.345\nb;56.125\n")
    with pytest.raises(DataError) as caught:
        list(labelled_rows(points, prepared.task, "label"))
    assert (caught.value.message, caught.value.hint) == (
        f"{points}, line 2: the label '12.345' can be read in two ways",
        "spell labels as the run's train rows do: a decimal comma, no thousands marks",
    )


# Many classes, few rows: a hundred rows of 77 classes show not all of them.


def many_classes(path: Path, rows: int, classes: int) -> Path:
    return write_table(path, "text,label", lambda n: f"{sentence(n)},c{n % classes}x", rows)


def test_labels_that_test_alone_has_are_scored_as_wrong_and_said(
    bert: Path, tmp_path: Path
) -> None:
    train = many_classes(tmp_path / "a.csv", 40, 4)
    test = many_classes(tmp_path / "t.csv", 12, 6)
    out = tmp_path / "run"
    files = ("--train-file", train, "--test-file", test, "--text", "text", "--label", "label")
    given = ("--dev-size", "0", "--model", bert, *FAST, "--out", out)
    code, _, stderr = invoke("train", *files, *given)
    note = "note: test: 4 rows have labels that no train row has: 'c4x', 'c5x'"
    assert code == 0
    assert note in stderr.splitlines()
    scores = json.loads((out / "result.json").read_text())["test"]
    assert scores["accuracy"] <= 8 / 12
    code, stdout, _ = invoke("eval", out, "--json")
    assert (code, json.loads(stdout)["scores"]["accuracy"]) == (0, scores["accuracy"])


def test_a_scored_file_may_have_labels_that_the_run_has_not(bert: Path, tmp_path: Path) -> None:
    train, out = many_classes(tmp_path / "a.csv", 60, 4), tmp_path / "run"
    given = ("--k", "24", "--dev-size", "0", "--model", bert, *FAST, "--out", out)
    files = ("--train-file", train, "--text", "text", "--label", "label")
    assert invoke("train", *files, *given)[0] == 0
    some = many_classes(tmp_path / "some.csv", 12, 6)
    code, stdout, stderr = invoke("eval", out, "--file", some, "--json")
    assert code == 0
    assert stderr.splitlines()[0] == (
        f"note: {some}: 4 rows have labels that no train row has: 'c4x', 'c5x'"
    )
    scores = json.loads(stdout)["scores"]
    assert scores["accuracy"] <= 8 / 12
    most = many_classes(tmp_path / "most.csv", 12, 12)
    assert error_of("eval", out, "--file", most) == (
        f"{most}, line 6: unknown label 'c4x'",
        "the labels of a are 'c0x', 'c1x', 'c2x', 'c3x'",
    )


def test_a_test_file_of_other_labels_is_refused(tmp_path: Path) -> None:
    train = many_classes(tmp_path / "a.csv", 40, 4)
    test = many_classes(tmp_path / "t.csv", 12, 12)
    files = ("--train-file", train, "--test-file", test, "--text", "text", "--label", "label")
    assert error_of("prepare", *files) == (
        f"{test}, line 6: unknown label 'c4x'",
        "the labels of a are 'c0x', 'c1x', 'c2x', 'c3x'",
    )


def test_77_labels_of_100_rows_are_classes(tmp_path: Path) -> None:
    assert len(prepare_own(many_classes(tmp_path / "a.csv", 100, 77)).task.labels) == 77


def test_numbers_are_classes_if_the_test_rows_show_it(tmp_path: Path) -> None:
    few = write_table(tmp_path / "a.csv", "text,label", lambda n: f"{sentence(n)},{n % 31}", 60)
    many = write_table(tmp_path / "t.csv", "text,label", lambda n: f"{sentence(n)},{n % 31}", 310)
    assert prepare_own(few, text="text", label="label").task.is_regression is True
    assert len(prepare_own(few, test_file=str(many)).task.labels) == 31
