"""What tells candidates apart: dev rows, or folds of the train rows where there are none."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.data.folds import fold_of
from unipelt_cli.data.manifest import seal_manifest
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import ConfigError, DataError
from unipelt_cli.models.evaluation import compute_logits, predictions, references
from unipelt_cli.sweeps.candidates import Candidate, Trial
from unipelt_cli.tasks import joint_metric
from unipelt_cli.training.events import Epoch
from unipelt_cli.training.planning import RowCache, loop_of, plan

KEPT = 3  # one candidate of so many goes on, and so many to the end
SEEDS = 3  # of those that train to their end on dev
# Of the train rows, without dev rows. Five cost twice as much to the end, and so leave fewer
# candidates that came there; the first of three tests a third of the rows, not a fifth.
FOLDS = 3


@dataclass(frozen=True)
class Rung:
    """How many candidates begin it at most, until which epoch they train, and how many trainings.

    Trainings differ in their seeds, or in the fold that is left out.
    """

    candidates: int | None
    epochs: int | None
    trainings: int = 1


class Judge(Protocol):
    """How candidates get their scores, all of them on the same rows."""

    rungs: tuple[Rung, ...]
    rows: int

    def advance(self, candidate: Candidate, rung: Rung, end: float) -> None:
        """Train a candidate as far as the rung asks, or until the time `end` is over.

        One training is always carried out. Raises UnipeltError for what cannot be trained.
        """


class DevJudge:
    """Scores on dev rows: loops go on from rung to rung, the last ones with more seeds."""

    def __init__(self, prepared: Sequence[Prepared], shared: RowCache) -> None:
        self.rungs: tuple[Rung, ...] = (Rung(None, 4), Rung(None, 12), Rung(KEPT, None, SEEDS))
        self.rows, self.shared = sum(len(part.splits["dev"]) for part in prepared), shared

    def advance(self, candidate: Candidate, rung: Rung, end: float) -> None:
        first = candidate.experiment.train.seed
        candidate.rows = self.rows
        while len(candidate.trials) < rung.trainings:
            seed = first + len(candidate.trials)
            candidate.trials.append(Trial(candidate.experiment.with_("train", seed=seed)))
        for count, trial in enumerate(candidate.trials):
            if count and time.monotonic() > end:
                break
            if not trial.is_over:
                self._train(candidate, trial, rung.epochs)

    def _train(self, candidate: Candidate, trial: Trial, until: int | None) -> None:
        """Go on with one trial from its state, and keep the new one."""
        experiment, prepared, tuned = plan(trial.experiment, self.shared)
        loop = loop_of(experiment, prepared, tuned, self.shared)
        if trial.state is not None:
            loop.restore(*trial.state)
        trial.is_over = True
        for event in loop.events():
            if isinstance(event, Epoch):
                trial.epoch = event.epoch
                if until is not None and event.epoch >= until and not loop.is_done:
                    trial.is_over = False
                    break
        trial.score = loop.progress.best_score if loop.progress.best_dev else None
        trial.state = None if trial.is_over else loop.state()
        candidate.metric = joint_metric(loop.tasks)
        candidate.stored_parameters = tuned.parameter_counts()["stored_parameters"]


class FoldJudge:
    """Scores of train rows by trainings without them, whole schedules all: rungs are more folds.

    Everyone is judged on the same folds, in the same order. They are drawn by another seed than
    those of a run, whose score would else be the very maximum that was chosen.
    """

    def __init__(self, whole: Prepared, shared: RowCache) -> None:
        manifest = {**whole.manifest, "folds": FOLDS, "data_seed": whole.manifest["data_seed"] + 1}
        rows = {"train": whole.splits["train"]}
        folded = Prepared(whole.task, rows, seal_manifest(manifest))
        self.parts = [fold_of(folded, fold) for fold in range(1, FOLDS + 1)]
        self.expected: list[Any] = [references(part.splits["test"]) for part in self.parts]
        self.rows, self.shared = len(rows["train"]), shared
        rungs = (Rung(None, None, 1), Rung(None, None, 2), Rung(KEPT, None, FOLDS))
        self.rungs: tuple[Rung, ...] = rungs

    def advance(self, candidate: Candidate, rung: Rung, end: float) -> None:
        task = self.parts[0].task
        count = len(self.parts) if candidate.is_floor else rung.trainings
        while (done := len(candidate.trials)) < count:
            if done and not candidate.is_floor and time.monotonic() > end:
                return
            candidate.trials.append(self._train(candidate, done))
            answers: list[Any] = [trial.predicted for trial in candidate.trials]
            expected = np.concatenate(self.expected[: done + 1])
            candidate.pooled.append(task.score(np.concatenate(answers), expected)[task.metric])
            candidate.metric, candidate.rows = task.metric, len(expected)

    def _train(self, candidate: Candidate, fold: int) -> Trial:
        """Train on all folds but one to the end of the schedule, and score that one."""
        experiment, _, tuned = plan(candidate.experiment, self.shared)
        part = self.parts[fold]
        loop = loop_of(experiment, [part], tuned, self.shared)
        trial = Trial(experiment, is_over=True)
        for event in loop.events():
            if isinstance(event, Epoch):
                trial.epoch = event.epoch
        rows = self.shared.encode(tuned, part, "test", experiment)
        trial.predicted = predictions(part.task, compute_logits(tuned, rows))
        trial.score = part.task.score(trial.predicted, self.expected[fold])[part.task.metric]
        candidate.stored_parameters = tuned.parameter_counts()["stored_parameters"]
        return trial


def judge_of(experiment: Experiment, shared: RowCache) -> DevJudge | FoldJudge:
    """Return what judges candidates on an experiment's rows: its dev rows, else folds.

    Raises DataError for rows that cannot be read, ConfigError for those that no fold can judge.
    """
    prepared = shared.prepare(experiment.data)
    if all("dev" in part.splits for part in prepared):
        return DevJudge(prepared, shared)
    if len(prepared) > 1:
        names = ", ".join(part.task.name for part in prepared)
        raise ConfigError(f"{names}: no dev rows, and folds are one task's", "give --dev-size N")
    try:
        return FoldJudge(prepared[0], shared)
    except DataError as error:
        hint = "give more rows, or --dev-size N: then dev rows decide"
        raise ConfigError(f"no dev rows, and folds cannot be made: {error.message}", hint) from None


def reuses_test_rows(experiment: Experiment, shared: RowCache) -> bool:
    """Say whether the rows that choose are those that a run is scored on: folds of its rows."""
    return any("test" not in part.splits for part in shared.prepare(experiment.data))
