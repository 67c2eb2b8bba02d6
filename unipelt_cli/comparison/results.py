"""What a comparison is made of, as its tables, documents and pictures read it.

Scores are fractions, times seconds, memory bytes, sizes numbers. None stands for what is unknown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unipelt_cli.files.as_json import OPTIONAL, keyed

if TYPE_CHECKING:
    from unipelt_cli.models.resampling import Interval


@dataclass(frozen=True)
class SeedScore:
    """One run of a group: its seeds, its directory and its test score."""

    data_seed: int
    seed: int
    run: str
    score: float
    collapsed: bool


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """Runs of one method that differ in their seeds alone: how they score, and what they cost."""

    task: str
    k: int | None
    backbone: str
    method: str
    label: str
    settings: Mapping[str, object]
    submodules: tuple[str, ...]
    metric: str
    positive: str | None = field(default=None, metadata=OPTIONAL)
    seeds: tuple[SeedScore, ...]
    mean: float
    standard_deviation: float | None
    interval: "Interval | None"
    interval_by_rows: "Interval | None"
    collapsed: int
    mean_not_collapsed: float | None
    trainable_parameters: int
    stored_parameters: int
    head_parameters: int
    median_seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class MethodMeans:
    """A method's mean scores by task; average and rank where it has every averaged task."""

    label: str
    means: Mapping[str, float | None]
    average: float | None
    average_rank: float | None


@dataclass(frozen=True)
class UnionBound:
    """A union beside the best of its submodules alone, task by task (Mao et al. 2022, Table 2)."""

    label: str
    submodules: tuple[str, ...]
    missing: tuple[str, ...]
    tasks: tuple[str, ...]
    bounds: Mapping[str, float]
    bound: float
    union: float
    difference: float


@dataclass(frozen=True)
class FloorMeans:
    """What the floor of all methods gives by task: `of` its own "runs", or the others' "notes"."""

    method: str
    of: str
    means: Mapping[str, float | None]
    average: float | None


@dataclass(frozen=True)
class MethodsTable:
    """Methods against tasks, on one backbone and with one number of train rows."""

    backbone: str
    k: int | None
    tasks: tuple[str, ...]
    averaged_tasks: tuple[str, ...]
    methods: tuple[MethodMeans, ...]
    bounds: tuple[UnionBound, ...]
    floor: FloorMeans | None


@dataclass(frozen=True)
class PairResult:
    """Two methods compared seed by seed; the difference is the first's minus the second's."""

    backbone: str
    ks: tuple[int | None, ...]
    methods: tuple[str, str]
    tasks: tuple[str, ...]
    seeds: int
    pairs: int
    difference: float | None
    interval: "Interval | None"
    p: float | None
    p_holm: float | None
    p_equivalence: float | None
    wins: int | None
    ties: int | None
    losses: int | None
    better: str | None
    verdict: str
    seeds_needed: int | None
    conclusion: str = field(metadata=keyed("said"))


@dataclass(frozen=True)
class PublishedCell:
    """Our mean score of one task, k and method beside the printed one."""

    backbone: str
    k: int | None
    task: str
    label: str
    seeds: int
    ours: float
    theirs: float
    their_deviation: float | None
    difference: float


@dataclass(frozen=True)
class PublishedAverage:
    """Our average over the publication's tasks beside the printed one."""

    backbone: str
    k: int | None
    label: str
    ours: float
    theirs: float
    difference: float


@dataclass(frozen=True)
class PublishedCosts:
    """What a method stores, and its time as a share of the reference's, beside the printed."""

    backbone: str
    label: str
    ours_stored: int
    theirs_stored: int
    ours_train_time: float | None
    theirs_train_time: float


@dataclass(frozen=True)
class PublishedComparison:
    """A comparison beside what one publication prints."""

    name: str
    backbone: str
    cells: tuple[PublishedCell, ...]
    averages: tuple[PublishedAverage, ...]
    costs: tuple[PublishedCosts, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class UnusableRun:
    """A run that could not be compared, and why."""

    run: str
    why: str


@dataclass(frozen=True)
class RunCounts:
    """How many runs are compared, and which are not."""

    finished: int
    repeated: tuple[str, ...]
    unusable: tuple[UnusableRun, ...]


@dataclass(frozen=True)
class Comparison:
    """Finished runs beside each other: all that `compare` shows, writes and draws."""

    runs: RunCounts
    margin: float
    groups: tuple[GroupSummary, ...]
    tables: tuple[MethodsTable, ...]
    comparisons: tuple[PairResult, ...]
    against: PublishedComparison | None
    notes: tuple[str, ...]

    def groups_of(self, table: MethodsTable) -> list[GroupSummary]:
        """Return the groups that a table is of."""
        scope = table.backbone, table.k
        return [group for group in self.groups if (group.backbone, group.k) == scope]
