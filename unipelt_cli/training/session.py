"""One run from its checks to its result: opened, kept, interrupted or finished."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.recorded import read_recorded
from unipelt_cli.data import preparation
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import BackboneError, ConfigError, DataError, RunError, UnipeltError
from unipelt_cli.metrics import Values, compare_with_mean
from unipelt_cli.models.evaluation import compute_logits, has_collapsed, predictions, references
from unipelt_cli.models.sharing import share
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.checks import as_started, check_same, check_started
from unipelt_cli.runs.names import ENVIRONMENT, EXPERIMENT, MODEL, RESULT, STATE
from unipelt_cli.runs.out_of_fold import OutOfFold, describe_score, read_folds
from unipelt_cli.runs.probe import EXACT, probe, units_of
from unipelt_cli.runs.progress import read_state
from unipelt_cli.runs.run import read_run, read_stored
from unipelt_cli.runs.writer import Writer, command_line
from unipelt_cli.system import memory
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.tasks import Task, joint_metric, joint_name, joint_positive, joint_scores
from unipelt_cli.training.events import BatchHalved, Epoch, Finished, Ready, TrainingEvent
from unipelt_cli.training.floor import beside
from unipelt_cli.training.loop import Training
from unipelt_cli.training.planning import RowCache, doubt, loop_of, plan, with_drawn_rows
from unipelt_cli.training.text_notes import text_notes

STATE_SECONDS = 60.0  # how much of a long epoch a crash may cost
STATE_SHARE = 0.015  # of the time since the last time, that may go into keeping the state
Mode = Literal["new", "resume", "overwrite"]


class Session:
    """One run from its checks to its result; of several processes, the main one alone writes it."""

    def __init__(
        self,
        experiment: Experiment,
        directory: Path,
        mode: Mode,
        processes: Processes = ALONE,
        shared: RowCache | None = None,
    ) -> None:
        self.writer, self.mode, self.shared = Writer(directory), mode, shared or RowCache()
        self.processes = processes
        self.experiment = with_drawn_rows(experiment)
        self.resumes = False
        self.save_seconds = 0.0
        self.together = 1  # runs that shared its passes
        self.out_of_fold: OutOfFold | None = None

    def check(self) -> None:
        """Raise before the slow part for a directory that cannot be written or is another's."""
        self.resumes, self.experiment = self.processes.on_main(self._check)

    def _check(self) -> tuple[bool, Experiment]:
        directory = self.writer.directory
        if self.mode != "resume" or not (directory / EXPERIMENT).is_file():
            self.writer.check(overwrite=self.mode == "overwrite")
            return False, self.experiment
        self.writer.claim()
        self.writer.clean_up()
        recorded = read_recorded(directory / EXPERIMENT)
        check_same(recorded, self.experiment, directory)
        return True, as_started(recorded.experiment, directory)

    def open(self, other: TunedModel | None = None) -> Ready | Finished:
        """After `check`, make data, model and loop ready; the backbone may be another run's."""
        self.start = self.saved = time.perf_counter()
        processes, directory = self.processes, self.writer.directory
        result = processes.on_main(self._result) if self.resumes else None
        if result is not None:
            return Finished(directory, result)
        self.experiment, self.prepared, self.tuned = processes.on_each(
            lambda: plan(self.experiment, self.shared)
        )
        if other is not None:
            share(other, self.tuned)
        processes.on_main(self._begin)
        self.training = processes.on_each(self._loop)
        self.start -= _restore(self.training, self.writer) if self.resumes else 0.0
        return Ready(
            self.experiment,
            tuple(dataset.manifest for dataset in self.prepared),
            joint_metric(self.training.tasks),
            self.tuned.parameter_counts(),
            self.training.epochs,
            self.training.progress.epoch - 1,
            self.training.progress.taken,
            doubt(self.training),
            (
                *self.tuned.notes,
                *text_notes(self.experiment, self.prepared, self.tuned, self.training),
            ),
        )

    def _result(self) -> Mapping[str, Any] | None:
        """Return the result of a run that is finished already; its rows must still be the same.

        Raises DataError where they are at hand, and are others: it would be another run's result.
        """
        directory, settings = self.writer.directory, self.experiment.data
        if not (directory / RESULT).is_file():
            return None
        run = read_run(directory)
        if settings.source == "hub" or settings.dataset is not None:
            return run.result
        try:
            is_one = len(settings.each()) == 1
            prepared = self.shared.prepare(run.data_settings() if is_one else settings)
        except UnipeltError:  # no longer there: the result is all that is left of them
            return run.result
        for task_index, dataset in enumerate(prepared):
            for split, record in dataset.manifest["splits"].items():
                is_known = split in run.splits
                if not is_known or record["digest"] != run.digest_of(split, task_index):
                    raise DataError(
                        f"{directory}: its {split} rows have changed since it was trained",
                        "train on these with --overwrite, or into another --out",
                    )
        return run.result

    def _begin(self) -> None:
        """Write what the run is and started on, or check that it is still so."""
        writer, directory = self.writer, self.writer.directory
        if not self.resumes:
            writer.create(overwrite=self.mode == "overwrite")
            writer.experiment(self.experiment)
        manifest = preparation.joint_manifest(self.prepared)
        if not (directory / ENVIRONMENT).is_file():
            writer.environment(self.tuned, manifest, command_line(), self.processes.count)
        elif self.resumes:
            check_started(directory, self.tuned, manifest)

    def _loop(self) -> Training:
        if self.processes.are_several and self.tuned.device.type == "mps":
            raise ConfigError(
                "train.device = 'mps': its tensors cannot go from process to process",
                "train in one process, or give --device cpu",
            )
        return loop_of(self.experiment, self.prepared, self.tuned, self.shared, self.processes)

    def take_folds(self) -> None:
        """Take the predictions of the folds, all of which are finished: they are the test."""
        directory, (prepared,) = self.writer.directory, self.prepared
        self.out_of_fold = self.processes.on_main(lambda: read_folds(directory, prepared))

    def keep(self, event: TrainingEvent) -> None:
        """Log an epoch, and save what a killed loop goes on from.

        That is every epoch, and now and then in a long one. Where saving would take more than its
        share of the time, it waits until it does not: a crash costs seconds then as well.
        """
        if not isinstance(event, BatchHalved):  # in the middle of a step
            self.processes.on_main(lambda: self._keep(event))

    def _keep(self, event: TrainingEvent) -> None:
        is_epoch = isinstance(event, Epoch)
        if is_epoch:
            self.writer.metric("epoch", asdict(event))
        since = time.perf_counter() - self.saved
        if since > max(self.save_seconds / STATE_SHARE, 0.0 if is_epoch else STATE_SECONDS):
            self._save()

    def interrupt(self) -> None:
        """Keep the state between two steps."""
        self.processes.on_main(self._interrupt)

    def _interrupt(self) -> None:
        self._save()
        progress = self.training.progress
        self.writer.metric("interrupted", {"epoch": progress.epoch, "step": progress.step})

    def finish(self) -> Finished:
        """Store the model, score test unless folds did, and write the result."""
        finished = Finished(self.writer.directory, _finish(self))
        self.writer.close()
        return finished

    def _save(self) -> None:
        start = time.perf_counter()
        tensors, counters = self.training.state()
        self.writer.state(tensors, counters, start - self.start)
        self.saved = time.perf_counter()
        self.save_seconds = self.saved - start


def _restore(training: Training, writer: Writer) -> float:
    """Take up the state of an interrupted run; return the seconds it had taken."""
    directory, processes = writer.directory, training.processes
    saved = processes.on_main(lambda: read_state(directory))
    header: Mapping[str, Any] = {"seconds": 0.0}
    if saved is not None:
        tensors, header = saved
        try:
            training.restore(tensors, header["counters"])
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise RunError(
                f"{directory / STATE}: not the state of this run",
                "start again with --overwrite",
            ) from None
    processes.on_main(lambda: writer.rewind(training.progress.epoch))
    return float(header["seconds"])


def _finish(session: Session) -> Mapping[str, Any]:
    """Store the model, read it back, and score test once with what was read back."""
    experiment, prepared, writer = session.experiment, session.prepared, session.writer
    training, out_of_fold = session.training, session.out_of_fold
    tasks, tuned, processes = training.tasks, training.tuned, training.processes
    scales = [course.scale for course in training.courses]
    trained = processes.on_main(lambda: writer.model(tuned, tasks, scales, experiment.method_name))
    exact = processes.on_main(lambda: _exact_probe(writer.directory, experiment, tasks, tuned))
    stored = read_stored(writer.directory, experiment, tasks, tuned, processes)
    units = units_of(tasks, scales)
    processes.on_main(lambda: writer.verify(stored, trained, units, exact))
    backbone = stored.classifier.backbone
    stored.method.report(backbone)  # drop what was measured on the probe
    if out_of_fold is not None:
        predicted, expected = [out_of_fold.predicted], [out_of_fold.expected]
    else:
        predicted, expected = _answers(experiment, prepared, stored, session.shared, processes)
    scores = [
        dataset.task.score(*answers)
        for dataset, *answers in zip(prepared, predicted, expected, strict=True)
    ]
    split = "test" if out_of_fold is None else "train"
    processes.on_main(lambda: writer.predictions(predicted, expected, split))
    measured = _mean(processes.gather(stored.method.report(backbone)))
    result = {
        **_describe(experiment, tasks),
        "dev": training.progress.best_dev,
        "test": joint_scores(tasks, scores),
        **_costs(training, writer, session.start),
        "together": session.together,
        "processes": processes.count,
        "micro_batch_size": training.progress.micro_batch_size or experiment.train.batch_size,
        "collapsed": any(
            has_collapsed(values, scale.unit)
            for values, scale in zip(predicted, scales, strict=True)
        ),
        **_against_mean(prepared, predicted, expected),
        "selection": "schedule" if training.dev is None else "dev",
        "head_end": training.head_end,
        "tested_on": "test" if out_of_fold is None else "folds",
        **describe_score(tasks, predicted, expected, out_of_fold),
    }
    if measured:
        result["measured"] = measured
    result |= processes.on_main(
        lambda: beside(experiment, prepared, tuned.pretrained, session.shared)
    )
    return processes.on_main(lambda: writer.result(result))


def _answers(
    experiment: Experiment,
    prepared: Sequence[Prepared],
    stored: TunedModel,
    shared: RowCache,
    processes: Processes,
) -> tuple[list[Values], list[Values]]:
    """Return each task's predictions and references on test."""
    expected = [references(dataset.splits["test"]) for dataset in prepared]
    encoded = [shared.encode(stored, dataset, "test", experiment) for dataset in prepared]
    predicted = [
        predictions(dataset.task, compute_logits(stored, rows, task_index, processes))
        for task_index, (dataset, rows) in enumerate(zip(prepared, encoded, strict=True))
    ]
    return predicted, expected


def _exact_probe(
    directory: Path, experiment: Experiment, tasks: Sequence[Task], trained: TunedModel
) -> Tensor | None:
    """Return the probe logits in fp32 of what a run in bf16 has just stored; None for one in fp32.

    Frozen tensors that were rounded cannot be had back from the trained model: it is built again.
    Where that copy does not fit into memory there are none: no run is lost for them.
    """
    if trained.precision == EXACT:
        return None
    experiment = experiment.with_("train", precision=EXACT)
    try:
        return torch.from_numpy(probe(read_stored(directory, experiment, tasks, trained)))
    except BackboneError:
        return None
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        return None


def _against_mean(
    prepared: Sequence[Prepared], predicted: Sequence[Values], expected: Sequence[Values]
) -> Mapping[str, Any]:
    """Return by task how a regression's error on test compares with that of the train mean."""
    by_task = {
        dataset.task.name: compare_with_mean(values, true, _train_mean(dataset.manifest))
        for dataset, values, true in zip(prepared, predicted, expected, strict=True)
        if dataset.task.is_regression
    }
    return {"against_mean": by_task} if by_task else {}


def _train_mean(manifest: Mapping[str, Any]) -> float:
    return float(manifest["splits"]["train"]["labels"]["mean"])


def _describe(experiment: Experiment, tasks: Sequence[Task]) -> Mapping[str, Any]:
    """Return what a result says of the experiment that it is of."""
    return {
        "task": joint_name(tasks),
        "method": experiment.method_name,
        "backbone": experiment.model.backbone,
        "k": experiment.data.k,
        "data_seed": experiment.data.data_seed,
        "seed": experiment.train.seed,
        "metric": joint_metric(tasks),
        **joint_positive(tasks),
    }


def _costs(training: Training, writer: Writer, start: float) -> Mapping[str, Any]:
    """Return what training took, and what the model takes to keep and to run."""
    tuned, progress = training.tuned, training.progress
    stored = training.processes.on_main((writer.directory / MODEL).stat)
    return {
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch - 1,
        "seconds": round(time.perf_counter() - start, 3),
        **tuned.parameter_counts(),
        "artifact_bytes": stored.st_size,
        "peak_memory_bytes": memory.peak(tuned.device),
        "tokens_per_second": round(progress.total_tokens / max(progress.total_train_seconds, 1e-9)),
        "pooling": tuned.pooling,
        "precision": tuned.precision,
        "device": tuned.device.type,
    }


def _mean(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of what each process measured on its equal share of the rows."""
    names = reports[0]
    return {name: fmean(report[name] for report in reports if name in report) for name in names}
