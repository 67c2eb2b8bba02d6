"""A comparison's answer as tables of text, for the terminal and for documents alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from unipelt_cli.comparison.results import (
    Comparison,
    GroupSummary,
    MethodsTable,
    PairResult,
    PublishedCell,
    PublishedComparison,
    UnionBound,
)

ABSENT = "-"


@dataclass(frozen=True)
class Sheet:
    """A table with a title; where it is `grouped`, rows with one first cell belong together."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    grouped: bool = False
    note: str = ""


def sheets(comparison: Comparison) -> Iterator[Sheet]:
    """Yield all tables of a comparison that have a row."""
    for table in comparison.tables:
        groups = comparison.groups_of(table)
        scope = f"{table.backbone}, {_k(table.k)}"
        yield _scores(table, groups, scope)
        yield _cells(groups, scope)
        yield _costs(table, groups, scope)
        if table.bounds:
            yield _bounds(table.bounds, scope)
    yield from _comparisons(comparison)
    if comparison.against is not None:
        yield from _against(comparison.against)


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader should know of the runs: which were left out, and other doubts."""
    left_out = []
    if unusable := comparison.runs.unusable:
        first = unusable[0]
        count = f"{len(unusable)} run{'s' if len(unusable) > 1 else ''}"
        left_out.append(f"{count} left out, such as {first.run}: {first.why}")
    if repeated := comparison.runs.repeated:
        left_out.append(f"{len(repeated)} of the same experiment as another, such as {repeated[0]}")
    published = () if comparison.against is None else comparison.against.notes
    return [*left_out, *comparison.notes, *published]


def _k(k: int | None) -> str:
    return "all rows" if k is None else f"k = {k}"


def _ks(ks: Sequence[int | None]) -> str:
    return _k(ks[0]) if len(ks) == 1 else "k = " + ", ".join(str(k or "all") for k in ks)


def score(value: float | None) -> str:
    """Write a fraction, or what stands for none."""
    return ABSENT if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.4f}"


def _interval(ends: Sequence[float] | None) -> str:
    return ABSENT if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _p(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _scores(table: MethodsTable, groups: Sequence[GroupSummary], scope: str) -> Sheet:
    """Set methods against tasks: mean, deviation, and how many runs collapsed."""
    by_cell = {(group.label, group.task): group for group in groups}
    metric = {group.task: group.metric for group in groups}
    several = len(table.averaged_tasks) > 1
    rows = []
    for entry in table.methods:
        cells = [_score_cell(by_cell.get((entry.label, task))) for task in table.tasks]
        rank = entry.average_rank
        ranked = (score(entry.average), ABSENT if rank is None else f"{rank:.1f}")
        rows.append((entry.label, *cells, *(ranked if several else ())))
    floor = table.floor
    if floor is not None and floor.of == "notes":
        cells = [score(floor.means[task]) for task in table.tasks]
        ranked = (score(floor.average), ABSENT)
        rows.append((f"({floor.method})", *cells, *(ranked if several else ())))
    columns = [f"{task} {metric[task]}" for task in table.tasks]
    note = "± standard deviation over seeds"
    if floor is not None and floor.of == "notes":
        note += f"; ({floor.method}): what the runs noted of it on their rows"
    if any(group.collapsed for group in groups):
        note += "; 2c: two of the runs collapsed, they predict one answer for every row"
    named = {group.task: group.positive for group in groups if group.positive is not None}
    note += "".join(f"; f1 of {task} is that of {label!r}" for task, label in named.items())
    if several and len(table.averaged_tasks) < len(table.tasks):
        note += "; tasks scored in mse are not averaged"
    return Sheet(
        f"{scope}: test scores, mean over seeds",
        ("method", *columns, *(("average", "rank") if several else ())),
        tuple(rows),
        note=note,
    )


def _score_cell(group: GroupSummary | None) -> str:
    if group is None:
        return ABSENT
    deviation = group.standard_deviation
    spread = "" if deviation is None else f" ±{deviation:.4f}"
    collapsed = f" {group.collapsed}c" if group.collapsed else ""
    return f"{group.mean:.4f}{spread}{collapsed}"


def _cells(groups: Sequence[GroupSummary], scope: str) -> Sheet:
    rows = [
        (
            f"{group.task} ({group.metric})",
            group.label,
            str(len(group.seeds)),
            score(group.mean),
            _interval(group.interval),
            _interval(group.interval_by_rows),
            str(group.collapsed),
            score(group.mean_not_collapsed),
        )
        for group in groups
    ]
    return Sheet(
        f"{scope}: how sure each mean is, with 95 % intervals",
        ("task", "method", "n", "mean", "over seeds", "over rows", "coll.", "others"),
        tuple(rows),
        grouped=True,
        note="n: seeds; coll.: collapsed runs; others: the mean of the runs that did not collapse",
    )


def _costs(table: MethodsTable, groups: Sequence[GroupSummary], scope: str) -> Sheet:
    """Sum a method's runs up over tasks: the same numbers train, whatever the task."""
    rows = []
    for label in (entry.label for entry in table.methods):
        of_method = [group for group in groups if group.label == label]
        row = (
            f"{of_method[0].trainable_parameters:,}",
            f"{of_method[0].stored_parameters:,}",
            f"{median(group.median_seconds for group in of_method):.1f}",
            f"{max(group.peak_memory_bytes for group in of_method) / 2**20:,.0f}",
        )
        rows.append((label, *row))
    return Sheet(
        f"{scope}: what a run costs",
        ("method", "trainable", "stored", "seconds", "MiB"),
        tuple(rows),
        note="numbers beside the head; median seconds over runs, then tasks; peak of memory",
    )


def _bounds(bounds: Sequence[UnionBound], scope: str) -> Sheet:
    rows = [
        (
            bound.label,
            str(len(bound.tasks)),
            score(bound.bound),
            score(bound.union),
            _signed(bound.difference),
            ", ".join(bound.missing) or "none",
        )
        for bound in bounds
    ]
    return Sheet(
        f"{scope}: unions against the best of their submodules alone, task by task",
        ("union", "tasks", "best alone", "union's", "difference", "parts without runs"),
        tuple(rows),
    )


def _comparisons(comparison: Comparison) -> Iterator[Sheet]:
    pairs = comparison.comparisons
    for backbone, ks in dict.fromkeys((pair.backbone, pair.ks) for pair in pairs):
        family = [pair for pair in pairs if (pair.backbone, pair.ks) == (backbone, ks)]
        tested = sum(pair.p is not None for pair in family)
        yield Sheet(
            f"{backbone}, {_ks(ks)}: pairs of methods, seed by seed",
            ("method", "against", "difference", "95 % interval", "p", "w/t/l", "verdict"),
            tuple(map(_comparison, family)),
            grouped=True,
            note=f"p by sign flips, Holm-corrected over the tested pairs ({tested}); w/t/l: cells "
            f"won, tied within {comparison.margin:g}, lost; seeds: on each task",
        )


def _comparison(pair: PairResult) -> tuple[str, ...]:
    first, second = pair.methods
    ends = pair.interval
    won = ABSENT
    if pair.wins is not None:
        won = f"{pair.wins}/{pair.ties}/{pair.losses}"
    return (
        f"{first} minus",
        second,
        _signed(pair.difference),
        ABSENT if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}",
        _p(pair.p_holm),
        won,
        pair.conclusion,
    )


def _against(published: PublishedComparison) -> Iterator[Sheet]:
    """Yield what others printed beside ours: cells, averages, costs."""
    name, shared = published.name, ("ours", "theirs", "difference")
    cells = [
        (
            f"{cell.task}, {_k(cell.k)}, {cell.backbone}",
            cell.label,
            str(cell.seeds),
            score(cell.ours),
            _printed(cell),
            _signed(cell.difference),
        )
        for cell in published.cells
    ]
    if cells:
        columns: tuple[str, ...] = ("", "method", "n", *shared)
        yield Sheet(f"against {name}: scores", columns, tuple(cells), grouped=True)
    averages = [
        (
            f"{_k(average.k)}, {average.backbone}",
            average.label,
            *(score(average.ours), score(average.theirs), _signed(average.difference)),
        )
        for average in published.averages
    ]
    if averages:
        columns = ("", "method", *shared)
        yield Sheet(f"against {name}: averages", columns, tuple(averages), grouped=True)
    costs = [
        (
            method.backbone,
            method.label,
            f"{method.ours_stored:,}",
            f"{method.theirs_stored:,}",
            _percent(method.ours_train_time),
            _percent(method.theirs_train_time),
        )
        for method in published.costs
    ]
    if costs:
        columns = ("", "method", "stored", "theirs", "time", "theirs")
        note = "time: to train, beside full fine-tuning; theirs are rounded"
        yield Sheet(f"against {name}: costs", columns, tuple(costs), grouped=True, note=note)


def _printed(cell: PublishedCell) -> str:
    deviation = cell.their_deviation
    return score(cell.theirs) + ("" if deviation is None else f" ±{deviation:.4f}")


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{share * 100:.0f} %"
