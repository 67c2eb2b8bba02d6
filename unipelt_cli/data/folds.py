"""Folds of train rows: each row is tested once, by a training on the rows of the other folds."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from unipelt_cli.data.cells import as_dataset
from unipelt_cli.data.manifest import describe_splits, seal_manifest, text_keys
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import DataError
from unipelt_cli.tasks import Task
from unipelt_cli.text import short

GIVE_NONE = "give fewer --folds, more rows, or --folds none"


def assign_folds(task: Task, train: Dataset, count: int, seed: int) -> NDArray[np.int64]:
    """Return each train row's fold, from 0: shuffled by the seed, and alike in their classes.

    Rows with equal texts share a fold. A class of fewer rows than folds is in some of them only.
    Raises DataError where a fold would be empty, or leave one class to train on.
    """
    labels: Sequence[float] = train[:]["label"]
    alike = defaultdict(list)
    for index, key in enumerate(text_keys(task, train)):
        alike[key].append(index)
    groups = list(alike.values())
    if len(groups) < count:
        what = f"data.folds = {count}: {task.name} has {len(groups)} train rows of different texts"
        raise DataError(what, GIVE_NONE)
    order = np.random.default_rng(seed).permutation(len(groups))
    drawn = [groups[index] for index in order]
    folds = np.zeros(len(train), np.int64)
    sizes, by_class = [0] * count, defaultdict[float, list[int]](lambda: [0] * count)
    if not task.is_regression:  # the largest class first: the small ones even the sizes out
        counts = Counter(labels)
        drawn.sort(key=lambda group: (-counts[labels[group[0]]], labels[group[0]]))
    for group in drawn:
        class_sizes = by_class[0.0 if task.is_regression else labels[group[0]]]
        chosen = min(range(count), key=lambda fold: (class_sizes[fold], sizes[fold], fold))
        class_sizes[chosen] += len(group)
        sizes[chosen] += len(group)
        folds[group] = chosen
    _check_classes(task, np.asarray(labels), folds)
    return folds


def _check_classes(task: Task, labels: NDArray[np.generic], folds: NDArray[np.int64]) -> None:
    if task.is_regression:
        return
    for fold in range(int(folds.max()) + 1):
        if len(left := set(labels[folds != fold].tolist())) == 1:
            what = f"without fold {fold + 1} every train row has the label"
            label = short(task.labels[left.pop()])
            raise DataError(f"data.folds: {task.name}, {what} {label}", GIVE_NONE)


def fold_of(whole: Prepared, fold: int) -> Prepared:
    """Return what trains and tests one fold, from 1: the rows of all others, and its own."""
    recorded, train = whole.manifest, whole.splits["train"]
    folds = assign_folds(whole.task, train, recorded["folds"], recorded["data_seed"])
    places = {"train": folds != fold - 1, "test": folds == fold - 1}
    splits = {
        split: as_dataset(train.select(np.flatnonzero(is_in_split)).with_format("arrow")[:])
        for split, is_in_split in places.items()
    }
    manifest = {**recorded, "fold": fold, "notes": [], **describe_splits(whole.task, splits)}
    return Prepared(whole.task, splits, seal_manifest(manifest))
