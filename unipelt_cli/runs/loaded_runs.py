"""Finished runs, loaded to label rows: what the command and other people's programs both use.

Several runs on one backbone hold its frozen tensors once, and those of one method send their rows
through it in one pass. What is said of a row depends on no other row, save for the rounding of the
precision: in bf16 the rows of its batch may move a logit by a thousandth of the logits' range.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from unipelt_cli.backbones import pretrained
from unipelt_cli.errors import ConfigError, RunError
from unipelt_cli.models import evaluation, sharing
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import Gates, Logits
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.opening import open_run
from unipelt_cli.runs.row_windows import Row, columns_without_names, windows_of_rows
from unipelt_cli.runs.run import Run, without_gates
from unipelt_cli.system import memory, network
from unipelt_cli.tasks import Task

Columns = Mapping[str, Sequence[str]]
_TURN = threading.Lock()  # the number of torch's threads, which a pass sets, is the process's


def _take_no_turn() -> None:
    """In a forked process, forget a pass that only the parent will end."""
    global _TURN
    _TURN = threading.Lock()


if hasattr(os, "register_at_fork"):  # not where processes cannot fork
    os.register_at_fork(after_in_child=_take_no_turn)


@dataclass(frozen=True)
class Prediction:
    """What a run says of a row: its label and all labels' probabilities; in regression a value."""

    label: str | None = None
    probabilities: Mapping[str, float] | None = None
    value: float | None = None

    def as_json(self) -> Mapping[str, object]:
        """Return the object that `unipelt predict` prints for a row."""
        if self.label is None:
            return {"value": self.value}
        return {"label": self.label, "probabilities": self.probabilities}


class LoadedRun:
    """A finished run in memory. Threads may share it: their calls take turns."""

    def __init__(self, run: Run, tuned: TunedModel, task_index: int = 0) -> None:
        self.run, self.tuned, self.task_index = run, tuned, task_index

    @property
    def task(self) -> Task:
        """The task whose rows are labelled: its name, text columns, labels and metric."""
        return self.run.tasks[self.task_index]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the logits; () in regression."""
        return self.task.labels

    @property
    def nothing(self) -> Mapping[str, object]:
        """What `unipelt predict` prints for a row that cannot be answered."""
        keys = ("value",) if self.task.is_regression else ("label", "probabilities")
        return dict.fromkeys(keys)

    def predict(self, rows: Iterable[Row]) -> list[Prediction]:
        """Label rows, in their order: texts, pairs of texts, or mappings with the run's columns.

        Raises DataError, which names the row by its place, for one that is none of these.
        """
        windows = windows_of_rows(rows, [self.task])
        return [prediction for columns in windows for [prediction] in _predictions([self], columns)]

    def logits(self, rows: Iterable[Row]) -> Logits:
        """Return the float32 logits (rows, labels), in regression (rows, 1); see `predict`."""
        windows = [_logits([self], columns)[0] for columns in windows_of_rows(rows, [self.task])]
        return np.concatenate([np.zeros((0, self.task.outputs), np.float32), *windows])

    def gates(self, rows: Iterable[Row]) -> Gates:
        """Return how far each gate opens: by layer, {submodule: (rows,) from 0 to 1}.

        Raises RunError for a method without gates; see `predict`.
        """
        texts: list[list[str]] = [[] for _ in self.task.text]
        for columns in windows_of_rows(rows, [self.task]):
            for texts_of_column, column in zip(texts, self.task.text, strict=True):
                texts_of_column += columns[column]
        if not texts[0]:
            return []
        with _TURN:
            encoded = self._encode(dict(zip(self.task.text, texts, strict=True)))
            _, gates = evaluation.compute_with_gates(self.tuned, encoded, self.task_index)
        if not gates:
            raise without_gates(self.run)
        return gates

    @property
    def _reading(self) -> tuple[object, ...]:
        """What decides, beside the rows and the backbone, which tokens are read."""
        length = self.run.experiment.model.max_length
        return self.task.text, length, self.tuned.method.pads_to_max_length, self.tuned.pairs

    def _encode(self, columns: Columns) -> Encoded:
        texts = [columns[column] for column in self.task.text]
        return evaluation.encode_rows(self.tuned, texts, self.run.experiment.model.max_length)


class LoadedRuns(Mapping[str, LoadedRun]):
    """Several finished runs over one backbone, by name; the order is that in which they came."""

    def __init__(self, loaded: Mapping[str, LoadedRun]) -> None:
        self._loaded = dict(loaded)

    def __getitem__(self, name: str) -> LoadedRun:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def columns(self) -> list[str]:
        """The text columns that any of the runs reads."""
        texts = (loaded_run.task.text for loaded_run in self.values())
        return list(dict.fromkeys(chain.from_iterable(texts)))

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The text columns that each of the runs reads."""
        return [loaded_run.task.text for loaded_run in self.values()]

    @property
    def plain(self) -> list[list[str]]:
        """The columns that each text of a row without names fills; [] where none can say."""
        return columns_without_names([loaded_run.task for loaded_run in self.values()])

    def predict(self, rows: Iterable[Row]) -> list[dict[str, Prediction]]:
        """Label rows by every run, which takes its own columns of them; see `LoadedRun.predict`."""
        windows = windows_of_rows(rows, [loaded_run.task for loaded_run in self.values()])
        return [each for columns in windows for each in self.predict_columns(columns)]

    def predict_columns(self, columns: Columns) -> Iterator[dict[str, Prediction]]:
        """Label rows that are checked already, given by column; tokens of all are held at once."""
        if not next(iter(columns.values())):
            return
        for predictions in _predictions(list(self.values()), columns):
            yield dict(zip(self, predictions, strict=True))


def load_run(
    path: str | Path,
    *,
    task: str | None = None,
    device: str | None = None,
    model: str | Path | None = None,
    precision: str | None = None,
    offline: bool = False,
) -> LoadedRun:
    """Load a finished run: `task` is one of several, `model` where its backbone is now.

    `precision` is fp32 or bf16, the run's own unless it is given.

    The network is used for what is on the hub and not in the local cache, a run (hub:OWNER/NAME) or
    its backbone, and for nothing else; with `offline` not even for that. Raises UnipeltError, in
    two sentences, for what cannot be.
    """
    (loaded,) = load_runs(
        [path], task=task, device=device, model=model, precision=precision, offline=offline
    ).values()
    return loaded


def load_runs(
    paths: Sequence[str | Path],
    *,
    task: str | None = None,
    device: str | None = None,
    model: str | Path | None = None,
    precision: str | None = None,
    offline: bool = False,
) -> LoadedRuns:
    """Load several runs on one backbone, whose frozen tensors they share; see `load_run`.

    They are called by their directories, or as they were given where two are called alike.
    """
    if not paths:
        raise ConfigError("load_runs: no run was given", "give the directories of some")
    backbone = None if model is None else str(model)
    runs: dict[str, Run] = {}
    for name, path in named(paths).items():
        runs[name] = open_run(
            path, offline=offline, model=backbone, needs_rows=False, is_guest=True
        )
        backbone = backbone or runs[name].experiment.model.backbone
    assert backbone is not None
    if network.names_hub(backbone):
        backbone = str(pretrained.cached(backbone) or backbone)
    return load(runs, task, device, backbone, precision)


def named(paths: Sequence[str | Path]) -> dict[str, str | Path]:
    """Name runs by their directories, or by their whole paths where two are called alike."""
    names = [Path(path).resolve().name for path in paths]
    answer: dict[str, str | Path] = {}
    for name, path in zip(names, paths, strict=True):
        label = name if names.count(name) == 1 else str(path)
        if label in answer:
            raise ConfigError(f"--run {path}: given twice", "give each run once")
        answer[label] = path
    return answer


def load(
    runs: Mapping[str, Run],
    task: str | None = None,
    device: str | None = None,
    model: str | None = None,
    precision: str | None = None,
) -> LoadedRuns:
    """Build runs that were read, the frozen tensors of their backbone held once.

    Raises RunError for runs on different backbones, beside what `Run.build` raises.
    """
    first = next(iter(runs.values()))
    for run in runs.values():
        backbone, other = run.environment["backbone"], first.environment["backbone"]
        if backbone["fingerprint"] != other["fingerprint"]:
            raise RunError(
                f"{run.directory}: trained on the backbone {backbone['name']}, and "
                f"{first.directory} on {other['name']} (or other files of it)",
                "ask runs on one backbone together, and the others by themselves",
            )
    loaded: dict[str, LoadedRun] = {}
    for name, run in runs.items():
        task_index = run.task_index(task if len(runs) == 1 or len(run.tasks) > 1 else None)
        tuned = run.build(device, model, precision)
        earlier = [loaded_run.tuned for loaded_run in loaded.values()]
        if earlier:
            sharing.hold_once(earlier, tuned)
            tuned = replace(tuned, tokenizer=earlier[0].tokenizer)
            memory.release()
        loaded[name] = LoadedRun(run, tuned, task_index)
    return LoadedRuns(loaded)


def _predictions(loaded: Sequence[LoadedRun], columns: Columns) -> Iterator[list[Prediction]]:
    """Yield what each run says of each row."""
    each = _logits(loaded, columns)
    pairs = zip(loaded, each, strict=True)
    by_run = [_predictions_of(loaded_run.task, logits) for loaded_run, logits in pairs]
    for row in zip(*by_run, strict=True):
        yield list(row)


def _predictions_of(task: Task, logits: Logits) -> list[Prediction]:
    predicted = evaluation.predictions(task, logits).tolist()
    if task.is_regression:
        return [Prediction(value=value) for value in predicted]
    shares = evaluation.probabilities(logits).tolist()
    return [
        Prediction(task.labels[index], dict(zip(task.labels, row_shares, strict=True)))
        for index, row_shares in zip(predicted, shares, strict=True)
    ]


def _logits(loaded: Sequence[LoadedRun], columns: Columns) -> list[Logits]:
    """Return each run's logits: tokens are made once, and passes shared where they can be."""
    encoded: dict[tuple[object, ...], Encoded] = {}
    answer: dict[int, Logits] = {}
    with _TURN:
        for group in _groups(loaded):
            first = loaded[group[0]]
            if first._reading not in encoded:
                encoded[first._reading] = first._encode(columns)
            rows = encoded[first._reading]
            if len(group) == 1:
                answer[group[0]] = evaluation.compute_logits(first.tuned, rows, first.task_index)
                continue
            members = [loaded[index] for index in group]
            for member, index in zip(members, group, strict=True):
                member.tuned.classifier.eval().select(member.task_index)
                answer[index] = np.zeros((len(rows), member.task.outputs), np.float32)
            compute = partial(sharing.answer, [member.tuned for member in members])
            group_logits = [answer[index] for index in group]
            evaluation.fill(group_logits, compute, first.tuned, rows, np.arange(len(rows)))
    return [answer[index] for index in range(len(loaded))]


def _groups(loaded: Sequence[LoadedRun]) -> list[list[int]]:
    """Return the places of runs that share passes, group by group."""
    groups: list[list[int]] = []
    for index, member in enumerate(loaded):
        for group in groups:
            first = loaded[group[0]]
            if first._reading == member._reading and sharing.can_join(first.tuned, member.tuned):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups
