"""Our scores beside those that others printed, cell by cell."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from unipelt_cli.comparison.groups import Group, group_by
from unipelt_cli.comparison.published import Table
from unipelt_cli.comparison.results import (
    GroupSummary,
    PublishedAverage,
    PublishedCell,
    PublishedComparison,
    PublishedCosts,
)
from unipelt_cli.tasks import TASKS


def against(
    groups: Sequence[Group], summaries: Sequence[GroupSummary], table: Table
) -> PublishedComparison:
    """Set the groups of a comparison beside what was printed of the same methods."""
    known = [group for group in groups if _is_theirs(group)]
    return PublishedComparison(
        name=table.name,
        backbone=table.backbone,
        cells=tuple(_cells(known, table)),
        averages=tuple(_averages(known, table)),
        costs=tuple(_costs(summaries, table)),
        notes=tuple(_notes(groups, table)),
    )


def _is_theirs(group: Group) -> bool:
    """Say whether a group's task is the one of the table, and not only called like it."""
    if group.task not in TASKS:
        return False
    (ours,), theirs = group.tasks, TASKS[group.task]
    return (ours.text, ours.labels, ours.metric) == (theirs.text, theirs.labels, theirs.metric)


def _cells(groups: Sequence[Group], table: Table) -> Iterator[PublishedCell]:
    for group in groups:
        score = table.score(group.task, group.k, group.method)
        if score is not None:
            yield PublishedCell(
                backbone=group.backbone,
                k=group.k,
                task=group.task,
                label=group.label,
                seeds=len(group.members),
                ours=group.mean,
                theirs=score.mean,
                their_deviation=score.deviation,
                difference=group.mean - score.mean,
            )


def _averages(groups: Sequence[Group], table: Table) -> Iterator[PublishedAverage]:
    """Yield the averages of the methods that were run on all of their tasks."""
    methods: dict[tuple[str, int | None, str], dict[str, Group]] = {}
    for group in groups:
        methods.setdefault((group.backbone, group.k, group.label), {})[group.task] = group
    for (backbone, k, label), by_task in methods.items():
        theirs = table.average(k, next(iter(by_task.values())).method)
        if theirs is not None and by_task.keys() >= set(table.tasks):
            ours = fmean(by_task[task].mean for task in table.tasks)
            yield PublishedAverage(backbone, k, label, ours, theirs, ours - theirs)


def _costs(summaries: Sequence[GroupSummary], table: Table) -> Iterator[PublishedCosts]:
    """Yield what methods store; and their time as a share of the reference's in the same cell."""
    theirs = {costs.method: costs for costs in table.costs}
    reference = {
        (summary.backbone, summary.task, summary.k): summary.median_seconds
        for summary in summaries
        if summary.method == table.costs_relative_to and not summary.settings
    }
    known = [summary for summary in summaries if summary.method in theirs]
    for same in group_by(lambda summary: (summary.backbone, summary.label), known).values():
        first, costs = same[0], theirs[same[0].method]
        shares = [
            summary.median_seconds / seconds
            for summary in same
            if (seconds := reference.get((summary.backbone, summary.task, summary.k)))
        ]
        yield PublishedCosts(
            backbone=first.backbone,
            label=first.label,
            ours_stored=first.stored_parameters,
            theirs_stored=costs.parameters,
            ours_train_time=sum(shares) / len(shares) if shares else None,
            theirs_train_time=costs.train_time / 100,
        )


def _notes(groups: Sequence[Group], table: Table) -> Iterator[str]:
    if not any(table.score(group.task, group.k, group.method) for group in groups):
        yield f"{table.name} prints no score for any task, k and method here"
    for backbone in dict.fromkeys(group.backbone for group in groups):
        if Path(backbone).name != table.backbone:
            yield (
                f"{table.name} used {table.backbone}: the differences on {backbone} are between "
                "backbones as well"
            )
    seeds = {len(group.members) for group in groups}
    if seeds != {5}:
        yield f"{table.name} averaged over five data seeds; the runs here are of other numbers"
    if any(group.k is None for group in groups):
        yield f"with all rows {table.name} gives one run's best score on the test rows themselves"
