"""Carry out one experiment: data, model, loop and run directory, as one stream of events."""

import gc
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from unipelt_cli.config.experiment import DataSettings, Experiment
from unipelt_cli.data import preparation
from unipelt_cli.data.preparation import Prepared
from unipelt_cli.errors import ConfigError, DataError, RunError, UnipeltError
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.build import Tuned, build
from unipelt_cli.models.evaluation import (
    compute_logits,
    encode_rows,
    has_collapsed,
    predictions,
    references,
)
from unipelt_cli.runs import run
from unipelt_cli.runs.writer import Writer, command_line
from unipelt_cli.system import memory
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.tasks import joint_metric, joint_name, joint_scores
from unipelt_cli.training.loop import Course, Epoch, Halved, Happening, Training
from unipelt_cli.training.shared_passes import can_share, share
from unipelt_cli.training.shared_passes import events as events_together

STATE_SECONDS = 60.0  # how much of a long epoch a crash may cost
STATE_SHARE = 0.015  # of the time since the last time, that may go into keeping the state
Mode = Literal["new", "resume", "overwrite"]


@dataclass(frozen=True)
class Ready:
    """Data and model are there; training starts, or goes on after `resumed_epoch`."""

    experiment: Experiment
    manifests: tuple[dict[str, Any], ...]
    metric: str
    parameters: dict[str, int]
    epochs: int
    resumed_epoch: int = 0
    taken: int = 0
    """Steps that were taken before."""
    doubt: str | None = None
    """What may not fit into memory."""


@dataclass(frozen=True)
class Finished:
    """The run is finished and its directory whole."""

    directory: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A run among others ended with an error."""

    directory: Path
    error: UnipeltError


Event = Ready | Happening | Finished


class Shared:
    """Rows drawn and tokenized once for all runs of a process that read the same ones.

    It is let go with the runs it was made for: files are taken to stay as they are meanwhile.
    """

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self._prepared: dict[DataSettings, Prepared] = {}
        self._encoded: dict[tuple[Any, ...], Encoded] = {}

    def prepare(self, settings: DataSettings) -> tuple[Prepared, ...]:
        """Draw each task's rows, or take those that were drawn before."""
        if any(own not in self._prepared for own in settings.each()):
            drawn = preparation.prepare_each(settings)
            self._prepared |= zip(settings.each(), drawn, strict=True)
        found = tuple(self._prepared[own] for own in settings.each())
        _drop_oldest(self._prepared, self.most)
        return found

    def encode(self, tuned: Tuned, own: Prepared, split: str, experiment: Experiment) -> Encoded:
        """Tokenize the text columns of a split, or take what was made of them before."""
        task, limit = own.task, experiment.model.max_length
        digest = own.manifest["splits"][split]["digest"]
        key = (tuned.pretrained.fingerprint, digest, limit, *task.text)
        if key not in self._encoded:
            columns = [own.splits[split][column] for column in task.text]
            self._encoded[key] = encode_rows(tuned, columns, limit)
        found = self._encoded[key]
        _drop_oldest(self._encoded, 3 * self.most)
        return found


def _drop_oldest(kept: dict[Any, Any], most: int) -> None:
    for key in list(kept)[:-most]:
        del kept[key]


def with_drawn_rows(experiment: Experiment) -> Experiment:
    """Write what prepared directories were drawn with into the experiment that uses them.

    Raises DataError when the experiment's own settings contradict it.
    """
    if experiment.data.prepared is None:
        return experiment
    manifests = preparation.read_drawn(experiment.data)
    drawn = {key: manifests[0][key] for key in ("task", "k", "data_seed", "dev_size")}
    if len(manifests) > 1:
        del drawn["task"]
        drawn["tasks"] = tuple(manifest["task"] for manifest in manifests)
    return experiment.replace("data", **drawn)


def plan(
    experiment: Experiment, shared: Shared | None = None
) -> tuple[Experiment, tuple[Prepared, ...], Tuned]:
    """Prepare each task's data, build the model, and write what was chosen into the experiment."""
    prepared = (shared or Shared()).prepare(experiment.data)
    tuned = build(experiment, [own.task.outputs for own in prepared])
    experiment = experiment.replace("model", pooling=tuned.pooling)
    experiment = experiment.replace("train", precision=tuned.precision)
    return experiment, prepared, tuned


def execute(
    experiment: Experiment,
    directory: Path,
    mode: Mode = "new",
    processes: Processes = ALONE,
) -> Generator[Event, None, None]:
    """Run an experiment and write its directory; closing the iterator interrupts it resumably.

    Several processes see the same events; the main one writes, and what it cannot is raised in all.
    Raises RunError for a directory that exists or belongs to another experiment.
    """
    session = _Session(experiment, directory, mode, processes)
    with closing(session.writer):
        session.check()
        opened = session.open()
        yield opened
        if isinstance(opened, Finished):
            return
        try:
            for event in session.training.events():
                session.keep(event)
                yield event
        except GeneratorExit:
            # Closed between two steps; anything else may have struck inside one.
            session.interrupt()
            raise
        yield session.finish()


def execute_together(
    experiments: Sequence[Experiment],
    directories: Sequence[Path],
    mode: Mode = "new",
    processes: Processes = ALONE,
    shared: Shared | None = None,
) -> Generator[tuple[int, Event | Failed], None, None]:
    """Run experiments that differ in seeds alone, in one pass each step where the method can.

    Each writes its own directory, as if it had run alone; yields its place with each event. A run
    that fails does not stop the others. Closing the iterator interrupts all of them resumably.
    """
    shared = shared or Shared()
    given = zip(experiments, directories, strict=True)
    waiting = [
        _Session(experiment, directory, mode, processes, shared) for experiment, directory in given
    ]
    with ExitStack() as stack:
        for session in waiting:
            stack.callback(session.writer.close)
            session.check()
        del session  # each is let go with its model when it is over
        yield from _train_all(waiting)


def _train_all(
    waiting: list["_Session"],
) -> Generator[tuple[int, Event | Failed], None, None]:
    """Open the sessions, and train together those that can share a pass."""
    places = iter(range(len(waiting)))
    while waiting:
        group: dict[int, _Session] = {}
        while waiting and (not group or can_share(next(iter(group.values())).tuned)):
            place, session = next(places), waiting.pop(0)
            try:
                opened = session.open(next(iter(group.values())).tuned if group else None)
            except UnipeltError as error:
                if place == 0:
                    raise  # it is likely that none can begin
                yield place, Failed(session.writer.directory, error)
                continue
            yield place, opened
            if not isinstance(opened, Finished):
                group[place] = session
        del session
        yield from _train_group(group)
        group.clear()
        gc.collect()  # models are cycles, and the next one may need the room


def _train_group(
    group: dict[int, "_Session"],
) -> Generator[tuple[int, Event | Failed], None, None]:
    """Train opened sessions to their end, taking each out of the group that is over."""
    loops = {place: session.training for place, session in group.items()}
    for session in group.values():
        session.together = len(group)
    try:
        for place, event in events_together(loops):
            session = group[place]
            directory = session.writer.directory
            if isinstance(event, Happening):
                session.keep(event)
                yield place, event
                continue
            del group[place]
            try:
                if event is not None:
                    raise event
                ended: Finished | Failed = session.finish()
            except UnipeltError as error:
                ended = Failed(directory, error)
            yield place, ended
    except GeneratorExit:
        for session in group.values():
            session.interrupt()
        raise


class _Session:
    """One run from its checks to its result; of several processes, the main one alone writes it."""

    def __init__(
        self,
        experiment: Experiment,
        directory: Path,
        mode: Mode,
        processes: Processes = ALONE,
        shared: Shared | None = None,
    ) -> None:
        self.writer, self.mode, self.shared = Writer(directory), mode, shared or Shared()
        self.processes = processes
        self.experiment = with_drawn_rows(experiment)
        self.resumes = False
        self.save_seconds = 0.0
        self.together = 1  # runs that shared its passes

    def check(self) -> None:
        """Raise before the slow part for a directory that cannot be written or is another's."""
        self.resumes, self.experiment = self.processes.main(self._check)

    def _check(self) -> tuple[bool, Experiment]:
        directory = self.writer.directory
        if self.mode != "resume" or not (directory / run.EXPERIMENT).is_file():
            self.writer.check(overwrite=self.mode == "overwrite")
            return False, self.experiment
        self.writer.claim()
        self.writer.sweep()
        recorded = run.read_experiment(directory)
        _same(recorded, self.experiment, directory)
        return True, recorded

    def open(self, other: Tuned | None = None) -> Ready | Finished:
        """After `check`, make data, model and loop ready; the backbone may be another run's."""
        self.start = self.saved = time.perf_counter()
        processes, directory = self.processes, self.writer.directory
        result = processes.main(self._result) if self.resumes else None
        if result is not None:
            return Finished(directory, result)
        self.experiment, self.prepared, self.tuned = processes.each(
            lambda: plan(self.experiment, self.shared)
        )
        if other is not None:
            share(other, self.tuned)
        processes.main(self._begin)
        self.training = processes.each(self._loop)
        self.start -= _restore(self.training, self.writer) if self.resumes else 0.0
        return Ready(
            self.experiment,
            tuple(own.manifest for own in self.prepared),
            joint_metric(self.training.tasks),
            self.tuned.parameter_counts(),
            self.training.epochs,
            self.training.progress.epoch - 1,
            self.training.progress.taken,
            _doubt(self.training),
        )

    def _result(self) -> dict[str, Any] | None:
        """Return the result of a run that is finished already; its rows must still be the same.

        Raises DataError where they are at hand, and are others: it would be another run's result.
        """
        directory, settings = self.writer.directory, self.experiment.data
        if not (directory / run.RESULT).is_file():
            return None
        found = run.read(directory)
        if settings.source == "hub" or settings.dataset is not None:
            return found.result
        try:
            prepared = self.shared.prepare(settings)
        except UnipeltError:  # no longer there: the result is all that is left of them
            return found.result
        for place, own in enumerate(prepared):
            for split, said in own.manifest["splits"].items():
                if said["digest"] != found.digest_of(split, place):
                    raise DataError(
                        f"{directory}: its {split} rows have changed since it was trained",
                        "train on these with --overwrite, or into another --out",
                    )
        return found.result

    def _begin(self) -> None:
        """Write what the run is and started on, or check that it is still so."""
        writer, directory = self.writer, self.writer.directory
        if not self.resumes:
            writer.create(overwrite=self.mode == "overwrite")
            writer.experiment(self.experiment)
        manifest = preparation.joint_manifest(self.prepared)
        if not (directory / run.ENVIRONMENT).is_file():
            writer.environment(self.tuned, manifest, command_line(), self.processes.count)
        elif self.resumes:
            run.check_started(directory, self.tuned, manifest)

    def _loop(self) -> Training:
        if self.processes.are_several and self.tuned.device.type == "mps":
            raise ConfigError(
                "train.device = 'mps': its tensors cannot go from process to process",
                "train in one process, or give --device cpu",
            )
        given = (self.experiment, self.prepared, self.tuned, self.shared, self.processes)
        return loop_of(*given)

    def keep(self, event: Happening) -> None:
        """Log an epoch, and save what a killed loop goes on from.

        That is every epoch, and now and then in a long one. Where saving would take more than its
        share of the time, it waits until it does not: a crash costs seconds then as well.
        """
        if not isinstance(event, Halved):  # in the middle of a step
            self.processes.main(lambda: self._keep(event))

    def _keep(self, event: Happening) -> None:
        is_epoch = isinstance(event, Epoch)
        if is_epoch:
            self.writer.metric("epoch", asdict(event))
        since = time.perf_counter() - self.saved
        if since > max(self.save_seconds / STATE_SHARE, 0.0 if is_epoch else STATE_SECONDS):
            self._save()

    def interrupt(self) -> None:
        """Keep the state between two steps."""
        self.processes.main(self._interrupt)

    def _interrupt(self) -> None:
        self._save()
        progress = self.training.progress
        self.writer.metric("interrupted", {"epoch": progress.epoch, "step": progress.step})

    def finish(self) -> Finished:
        """Store the model, score test, and write the result."""
        given = (self.experiment, self.prepared, self.training, self.writer, self.shared)
        result = _finish(*given, start=self.start, together=self.together)
        finished = Finished(self.writer.directory, result)
        self.writer.close()
        return finished

    def _save(self) -> None:
        start = time.perf_counter()
        tensors, counters = self.training.state()
        self.writer.state(tensors, counters, start - self.start)
        self.saved = time.perf_counter()
        self.save_seconds = self.saved - start


def loop_of(
    experiment: Experiment,
    prepared: Sequence[Prepared],
    tuned: Tuned,
    shared: Shared,
    processes: Processes = ALONE,
) -> Training:
    """Make the loop over what `plan` returned."""
    courses = []
    for own in prepared:
        train, dev = (
            (shared.encode(tuned, own, split, experiment), references(own.splits[split]))
            for split in ("train", "dev")
        )
        courses.append(Course(own.task, train, dev))
    first, *more = courses
    given = (tuned, first.task, first.train, first.dev, experiment.train)
    return Training(*given, more, processes)


def _doubt(training: Training) -> str | None:
    """Say where the longest rows may not fit into memory as one batch."""
    tuned = training.tuned
    batch = longest_batch(training)
    return memory.doubt(*batch, tuned.classifier.backbone.config, tuned.device)


def longest_batch(training: Training) -> tuple[int, int]:
    """Return the rows and the tokens a row of the longest batch that there can be."""
    lengths = max((course.train[0].lengths for course in training.courses), key=max)
    return min(training.settings.batch_size, len(lengths)), int(max(lengths))


def _restore(training: Training, writer: Writer) -> float:
    """Take up the state of an interrupted run; return the seconds it had taken."""
    directory, processes = writer.directory, training.processes
    saved = processes.main(lambda: run.read_state(directory))
    header: dict[str, Any] = {"seconds": 0.0}
    if saved is not None:
        tensors, header = saved
        try:
            training.restore(tensors, header["counters"])
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise RunError(
                f"{directory / run.STATE}: not the state of this run",
                "start again with --overwrite",
            ) from None
    processes.main(lambda: writer.rewind(training.progress.epoch))
    return float(header["seconds"])


def _finish(
    experiment: Experiment,
    prepared: Sequence[Prepared],
    training: Training,
    writer: Writer,
    shared: Shared,
    *,
    start: float,
    together: int,
) -> dict[str, Any]:
    """Store the model, read it back, and score test once with what was read back."""
    tasks, tuned, progress = training.tasks, training.tuned, training.progress
    processes = training.processes
    trained = processes.main(lambda: writer.model(tuned, tasks, experiment.method_name))
    stored = run.read_stored(writer.directory, experiment, tasks, tuned, processes)
    processes.main(lambda: writer.verify(stored, trained))
    backbone = stored.classifier.backbone
    stored.method.report(backbone)  # drop what was measured on the probe
    expected = [references(own.splits["test"]) for own in prepared]
    predicted = []
    for place, own in enumerate(prepared):
        rows = shared.encode(stored, own, "test", experiment)
        predicted.append(predictions(own.task, compute_logits(stored, rows, place, processes)))
    scores = [
        own.task.score(*answers)
        for own, *answers in zip(prepared, predicted, expected, strict=True)
    ]
    processes.main(lambda: writer.predictions(predicted, expected))
    measured = _mean(processes.gather(stored.method.report(backbone)))
    counts = tuned.parameter_counts()
    data_settings = experiment.data
    result = {
        "task": joint_name(tasks),
        "method": experiment.method_name,
        "backbone": experiment.model.backbone,
        "k": data_settings.k,
        "data_seed": data_settings.data_seed,
        "seed": experiment.train.seed,
        "metric": joint_metric(tasks),
        "dev": progress.best_dev,
        "test": joint_scores(tasks, scores),
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch - 1,
        "seconds": round(time.perf_counter() - start, 3),
        **counts,
        "artifact_bytes": processes.main((writer.directory / run.MODEL).stat).st_size,
        "peak_memory_bytes": memory.peak(tuned.device),
        "tokens_per_second": round(progress.total_tokens / max(progress.total_train_seconds, 1e-9)),
        "pooling": tuned.pooling,
        "precision": tuned.precision,
        "device": tuned.device.type,
        "together": together,
        "processes": processes.count,
        "micro_batch_size": progress.micro_batch_size or experiment.train.batch_size,
        "collapsed": any(map(has_collapsed, predicted)),
    }
    if measured:
        result["measured"] = measured
    return processes.main(lambda: writer.result(result))


def _mean(reports: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of what each process measured on its equal share of the rows."""
    return {name: fmean(own[name] for own in reports if name in own) for name in reports[0]}


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
