"""Paired tests between methods: each seed of a task is compared with the same seed's other run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from statistics import fmean
from typing import Any

from unipelt_cli.comparison import significance
from unipelt_cli.comparison.groups import Cell, Group, Seed, averaged_tasks, scopes
from unipelt_cli.comparison.significance import ALPHA

Answer = dict[str, Any]


@dataclass(frozen=True)
class _Paired:
    """What two methods have in common; differences are positive where the first is better."""

    strata: dict[str, list[float]]
    """For each task with two shared seeds or more: each seed's difference, averaged over k."""
    cells: list[float]
    """For each task and k of those: the difference of the means."""
    tasks: int
    """How many tasks both have."""
    seeds: int
    """How many seeds they share on a task, at least."""


def comparisons(groups: Sequence[Group], margin: float) -> Iterator[Answer]:
    """Yield every pair of methods: for each backbone and k, then for each backbone over all k."""
    found = [(backbone, [k], own) for backbone, k, own in scopes(groups)]
    for backbone in dict.fromkeys(group.backbone for group in groups):
        ks = [k for name, (k,), _ in found if name == backbone]
        if len(ks) > 1:
            found.append((backbone, ks, [own for own in groups if own.backbone == backbone]))
    for backbone, ks, own in found:
        for entry in _family(own, margin):
            yield {"backbone": backbone, "ks": ks, **entry}


def _family(groups: Sequence[Group], margin: float) -> list[Answer]:
    """Test all pairs of methods of one scope: their p values hold for all of them together."""
    tasks = averaged_tasks(groups)
    by_label: dict[str, dict[Cell, Group]] = {}
    for group in groups:
        if group.task in tasks:
            by_label.setdefault(group.label, {})[group.cell] = group
    pairs = {
        names: paired
        for names in combinations(sorted(by_label), 2)
        if (paired := _pair(*(by_label[name] for name in names))).tasks
    }
    tested = {
        names: significance.sign_flip(list(paired.strata.values()))
        for names, paired in pairs.items()
        if paired.strata
    }
    adjusted = dict(zip(tested, significance.holm(list(tested.values())), strict=True))
    alpha = ALPHA / max(1, len(pairs))  # what the smallest p value must reach
    return [
        _tested(names, paired, margin, (tested[names], adjusted[names]), alpha)
        if names in tested
        else _refused(names, paired, alpha)
        for names, paired in pairs.items()
    ]


def _pair(one: dict[Cell, Group], other: dict[Cell, Group]) -> _Paired:
    """Pair two methods' runs: by task, then by seed over every k that both have."""
    strata: dict[str, list[float]] = {}
    cells: list[float] = []
    most, tasks = 0, dict.fromkeys(task for task, k in one if (task, k) in other)
    for task in tasks:
        own = [cell for cell in one if cell[0] == task and cell in other]
        differences = [_by_seed(one[cell], other[cell]) for cell in own]
        seeds = sorted(set.intersection(*(set(each) for each in differences)))
        most = max(most, len(seeds))
        if len(seeds) > 1:
            # The rows of a smaller k are among those of a larger one: no two independent pairs.
            strata[task] = [fmean(each[seed] for each in differences) for seed in seeds]
            cells += [fmean(each[seed] for seed in seeds) for each in differences]
    return _Paired(strata, cells, len(tasks), min(map(len, strata.values()), default=most))


def _by_seed(one: Group, other: Group) -> dict[Seed, float]:
    theirs = other.scores
    return {
        seed: one.sign * (score - theirs[seed])
        for seed, score in one.scores.items()
        if seed in theirs
    }


def _refused(names: tuple[str, str], paired: _Paired, alpha: float) -> Answer:
    """Name no winner where no spread over seeds is known."""
    needed = max(2, ceil(significance.pairs_needed(alpha) / paired.tasks))
    shared = "from one seed" if paired.seeds else "without a shared seed"
    unknown = ("difference", "interval", "p", "p_holm", "p_equivalence")
    return {
        "methods": list(names),
        "tasks": [],
        "seeds": paired.seeds,
        "pairs": 0,
        **dict.fromkeys((*unknown, "wins", "ties", "losses", "better")),
        "verdict": "refused",
        "seeds_needed": needed,
        "said": f"no winner {shared}: at least {needed} would be needed",
    }


def _tested(
    names: tuple[str, str],
    paired: _Paired,
    margin: float,
    p_values: tuple[float, float],
    alpha: float,
) -> Answer:
    """Say what a pair shows; of its two p values the second holds for the whole family."""
    strata = list(paired.strata.values())
    estimate = significance.stratified(strata)
    wins, ties, losses = significance.record(paired.cells, margin)
    equivalence = estimate.equivalence(margin)
    better = (names[0] if estimate.value > 0 else names[1]) if p_values[1] <= ALPHA else None
    needed = None
    if equivalence <= ALPHA:
        verdict = "equivalent"
        said = f"equivalent within {margin:g}" + (f", though {better} is ahead" if better else "")
    elif better:
        verdict, said = "ahead", f"{better} is ahead"
    else:
        found = significance.seeds_needed(strata, alpha)
        needed = found and max(found, paired.seeds + 1)
        about = f"about {needed:,}" if needed else f"more than {significance.MOST_SEEDS:,}"
        verdict, said = "undecided", f"undecided: {about} seeds would be needed"
    return {
        "methods": list(names),
        "tasks": list(paired.strata),
        "seeds": paired.seeds,
        "pairs": sum(map(len, strata)),
        "difference": estimate.value,
        "interval": list(estimate.interval()),
        **dict(zip(("p", "p_holm"), p_values, strict=True)),
        "p_equivalence": equivalence,
        **{"wins": wins, "ties": ties, "losses": losses},
        "better": better,
        "verdict": verdict,
        "seeds_needed": needed,
        "said": said,
    }
