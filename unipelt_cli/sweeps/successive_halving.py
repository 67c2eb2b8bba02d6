"""Choosing among candidates under a time budget, by successive halving.

Jamieson and Talwalkar 2016: all candidates are judged a little, the best third of them more, the
last few to the end. The test rows are never looked at.
"""

import re
import time
from collections.abc import Iterator, Sequence

from unipelt_cli.errors import ConfigError, UnipeltError
from unipelt_cli.sweeps.candidates import Candidate
from unipelt_cli.sweeps.judges import KEPT, Judge, Rung
from unipelt_cli.sweeps.selection import contender, ranked

FINAL_SHARE = 0.25  # of the budget, kept for the run at the end
RUNG_ENDS = (0.5, 0.75, 1.0)  # of the search: by then a rung begins no further candidate


def search(candidates: Sequence[Candidate], judge: Judge, budget: float) -> Iterator[Candidate]:
    """Train candidates rung by rung; yield each one after its turn.

    What the budget, in seconds, does not reach is left out; the first rung goes on until one
    candidate that trains inside the backbone has a score. What is left of the time after the last
    rung is spent too: see `_next`. Closing the iterator stops at once.
    """
    start, length = time.monotonic(), budget * (1 - FINAL_SHARE)
    end = start + length
    running = list(candidates)
    rivals = _rivals(candidates)
    for level, (rung, share) in enumerate(zip(judge.rungs, RUNG_ENDS, strict=True)):
        if level:
            running = _kept(running, rung)
        for candidate in running:
            is_late = time.monotonic() > start + share * length
            if is_late and any(each.score is not None for each in rivals):
                break
            if candidate.is_complete:  # a floor: nothing is left to be known of it
                candidate.rung = level
                continue
            _climb(candidate, judge, level, end)
            yield candidate
        running = [each for each in running if each.rung == level and each.score is not None]
    while time.monotonic() < end and (following := _next(candidates, judge)) is not None:
        _climb(following[0], judge, following[1], end)
        yield following[0]


def _next(candidates: Sequence[Candidate], judge: Judge) -> tuple[Candidate, int] | None:
    """Return who is trained, and until which rung, while time is left; None where all is known.

    First whoever must be trained to the end before anyone is chosen, then, where only floors were,
    the best of the others, then what was not tried.
    """
    last = len(judge.rungs) - 1
    if (ahead := contender(candidates)) is not None:
        return ahead, last
    rivals = ranked([each for each in candidates if not each.is_floor])
    if rivals and not any(each.is_complete for each in rivals):
        return rivals[0], last
    untried = (each for each in candidates if each.rung < 0)
    return next(((each, 0) for each in untried), None)


def _rivals(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Return those of which one must be tried, however late: what costs more than the floor."""
    inside = [each for each in candidates if not each.experiment.method.reads_frozen_features]
    return inside or [each for each in candidates if not each.is_floor] or candidates


def _kept(running: Sequence[Candidate], rung: Rung) -> list[Candidate]:
    """Return the floors and the best third of the others, the best first."""
    floors = [each for each in running if each.is_floor]
    others = ranked([each for each in running if not each.is_floor])
    return [*floors, *others[: rung.candidates or max(1, -(-len(others) // KEPT))]]


def _climb(candidate: Candidate, judge: Judge, level: int, end: float) -> None:
    """Train a candidate as far as a rung asks; what fails is out, with its reason."""
    start = time.monotonic()
    try:
        judge.advance(candidate, judge.rungs[level], end)
    except UnipeltError as error:
        candidate.error = error.message
        candidate.trials.clear()
        candidate.pooled.clear()
    # A fit at once has no seed that would repeat it otherwise; every fold is needed of all.
    has_one_training = candidate.experiment.method.has_closed_form and not candidate.pooled
    trainings = 1 if has_one_training else judge.rungs[-1].trainings
    is_over = all(trial.is_over for trial in candidate.trials)
    candidate.is_complete = is_over and len(candidate.trials) >= trainings
    candidate.rung = level
    candidate.seconds += time.monotonic() - start


def seconds_of(text: str) -> float:
    """Read a time such as 90s, 10m or 1.5h; raise ConfigError for what is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if match is None or not float(match[1]):
        raise ConfigError(f"--budget {text!r}: not a time", "write it like 90s, 10m or 1.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
