"""A finished run on disk: read, checked, and built again."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from unipelt_cli.backbones.pretrained import Pretrained, find
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.recorded import RecordedExperiment, read_recorded
from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation
from unipelt_cli.data.manifest import digest_rows
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import ConfigError, DataError, RunError, nearest
from unipelt_cli.files import sealed
from unipelt_cli.metrics import Values
from unipelt_cli.models.build import build
from unipelt_cli.models.label_scale import RAW, LabelScale
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs import schema
from unipelt_cli.runs.checks import (
    check_backbone,
    check_digest,
    check_file,
    check_seal,
    recorded_files,
    without_split,
)
from unipelt_cli.runs.names import (
    ENVIRONMENT,
    EXPERIMENT,
    METRICS,
    MODEL,
    PREDICTIONS,
    PROBE,
    RESULT,
)
from unipelt_cli.runs.probe import Likeness, StoredProbe, read_probe, units_of
from unipelt_cli.runs.progress import describe_progress
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.tasks import Task


@dataclass(frozen=True)
class Run:
    """A finished run, read from its directory; the backbone is not loaded yet."""

    directory: Path
    experiment: Experiment
    environment: Mapping[str, Any]
    header: Mapping[str, Any]
    result: Mapping[str, Any]

    @cached_property
    def outcome(self) -> schema.Result:
        """What reading relies on in the result; `result` is all of it, as it was recorded."""
        return schema.Result.model_validate(self.result, strict=True)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks as they were trained: text columns, labels and metric."""
        return tuple(
            Task(
                description["name"],
                tuple(description["text"]),
                tuple(description["labels"]),
                description["metric"],
                tuple(description["also"]),
                positive=description.get("positive"),
                decimal_comma=description.get("decimal_comma", False),
            )
            for description in self.header.get("tasks") or [self.header["task"]]
        )

    @property
    def scales(self) -> tuple[LabelScale, ...]:
        """The scale on which each task's labels were learned; the stored head gives labels."""
        described = self.header.get("tasks") or [self.header["task"]]
        scales = [description.get("label_scale") for description in described]
        return tuple(
            LabelScale(scale["mean"], scale["deviation"]) if scale else RAW for scale in scales
        )

    @property
    def task(self) -> Task:
        """The task of a run that has one; of several the first."""
        return self.tasks[0]

    def task_index(self, name: str | None) -> int:
        """Return the place of a task among the run's; the name may be left out if there is one.

        Raises ConfigError where it may not, and for a task that the run was not trained on.
        """
        names = [task.name for task in self.tasks]
        if name is None and len(names) > 1:
            raise ConfigError(
                f"{self.directory}: trained on several tasks ({', '.join(names)})",
                "say which one with --task NAME",
            )
        if name is not None and name not in names:
            raise ConfigError(
                f"--task {name!r}: {self.directory} was not trained on it", nearest(name, names)
            )
        return 0 if name is None else names.index(name)

    def build(
        self,
        device: str | None = None,
        backbone: str | None = None,
        precision: str | None = None,
    ) -> TunedModel:
        """Build the model on its backbone and load what was stored, strictly.

        `backbone` says where the run's backbone is now; `precision` is the run's unless given.
        Raises RunError when it is another one, or a tensor is missing, extra, reshaped, not finite
        or changed.
        """
        return self.build_compared(device, backbone, precision)[0]

    def build_compared(
        self,
        device: str | None = None,
        backbone: str | None = None,
        precision: str | None = None,
    ) -> tuple[TunedModel, Likeness]:
        """Do what `build` does, and return how far its logits are from the stored ones as well."""
        experiment = self.experiment
        experiment = experiment.with_("train", device=device, precision=precision)
        pretrained = find(backbone or experiment.model.backbone)
        self.check_backbone(pretrained)
        tuned = _load(self.directory, experiment, self.tasks, pretrained)
        likeness = self.stored_probe.compare(tuned)
        if not likeness.holds:
            raise RunError(
                f"{self.directory}: computes other logits than when it was saved "
                f"(in {likeness.precision} they differ by {likeness.difference:.2g}, and may by "
                f"{likeness.allowed:.2g})",
                "its settings or a library have changed: restore them, or train it again",
            )
        return tuned, likeness

    @cached_property
    def stored_probe(self) -> StoredProbe:
        """The logits that tell whether a model computes what this run did; see `StoredProbe`."""
        units = units_of(self.tasks, self.scales)
        precision = str(self.header.get("precision", self.experiment.train.precision))
        return read_probe(self.directory / PROBE, precision, self.result["device"], units)

    def check_backbone(self, backbone: Pretrained) -> None:
        """Raise RunError when a backbone is not the one that the run was trained on."""
        check_backbone(self.directory, self.environment["backbone"], backbone)

    def predictions(self, task_index: int = 0) -> tuple[Values, Values] | None:
        """Return a task's predictions and references on test, as label indices or values (rows,).

        None for a run of an earlier version, which stored none. Raises RunError for tensors that
        cannot be this task's.
        """
        if PREDICTIONS not in self.result["files"]:
            return None
        path, task = self.directory / PREDICTIONS, self.tasks[task_index]
        tensors, _ = sealed.open_tensors(path)
        pair = [tensors.get(f"{what}.{task_index}") for what in ("predictions", "references")]
        predicted, expected = (_answers(tensor, task) for tensor in pair)
        if predicted is None or expected is None or predicted.shape != expected.shape:
            raise RunError(f"{path}: damaged", sealed.REMEDY)
        return predicted, expected

    def rows(self, split: str, source: str | None = None, task_index: int = 0) -> Dataset:
        """Find the rows of a task's split again, by source and settings, and check them by hash."""
        recorded = self._manifests[task_index]["splits"]
        if split not in recorded:
            raise without_split(self.directory, self.result, split, list(recorded))
        rows = self.prepared(source, task_index).splits[split]
        if digest_rows(rows) != self.digest_of(split, task_index):
            raise DataError(
                f"the {split} rows found now are not those of {self.directory}",
                self._where_rows_were(task_index),
            )
        return rows

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that the run's rows are in."""
        return tuple(self._manifests[0]["splits"])

    def _where_rows_were(self, task_index: int) -> str:
        """Say what to do where the rows have changed."""
        file = self.experiment.data.each()[task_index].train_file
        if file is None:
            return "the source has changed; give the one that was used with --source"
        return f"{file} has changed: restore it, or score other rows with `unipelt eval --file`"

    def prepared(self, source: str | None = None, task_index: int = 0) -> Prepared:
        """Find and draw a task's rows again; whether they are the same is not checked."""
        settings = self.data_settings(task_index)
        if source is not None:
            settings = settings.moved(source)
        return preparation.prepare(settings)

    def data_settings(self, task_index: int = 0) -> DataSettings:
        """Return the settings of a task's rows, with what the run took its own labels for.

        Earlier versions decided that otherwise, and did not record it.
        """
        settings = self.experiment.data.each()[task_index]
        if settings.kind != "auto" or not (settings.train_file or settings.dataset):
            return settings
        kind = "regression" if self.tasks[task_index].is_regression else "classification"
        return settings.model_copy(update={"kind": kind})

    def as_it_was(self) -> Experiment:
        """Return the experiment with what an earlier version decided and did not record.

        Then F1 was that of the second label, and the kind of own labels was decided otherwise.
        """
        data, changes = self.experiment.data, dict[str, str | None]()
        if len(self.tasks) == 1 and (data.train_file or data.dataset):
            changes["kind"] = self.data_settings().kind
            if data.positive is None and "positive" not in self.header["task"]:
                changes["positive"] = self.task.positive_label
        return self.experiment.with_("data", **changes)

    def digest_of(self, split: str, task_index: int = 0) -> str:
        """Return the recorded hash of the rows of a task's split."""
        return str(self._manifests[task_index]["splits"][split]["digest"])

    def train_mean(self, task_index: int = 0) -> float | None:
        """Return the recorded mean of a task's train labels; None where no such thing was."""
        mean = self._manifests[task_index]["splits"]["train"].get("labels", {}).get("mean")
        return mean if self.tasks[task_index].is_regression else None

    def count_of(self, split: str, task_index: int = 0) -> int:
        """Return how many rows a task's split had, as it was recorded."""
        return int(self._manifests[task_index]["splits"][split].get("rows", 0))

    @property
    def _manifests(self) -> list[Mapping[str, Any]]:
        recorded = self.environment["data"]
        return list(recorded["tasks"].values()) if len(self.tasks) > 1 else [recorded]


def _answers(tensor: Tensor | None, task: Task) -> Values | None:
    """Return stored answers to a task's rows, or None for what cannot be such."""
    kind = torch.float64 if task.is_regression else torch.int32
    if tensor is None or tensor.dtype != kind or tensor.dim() != 1 or not len(tensor):
        return None
    if task.is_regression:
        return tensor.numpy() if bool(torch.isfinite(tensor).all()) else None
    values: Values = tensor.numpy().astype(np.int64)
    return values if values.min() >= 0 and values.max() < task.outputs else None


def read_run(directory: Path, recorded: RecordedExperiment | None = None) -> Run:
    """Read a finished run; raise RunError when it is absent, unfinished, damaged or newer.

    `recorded` is what its experiment file says, where that was read already.
    """
    if not (directory / EXPERIMENT).is_file():
        raise RunError(f"{directory}: not a run directory", _where_runs_are(directory))
    if not os.path.lexists(directory / RESULT):
        raise RunError(
            f"{directory}: unfinished, {describe_progress(directory)}",
            "go on with `unipelt train ... --resume`, or start again with --overwrite",
        )
    result = sealed.read_object(directory / RESULT)
    schema.shaped(directory / RESULT, result, schema.Result)
    check_seal(directory / RESULT, result)
    for name in recorded_files(result):
        if name == EXPERIMENT and recorded is not None:
            check_digest(directory / name, recorded.sha256, result["files"][name])
        elif name != METRICS:
            check_file(directory / name, result["files"][name])
    header = sealed.read_header(directory / MODEL)
    environment = sealed.read_object(directory / ENVIRONMENT)
    joint = "tasks" in header
    schema.shaped(directory / MODEL, header, schema.JointHeader if joint else schema.Header)
    expected = schema.JointEnvironment if joint else schema.Environment
    schema.shaped(directory / ENVIRONMENT, environment, expected)
    recorded = recorded or read_recorded(directory / EXPERIMENT)
    return Run(directory, recorded.experiment, environment, header, result)


def read_stored(
    directory: Path,
    experiment: Experiment,
    tasks: Sequence[Task],
    trained: TunedModel,
    processes: Processes = ALONE,
) -> TunedModel:
    """Build the model that an unfinished run has just stored, read back from its file.

    Of several processes the main one reads it, for all.
    """
    return _load(directory, experiment, tasks, trained.pretrained, processes)


def _load(
    directory: Path,
    experiment: Experiment,
    tasks: Sequence[Task],
    pretrained: Pretrained,
    processes: Processes = ALONE,
) -> TunedModel:
    outputs, pairs = [task.outputs for task in tasks], [task.is_pair for task in tasks]
    make = partial(build, experiment, outputs, pretrained, folded=True, pairs=pairs)
    tuned = processes.on_each(make)
    tuned.load(processes.on_main(lambda: sealed.read_tensors(directory / MODEL, tuned.stored())))
    return tuned


def read_experiment(directory: Path) -> Experiment:
    """Read the resolved experiment of a run directory, finished or not."""
    return read_recorded(directory / EXPERIMENT).experiment


def _where_runs_are(directory: Path) -> str:
    """Return the hint for what is no run: those below it, else the nearest name beside it."""
    if below := sorted(path.parent for path in directory.glob(f"*/{RESULT}")):
        return f"it holds runs: give one of them, such as {below[0]}"
    beside = (directory.parent, Path("runs"))
    runs = (path.parent for folder in beside for path in folder.glob(f"*/{RESULT}"))
    finished = {run.name: run for run in runs}
    if close := get_close_matches(directory.name, finished, n=1):
        return f"did you mean {finished[close[0]]}? otherwise see `unipelt list runs`"
    return "give a directory that `train` wrote"


def copied(run: Run, tuned: TunedModel, *, accelerate: bool = True) -> TunedModel:
    """Build a model once more, in float32 on the CPU."""
    experiment = run.experiment.with_("train", device="cpu", precision="fp32")
    if not accelerate:
        experiment = experiment.with_("model", attention="auto")  # plain, on a CPU
    copy = build(
        experiment,
        run.task.outputs,
        tuned.pretrained,
        folded=True,
        accelerate=accelerate,
        pairs=[run.task.is_pair],
    )
    copy.load(tuned.stored())
    return copy


def without_gates(run: Run) -> RunError:
    """Return the error for a run whose method has no gates."""
    return RunError(
        f"{run.directory}: method {run.experiment.method_name!r} has no gates",
        "train a gated method, such as unipelt-apl",
    )
