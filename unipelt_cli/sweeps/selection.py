"""Which candidate to choose by what is known of each: none that is clearly beaten on its rows."""

from collections.abc import Sequence

from unipelt_cli.errors import ConfigError
from unipelt_cli.metrics import is_better, lost
from unipelt_cli.sweeps.candidates import Candidate

HALF_A_POINT = 0.005
"""The chosen one is at most so much worse than any other, on the rows that both were judged on."""
ROUNDING = 1e-9  # so that a difference of half a point in decimals is one in binary numbers


def margin(ahead: Candidate, behind: Candidate) -> float:
    """Return how much better one candidate is than another on the rows of both; below 0: worse."""
    better, worse = ahead.beside(behind)
    return lost(ahead.metric, better, worse)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that have a score, the one to choose first.

    What another one beats by more than half a point, on the rows that both were judged on, comes
    after what is not so beaten. Of the latter the best known goes first, then the best score; of
    equal ones the floor, then the smaller. An error has no half point: there the better one counts.
    """
    scored = [each for each in candidates if each.score is not None and each.error is None]
    if not scored:
        return []
    metric = scored[0].metric
    sign = 1 if is_better(metric, 1.0, 0.0) else -1
    beaten_by = {
        id(each): max(0.0, *(margin(other, each) for other in scored if other is not each), 0.0)
        for each in scored
    }
    # Where folds contradict each other everyone may be beaten: then the one beaten least.
    allowed = max(HALF_A_POINT if sign > 0 else 0.0, min(beaten_by.values())) + ROUNDING

    def order(each: Candidate) -> tuple[object, ...]:
        known = tuple(-number for number in each.evidence)
        score = -sign * (each.score or 0.0)
        return beaten_by[id(each)] > allowed, known, score, not each.is_floor, _size(each)

    return sorted(scored, key=order)


def _size(candidate: Candidate) -> int:
    return candidate.stored_parameters


def best(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate to choose; raise ConfigError where none could be trained."""
    scored = ranked(candidates)
    if not scored:
        why = next((each.error for each in candidates if each.error), "no time")
        raise ConfigError(
            f"no candidate could be trained: {why}", "give other --methods or --rates"
        )
    return scored[0]


def contender(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return who must be trained to the end before anyone is chosen; None where nobody must.

    That is the one to choose while it is not, then whoever has not been and is better than it.
    """
    scored = ranked(candidates)
    if not scored:
        return None
    chosen, *others = scored
    if not chosen.is_complete:
        return chosen
    ahead = [each for each in others if not each.is_complete and margin(each, chosen) > 0]
    return max(ahead, key=lambda each: margin(each, chosen), default=None)


def floors(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the floors that have a score, the best one first: one a backbone."""
    return ranked([each for each in candidates if each.is_floor])
