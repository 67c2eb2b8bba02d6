"""Tasks of GLUE, the packaged demo and the hub are found, or the way out is said."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from support.data_files import GLUE_TASKS, HEADERS, glue, own_file, prepare_glue, prepare_own, write

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation
from unipelt_cli.errors import DataError, UnipeltError
from unipelt_cli.tasks import get_task

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
            "choose one of accuracy, f1, macro_f1, matthews",
        ),
        (
            {"kind": "regression"},
            "own.csv, line 2: the label 'bad' is not a number",
            "mend the row, or train with --set data.kind=classification if labels are names",
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
