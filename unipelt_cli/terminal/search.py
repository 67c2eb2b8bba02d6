"""The search of `recommend` as it goes on, the table of its candidates, and what is chosen."""

from collections.abc import Sequence
from statistics import stdev

from unipelt_cli.metrics import is_better
from unipelt_cli.sweeps import selection, successive_halving
from unipelt_cli.sweeps.candidates import Candidate
from unipelt_cli.sweeps.judges import FoldJudge, Judge
from unipelt_cli.sweeps.recommendation import untried
from unipelt_cli.terminal import console, tables

MOST_NAMES = 6


def show_search(candidates: Sequence[Candidate], judge: Judge, budget: float) -> Candidate:
    """Search among candidates, show each one's turn and then all; return the best.

    A request to stop ends it at once: nothing is written yet.
    """
    console.say(f"{len(candidates)} candidates, {tables.duration(budget)} in all: {_rule(judge)}")
    for candidate in successive_halving.search(candidates, judge, budget):
        console.say(_turn(candidate, judge))
    chosen = selection.best(candidates)
    for warning in (_early_end(candidates, chosen, judge), _undecided(candidates, chosen)):
        if warning is not None:
            console.say(("warning: ", "yellow"), warning)
    _show_table(candidates, chosen, judge)
    if line := floor_verdict(candidates):
        console.reply(line)
    for candidate in candidates:
        if candidate.error is not None:
            console.say(("failed: ", "yellow"), f"{candidate.name}: {candidate.error}")
    return chosen


def _rule(judge: Judge) -> str:
    """Say what decides."""
    if isinstance(judge, FoldJudge):
        return f"{len(judge.parts)} folds of the {judge.rows} train rows decide, no test row does"
    return "dev alone decides, test is not looked at"


def _turn(candidate: Candidate, judge: Judge) -> str:
    """Write what a candidate's turn came to."""
    begin = f"round {candidate.rung + 1}  {candidate.name}: "
    if candidate.score is None:
        return f"{begin}failed"
    score = f"{begin}{candidate.metric} {candidate.score:.4f}"
    if isinstance(judge, FoldJudge):
        return f"{score} on {candidate.rows} of {judge.rows} rows"
    seeds = f", {len(candidate.scores)} seeds" if len(candidate.scores) > 1 else ""
    return f"{score} after epoch {candidate.epochs}{seeds}"


def _early_end(candidates: Sequence[Candidate], chosen: Candidate, judge: Judge) -> str | None:
    """Say what the budget left out; None where it left out nothing."""
    rivals = [each for each in candidates if not each.is_floor]
    is_over = any(each.is_complete for each in rivals or [chosen])
    names = [each.name for each in untried(candidates)]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    missed = f"not tried: {', '.join(names[:MOST_NAMES])}{more}"
    if not is_over:
        reached = max((each.rung for each in rivals), default=chosen.rung)
        rounds = f"the budget ended in round {reached + 1} of {len(judge.rungs)}"
        return f"{rounds}; {missed}" if names else rounds
    return f"the budget was too short for all; {missed}" if names else None


def _undecided(candidates: Sequence[Candidate], chosen: Candidate) -> str | None:
    """Say who is clearly better than the chosen one on the rows of both; None where nobody is.

    That is so only where the budget ended before folds that contradict each other were all seen.
    """
    ahead = max(selection.ranked(candidates), key=lambda each: selection.margin(each, chosen))
    if selection.margin(ahead, chosen) <= selection.HALF_A_POINT + selection.ROUNDING:
        return None
    theirs, score = chosen.beside(ahead)
    rows = min(ahead.rows, chosen.rows)
    better = f"on {rows} rows {ahead.name} has {score:.4f}, the chosen {chosen.name} {theirs:.4f}"
    return f"{better}: the budget ended before more folds could decide"


def _show_table(candidates: Sequence[Candidate], chosen: Candidate, judge: Judge) -> None:
    """Print every candidate, the chosen one first, with what it was judged on."""
    by_folds = isinstance(judge, FoldJudge)
    has_backbones = chosen.choice.backbone is not None
    columns = ["  method", "rate", *(["backbone"] if has_backbones else [])]
    columns += [chosen.metric, "rows", "to chosen"] if by_folds else [f"dev {chosen.metric}"]
    columns += [] if by_folds else ["seeds", "epochs"]
    columns += [] if has_backbones else ["stored"]  # `evidence.json` has it
    rows = []
    for candidate in selection.ranked(candidates):
        mark = "* " if candidate is chosen else "  "
        row = [mark + candidate.method, "-" if candidate.rate is None else f"{candidate.rate:g}"]
        row += [candidate.choice.backbone_name or ""] if has_backbones else []
        row += _judged_by_folds(candidate, chosen) if by_folds else _judged_on_dev(candidate)
        rows.append([*row, *([] if has_backbones else [f"{candidate.stored_parameters:,}"])])
    tables.table(columns, rows)
    if by_folds and any(each.rows < judge.rows for each in candidates if each.score is not None):
        console.reply("to chosen: how far from the chosen one on the rows that both were judged on")


def _judged_by_folds(candidate: Candidate, chosen: Candidate) -> list[str]:
    theirs, score = chosen.beside(candidate)
    return [f"{candidate.score:.4f}", str(candidate.rows), f"{score - theirs:+.4f}"]


def _judged_on_dev(candidate: Candidate) -> list[str]:
    spread = f" ±{stdev(candidate.scores):.4f}" if len(candidate.scores) > 1 else ""
    seeds, epochs = str(len(candidate.scores)), str(candidate.epochs)
    return [f"{candidate.score:.4f}{spread}", seeds, epochs]


def floor_verdict(candidates: Sequence[Candidate]) -> str | None:
    """Say how many candidates beat the best floor; None where it has no score."""
    floors = selection.floors(candidates)
    if not floors:
        return None
    floor = floors[0]
    backbone = floor.choice.backbone_name
    name = floor.choice.method + ("" if backbone is None else f" on {backbone}")
    what = f"{name}, which trains nothing in the backbone"
    others = [each for each in candidates if not each.is_floor and each.score is not None]
    pairs = [each.beside(floor) for each in others]
    better = sum(is_better(floor.metric, score, least) for score, least in pairs)
    is_chosen = selection.best(candidates) is floor
    chosen = ": it is chosen" if is_chosen else ""
    if not better:
        return f"nothing beat {what} ({floor.metric} {floor.score:.4f}){chosen}"
    if is_chosen:
        chosen = ", by less than half a point each and on less evidence: it is chosen"
    return f"{better} of {len(others)} beat {what}{chosen}"
