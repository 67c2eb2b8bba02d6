"""Rows are drawn by the protocol."""

import re

import numpy as np
import pytest
from support.data_files import glue, own_file, prepare_glue, prepare_own, write

from unipelt_cli.errors import DataError
from unipelt_cli.terminal import summaries

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


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (("7", "7.0"), "train: every row has the label 7, so there is nothing to learn"),
        (
            ("1000000000.5", "1000000003.5"),
            "train: the labels, up to 1e+09, differ by 1.5, which float32 does not hold: subtract "
            "a constant from all of them",
        ),
    ],
)
def test_values_that_teach_nothing_are_said(tmp_path, labels, note):
    prepared = prepare_own(own_file(tmp_path, labels=labels), k=20, kind="regression")
    said = prepared.manifest["notes"][-1]
    assert re.sub(r"by 1\.[45]\d*", "by 1.5", said) == note


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
    summaries.data_summary(manifest, is_answer=False)
    shown = capsys.readouterr().err.splitlines()
    within = "12 within train, 2 within dev, 2 within test"
    equal = f"{within}, 6 train and dev, 9 train and test, 1 dev and test"
    assert shown[-2:] == [
        f"note: rows with equal texts: {equal}",
        "note: texts with more than one label: 17",
    ]
    summaries.data_summary(prepare_own(own_file(tmp_path)).manifest, is_answer=False)
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
