"""Carry out one experiment: data, model, loop and run directory, as one stream of events."""

import resource
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from unipelt_cli import data, runs
from unipelt_cli.batches import Encoded
from unipelt_cli.config import Experiment
from unipelt_cli.data import Prepared
from unipelt_cli.errors import RunError
from unipelt_cli.evaluation import (
    compute_logits,
    encode_rows,
    has_collapsed,
    predictions,
    references,
)
from unipelt_cli.modeling import Tuned, build
from unipelt_cli.tasks import Task
from unipelt_cli.training import Epoch, Step, Training

STATE_SECONDS = 60.0
Mode = Literal["new", "resume", "overwrite"]


@dataclass(frozen=True)
class Ready:
    """Data and model are there; training starts, or goes on after `resumed_epoch`."""

    experiment: Experiment
    manifest: dict[str, Any]
    task: Task
    parameters: dict[str, int]
    epochs: int
    resumed_epoch: int = 0


@dataclass(frozen=True)
class Finished:
    """The run is finished and its directory whole."""

    directory: Path
    result: dict[str, Any]


Event = Ready | Step | Epoch | Finished


def with_drawn_rows(experiment: Experiment) -> Experiment:
    """Write what a prepared directory was drawn with into the experiment that uses it.

    Raises DataError when the experiment's own settings contradict it.
    """
    if experiment.data.prepared is None:
        return experiment
    manifest = data.prepare(experiment.data).manifest
    drawn = {key: manifest[key] for key in ("task", "k", "data_seed", "dev_size")}
    return experiment.replace("data", **drawn)


def plan(experiment: Experiment) -> tuple[Experiment, Prepared, Tuned]:
    """Prepare the data, build the model, and write what was chosen into the experiment."""
    prepared = data.prepare(experiment.data)
    tuned = build(experiment, prepared.task.outputs)
    experiment = experiment.replace("model", pooling=tuned.pooling)
    experiment = experiment.replace("train", precision=tuned.precision)
    return experiment, prepared, tuned


def execute(
    experiment: Experiment, directory: Path, mode: Mode = "new"
) -> Generator[Event, None, None]:
    """Run an experiment and write its directory; closing the iterator interrupts it resumably.

    Raises RunError for a directory that exists or belongs to another experiment.
    """
    start = time.perf_counter()
    writer = runs.Writer(directory)
    experiment = with_drawn_rows(experiment)
    resumes = mode == "resume" and (directory / runs.EXPERIMENT).is_file()
    if resumes:
        recorded = runs.read_experiment(directory)
        _same(recorded, experiment, directory)
        experiment = recorded
        if (directory / runs.RESULT).is_file():
            yield Finished(directory, runs.read(directory).result)
            return
    else:
        # Before the slow part: a directory that cannot be written fails at once.
        writer.check(overwrite=mode == "overwrite")
    experiment, prepared, tuned = plan(experiment)
    if not resumes:
        writer.create()
        writer.experiment(experiment)
    if not (directory / runs.ENVIRONMENT).is_file():
        writer.environment(tuned, prepared.manifest, runs.command_line())
    elif resumes:
        runs.check_rows(directory, prepared.manifest)
    training = _training(experiment, prepared, tuned)
    seconds_before = _restore(training, writer) if resumes else 0.0
    yield Ready(
        experiment,
        prepared.manifest,
        prepared.task,
        tuned.parameter_counts(),
        training.epochs,
        training.progress.epoch - 1,
    )
    start -= seconds_before
    yield from _loop(training, writer, start)
    yield Finished(directory, _finish(experiment, prepared, training, writer, start))


def _training(experiment: Experiment, prepared: Prepared, tuned: Tuned) -> Training:
    splits = prepared.splits
    train, dev = (
        (encode_split(tuned, prepared.task, splits[name], experiment), references(splits[name]))
        for name in ("train", "dev")
    )
    return Training(tuned, prepared.task, train, dev, experiment.train)


def encode_split(tuned: Tuned, task: Task, rows: Dataset, experiment: Experiment) -> Encoded:
    """Tokenize the text columns of a split."""
    return encode_rows(tuned, [rows[column] for column in task.text], experiment.model.max_length)


def _loop(training: Training, writer: runs.Writer, start: float) -> Iterator[Step | Epoch]:
    """Pass the loop's events on; keep its state now and then, and when it is interrupted."""
    saved = time.perf_counter()
    try:
        for event in training.events():
            if isinstance(event, Epoch):
                writer.metric("epoch", asdict(event))
                if time.perf_counter() - saved > STATE_SECONDS:
                    _save_state(training, writer, start)
                    saved = time.perf_counter()
            yield event
    except GeneratorExit:
        # Closed between two steps; anything else may have struck inside one.
        _save_state(training, writer, start)
        progress = training.progress
        writer.metric("interrupted", {"epoch": progress.epoch, "step": progress.step})
        raise


def _save_state(training: Training, writer: runs.Writer, start: float) -> None:
    tensors, counters = training.state()
    writer.state(tensors, {**counters, "seconds": time.perf_counter() - start})


def _restore(training: Training, writer: runs.Writer) -> float:
    """Take up the state of an interrupted run; return the seconds it had taken."""
    directory = writer.directory
    saved = runs.read_state(directory)
    if saved is None:
        writer.rewind(training.progress.epoch)
        return 0.0
    tensors, counters = saved
    seconds = float(counters.pop("seconds", 0.0))
    try:
        training.restore(tensors, counters)
    except (KeyError, RuntimeError, TypeError):
        raise RunError(
            f"{directory / runs.STATE}: not the state of this run", "start again with --overwrite"
        ) from None
    writer.rewind(training.progress.epoch)
    return seconds


def _finish(
    experiment: Experiment,
    prepared: Prepared,
    training: Training,
    writer: runs.Writer,
    start: float,
) -> dict[str, Any]:
    """Store the model, read it back, and score test once with what was read back."""
    task, tuned, progress = prepared.task, training.tuned, training.progress
    trained = writer.model(tuned, task, experiment.method_name)
    stored = runs.read_stored(writer.directory, experiment, task, tuned)
    writer.verify(stored, trained)
    rows = encode_split(stored, task, prepared.splits["test"], experiment)
    backbone = stored.classifier.backbone
    stored.method.report(backbone)  # drop what was measured on the probe
    predicted = predictions(task, compute_logits(stored, rows))
    counts = tuned.parameter_counts()
    data_settings = experiment.data
    result = {
        "task": task.name,
        "method": experiment.method_name,
        "backbone": experiment.model.backbone,
        "k": data_settings.k,
        "data_seed": data_settings.data_seed,
        "seed": experiment.train.seed,
        "metric": task.metric,
        "dev": progress.best_dev,
        "test": task.score(predicted, references(prepared.splits["test"])),
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch - 1,
        "seconds": round(time.perf_counter() - start, 3),
        **counts,
        "artifact_bytes": (writer.directory / runs.MODEL).stat().st_size,
        "peak_memory_bytes": _peak_memory(tuned.device),
        "tokens_per_second": round(progress.total_tokens / max(progress.total_train_seconds, 1e-9)),
        "pooling": tuned.pooling,
        "precision": tuned.precision,
        "device": tuned.device.type,
        "collapsed": has_collapsed(predicted),
    }
    if measured := stored.method.report(backbone):
        result["measured"] = measured
    writer.result(result)
    return result


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _same(there: Experiment, asked: Experiment, directory: Path) -> None:
    """Raise RunError when a directory holds another experiment; `auto` matches what it became."""
    found, wanted = there.settings(), asked.settings()
    for section, values in wanted.items():
        for key in sorted(values.keys() | found[section].keys()):
            old, new = found[section].get(key), values.get(key)
            if old != new and new != "auto":
                raise RunError(
                    f"{directory}: holds another experiment, {section}.{key} = {old!r} there, "
                    f"{new!r} here",
                    "give another --out, or replace it with --overwrite",
                )
