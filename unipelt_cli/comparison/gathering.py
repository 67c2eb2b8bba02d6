"""Finished runs read from directories and told apart: backbones, tasks, copies."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from unipelt_cli.comparison.groups import (
    Group,
    Member,
    group_by,
    identity,
    make_groups,
    scored_label,
)
from unipelt_cli.errors import RunError
from unipelt_cli.runs.discovery import runs_below
from unipelt_cli.runs.run import Run
from unipelt_cli.tasks import joint_name
from unipelt_cli.text import short


@dataclass(frozen=True)
class Gathered:
    """All groups; the runs that could not be used, with the reason; and what is to be said."""

    groups: tuple[Group, ...]
    unusable: tuple[tuple[Path, str], ...]
    repeated: tuple[Path, ...]
    notes: tuple[str, ...]


def gather(directories: Sequence[Path]) -> Gathered:
    """Read all finished runs below directories and group them.

    Raises RunError where there is none.
    """
    members: list[Member] = []
    unusable: dict[Path, str] = {}
    seen: set[Path] = set()
    for directory in directories:
        if not directory.is_dir():
            raise RunError(f"{directory}: no such directory", "give directories that hold runs")
        for path, run in runs_below(directory):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            if isinstance(run, str):
                unusable[path] = run
            elif _is_consistent(run):
                members.append(_member(run))
            else:
                unusable[path] = "damaged"
    if not members:
        where = ", ".join(map(str, directories))
        others = f" ({len(unusable)} unfinished or damaged)" if unusable else ""
        raise RunError(
            f"{where}: no finished run there{others}",
            "give directories that `train` wrote, or that hold such",
        )
    members, task_notes = _with_distinct_tasks(_with_distinct_backbones(members))
    kept, repeated, repeat_notes = _once(members)
    notes = (*task_notes, *repeat_notes)
    return Gathered(make_groups(kept), tuple(unusable.items()), tuple(repeated), notes)


def _is_consistent(run: Run) -> bool:
    """Say whether a run's predictions, where it stored them, give the scores of its result."""
    test = run.outcome.test
    for task_index, task in enumerate(run.tasks):
        try:
            answers = run.predictions(task_index)
        except RunError:
            return False
        if answers is not None:
            name = task.metric if len(run.tasks) == 1 else f"{task.name}.{task.metric}"
            score = task.score(*answers)[task.metric]
            if name not in test or not abs(score - test[name]) < 1e-6:
                return False
    return True


def _member(run: Run) -> Member:
    environment, places = run.environment, range(len(run.tasks))
    data, backbone = environment["data"], environment["backbone"]
    each = data["tasks"].values() if len(run.tasks) > 1 else [data]
    return Member(
        replace(run, environment={}),
        joint_name(run.tasks),
        Path(backbone["name"]).name,
        backbone["fingerprint"],
        tuple(_tested_rows(run, task_index) for task_index in places),
        json.dumps([task_data.get("source") for task_data in each], sort_keys=True),
    )


def _tested_rows(run: Run, task_index: int) -> str:
    """Name the rows that a task's score is of: the hash of its test rows, or of those in folds."""
    folds = run.outcome.folds
    if folds is None:
        return run.digest_of("test", task_index)
    return f"{run.digest_of('train', task_index)} in {folds.count} folds"


def _with_distinct_backbones(members: Sequence[Member]) -> list[Member]:
    """Call a backbone by one name, and different ones by different names."""
    names: dict[str, str] = {}
    for member in members:
        names.setdefault(member.fingerprint, member.backbone)
    shared = group_by(lambda fingerprint: names[fingerprint], names)
    distinct_names = {
        fingerprint: name if len(fingerprints) == 1 else f"{name} ({fingerprint[:6]})"
        for name, fingerprints in shared.items()
        for fingerprint in fingerprints
    }
    return [replace(member, backbone=distinct_names[member.fingerprint]) for member in members]


def _with_distinct_tasks(members: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """Tell tasks apart that are called the same but have other rows or labels."""
    distinct: list[Member] = []
    notes = []
    for name, of_name in group_by(lambda member: member.task, members).items():
        parts = group_by(_kind, of_name)
        if len(parts) == 1 and _conflicts(of_name):
            parts = group_by(lambda member: member.source, of_name)
            if any(map(_conflicts, parts.values())):
                parts = group_by(lambda member: (member.source, member.rows), of_name)
        if len(parts) == 1:
            distinct += of_name
            continue
        for number, part in enumerate(parts.values(), 1):
            distinct += [replace(member, task=f"{name} #{number}") for member in part]
            labels = [label for task in part[0].run.tasks if (label := scored_label(task))]
            if folds := part[0].run.outcome.folds:
                notes.append(f"{name} #{number} is scored by {folds.count} folds of train rows")
            elif len({member.rows for member in of_name}) == 1 and labels:
                notes.append(f"{name} #{number} is scored by f1 of {', '.join(map(short, labels))}")
            else:
                notes.append(f"{name} #{number} has rows of its own: {part[0].source}")
    return distinct, notes


def _kind(member: Member) -> tuple[object, ...]:
    folds = member.run.outcome.folds
    return folds and folds.count, *(
        (task.text, task.labels, task.metric, scored_label(task)) for task in member.run.tasks
    )


def _conflicts(members: Sequence[Member]) -> bool:
    """Say whether runs with one data seed have different test rows."""
    drawn = group_by(lambda member: member.seed[0], members)
    return any(len({member.rows for member in drawn_alike}) > 1 for drawn_alike in drawn.values())


def _once(members: Sequence[Member]) -> tuple[list[Member], list[Path], list[str]]:
    """Keep the first of the runs that are one experiment."""
    kept, repeated, notes = [], [], []
    for copies in group_by(lambda member: (identity(member), member.seed), members).values():
        kept.append(copies[0])
        repeated += [member.run.directory for member in copies[1:]]
        scores = sorted({member.score for member in copies})
        if len(scores) > 1:
            notes.append(
                f"{copies[0].run.directory}: counted once of {len(copies)} runs of its experiment, "
                f"which scored {scores[0]:.4f} to {scores[-1]:.4f}"
            )
    return kept, repeated, notes
