"""Rows without a dev set: what small files choose, what is held back, and folds of train rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data_files import glue, own_file, prepare_glue, prepare_own, write

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation
from unipelt_cli.data.folds import assign_folds
from unipelt_cli.data.manifest import digest_rows, seal_manifest
from unipelt_cli.data.prepared_directory import Prepared, load_prepared, save_prepared
from unipelt_cli.errors import DataError

NO_DEV = "no dev set: trained to the end of its schedule"


def sizes(prepared: Prepared) -> dict[str, int]:
    return {split: len(rows) for split, rows in prepared.splits.items()}


def chosen(path: Path, **settings: Any) -> tuple[dict[str, int], int, list[str]]:
    """Prepare own rows whose user says nothing of dev rows; return splits, folds and notes."""
    prepared = prepare_own(path, **{"folds": "auto", **settings})
    manifest = prepared.manifest
    assert manifest["splits"].keys() == sizes(prepared).keys()
    return sizes(prepared), manifest.get("folds", 0), manifest["notes"]


@pytest.mark.parametrize(
    ("rows", "settings", "expected", "folds", "why"),
    [
        (100, {}, {"train": 100}, 5, "; scored by 5 folds"),
        (499, {}, {"train": 499}, 5, "; scored by 5 folds"),
        (500, {}, {"train": 400, "test": 100}, 0, ""),
        (1000, {}, {"train": 800, "test": 200}, 0, ""),
        (1001, {}, {"train": 601, "dev": 200, "test": 200}, 0, None),
        (100, {"test_file": "test.csv"}, {"train": 100, "test": 30}, 0, ""),
        (100, {"dev_file": "test.csv"}, {"train": 80, "dev": 30, "test": 20}, 0, None),
        (200, {"k": 100}, {"train": 100, "test": 100}, 0, ""),
        (199, {"k": 100}, {"train": 100}, 5, "; scored by 5 folds"),
        (100, {"k": 100}, {"train": 100}, 5, "; scored by 5 folds"),
        (1001, {"k": 100}, {"train": 100, "dev": 701, "test": 200}, 0, None),
    ],
)
def test_small_files_without_dev_rows_choose_by_their_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    settings: dict[str, Any],
    expected: dict[str, int],
    folds: int,
    why: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    own_file(tmp_path, 30, name="test.csv")
    found = chosen(own_file(tmp_path, rows), **settings)
    assert found[:2] == (expected, folds)
    held = "test and dev rows" if folds else "dev rows"
    said = f"{NO_DEV}{why} (chosen for {rows} rows; --folds none holds {held} back)"
    assert [note for note in found[2] if note.startswith("no dev")] == [said] * (why is not None)


def test_what_was_chosen_is_recorded_and_gives_the_same_rows_again(tmp_path: Path) -> None:
    path = own_file(tmp_path, 60)
    first = prepare_own(path, folds="auto")
    again = prepare_own(path, folds=first.manifest["folds"], dev_size=first.manifest["dev_size"])
    assert (first.manifest["folds"], first.manifest["dev_size"]) == (5, 0)
    assert digest_rows(first.splits["train"]) == digest_rows(again.splits["train"])
    assert again.manifest["notes"] == [f"{NO_DEV}; scored by 5 folds"]


def test_a_dev_size_or_no_folds_is_what_its_user_says(tmp_path: Path) -> None:
    path = own_file(tmp_path, 60)
    settings = DataSettings(train_file=str(path), text="text", label="label", dev_size=7)
    assert sizes(preparation.prepare(settings)) == {"train": 41, "dev": 7, "test": 12}
    assert sizes(prepare_own(path, folds=0)) == {"train": 36, "dev": 12, "test": 12}
    assert sizes(prepare_own(path, dev_size=0)) == {"train": 48, "test": 12}


def test_rows_that_cannot_be_folded_are_cut_as_larger_files_are(tmp_path: Path) -> None:
    path = own_file(tmp_path, 40)
    rare = write(tmp_path / "rare.csv", path.read_text().replace("bad", "good") + "one,bad\n")
    found, folds, _ = chosen(rare, kind="classification")
    assert (set(found), folds) == ({"train", "dev", "test"}, 0)
    with pytest.raises(DataError) as caught:
        prepare_own(rare, kind="classification", folds=5, dev_size=0)
    assert "every train row has the label 'good'" in caught.value.message
    assert caught.value.hint == "give fewer --folds, more rows, or --folds none"


def test_without_dev_the_rows_after_the_k_train_rows_are_test(tmp_path: Path) -> None:
    path = own_file(tmp_path, 60)
    small, large = (prepare_own(path, k=k, dev_size=0) for k in (20, 30))
    order = np.random.default_rng(111).permutation(60).tolist()
    assert small.splits["train"][:]["row"] == order[:20]
    assert small.splits["test"][:]["row"] == order[20:]
    assert large.splits["train"][:]["row"] == order[:30]
    assert small.manifest["notes"] == ["test: the next 40 of the shuffled train rows", NO_DEV]
    with pytest.raises(DataError) as caught:
        prepare_own(path, k=60, dev_size=0)
    assert caught.value.hint == "the largest usable k is 59"


def test_a_task_of_the_table_keeps_its_test_rows(tmp_path: Path) -> None:
    prepared = prepare_glue(glue(tmp_path, "mrpc"), "mrpc", k=20, dev_size=0)
    assert sizes(prepared) == {"train": 20, "test": 12}
    assert prepared.manifest["leakage"] == {"train_test": 0}
    folded = prepare_glue(tmp_path, "mrpc", k=20, dev_size=0, folds=4)
    assert sizes(folded) == {"train": 20}
    assert folded.manifest["notes"][1] == (
        "beside the 20 train rows 40 rows are left out of training and scoring"
    )


def test_a_directory_without_some_splits_is_read_as_it_was_written(tmp_path: Path) -> None:
    prepared = prepare_own(own_file(tmp_path, 60), folds=3, dev_size=0)
    save_prepared(prepared, tmp_path / "ready")
    assert sorted(path.name for path in (tmp_path / "ready").iterdir()) == [
        "manifest.json",
        "train.arrow",
    ]
    read = load_prepared(tmp_path / "ready")
    assert (sizes(read), read.manifest) == ({"train": 60}, prepared.manifest)
    settings = DataSettings(prepared=str(tmp_path / "ready"), folds=3, fold=2)
    assert sizes(preparation.prepare(settings)) == {"train": 40, "test": 20}
    for folds, count in ((4, 4), ("none", 0)):
        with pytest.raises(DataError) as caught:
            preparation.prepare(DataSettings(prepared=str(tmp_path / "ready"), folds=folds))
        told = f"data.folds = {count}: {tmp_path / 'ready'} was prepared with 3"
        assert caught.value.message == told


def test_a_directory_without_folds_is_what_no_folds_ask_for(tmp_path: Path) -> None:
    save_prepared(prepare_own(own_file(tmp_path, 60), folds=0), tmp_path / "ready")
    settings = DataSettings(prepared=str(tmp_path / "ready"), folds=0)
    assert sizes(preparation.prepare(settings)) == {"train": 36, "dev": 12, "test": 12}
    with pytest.raises(DataError) as caught:
        preparation.prepare(DataSettings(prepared=str(tmp_path / "ready"), folds=4))
    told = f"data.folds = 4: {tmp_path / 'ready'} was prepared with no folds"
    assert caught.value.message == told


def test_a_manifest_that_lacks_a_split_without_a_reason_is_damaged(tmp_path: Path) -> None:
    prepared = prepare_own(own_file(tmp_path, 60))
    lacking = {split: own for split, own in prepared.manifest["splits"].items() if split != "dev"}
    for manifest in ({"splits": lacking}, {"splits": {**lacking, "dev": None}, "dev_size": 0}):
        changed = Prepared(
            prepared.task, prepared.splits, seal_manifest({**prepared.manifest, **manifest})
        )
        save_prepared(changed, tmp_path / "ready" / str(len(manifest)))
        with pytest.raises(DataError):
            load_prepared(tmp_path / "ready" / str(len(manifest)))


# The folds themselves


def folds_of(path: Path, count: int, **settings: Any) -> tuple[Prepared, np.ndarray[Any, Any]]:
    prepared = prepare_own(path, folds=count, dev_size=0, **settings)
    train = prepared.splits["train"]
    return prepared, assign_folds(prepared.task, train, count, prepared.manifest["data_seed"])


def test_every_row_is_tested_once_and_classes_are_spread(tmp_path: Path) -> None:
    labels = ("bad", "good", "good", "odd")
    prepared, folds = folds_of(own_file(tmp_path, 62, labels), 5)
    assert max(Counter(folds.tolist()).values()) - min(Counter(folds.tolist()).values()) <= 1
    drawn = np.array(prepared.splits["train"][:]["label"])
    for label in range(3):
        counts = [int((drawn[folds == fold] == label).sum()) for fold in range(5)]
        assert max(counts) - min(counts) <= 1
    settings = {"train_file": str(tmp_path / "own.csv"), "text": "text", "label": "label"}
    parts = [
        preparation.prepare(DataSettings(**settings, folds=5, dev_size=0, fold=fold))
        for fold in range(1, 6)
    ]
    tested = [row for part in parts for row in part.splits["test"][:]["row"]]
    assert sorted(tested) == list(range(62))
    for part in parts:
        rows = [*part.splits["train"][:]["row"], *part.splits["test"][:]["row"]]
        assert sorted(rows) == list(range(62))
        assert part.manifest["leakage"] == {"train_test": 0}


def test_a_seed_draws_the_folds_and_another_one_others(tmp_path: Path) -> None:
    path = own_file(tmp_path, 60)
    drawn = [
        dict(zip(own.splits["train"][:]["row"], folds, strict=True))
        for own, folds in (folds_of(path, 5, data_seed=seed) for seed in (111, 111, 222))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_equal_texts_share_a_fold_and_rare_classes_are_in_some(tmp_path: Path) -> None:
    lines = [f"message {n % 30},{('bad', 'good')[n % 2]}" for n in range(60)]
    lines += ["rare one,odd", "rare two,odd"]
    path = write(tmp_path / "own.csv", "\n".join(["text,label", *lines]) + "\n")
    prepared, folds = folds_of(path, 5)
    by_text: dict[str, set[int]] = {}
    for text, fold in zip(prepared.splits["train"][:]["text"], folds, strict=True):
        by_text.setdefault(text, set()).add(int(fold))
    assert all(len(own) == 1 for own in by_text.values())
    assert by_text["rare one"] != by_text["rare two"]


def test_values_are_folded_as_they_come(tmp_path: Path) -> None:
    labels = tuple(f"{n / 7:.3f}" for n in range(50))
    _, folds = folds_of(own_file(tmp_path, 50, labels), 5, kind="regression")
    assert sorted(Counter(folds.tolist()).values()) == [10] * 5


def test_fewer_texts_than_folds_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", "text,label\n" + "a,x\nb,y\na,x\nb,y\n" * 4)
    with pytest.raises(DataError) as caught:
        prepare_own(path, folds=5, dev_size=0)
    assert caught.value.message == "data.folds = 5: own has 2 train rows of different texts"
    assert caught.value.hint == "give fewer --folds, more rows, or --folds none"
