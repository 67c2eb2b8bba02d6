"""Our scores beside those that others printed, cell by cell."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from unipelt_cli.comparison.groups import Group
from unipelt_cli.comparison.published import Table
from unipelt_cli.tasks import TASKS

Answer = dict[str, Any]


def against(groups: Sequence[Group], answer: Answer, table: Table) -> Answer:
    """Set the groups of a comparison beside what was printed of the same methods."""
    known = [group for group in groups if _is_theirs(group)]
    return {
        "name": table.name,
        "backbone": table.backbone,
        "cells": list(_cells(known, table)),
        "averages": list(_averages(known, table)),
        "costs": list(_costs(answer["groups"], table)),
        "notes": list(_notes(groups, table)),
    }


def _is_theirs(group: Group) -> bool:
    """Say whether a group's task is the one of the table, and not only called like it."""
    if group.task not in TASKS:
        return False
    (own,), theirs = group.tasks, TASKS[group.task]
    return (own.text, own.labels, own.metric) == (theirs.text, theirs.labels, theirs.metric)


def _cells(groups: Sequence[Group], table: Table) -> Iterator[Answer]:
    for group in groups:
        score = table.score(group.task, group.k, group.method)
        if score is not None:
            yield {
                "backbone": group.backbone,
                "k": group.k,
                "task": group.task,
                "label": group.label,
                "seeds": len(group.members),
                "ours": group.mean,
                "theirs": score.mean,
                "their_deviation": score.deviation,
                "difference": group.mean - score.mean,
            }


def _averages(groups: Sequence[Group], table: Table) -> Iterator[Answer]:
    """Yield the averages of the methods that were run on all of their tasks."""
    found: dict[tuple[str, int | None, str], dict[str, Group]] = {}
    for group in groups:
        found.setdefault((group.backbone, group.k, group.label), {})[group.task] = group
    for (backbone, k, label), own in found.items():
        theirs = table.average(k, next(iter(own.values())).method)
        if theirs is not None and own.keys() >= set(table.tasks):
            ours = fmean(own[task].mean for task in table.tasks)
            yield {
                "backbone": backbone,
                "k": k,
                "label": label,
                "ours": ours,
                "theirs": theirs,
                "difference": ours - theirs,
            }


def _costs(entries: Sequence[Answer], table: Table) -> Iterator[Answer]:
    """Yield what methods store; and their time as a share of the reference's in the same cell."""
    theirs = {costs.method: costs for costs in table.costs}
    reference = {
        (entry["backbone"], entry["task"], entry["k"]): entry["median_seconds"]
        for entry in entries
        if entry["method"] == table.costs_relative_to and not entry["settings"]
    }
    told: dict[tuple[str, str], Answer] = {}
    for entry in entries:
        if entry["method"] not in theirs:
            continue
        costs = theirs[entry["method"]]
        own = told.setdefault(
            (entry["backbone"], entry["label"]),
            {
                "backbone": entry["backbone"],
                "label": entry["label"],
                "ours_stored": entry["stored_parameters"],
                "theirs_stored": costs.parameters,
                "ours_train_time": None,
                "theirs_train_time": costs.train_time / 100,
                "shares": [],
            },
        )
        seconds = reference.get((entry["backbone"], entry["task"], entry["k"]))
        if seconds:
            own["shares"].append(entry["median_seconds"] / seconds)
    for own in told.values():
        shares = own.pop("shares")
        yield own | {"ours_train_time": sum(shares) / len(shares) if shares else None}


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
