"""Candidates of which something is known, as a search leaves them."""

from pathlib import Path

from support.models import experiment

from unipelt_cli.sweeps.candidates import Candidate, Choice, Trial
from unipelt_cli.sweeps.judges import Rung


def on_dev(
    method: str,
    *scores: float,
    rung: int = 0,
    is_complete: bool = False,
    stored: int = 0,
    metric: str = "accuracy",
    error: str | None = None,
) -> Candidate:
    """Return a candidate with the dev scores of so many seeds."""
    described = experiment(Path("minilm"), method)
    trials = [Trial(described, score=score) for score in scores]
    return Candidate(
        Choice(method, 1e-3),
        described,
        trials,
        rung=rung,
        rows=200,
        is_complete=is_complete,
        stored_parameters=stored,
        metric=metric,
        error=error,
    )


def by_folds(
    method: str, *pooled: float, folds: int = 5, metric: str = "accuracy", stored: int = 0
) -> Candidate:
    """Return a candidate with the scores of the first fold's rows, of the first two folds', ..."""
    candidate = on_dev(method, *pooled, metric=metric, stored=stored)
    candidate.pooled = list(pooled)
    candidate.rows = 20 * len(pooled)
    candidate.is_complete = len(pooled) == folds
    return candidate


class Clock:
    """A time that goes on only where something takes so long."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Scripted:
    """A judge that trains nothing: scores of seeds by method, and seconds a training."""

    def __init__(self, scores: dict[str, list[float]], clock: Clock, seconds: float) -> None:
        self.rungs: tuple[Rung, ...] = (Rung(None, 4), Rung(None, 12), Rung(1, None, 3))
        self.rows, self.scores, self.clock, self.seconds = 200, scores, clock, seconds

    def advance(self, candidate: Candidate, rung: Rung, end: float) -> None:
        self.clock.now += self.seconds
        name = candidate.choice.method
        candidate.trials = on_dev(name, *self.scores[name][: rung.trainings]).trials
        for trial in candidate.trials:
            trial.is_over = candidate.is_floor or rung.epochs is None
