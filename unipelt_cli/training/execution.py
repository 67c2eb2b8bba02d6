"""Carry out one experiment, or several together, as one stream of events."""

import gc
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.errors import UnipeltError
from unipelt_cli.models.sharing import can_share
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.out_of_fold import fold_experiments
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.training.events import Event, Failed, Finished, Folded, TrainingEvent
from unipelt_cli.training.planning import RowCache
from unipelt_cli.training.session import Mode, Session
from unipelt_cli.training.shared_passes import train_together


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
    session = Session(experiment, directory, mode, processes)
    with closing(session.writer):
        session.check()
        opened = session.open()
        yield opened
        if isinstance(opened, Finished):
            return
        yield from _train_folds(session)
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
    shared: RowCache | None = None,
    lender: TunedModel | None = None,
) -> Generator[tuple[int, Event | Failed], None, None]:
    """Run experiments that differ in seeds alone, in one pass each step where the method can.

    Each writes its own directory, as if it had run alone; yields its place with each event. A run
    that fails does not stop the others. Closing the iterator interrupts all of them resumably.
    `lender` is a model that holds the same backbone already.
    """
    shared = shared or RowCache()
    waiting = [
        Session(experiment, directory, mode, processes, shared)
        for experiment, directory in zip(experiments, directories, strict=True)
    ]
    with ExitStack() as stack:
        for session in waiting:
            stack.callback(session.writer.close)
            session.check()
        del session  # each is let go with its model when it is over
        yield from _train_all(waiting, lender)


def _train_all(
    waiting: list["Session"],
    lender: TunedModel | None = None,
) -> Generator[tuple[int, Event | Failed], None, None]:
    """Open the sessions, and train together those that can share a pass."""
    places = iter(range(len(waiting)))
    while waiting:
        group: dict[int, Session] = {}
        while waiting and (not group or can_share(next(iter(group.values())).tuned)):
            run_index, session = next(places), waiting.pop(0)
            try:
                opened = session.open(next(iter(group.values())).tuned if group else lender)
            except UnipeltError as error:
                if run_index == 0:
                    raise  # it is likely that none can begin
                yield run_index, Failed(session.writer.directory, error)
                continue
            yield run_index, opened
            if isinstance(opened, Finished):
                continue
            try:
                for folded in _train_folds(session):
                    yield run_index, folded
            except UnipeltError as error:
                yield run_index, Failed(session.writer.directory, error)
                continue
            group[run_index] = session
        del session
        yield from _train_group(group)
        group.clear()
        gc.collect()  # models are cycles, and the next one may need the room


def _train_folds(session: "Session") -> Generator[Folded, None, None]:
    """Train what is left of an opened run's folds, before the run itself; raise what fails."""
    planned = list(fold_experiments(session.experiment, session.writer.directory))
    if not planned:
        return
    lender = session.tuned if can_share(session.tuned) else None
    experiments, directories = zip(*planned, strict=True)
    shares = (session.processes, session.shared, lender)
    with closing(execute_together(experiments, directories, "resume", *shares)) as events:
        for fold_index, event in events:
            if isinstance(event, Failed):
                raise event.error
            yield Folded(fold_index + 1, len(planned), event)
    session.take_folds()


def _train_group(
    group: dict[int, "Session"],
) -> Generator[tuple[int, Event | Failed], None, None]:
    """Train opened sessions to their end, taking each out of the group that is over."""
    loops = {run_index: session.training for run_index, session in group.items()}
    for session in group.values():
        session.together = len(group)
    try:
        for run_index, event in train_together(loops):
            session = group[run_index]
            directory = session.writer.directory
            if isinstance(event, TrainingEvent):
                session.keep(event)
                yield run_index, event
                continue
            del group[run_index]
            try:
                if event is not None:
                    raise event
                ended: Finished | Failed = session.finish()
            except UnipeltError as error:
                ended = Failed(directory, error)
            yield run_index, ended
    except GeneratorExit:
        for session in group.values():
            session.interrupt()
        raise
