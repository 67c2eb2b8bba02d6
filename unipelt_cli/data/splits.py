"""Drawing train, dev and test rows by the protocol."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from datasets import Dataset

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data.cells import as_dataset
from unipelt_cli.data.division import divide, division_notes, settle
from unipelt_cli.data.folds import assign_folds
from unipelt_cli.data.label_kind import without_train_row
from unipelt_cli.data.manifest import SPLITS
from unipelt_cli.data.sources import SourceRows
from unipelt_cli.errors import DataError
from unipelt_cli.tasks import Task
from unipelt_cli.text import short


def draw_splits(
    source: SourceRows, settings: DataSettings
) -> tuple[DataSettings, dict[str, Dataset], list[str]]:
    """Shuffle the train rows by the data seed and cut them: test (if none), train, dev.

    Without k, dev is cut before train, which is all the rest. Returns the settings with what
    `auto` became, the splits that there are, and what must be known of them.
    """
    shuffled = source.rows["train"].shuffle(seed=settings.data_seed, keep_in_memory=True)
    settled = settle(source, settings, shuffled)
    division = divide(source, settled)
    splits = {"train": _part(shuffled, division.train)}
    for split, places in (("dev", division.dev), ("test", division.test)):
        if places:
            splits[split] = _part(shuffled, places)
        elif split in source.rows and not settled.folds:
            splits[split] = source.rows[split]
    _check_classes(source.task, splits["train"], settled.k)
    if settled.folds:
        assert settled.folds != "auto"
        assign_folds(source.task, splits["train"], settled.folds, settled.data_seed)
    odd = (*_unseen_labels(source.task, splits), *_flat_values(source.task, splits["train"]))
    decided = division_notes(source, settings, settled, division)
    return settled, splits, [*source.notes, *decided, *odd]


def _part(rows: Dataset, places: range) -> Dataset:
    return as_dataset(rows.select(places, keep_in_memory=True).with_format("arrow")[:])


def _unseen_labels(task: Task, splits: Mapping[str, Dataset]) -> Iterator[str]:
    """Say which labels dev and test ask for that training never shows."""
    if task.is_regression:
        return
    drawn = set(splits["train"][:]["label"])
    for split in SPLITS[1:]:
        if split not in splits:
            continue
        unseen = Counter(label for label in splits[split][:]["label"] if label not in drawn)
        if unseen:
            counts = {task.labels[label]: unseen[label] for label in sorted(unseen)}
            yield f"{split}: {without_train_row(counts)}"


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
