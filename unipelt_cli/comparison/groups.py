"""Runs grouped by everything but their seeds."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, TypeVar

from unipelt_cli.metrics import is_better
from unipelt_cli.runs.run import Run
from unipelt_cli.tasks import TASKS, Task

NO_SETTINGS = frozenset({"model.backbone", "method.name", "train.seed", "train.device"})
Seed = tuple[int, int]
"""The data seed and the seed of one run."""
Cell = tuple[str, int | None]
"""A task and a number of train rows."""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Member:
    """One finished run, and what it is told from others by; its row ids are not kept."""

    run: Run
    task: str
    backbone: str
    fingerprint: str
    rows: tuple[str, ...]
    """The hash of each task's test rows."""
    source: str

    @property
    def seed(self) -> Seed:
        experiment = self.run.experiment
        return experiment.data.data_seed, experiment.train.seed

    @property
    def score(self) -> float:
        """The test score in the task's own metric."""
        outcome = self.run.outcome
        return outcome.test[outcome.metric]

    @cached_property
    def settings(self) -> Mapping[str, object]:
        """The settings that a mean must not mix, by section.key."""
        sections = self.run.experiment.settings()
        flat = {
            f"{name}.{key}": value
            for name in ("model", "method", "train")
            for key, value in sections[name].items()
            if not _is_path(value)
        }
        kept = {key: value for key, value in flat.items() if key not in NO_SETTINGS}
        kept["data.dev_size"] = sections["data"]["dev_size"]
        if folds := sections["data"]["folds"]:
            kept["data.folds"] = folds
        # Like the rows' settings it differs from task to task, and says nothing of most.
        scale = kept.pop("train.label_scale", None)
        if any(task.is_regression for task in self.run.tasks):
            kept["data.label_scale"] = scale
        return kept


@dataclass(frozen=True)
class Group:
    """Runs of one method on one task, k and backbone, a seed each.

    `label` is the method's name, and the settings that other runs of the method have otherwise.
    """

    task: str
    k: int | None
    backbone: str
    method: str
    label: str
    settings: Mapping[str, object]
    members: tuple[Member, ...]

    @property
    def metric(self) -> str:
        return self.members[0].run.outcome.metric

    @property
    def positive(self) -> str | None:
        """The label that the metric is F1 of, of one task with two."""
        return scored_label(self.tasks[0]) if len(self.tasks) == 1 else None

    @property
    def sign(self) -> int:
        """1 where a higher score is better, -1 where a lower one is."""
        return 1 if is_better(self.metric, 1.0, 0.0) else -1

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.members[0].run.tasks

    @property
    def submodules(self) -> tuple[str, ...]:
        """What the method is a union of."""
        return self.members[0].run.experiment.method.submodules

    @property
    def cell(self) -> Cell:
        return self.task, self.k

    @cached_property
    def mean(self) -> float:
        """The mean test score over seeds."""
        return fmean(self.scores.values())

    @cached_property
    def floors(self) -> dict[int, float]:
        """What the floor of all methods gives on the runs' rows, by data seed, where they know."""
        known = {member.seed[0]: member.run.outcome.probe for member in self.members}
        return {seed: floor.test[self.metric] for seed, floor in known.items() if floor is not None}

    @cached_property
    def scores(self) -> dict[Seed, float]:
        return {member.seed: member.score for member in self.members}


def scored_label(task: Task) -> str | None:
    """Return the label that a task's own metric is F1 of; None where it is of none or of all."""
    return task.positive_label if task.metric == "f1" else None


def scopes(groups: Sequence[Group]) -> Iterator[tuple[str, int | None, list[Group]]]:
    """Yield what stands in one table: the groups of a backbone and k."""
    for (backbone, k), members in group_by(lambda group: (group.backbone, group.k), groups).items():
        yield backbone, k, members


def averaged_tasks(groups: Sequence[Group]) -> list[str]:
    """Return the tasks whose scores have a common scale: where higher is better, if any is."""
    upward = dict.fromkeys(group.task for group in groups if group.sign > 0)
    return list(upward or dict.fromkeys(group.task for group in groups))


def _is_path(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_path, value))
    return isinstance(value, str) and "/" in value


def group_by(key: Callable[[_Item], Any], items: Iterable[_Item]) -> dict[Any, list[_Item]]:
    """Return items by key, both in the order in which they came."""
    grouped = defaultdict(list)
    for item in items:
        grouped[key(item)].append(item)
    return dict(grouped)


def identity(member: Member) -> tuple[object, ...]:
    """Return what runs of one group have in common: all but their seeds."""
    experiment = member.run.experiment
    settings = json.dumps(member.settings, sort_keys=True, default=str)
    cell = (member.task, experiment.data.k, member.fingerprint)
    return *cell, experiment.method_name, settings


def make_groups(members: Sequence[Member]) -> tuple[Group, ...]:
    """Group runs by all but their seeds, labelled by the settings in which they differ."""
    differing = _differing(members)
    groups = []
    for alike in group_by(identity, members).values():
        first = alike[0]
        name, k = first.run.experiment.method_name, first.run.experiment.data.k
        differing_values = {
            key: value
            for key in sorted(differing[_kin(first)] | differing[_kin(first, first.task)])
            if (value := first.settings.get(key)) is not None
        }
        words = [
            f"{key.partition('.')[2]}={_shown(value)}" for key, value in differing_values.items()
        ]
        ordered = tuple(sorted(alike, key=lambda member: member.seed))
        label = " ".join([name, *words])
        groups.append(Group(first.task, k, first.backbone, name, label, differing_values, ordered))
    return tuple(sorted(groups, key=_order))


def _kin(member: Member, task: str | None = None) -> tuple[str | None, str, str]:
    """Return whose settings are compared: a method's on a backbone, or on one task there."""
    return task, member.backbone, member.run.experiment.method_name


def _kin_on_task(member: Member) -> tuple[str | None, str, str]:
    return _kin(member, member.task)


def _differing(members: Sequence[Member]) -> dict[tuple[str | None, str, str], set[str]]:
    """Return the settings in which runs of a method differ: those of the rows task by task."""
    differing = {}
    for is_data in (False, True):
        key = _kin_on_task if is_data else _kin
        for kin, kindred in group_by(key, members).items():
            keys = {key for member in kindred for key in member.settings}
            differing[kin] = {
                key
                for key in keys
                if key.startswith("data.") == is_data
                and len({json.dumps(member.settings.get(key)) for member in kindred}) > 1
            }
    return differing


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _order(group: Group) -> tuple[object, ...]:
    names = list(TASKS)
    known = names.index(group.task) if group.task in TASKS else len(names)
    return group.backbone, group.k is None, group.k or 0, known, group.task, group.label
