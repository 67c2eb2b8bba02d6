"""Paired tests between methods: each seed of a task is compared with the same seed's other run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from statistics import fmean

from unipelt_cli.comparison import significance
from unipelt_cli.comparison.groups import Cell, Group, Seed, averaged_tasks, scopes
from unipelt_cli.comparison.results import PairResult
from unipelt_cli.comparison.significance import ALPHA


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


@dataclass(frozen=True)
class _Scope:
    """What pairs of methods are compared on: a backbone, with one k or over all."""

    backbone: str
    ks: tuple[int | None, ...]


def comparisons(groups: Sequence[Group], margin: float) -> Iterator[PairResult]:
    """Yield every pair of methods: for each backbone and k, then for each backbone over all k."""
    tables = list(scopes(groups))
    for backbone, k, members in tables:
        yield from _family(_Scope(backbone, (k,)), members, margin)
    for backbone in dict.fromkeys(group.backbone for group in groups):
        ks = tuple(k for name, k, _ in tables if name == backbone)
        if len(ks) > 1:
            members = [group for group in groups if group.backbone == backbone]
            yield from _family(_Scope(backbone, ks), members, margin)


def _family(scope: _Scope, groups: Sequence[Group], margin: float) -> Iterator[PairResult]:
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
    for names, paired in pairs.items():
        if names in tested:
            p_values = tested[names], adjusted[names]
            yield _tested(scope, names, paired, margin, p_values, alpha)
        else:
            yield _refused(scope, names, paired, alpha)


def _pair(first: dict[Cell, Group], second: dict[Cell, Group]) -> _Paired:
    """Pair two methods' runs: by task, then by seed over every k that both have."""
    strata: dict[str, list[float]] = {}
    cells: list[float] = []
    most, tasks = 0, dict.fromkeys(task for task, k in first if (task, k) in second)
    for task in tasks:
        shared = [cell for cell in first if cell[0] == task and cell in second]
        differences = [_by_seed(first[cell], second[cell]) for cell in shared]
        seeds = sorted(set.intersection(*(set(each) for each in differences)))
        most = max(most, len(seeds))
        if len(seeds) > 1:
            # The rows of a smaller k are among those of a larger one: no two independent pairs.
            strata[task] = [fmean(each[seed] for each in differences) for seed in seeds]
            cells += [fmean(each[seed] for seed in seeds) for each in differences]
    return _Paired(strata, cells, len(tasks), min(map(len, strata.values()), default=most))


def _by_seed(first: Group, second: Group) -> dict[Seed, float]:
    return {
        seed: first.sign * (score - second.scores[seed])
        for seed, score in first.scores.items()
        if seed in second.scores
    }


def _refused(scope: _Scope, names: tuple[str, str], paired: _Paired, alpha: float) -> PairResult:
    """Name no winner where no spread over seeds is known."""
    needed = max(2, ceil(significance.pairs_needed(alpha) / paired.tasks))
    shared = "from one seed" if paired.seeds else "without a shared seed"
    return PairResult(
        backbone=scope.backbone,
        ks=scope.ks,
        methods=names,
        tasks=(),
        seeds=paired.seeds,
        pairs=0,
        difference=None,
        interval=None,
        p=None,
        p_holm=None,
        p_equivalence=None,
        wins=None,
        ties=None,
        losses=None,
        better=None,
        verdict="refused",
        seeds_needed=needed,
        conclusion=f"no winner {shared}: at least {needed} would be needed",
    )


def _tested(
    scope: _Scope,
    names: tuple[str, str],
    paired: _Paired,
    margin: float,
    p_values: tuple[float, float],
    alpha: float,
) -> PairResult:
    """Say what a pair shows; of its two p values the second holds for the whole family."""
    strata = list(paired.strata.values())
    estimate = significance.stratified(strata)
    wins, ties, losses = significance.record(paired.cells, margin)
    equivalence = estimate.equivalence(margin)
    better = (names[0] if estimate.value > 0 else names[1]) if p_values[1] <= ALPHA else None
    needed = None
    if equivalence <= ALPHA:
        verdict = "equivalent"
        ahead = f", though {better} is ahead" if better else ""
        conclusion = f"equivalent within {margin:g}{ahead}"
    elif better:
        verdict, conclusion = "ahead", f"{better} is ahead"
    else:
        seeds = significance.seeds_needed(strata, alpha)
        needed = seeds and max(seeds, paired.seeds + 1)
        about = f"about {needed:,}" if needed else f"more than {significance.MOST_SEEDS:,}"
        verdict, conclusion = "undecided", f"undecided: {about} seeds would be needed"
    return PairResult(
        backbone=scope.backbone,
        ks=scope.ks,
        methods=names,
        tasks=tuple(paired.strata),
        seeds=paired.seeds,
        pairs=sum(map(len, strata)),
        difference=estimate.value,
        interval=estimate.interval(),
        p=p_values[0],
        p_holm=p_values[1],
        p_equivalence=equivalence,
        wins=wins,
        ties=ties,
        losses=losses,
        better=better,
        verdict=verdict,
        seeds_needed=needed,
        conclusion=conclusion,
    )
