"""What groups of runs show: means with intervals, tables over tasks, bounds of unions.

The answer is one JSON object. Scores are fractions, times seconds, memory bytes, sizes numbers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, cast

import numpy as np

from unipelt_cli import methods
from unipelt_cli.comparison import significance
from unipelt_cli.comparison.against_published import against
from unipelt_cli.comparison.gathering import Gathered, gather
from unipelt_cli.comparison.groups import Group, averaged_tasks, scopes
from unipelt_cli.comparison.paired_tests import comparisons
from unipelt_cli.comparison.published import Table
from unipelt_cli.metrics import Values
from unipelt_cli.models.resampling import Interval, Sample, bootstrap_interval
from unipelt_cli.models.weighted_metrics import weighted_metric

MARGIN = 0.01
Answer = dict[str, Any]


def summarise_directories(
    directories: Sequence[Path], margin: float = MARGIN, printed: Table | None = None
) -> Answer:
    """Compare all finished runs below directories, with what others printed too if it is given.

    `margin` is the difference in score that does not matter. Raises RunError where there is none.
    """
    gathered = gather(directories)
    answer, groups = summarise(gathered, margin), gathered.groups
    return answer | {"against": printed and against(groups, answer, printed)}


def summarise(gathered: Gathered, margin: float) -> Answer:
    """Compare runs that are grouped."""
    groups = gathered.groups
    return {
        "runs": {
            "finished": sum(len(group.members) for group in groups),
            "repeated": [str(path) for path in gathered.repeated],
            "unusable": [{"run": str(path), "why": why} for path, why in gathered.unusable],
        },
        "margin": margin,
        "groups": list(map(_entry, groups)),
        "tables": [_table(*scope) for scope in scopes(groups)],
        "comparisons": list(comparisons(groups, margin)),
        "against": None,
        "notes": [*gathered.notes, *_cost_notes(groups)],
    }


def _cost_notes(groups: Sequence[Group]) -> Iterator[str]:
    """Say where times and memory cannot be compared run by run."""
    results = [member.run.result for group in groups for member in group.members]
    if shared := sum(result.get("together", 1) != 1 for result in results):
        yield f"seconds and memory of {shared} runs are those of several that shared their passes"
    if len(devices := {result["device"] for result in results}) > 1:
        yield f"seconds and memory are of several kinds of device: {', '.join(sorted(devices))}"


def _entry(group: Group) -> Answer:
    """Describe one group: its scores, how sure they are, and what its runs cost."""
    results = [member.run.result for member in group.members]
    scores = [member.score for member in group.members]
    standing = [m.score for m in group.members if not m.run.result["collapsed"]]
    interval, by_rows = significance.mean_interval(scores), _interval_by_rows(group)
    return {
        "task": group.task,
        "k": group.k,
        "backbone": group.backbone,
        "method": group.method,
        "label": group.label,
        "settings": group.settings,
        "submodules": list(group.submodules),
        "metric": group.metric,
        **({} if group.positive is None else {"positive": group.positive}),
        "seeds": [
            {
                "data_seed": member.seed[0],
                "seed": member.seed[1],
                "run": str(member.run.directory),
                "score": member.score,
                "collapsed": member.run.result["collapsed"],
            }
            for member in group.members
        ],
        "mean": group.mean,
        "standard_deviation": stdev(scores) if len(scores) > 1 else None,
        "interval": interval and list(interval),
        "interval_by_rows": by_rows and list(by_rows),
        "collapsed": len(scores) - len(standing),
        "mean_not_collapsed": fmean(standing) if standing else None,
        **{
            name: results[0][name]
            for name in ("trainable_parameters", "stored_parameters", "head_parameters")
        },
        "median_seconds": median(result["seconds"] for result in results),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
    }


def _interval_by_rows(group: Group) -> Interval | None:
    """Return the bootstrap interval over test rows, or None where a run stored no predictions.

    Seeds that were tested on the same rows are drawn together, those on other rows apart.
    """
    sets: dict[tuple[int, str], list[tuple[Values, Values]]] = {}
    for member in group.members:
        for place in range(len(group.tasks)):
            answers = member.run.predictions(place)
            if answers is None:
                return None
            sets.setdefault((place, member.rows[place]), []).append(answers)
    total = sum(map(len, sets.values()))
    samples = [
        Sample(
            own[0][1],
            cast(Values, np.stack([predicted for predicted, _ in own])),
            weighted_metric(group.tasks[place]),
            len(own) / total,
        )
        for (place, _), own in sets.items()
    ]
    return bootstrap_interval(samples, np.random.default_rng(0))


def _table(backbone: str, k: int | None, groups: Sequence[Group]) -> Answer:
    """Set methods against tasks; an average is given where a method has every task."""
    averaged, labels = averaged_tasks(groups), sorted({group.label for group in groups})
    tasks = list(dict.fromkeys(group.task for group in groups))
    means = {(group.label, group.task): group.mean for group in groups}
    signs = {group.task: group.sign for group in groups}
    whole = [label for label in labels if all((label, task) in means for task in averaged)]
    oriented = [[signs[task] * means[label, task] for task in averaged] for label in whole]
    ranks = significance.average_ranks(oriented) if whole else np.zeros(0)
    rank_of = {label: float(rank) for label, rank in zip(whole, ranks, strict=True)}
    return {
        "backbone": backbone,
        "k": k,
        "tasks": tasks,
        "averaged_tasks": averaged,
        "methods": [
            {
                "label": label,
                "means": {task: means.get((label, task)) for task in tasks},
                "average": fmean(means[label, task] for task in averaged)
                if label in rank_of
                else None,
                "average_rank": rank_of.get(label),
            }
            for label in labels
        ],
        "bounds": list(_bounds(groups, averaged)),
        "floor": _floor(groups, averaged),
    }


def _floor(groups: Sequence[Group], averaged: Sequence[str]) -> Answer | None:
    """Return what the floor of all methods gives on each task; None where no run knows it.

    From its own runs where there are any, else from what other runs noted beside themselves:
    there each set of rows counts once.
    """
    runs = [group for group in groups if group.method == methods.FLOOR]
    found: dict[str, dict[Any, float]] = {group.task: {} for group in groups}
    for group in runs or groups:
        found[group.task] |= {(group.label, "mean"): group.mean} if runs else group.floors
    means = {task: fmean(own.values()) if own else None for task, own in found.items()}
    if not any(found.values()):
        return None
    whole = [own for task in averaged if (own := means[task]) is not None]
    return {
        "method": methods.FLOOR,
        "of": "runs" if runs else "notes",
        "means": means,
        "average": fmean(whole) if len(whole) == len(averaged) else None,
    }


def _bounds(groups: Sequence[Group], averaged: Sequence[str]) -> Iterator[Answer]:
    """Compare each union with the best of its submodules alone, task by task.

    Mao et al. 2022, Table 2. A part that has no run of its own on one of the tasks is missing.
    """
    unions = [group for group in groups if len(group.submodules) > 1]
    for label in dict.fromkeys(group.label for group in unions):
        own = {group.task: group for group in unions if group.label == label}
        parts = next(iter(own.values())).submodules
        alone = {
            task: [
                group
                for group in groups
                if group.task == task
                and len(group.submodules) == 1
                and group.submodules[0] in parts
            ]
            for task in averaged
            if task in own
        }
        bounds = {task: _best(found) for task, found in alone.items() if found}
        if not bounds:
            continue
        had = [{group.submodules[0] for group in alone[task]} for task in bounds]
        bound = fmean(bounds.values())
        union = fmean(own[task].mean for task in bounds)
        yield {
            "label": label,
            "submodules": list(parts),
            "missing": [part for part in parts if not all(part in found for found in had)],
            "tasks": list(bounds),
            "bounds": bounds,
            "bound": bound,
            "union": union,
            "difference": union - bound,
        }


def _best(groups: Sequence[Group]) -> float:
    return max(groups, key=lambda group: group.sign * group.mean).mean
