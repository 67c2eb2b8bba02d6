"""Drawing train, dev and test rows by the protocol."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from datasets import Dataset

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data.cells import as_dataset
from unipelt_cli.data.sources import Found
from unipelt_cli.errors import DataError
from unipelt_cli.tasks import Task
from unipelt_cli.text import short

SPLITS = ("train", "dev", "test")
LARGEST_TEST = 1000


def draw_splits(found: Found, settings: DataSettings) -> tuple[dict[str, Dataset], list[str]]:
    """Shuffle the train rows by the data seed and cut them: test (if none), train, dev.

    Without k, dev is cut before train, which is all the rest.
    """
    rows, k, name = len(found.rows["train"]), settings.k, found.task.name
    carves_dev = "dev" not in found.rows
    fifth = max(1, rows // 5)
    test = 0 if "test" in found.rows else min(LARGEST_TEST, fifth)
    left = rows - test
    most = left - carves_dev
    if most < 1:
        raise DataError(f"{name}: too few rows ({rows})", "give at least 3 labelled rows")
    if k is not None and k > most:
        held = f", {test} of them held for test" if test else ""
        reserved = ", which leaves one row for dev" if carves_dev else ""
        raise DataError(
            f"data.k = {k}: {name} has {rows} train rows{held}",
            f"the largest usable k is {most}{reserved}",
        )
    largest = left - k if k is not None else fifth if found.own else max(1, left // 2)
    dev = min(settings.dev_size, largest) if carves_dev else 0
    first = test if k is None else test + k
    places = {
        "train": range(test + dev, rows) if k is None else range(test, first),
        "dev": range(first, first + dev),
        "test": range(test),
    }
    shuffled = found.rows["train"].shuffle(seed=settings.data_seed, keep_in_memory=True)
    splits = {
        split: _part(shuffled, places[split]) if places[split] else found.rows[split]
        for split in SPLITS
    }
    _check_classes(found.task, splits["train"], k)
    odd = (*_unseen_labels(found.task, splits), *_flat_values(found.task, splits["train"]))
    return splits, [*found.notes, *_notes(settings, test, dev), *odd]


def _part(rows: Dataset, places: range) -> Dataset:
    return as_dataset(rows.select(places, keep_in_memory=True).with_format("arrow")[:])


def _notes(settings: DataSettings, test: int, dev: int) -> Iterator[str]:
    """Say in sentences what the draw did that its settings alone do not tell."""
    if test:
        yield f"test: the first {test} of the shuffled train rows (20 %, at most {LARGEST_TEST})"
    if dev and settings.k is None:
        yield f"dev: the {'next' if test else 'first'} {dev} of the shuffled rows; train: the rest"
    if 0 < dev < settings.dev_size:
        yield f"dev: {dev} rows instead of {settings.dev_size}, because there are too few"


def _unseen_labels(task: Task, splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Say which labels dev and test ask for that training never shows."""
    if task.is_regression:
        return
    drawn = set(splits["train"][:]["label"])
    for split in SPLITS[1:]:
        unseen = Counter(label for label in splits[split][:]["label"] if label not in drawn)
        if unseen:
            count, names = unseen.total(), [short(task.labels[label]) for label in sorted(unseen)]
            listed = ", ".join([*names[:20], *(["..."] if len(names) > 20 else [])])
            rows = f"{count} rows have" if count > 1 else "1 row has"
            labels = "labels" if len(names) > 1 else "a label"
            yield f"{split}: {rows} {labels} that no train row has: {listed}"


def _flat_values(task: Task, train: Dataset) -> Iterator[str]:
    """Say where a regression's train labels are one, or too near to each other for float32."""
    if not task.is_regression:
        return
    values = np.asarray(train[:]["label"])
    largest = np.abs(values).max()
    if values.min() == values.max():
        yield f"train: every row has the label {values[0]:.10g}, so there is nothing to learn"
    elif np.spacing(np.float32(largest)) > values.std() / 10:
        yield (
            f"train: the labels, up to {largest:.3g}, differ by {values.std():.3g}, which float32 "
            "does not hold: subtract a constant from all of them"
        )


def _check_classes(task: Task, train: Dataset, k: int | None) -> None:
    drawn = set(train[:]["label"])
    if not task.is_regression and len(drawn) == 1:
        setting = "data.k is not set" if k is None else f"data.k = {k}"
        label = short(task.labels[drawn.pop()])
        if len(task.labels) == 1:
            raise DataError(
                f"{task.name}: every row has the label {label}",
                "give rows of at least two classes, or another column with --label",
            )
        raise DataError(
            f"{setting}: every train row of {task.name} has the label {label}",
            "give rows of at least two classes: a larger --k, another --data-seed or other data",
        )
