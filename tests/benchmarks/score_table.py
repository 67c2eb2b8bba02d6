"""The score table: contenders side by side, their distance from one of them, and both as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from tests.benchmarks.score_runs import Outcome
from unipelt_cli.comparison import significance
from unipelt_cli.comparison.tables import ABSENT, Sheet

MARK = "*"
FLIPS = "p: sign flips of the pairs; Holm: for all rows together."
ONE_SEED = "One seed a task shows no spread: no interval, no p."
SeedScores = dict[int, float]


@dataclass(frozen=True)
class Standing:
    """What a contender reached: by task the score of each data seed, and what its runs took."""

    name: str
    seeds: int
    """How many data seeds there are: a mean over fewer is none."""
    scores: dict[str, SeedScores] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    labels_read: list[int] = field(default_factory=list)
    selected_on: list[str] = field(default_factory=list)
    """Tasks whose scored dev rows chose its best epoch."""
    marked: set[str] = field(default_factory=set)
    """Tasks that it read otherwise than the others; a note says how."""

    def add(self, task: str, metric: str, seed: int, split: str, outcome: Outcome) -> None:
        """Take in one run."""
        self.scores.setdefault(task, {})[seed] = outcome.scores[split][metric]
        self.seconds.append(outcome.seconds)
        self.labels_read.append(outcome.labels_read)
        if outcome.selected_on_dev and task not in self.selected_on:
            self.selected_on.append(task)

    def has(self, task: str) -> bool:
        """Say whether it has every seed of a task."""
        return len(self.scores.get(task, ())) == self.seeds

    def mean(self, tasks: Sequence[str]) -> float | None:
        """Return the mean over tasks of the means over seeds; None where a run is missing."""
        if not tasks or not all(map(self.has, tasks)):
            return None
        return fmean(fmean(self.scores[task].values()) for task in tasks)


@dataclass(frozen=True)
class Distance:
    """How far a contender is ahead of another one, over the tasks and seeds that both have.

    `interval` (95 %) and the p values are None where no task has two seeds.
    """

    name: str
    tasks: tuple[str, ...]
    pairs: int
    difference: float
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Table:
    """All standings of one split; the mean is over the tasks that every contender has."""

    title: str
    split: str
    tasks: tuple[str, ...]
    standings: tuple[Standing, ...]
    against: str | None
    notes: tuple[str, ...] = ()

    @property
    def ranked(self) -> list[Standing]:
        """The contenders that have a score."""
        return [standing for standing in self.standings if standing.scores]

    @property
    def averaged(self) -> tuple[str, ...]:
        """The tasks that all of these have: no mean may gain by a task left out."""
        return tuple(
            task for task in self.tasks if all(standing.has(task) for standing in self.ranked)
        )

    def distances(self) -> list[Distance]:
        """Compare every contender with the one that they are held against."""
        reference = next((own for own in self.ranked if own.name == self.against), None)
        if reference is None:
            return []
        pairs = {
            own.name: strata
            for own in self.ranked
            if own is not reference and (strata := _strata(own.scores, reference.scores))
        }
        spread = {
            name: [values for values in strata.values() if len(values) > 1]
            for name, strata in pairs.items()
        }
        p_values = {name: significance.sign_flip(own) for name, own in spread.items() if own}
        adjusted = dict(zip(p_values, significance.holm([*p_values.values()]), strict=True))
        return [
            _distance(name, strata, p_values.get(name), adjusted.get(name))
            for name, strata in pairs.items()
        ]

    def sheets(self) -> Iterator[Sheet]:
        """Yield the table of scores and, where there is one, that of distances."""
        yield Sheet(
            self.title,
            ("", *self.tasks, "mean", "seconds", "labels read"),
            tuple(self._row(standing) for standing in self.standings),
        )
        if distances := self.distances():
            yield Sheet(
                f"Ahead of {self.against}, pair by pair over tasks and data seeds",
                ("", "tasks", "pairs", "difference", "95 % interval", "p", "p (Holm)"),
                tuple(map(_distance_row, distances)),
                note=FLIPS if any(own.p is not None for own in distances) else ONE_SEED,
            )

    def _row(self, standing: Standing) -> tuple[str, ...]:
        cells = [
            _score(standing.mean([task])) + (MARK if task in standing.marked else "")
            for task in self.tasks
        ]
        mean = _score(standing.mean(self.averaged))
        seconds = f"{fmean(standing.seconds):,.0f}" if standing.seconds else ABSENT
        return (standing.name, *cells, mean, seconds, _labels(standing.labels_read))


def _strata(
    one: Mapping[str, SeedScores], other: Mapping[str, SeedScores]
) -> dict[str, list[float]]:
    """Return by task the difference of each seed that both have."""
    shared = {
        task: [score - other[task][seed] for seed, score in scores.items() if seed in other[task]]
        for task, scores in one.items()
        if task in other
    }
    return {task: differences for task, differences in shared.items() if differences}


def _distance(
    name: str, strata: Mapping[str, list[float]], p: float | None, p_holm: float | None
) -> Distance:
    """Estimate over tasks with two pairs or more; with none of them the mean alone is known."""
    tested = {task: values for task, values in strata.items() if len(values) > 1}
    if not tested:
        mean = fmean(fmean(values) for values in strata.values())
        return Distance(name, tuple(strata), len(strata), mean)
    estimate = significance.stratified([*tested.values()])
    count = sum(map(len, tested.values()))
    return Distance(name, tuple(tested), count, estimate.value, estimate.interval(), p, p_holm)


def _distance_row(distance: Distance) -> tuple[str, ...]:
    ends = distance.interval
    return (
        distance.name,
        str(len(distance.tasks)),
        str(distance.pairs),
        f"{distance.difference:+.3f}",
        ABSENT if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}",
        _p(distance.p),
        _p(distance.p_holm),
    )


def _score(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def _p(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _labels(counts: Sequence[int]) -> str:
    """Write how many labels a run read; tasks may have other numbers of dev rows."""
    if not counts:
        return ABSENT
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
