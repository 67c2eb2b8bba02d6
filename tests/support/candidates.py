"""Candidates of which something is known, as a search leaves them."""

from pathlib import Path

from support.models import experiment

from unipelt_cli.sweeps.candidates import Candidate, Choice, Trial


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
