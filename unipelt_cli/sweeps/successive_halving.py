"""Choosing a method and a learning rate on dev alone, by successive halving under a time budget.

Jamieson and Talwalkar 2016: all candidates train a little, the best third of them goes on from
there. The last few train to their end, with more seeds. The test rows are never looked at.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean
from typing import Any

from unipelt_cli import methods
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.errors import ConfigError, UnipeltError, nearest
from unipelt_cli.metrics import is_better
from unipelt_cli.tasks import joint_metric
from unipelt_cli.training.events import Epoch
from unipelt_cli.training.planning import Shared, loop_of, plan

FACTORS = (1.0, 1 / 3, 3.0)  # of a method's own rate, which is tried first
KEPT = 3  # one candidate of so many goes on
SEEDS = 3  # of those that train to their end
FINAL_SHARE = 0.25  # of the budget, kept for the run at the end


@dataclass(frozen=True)
class Rung:
    """How many candidates begin it at most, until which epoch they train, with how many seeds."""

    candidates: int | None
    epochs: int | None
    seeds: int = 1


RUNGS = (Rung(None, 4), Rung(None, 12), Rung(KEPT, None, SEEDS))


@dataclass
class Trial:
    """One candidate with one seed: where its loop stands, between two rungs as a saved state."""

    experiment: Experiment
    state: tuple[dict[str, Any], dict[str, Any]] | None = None
    score: float | None = None
    epoch: int = 0
    is_over: bool = False


@dataclass
class Candidate:
    """A method with a learning rate, and what is known of it."""

    experiment: Experiment
    trials: list[Trial] = field(default_factory=list)
    rung: int = -1
    seconds: float = 0.0
    stored_parameters: int = 0
    metric: str = ""
    error: str | None = None

    @property
    def is_floor(self) -> bool:
        """Whether it is what every other candidate has to beat; it stays to the end."""
        return self.experiment.method_name == methods.FLOOR

    @property
    def rate(self) -> float | None:
        """The learning rate; None for what takes no step."""
        takes_none = self.experiment.method.has_closed_form
        return None if takes_none else self.experiment.train.learning_rate

    @property
    def name(self) -> str:
        """What it is called where it is read."""
        method = self.experiment.method_name
        return method if self.rate is None else f"{method} at {self.rate:g}"

    @property
    def scores(self) -> list[float]:
        """The best dev score so far, of each seed."""
        return [trial.score for trial in self.trials if trial.score is not None]

    @property
    def score(self) -> float | None:
        """The mean over its seeds."""
        return fmean(self.scores) if self.scores else None

    def said(self) -> dict[str, Any]:
        """Return the evidence as plain values."""
        return {
            "method": self.experiment.method_name,
            "learning_rate": self.rate,
            "score": self.score,
            "scores": self.scores,
            "rungs": self.rung + 1,
            "epochs": max((trial.epoch for trial in self.trials), default=0),
            "stored_parameters": self.stored_parameters,
            "seconds": round(self.seconds, 2),
            "error": self.error,
        }


def candidates(
    base: Callable[[str, float], Experiment],
    names: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
) -> list[Candidate]:
    """Return every method with every rate; without rates its own one, a third and three times it.

    The floor is always among them, and as all that takes no step it comes once. `base` makes the
    experiment of a method and a rate. Raises ConfigError for an unknown method.
    """
    table = methods.table()
    chosen = names or [name for name, recipe in table.items() if recipe.is_suggested]
    for name in chosen:
        if name not in table:
            raise ConfigError(f"method {name!r}: no such method", nearest(name, table))
    own = {name: _rates(name, rates) for name in dict.fromkeys([methods.FLOOR, *chosen])}
    # Every method once before one of them again: the budget may end anywhere.
    turns = zip_longest(*own.values())
    return [
        Candidate(base(name, rate))
        for turn in turns
        for name, rate in zip(own, turn, strict=True)
        if rate is not None
    ]


def _rates(name: str, rates: Sequence[float] | None) -> Sequence[float]:
    recipe = methods.get(name)
    if recipe.method.has_closed_form:
        return [recipe.learning_rate]
    return rates or [float(f"{recipe.learning_rate * factor:.2g}") for factor in FACTORS]


def floor_among(found: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate that every other one has to beat, where it has a score."""
    return next((own for own in found if own.is_floor and own.score is not None), None)


def search(found: Sequence[Candidate], budget: float) -> Iterator[Candidate]:
    """Train candidates rung by rung; yield each one after its turn. The best is `best(found)`.

    What the budget, in seconds, does not reach is left out; the first rung goes on until one
    candidate beside the floor has a score. Closing the iterator stops at once.
    """
    shared, end = Shared(), time.monotonic() + budget * (1 - FINAL_SHARE)
    running = list(found)
    rivals = [own for own in found if not own.is_floor] or running
    for place, rung in enumerate(RUNGS):
        if place:
            kept = ranked([own for own in running if not own.is_floor])
            count = max(1, -(-sum(not own.is_floor for own in running) // KEPT))
            floors = [own for own in running if own.is_floor]
            running = [*floors, *kept[: rung.candidates or count]]
        for candidate in running:
            if time.monotonic() > end and any(own.score is not None for own in rivals):
                return
            _climb(candidate, rung, place, shared, end)
            yield candidate
        running = [own for own in running if own.error is None]


def _climb(candidate: Candidate, rung: Rung, place: int, shared: Shared, end: float) -> None:
    """Train a candidate's seeds until the rung's epoch; what fails is out, with its reason."""
    first = candidate.experiment.train.seed
    while len(candidate.trials) < rung.seeds:
        seed = first + len(candidate.trials)
        candidate.trials.append(Trial(candidate.experiment.replace("train", seed=seed)))
    start = time.monotonic()
    try:
        for count, trial in enumerate(candidate.trials):
            if count and time.monotonic() > end:
                break
            _advance(candidate, trial, rung.epochs, shared)
    except UnipeltError as error:
        candidate.error = error.message
        candidate.trials.clear()
    candidate.rung = place
    candidate.seconds += time.monotonic() - start


def _advance(candidate: Candidate, trial: Trial, until: int | None, shared: Shared) -> None:
    """Go on with one trial from its state, and keep the new one."""
    if trial.is_over:
        return
    experiment, prepared, tuned = plan(trial.experiment, shared)
    loop = loop_of(experiment, prepared, tuned, shared)
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


def ranked(found: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that have a score, the best first.

    Who came further is better known, so it goes first; of equal ones the smaller does.
    """
    scored = [own for own in found if own.score is not None and own.error is None]
    if not scored:
        return []
    sign = 1 if is_better(scored[0].metric, 1.0, 0.0) else -1
    return sorted(
        scored, key=lambda own: (-own.rung, -sign * (own.score or 0.0), own.stored_parameters)
    )


def best(found: Sequence[Candidate]) -> Candidate:
    """Return the candidate to choose; raise ConfigError where none could be trained."""
    scored = ranked(found)
    if not scored:
        why = next((own.error for own in found if own.error), "no time")
        raise ConfigError(
            f"no candidate could be trained: {why}", "give other --methods or --rates"
        )
    return scored[0]


def preset(chosen: Candidate) -> str:
    """Write what was chosen as a preset that `--preset` reads."""
    name, rate = chosen.experiment.method_name, chosen.rate
    train = "" if rate is None else f"\n[train]\nlearning_rate = {rate!r}\n"
    return (
        f"# Chosen on dev: {chosen.metric} {chosen.score:.4f}, mean of {len(chosen.scores)} seeds\n"
        f'\n[method]\nname = "{name}"\n{train}'
    )


def seconds_of(text: str) -> float:
    """Read a time such as 90s, 10m or 1.5h; raise ConfigError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"--budget {text!r}: not a time", "write it like 90s, 10m or 1.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
