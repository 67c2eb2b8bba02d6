"""What groups of runs show: means with intervals, tables over tasks, bounds of unions."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, cast

import numpy as np

from unipelt_cli import methods
from unipelt_cli.comparison import significance
from unipelt_cli.comparison.against_published import against
from unipelt_cli.comparison.gathering import Gathered, gather
from unipelt_cli.comparison.groups import Group, Member, averaged_tasks, scopes
from unipelt_cli.comparison.paired_tests import comparisons
from unipelt_cli.comparison.published import Table
from unipelt_cli.comparison.results import (
    Comparison,
    FloorMeans,
    GroupSummary,
    MethodMeans,
    MethodsTable,
    RunCounts,
    SeedScore,
    UnionBound,
    UnusableRun,
)
from unipelt_cli.metrics import Values
from unipelt_cli.models.resampling import Interval, Sample, bootstrap_interval
from unipelt_cli.models.weighted_metrics import weighted_metric

MARGIN = 0.01


def summarise_directories(
    directories: Sequence[Path], margin: float = MARGIN, printed: Table | None = None
) -> Comparison:
    """Compare all finished runs below directories, with what others printed too if it is given.

    `margin` is the difference in score that does not matter. Raises RunError where there is none.
    """
    gathered = gather(directories)
    comparison, groups = summarise(gathered, margin), gathered.groups
    if printed is None:
        return comparison
    return replace(comparison, against=against(groups, comparison.groups, printed))


def summarise(gathered: Gathered, margin: float) -> Comparison:
    """Compare runs that are grouped."""
    groups = gathered.groups
    return Comparison(
        runs=RunCounts(
            finished=sum(len(group.members) for group in groups),
            repeated=tuple(map(str, gathered.repeated)),
            unusable=tuple(UnusableRun(str(path), why) for path, why in gathered.unusable),
        ),
        margin=margin,
        groups=tuple(map(_summary, groups)),
        tables=tuple(_table(*scope) for scope in scopes(groups)),
        comparisons=tuple(comparisons(groups, margin)),
        against=None,
        notes=(*gathered.notes, *_cost_notes(groups)),
    )


def _cost_notes(groups: Sequence[Group]) -> Iterator[str]:
    """Say where times and memory cannot be compared run by run."""
    outcomes = [member.run.outcome for group in groups for member in group.members]
    if shared := sum(outcome.together != 1 for outcome in outcomes):
        yield f"seconds and memory of {shared} runs are those of several that shared their passes"
    if len(devices := {outcome.device for outcome in outcomes}) > 1:
        yield f"seconds and memory are of several kinds of device: {', '.join(sorted(devices))}"


def _summary(group: Group) -> GroupSummary:
    """Describe one group: its scores, how sure they are, and what its runs cost."""
    outcomes = [member.run.outcome for member in group.members]
    scores = [member.score for member in group.members]
    standing = [m.score for m in group.members if not m.run.outcome.collapsed]
    return GroupSummary(
        task=group.task,
        k=group.k,
        backbone=group.backbone,
        method=group.method,
        label=group.label,
        settings=group.settings,
        submodules=group.submodules,
        metric=group.metric,
        positive=group.positive,
        seeds=tuple(map(_seed_score, group.members)),
        mean=group.mean,
        standard_deviation=stdev(scores) if len(scores) > 1 else None,
        interval=significance.mean_interval(scores),
        interval_by_rows=_interval_by_rows(group),
        collapsed=len(scores) - len(standing),
        mean_not_collapsed=fmean(standing) if standing else None,
        trainable_parameters=outcomes[0].trainable_parameters,
        stored_parameters=outcomes[0].stored_parameters,
        head_parameters=outcomes[0].head_parameters,
        median_seconds=median(outcome.seconds for outcome in outcomes),
        peak_memory_bytes=max(outcome.peak_memory_bytes for outcome in outcomes),
    )


def _seed_score(member: Member) -> SeedScore:
    data_seed, seed = member.seed
    collapsed = member.run.outcome.collapsed
    return SeedScore(data_seed, seed, str(member.run.directory), member.score, collapsed)


def _interval_by_rows(group: Group) -> Interval | None:
    """Return the bootstrap interval over test rows, or None where a run stored no predictions.

    Seeds that were tested on the same rows are drawn together, those on other rows apart.
    """
    sets: dict[tuple[int, str], list[tuple[Values, Values]]] = {}
    for member in group.members:
        for task_index in range(len(group.tasks)):
            answers = member.run.predictions(task_index)
            if answers is None:
                return None
            sets.setdefault((task_index, member.rows[task_index]), []).append(answers)
    total = sum(map(len, sets.values()))
    samples = [
        Sample(
            seeds[0][1],
            cast(Values, np.stack([predicted for predicted, _ in seeds])),
            weighted_metric(group.tasks[task_index]),
            len(seeds) / total,
        )
        for (task_index, _), seeds in sets.items()
    ]
    return bootstrap_interval(samples, np.random.default_rng(0))


def _table(backbone: str, k: int | None, groups: Sequence[Group]) -> MethodsTable:
    """Set methods against tasks; an average is given where a method has every task."""
    averaged, labels = averaged_tasks(groups), sorted({group.label for group in groups})
    tasks = tuple(dict.fromkeys(group.task for group in groups))
    means = {(group.label, group.task): group.mean for group in groups}
    signs = {group.task: group.sign for group in groups}
    whole = [label for label in labels if all((label, task) in means for task in averaged)]
    oriented = [[signs[task] * means[label, task] for task in averaged] for label in whole]
    ranks = significance.average_ranks(oriented) if whole else np.zeros(0)
    rank_of = {label: float(rank) for label, rank in zip(whole, ranks, strict=True)}
    average_of = {label: fmean(means[label, task] for task in averaged) for label in whole}
    return MethodsTable(
        backbone=backbone,
        k=k,
        tasks=tasks,
        averaged_tasks=tuple(averaged),
        methods=tuple(
            MethodMeans(
                label=label,
                means={task: means.get((label, task)) for task in tasks},
                average=average_of.get(label),
                average_rank=rank_of.get(label),
            )
            for label in labels
        ),
        bounds=tuple(_bounds(groups, averaged)),
        floor=_floor(groups, averaged),
    )


def _floor(groups: Sequence[Group], averaged: Sequence[str]) -> FloorMeans | None:
    """Return what the floor of all methods gives on each task; None where no run knows it.

    From its own runs where there are any, else from what other runs noted beside themselves:
    there each set of rows counts once.
    """
    runs = [group for group in groups if group.method == methods.FLOOR]
    scores: dict[str, dict[Any, float]] = {group.task: {} for group in groups}
    for group in runs or groups:
        if runs:
            scores[group.task][group.label] = group.mean
        else:
            scores[group.task].update(group.floors)
    means = {task: fmean(of_task.values()) if of_task else None for task, of_task in scores.items()}
    if not any(scores.values()):
        return None
    known = [mean for task in averaged if (mean := means[task]) is not None]
    average = fmean(known) if len(known) == len(averaged) else None
    return FloorMeans(methods.FLOOR, "runs" if runs else "notes", means, average)


def _bounds(groups: Sequence[Group], averaged: Sequence[str]) -> Iterator[UnionBound]:
    """Compare each union with the best of its submodules alone, task by task.

    A part that has no run of its own on one of the tasks is missing.
    """
    unions = [group for group in groups if len(group.submodules) > 1]
    for label in dict.fromkeys(group.label for group in unions):
        by_task = {group.task: group for group in unions if group.label == label}
        parts = next(iter(by_task.values())).submodules
        alone = {
            task: [group for group in groups if group.task == task and _is_one_of(group, parts)]
            for task in averaged
            if task in by_task
        }
        bounds = {task: _best(singles) for task, singles in alone.items() if singles}
        if not bounds:
            continue
        trained = [{group.submodules[0] for group in alone[task]} for task in bounds]
        bound = fmean(bounds.values())
        union = fmean(by_task[task].mean for task in bounds)
        yield UnionBound(
            label=label,
            submodules=parts,
            missing=tuple(part for part in parts if not all(part in known for known in trained)),
            tasks=tuple(bounds),
            bounds=bounds,
            bound=bound,
            union=union,
            difference=union - bound,
        )


def _is_one_of(group: Group, parts: Sequence[str]) -> bool:
    """Say whether a group's method is one of a union's submodules, alone."""
    return len(group.submodules) == 1 and group.submodules[0] in parts


def _best(groups: Sequence[Group]) -> float:
    return max(groups, key=lambda group: group.sign * group.mean).mean
