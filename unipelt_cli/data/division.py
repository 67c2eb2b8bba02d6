"""What of the rows is held back: test rows, dev rows, or neither, where folds test all of them.

A dev set is rows that teach nothing, and of a hundred rows nobody can spare them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data.folds import assign_folds
from unipelt_cli.data.sources import SourceRows
from unipelt_cli.errors import DataError

LARGEST_TEST = 1000
# What own files without dev rows choose, if their user says nothing. Measured with the default
# method on minilm, k = 100, data seeds 111, 222 and 333, mean test score: demo 0.900 with 200 dev
# rows, 0.904 with none; SST-2 0.766 with 300, 0.765 with none; STS-B 0.873 with 300, 0.869 with
# none. Where dev rows begin to pay was not measured.
FOLDED_BELOW = 500  # rows: below, all of them train, and folds test them, if no file does
WITHOUT_DEV = 1000  # rows: up to so many, none of them is held for dev
FOLDS = 5
LEAST_TEST = 100  # rows beside k train rows, from which on they are the test


@dataclass(frozen=True)
class Division:
    """Where the shuffled rows go, by their places; what is empty is elsewhere, or not at all."""

    train: range
    dev: range = range(0)
    test: range = range(0)


def settle(source: SourceRows, settings: DataSettings, shuffled: Dataset) -> DataSettings:
    """Return the settings with `folds`, and with the `dev_size` where `auto` decides it as well.

    Rows that cannot be folded are cut as larger files are.
    """
    settings = settings.with_folds()
    if settings.folds != "auto":
        return settings
    rows, k = len(shuffled), settings.k
    cut = settings.model_copy(update={"folds": 0})
    if rows > WITHOUT_DEV:
        return cut
    scored = cut.model_copy(update={"dev_size": 0})
    if "test" in source.rows or (rows - k >= LEAST_TEST if k is not None else rows >= FOLDED_BELOW):
        return scored
    folded = cut.model_copy(update={"folds": FOLDS, "dev_size": 0})
    train = shuffled.select(range(min(k or rows, rows)))
    try:
        assign_folds(source.task, train, FOLDS, settings.data_seed)
    except DataError:
        return cut
    return folded


def divide(source: SourceRows, settings: DataSettings) -> Division:
    """Say which of the shuffled rows train, and which are dev and test, where no file has those.

    Raises DataError for too few rows, and for a k that leaves none for what it must.
    """
    rows, k, name = len(source.rows["train"]), settings.k, source.task.name
    carves_dev = "dev" not in source.rows and settings.dev_size > 0
    fifth = max(1, rows // 5)
    carves_test = "test" not in source.rows and not settings.folds
    follows = carves_test and k is not None and settings.dev_size == 0
    test = 0 if not carves_test else 1 if follows else min(LARGEST_TEST, fifth)
    left = rows - test
    most = left - carves_dev
    if most < 1:
        least = 2 + carves_dev
        raise DataError(f"{name}: too few rows ({rows})", f"give at least {least} labelled rows")
    if k is not None and k > most:
        held = f", {test} of them held for test" if test else ""
        reserved = ", which leaves one row for dev" if carves_dev else ""
        raise DataError(
            f"data.k = {k}: {name} has {rows} train rows{held}",
            f"the largest usable k is {most}{reserved}",
        )
    if follows and k is not None:
        return Division(range(k), test=range(k, min(rows, k + LARGEST_TEST)))
    largest = left - k if k is not None else fifth if source.is_own else max(1, left // 2)
    dev = min(settings.dev_size, largest) if carves_dev else 0
    first = test if k is None else test + k
    train = range(test + dev, rows) if k is None else range(test, first)
    return Division(train, range(first, first + dev), range(test))


def division_notes(
    source: SourceRows, asked: DataSettings, settled: DataSettings, division: Division
) -> Iterator[str]:
    """Say in sentences what was held back, and why, where the settings alone do not tell."""
    test, dev = len(division.test), len(division.dev)
    if test and division.test.start:
        yield f"test: the next {test} of the shuffled train rows"
    elif test:
        yield f"test: the first {test} of the shuffled train rows (20 %, at most {LARGEST_TEST})"
    if dev and settled.k is None:
        yield f"dev: the {'next' if test else 'first'} {dev} of the shuffled rows; train: the rest"
    if 0 < dev < settled.dev_size:
        yield f"dev: {dev} rows instead of {settled.dev_size}, because there are too few"
    if not settled.has_dev:
        scored = f"; scored by {settled.folds} folds" if settled.folds else ""
        held = "test and dev rows" if settled.folds else "dev rows"
        chosen = asked.with_folds().folds == "auto"
        yield f"no dev set: trained to the end of its schedule{scored}" + (
            f" (chosen for {len(source.rows['train'])} rows; --folds none holds {held} back)"
            if chosen
            else ""
        )
    if settled.folds and (left := len(source.rows["train"]) - len(division.train)):
        rows = "1 row is" if left == 1 else f"{left} rows are"
        yield f"beside the {len(division.train)} train rows {rows} left out of training and scoring"
