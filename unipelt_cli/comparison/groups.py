"""Finished runs below directories, in groups that differ in nothing but their seeds.

Runs with different settings never share a group: where runs of one method on one backbone differ
in a setting, the group's label says it. Seeds, paths and the device are no settings.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from unipelt_cli.commands.listing import runs_below
from unipelt_cli.errors import RunError
from unipelt_cli.runs.run import Run
from unipelt_cli.tasks import TASKS, Task, is_better, joint_name

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
        result = self.run.result
        return float(result["test"][result["metric"]])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that a mean must not mix, by section.key."""
        sections = self.run.experiment.settings()
        flat = {
            f"{name}.{key}": value
            for name in ("model", "method", "train")
            for key, value in sections[name].items()
            if not _is_path(value)
        }
        kept = {key: value for key, value in flat.items() if key not in NO_SETTINGS}
        return kept | {"data.dev_size": sections["data"]["dev_size"]}


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
    settings: dict[str, Any]
    members: tuple[Member, ...]

    @property
    def metric(self) -> str:
        return str(self.members[0].run.result["metric"])

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
    def scores(self) -> dict[Seed, float]:
        return {member.seed: member.score for member in self.members}


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
    members, task_notes = _with_told_tasks(_with_told_backbones(members))
    kept, repeated, repeat_notes = _once(members)
    notes = (*task_notes, *repeat_notes)
    return Gathered(_grouped(kept), tuple(unusable.items()), tuple(repeated), notes)


def scopes(groups: Sequence[Group]) -> Iterator[tuple[str, int | None, list[Group]]]:
    """Yield what stands in one table: the groups of a backbone and k."""
    for (backbone, k), own in _by(lambda group: (group.backbone, group.k), groups).items():
        yield backbone, k, own


def averaged_tasks(groups: Sequence[Group]) -> list[str]:
    """Return the tasks whose scores have a common scale: where higher is better, if any is."""
    upward = dict.fromkeys(group.task for group in groups if group.sign > 0)
    return list(upward or dict.fromkeys(group.task for group in groups))


def _is_consistent(run: Run) -> bool:
    """Say whether a run's predictions, where it stored them, give the scores of its result."""
    test = run.result["test"]
    for place, task in enumerate(run.tasks):
        try:
            answers = run.predictions(place)
        except RunError:
            return False
        if answers is not None:
            name = task.metric if len(run.tasks) == 1 else f"{task.name}.{task.metric}"
            found = task.score(*answers)[task.metric]
            if name not in test or not abs(found - test[name]) < 1e-6:
                return False
    return True


def _member(run: Run) -> Member:
    environment, places = run.environment, range(len(run.tasks))
    data, found = environment["data"], environment["backbone"]
    each = data["tasks"].values() if len(run.tasks) > 1 else [data]
    return Member(
        replace(run, environment={}),
        joint_name(run.tasks),
        Path(found["name"]).name,
        found["fingerprint"],
        tuple(run.digest_of("test", place) for place in places),
        json.dumps([own.get("source") for own in each], sort_keys=True),
    )


def _is_path(value: object) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_path, value))
    return isinstance(value, str) and "/" in value


def _by(key: Callable[[_Item], Any], items: Iterable[_Item]) -> dict[Any, list[_Item]]:
    found = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)


def _with_told_backbones(members: Sequence[Member]) -> list[Member]:
    """Call a backbone by one name, and different ones by different names."""
    names: dict[str, str] = {}
    for member in members:
        names.setdefault(member.fingerprint, member.backbone)
    shared = _by(lambda fingerprint: names[fingerprint], names)
    told = {
        fingerprint: name if len(own) == 1 else f"{name} ({fingerprint[:6]})"
        for name, own in shared.items()
        for fingerprint in own
    }
    return [replace(member, backbone=told[member.fingerprint]) for member in members]


def _with_told_tasks(members: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """Tell tasks apart that are called the same but have other rows or labels."""
    told: list[Member] = []
    notes = []
    for name, own in _by(lambda member: member.task, members).items():
        parts = _by(_kind, own)
        if len(parts) == 1 and _conflicts(own):
            parts = _by(lambda member: member.source, own)
            if any(map(_conflicts, parts.values())):
                parts = _by(lambda member: (member.source, member.rows), own)
        if len(parts) == 1:
            told += own
            continue
        for number, part in enumerate(parts.values(), 1):
            told += [replace(member, task=f"{name} #{number}") for member in part]
            notes.append(f"{name} #{number} has rows of its own: {part[0].source}")
    return told, notes


def _kind(member: Member) -> tuple[object, ...]:
    return tuple((task.text, task.labels, task.metric) for task in member.run.tasks)


def _conflicts(members: Sequence[Member]) -> bool:
    """Say whether runs with one data seed have different test rows."""
    drawn = _by(lambda member: member.seed[0], members)
    return any(len({member.rows for member in own}) > 1 for own in drawn.values())


def _identity(member: Member) -> tuple[object, ...]:
    experiment = member.run.experiment
    settings = json.dumps(member.settings, sort_keys=True, default=str)
    place = (member.task, experiment.data.k, member.fingerprint)
    return *place, experiment.method_name, settings


def _once(members: Sequence[Member]) -> tuple[list[Member], list[Path], list[str]]:
    """Keep the first of the runs that are one experiment."""
    kept, repeated, notes = [], [], []
    for own in _by(lambda member: (_identity(member), member.seed), members).values():
        kept.append(own[0])
        repeated += [member.run.directory for member in own[1:]]
        scores = sorted({member.score for member in own})
        if len(scores) > 1:
            notes.append(
                f"{own[0].run.directory}: counted once of {len(own)} runs of its experiment, "
                f"which scored {scores[0]:.4f} to {scores[-1]:.4f}"
            )
    return kept, repeated, notes


def _grouped(members: Sequence[Member]) -> tuple[Group, ...]:
    differing = _differing(members)
    groups = []
    for own in _by(_identity, members).values():
        first = own[0]
        name, k = first.run.experiment.method_name, first.run.experiment.data.k
        told = {
            key: value
            for key in sorted(differing[_kin(first)] | differing[_kin(first, first.task)])
            if (value := first.settings.get(key)) is not None
        }
        words = [f"{key.partition('.')[2]}={_shown(value)}" for key, value in told.items()]
        ordered = tuple(sorted(own, key=lambda member: member.seed))
        label = " ".join([name, *words])
        groups.append(Group(first.task, k, first.backbone, name, label, told, ordered))
    return tuple(sorted(groups, key=_place))


def _kin(member: Member, task: str | None = None) -> tuple[str | None, str, str]:
    """Return whose settings are compared: a method's on a backbone, or on one task there."""
    return task, member.backbone, member.run.experiment.method_name


def _differing(members: Sequence[Member]) -> dict[tuple[str | None, str, str], set[str]]:
    """Return the settings in which runs of a method differ: those of the rows task by task."""
    found = {}
    for is_data in (False, True):
        for kin, own in _by(lambda m, d=is_data: _kin(m, m.task if d else None), members).items():  # type: ignore[misc]
            keys = {key for member in own for key in member.settings}
            found[kin] = {
                key
                for key in keys
                if key.startswith("data.") == is_data
                and len({json.dumps(member.settings.get(key)) for member in own}) > 1
            }
    return found


def _shown(value: object) -> str:
    if isinstance(value, tuple | list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _place(group: Group) -> tuple[object, ...]:
    names = list(TASKS)
    known = names.index(group.task) if group.task in TASKS else len(names)
    return group.backbone, group.k is None, group.k or 0, known, group.task, group.label
