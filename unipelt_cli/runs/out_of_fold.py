"""The folds of a run: experiments of their own beside it, and what their predictions amount to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.data.folds import assign_folds
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import RunError
from unipelt_cli.files import sealed
from unipelt_cli.files.as_json import as_json
from unipelt_cli.metrics import Values
from unipelt_cli.models.evaluation import references
from unipelt_cli.models.resampling import Interval, score_interval
from unipelt_cli.runs.names import fold_directory
from unipelt_cli.runs.run import read_run
from unipelt_cli.tasks import Task


@dataclass(frozen=True)
class FoldScore:
    """One fold: how many rows it tested, with which scores, after what training."""

    rows: int
    test: Mapping[str, float]
    epochs: int
    seconds: float
    collapsed: bool


@dataclass(frozen=True)
class FoldsSummary:
    """The mean and spread of the folds' scores, the interval over all rows, and each fold."""

    count: int
    rows: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    interval: Interval | None
    each: Sequence[FoldScore]


@dataclass(frozen=True)
class OutOfFold:
    """What trainings without them said of the train rows (rows,), in these rows' order."""

    predicted: Values
    expected: Values
    each: tuple[FoldScore, ...]


def fold_experiments(experiment: Experiment, directory: Path) -> Iterator[tuple[Experiment, Path]]:
    """Yield what trains each fold of a run's rows, and where; nothing for a run without folds."""
    folds = experiment.data.folds
    if folds == "auto" or experiment.data.fold is not None:
        return
    for fold in range(1, folds + 1):
        yield experiment.with_("data", fold=fold), fold_directory(directory, fold)


def read_folds(directory: Path, prepared: Prepared) -> OutOfFold:
    """Read what the finished folds of a run said of its train rows.

    Raises RunError where a fold's files are damaged, or those of other rows.
    """
    recorded, train = prepared.manifest, prepared.splits["train"]
    places = assign_folds(prepared.task, train, recorded["folds"], recorded["data_seed"])
    expected = references(train)
    predicted, each = np.zeros_like(expected), []
    for fold in range(recorded["folds"]):
        run = read_run(fold_directory(directory, fold + 1))
        answers = run.predictions()
        if answers is None or not np.array_equal(answers[1], expected[places == fold]):
            raise RunError(f"{run.directory}: not of the rows of this fold", sealed.REMEDY)
        predicted[places == fold] = answers[0]
        outcome = run.outcome
        each.append(
            FoldScore(
                rows=len(answers[0]),
                test=outcome.test,
                epochs=outcome.epochs,
                seconds=outcome.seconds,
                collapsed=outcome.collapsed,
            )
        )
    return OutOfFold(predicted, expected, tuple(each))


def summarise_folds(folds: OutOfFold, task: Task) -> FoldsSummary:
    """Return what a result says of its folds: the mean and spread of their scores, and each.

    The interval is that of the task's own metric over all rows, at 95 %, if rows are drawn anew.
    """
    scores = [fold.test for fold in folds.each]
    return FoldsSummary(
        count=len(folds.each),
        rows=len(folds.expected),
        mean={name: fmean(of_fold[name] for of_fold in scores) for name in scores[0]},
        spread={name: stdev(of_fold[name] for of_fold in scores) for name in scores[0]},
        interval=score_interval(task, folds.predicted, folds.expected),
        each=folds.each,
    )


def describe_score(
    tasks: Sequence[Task],
    predicted: Sequence[Values],
    expected: Sequence[Values],
    out_of_fold: OutOfFold | None,
) -> Mapping[str, Any]:
    """Return what a result says of how sure its score is: an interval, and the folds if any."""
    if out_of_fold is not None:
        folds = as_json(summarise_folds(out_of_fold, tasks[0]))
        return {"interval": folds["interval"], "folds": folds}
    if len(tasks) > 1:
        return {}
    interval = score_interval(tasks[0], predicted[0], expected[0])
    return {"interval": interval and list(interval)}
