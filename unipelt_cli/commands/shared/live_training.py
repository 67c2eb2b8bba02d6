"""Training shown live: the events of runs as progress and summaries, with a clean stop."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.files.as_json import OPTIONAL
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.terminal import console, progress, summaries
from unipelt_cli.terminal.interrupts import stop_on_request
from unipelt_cli.text import shown_score
from unipelt_cli.training import execution
from unipelt_cli.training.events import BatchHalved, Epoch, Failed, Finished, Folded, Ready, Step
from unipelt_cli.training.planning import RowCache
from unipelt_cli.training.session import Mode
from unipelt_cli.training.trackers import Tracking


@dataclass(frozen=True)
class FailedRun:
    """A run of several that ended with an error."""

    run: str
    error: str


@dataclass(frozen=True)
class TrainedRuns:
    """The results of several runs, their mean scores by split, and what failed."""

    runs: Sequence[Mapping[str, Any]]
    mean: Mapping[str, Mapping[str, float]]
    failed: Sequence[FailedRun] | None = field(metadata=OPTIONAL)


def train(
    experiment: Experiment,
    directory: Path,
    mode: Mode,
    processes: Processes = ALONE,
    trackers: Sequence[str] = (),
    shared: RowCache | None = None,
) -> Mapping[str, Any]:
    """Carry one run out and return its result; a request to stop any process stops them all.

    Raises KeyboardInterrupt after a request to stop: then the run can go on from there.
    """
    hint = f"--resume --out {directory}"
    runs = {"": experiment}
    (ended,) = _watch(runs, [directory], mode, hint, processes, trackers, shared).values()
    if isinstance(ended, Failed):
        raise ended.error
    done, settings = ended.result["epochs"], experiment.train
    is_stopped = ended.result["dev"] and not experiment.method.has_closed_form
    if done < settings.epochs and is_stopped:
        why = f"dev was not better for {settings.patience} epochs (* marks the best so far)"
        console.say(f"ended after {done} of {settings.epochs}: {why}")
    summaries.result_summary(ended.result, directory)
    console.say(f"next: unipelt predict {directory} FILE, or inspect-gates, eval, export --to onnx")
    return ended.result


def train_together(
    grid: Mapping[str, Experiment],
    directories: Sequence[Path],
    mode: Mode,
    trackers: Sequence[str] = (),
    shared: RowCache | None = None,
) -> TrainedRuns:
    """Carry several runs out; return their results by label, the means, and what failed.

    Raises KeyboardInterrupt after a request to stop: then the runs can go on from there.
    """
    hint = "the same command and --resume"
    ended = _watch(grid, directories, mode, hint, trackers=trackers, shared=shared)
    finished = {
        label: {"run": str(event.directory), **event.result}
        for label, event in ended.items()
        if isinstance(event, Finished)
    }
    failed = [
        FailedRun(str(event.directory), event.error.message)
        for event in ended.values()
        if isinstance(event, Failed)
    ]
    if finished:
        summaries.runs_summary(finished)
        console.say("runs: ", (str(directories[0].parent), "bold"))
        for directory in directories:
            console.say(f"  {directory.name}")
        console.say(f"next: unipelt compare {directories[0].parent}")
    results = list(finished.values())
    means = {
        split: {name: fmean(r[split][name] for r in results) for name in results[0][split]}
        for split in ("dev", "test")
        if results
    }
    return TrainedRuns(results, means, failed or None)


def _watch(
    grid: Mapping[str, Experiment],
    directories: Sequence[Path],
    mode: Mode,
    hint: str,
    processes: Processes = ALONE,
    trackers: Sequence[str] = (),
    shared: RowCache | None = None,
) -> dict[str, Finished | Failed]:
    """Show the events of runs as they come; return how each ended, in the order of the grid."""
    labels, view = list(grid), None
    ended: dict[str, Finished | Failed] = {}
    events = execution.execute_together(list(grid.values()), directories, mode, processes, shared)
    tracking = Tracking(trackers if processes.is_main else (), directories, console.say)
    stop_requests = stop_on_request(processes)
    with (
        stop_requests as is_stopped,
        progress.live() as show,
        closing(tracking),
        closing(events),
    ):
        for run_index, event in events:
            label = f"{labels[run_index]}  " if labels[run_index] else ""
            match event:
                case Ready() if view is None:
                    view = show(event.metric, event.epochs, _shown_metric(event))
                    summarise(event.manifests)
                    _announce(event)
                case Step() if view is not None:
                    view.step(event, label)
                case BatchHalved() if view is not None:
                    view.halved(event, label)
                case Epoch() if view is not None:
                    view.epoch(asdict(event), label)
                case Folded() if view is not None:
                    _show_fold(view, event, label)
                case Finished():
                    ended[labels[run_index]] = event
                case Failed():
                    ended[labels[run_index]] = event
                    if len(grid) > 1:
                        console.error(f"{event.directory}: {event.error.message}", event.error.hint)
            tracking.see(run_index, event)
            if len(ended) < len(grid) and processes.any(is_stopped()):
                events.close()
                console.say(("interrupted", "yellow"), f": go on with {hint}")
                raise KeyboardInterrupt
    return {label: ended[label] for label in labels}


def _show_fold(view: progress.TrainingView, event: Folded, label: str) -> None:
    """Show what happens to a fold: its steps on the bar, and a line when it is finished."""
    named = f"{label}fold {event.fold} of {event.count}  "
    match event.event:
        case Step() as step:
            view.step(step, named)
        case BatchHalved() as halved:
            view.halved(halved, named)
        case Finished() as finished:
            view.fold(finished.result, named)


def _shown_metric(event: Ready) -> str:
    """Return what the metric that selects the epochs is called where it is read."""
    positive = event.manifests[0].get("positive") if len(event.manifests) == 1 else None
    return shown_score(event.metric, positive)


def summarise(manifests: Sequence[Mapping[str, Any]], *, is_answer: bool = False) -> None:
    """Print each task's splits, under its name where there are several."""
    say = console.reply if is_answer else console.say
    for manifest in manifests:
        if len(manifests) > 1:
            say((manifest["task"], "bold"))
        summaries.data_summary(manifest, is_answer=is_answer)


def _announce(event: Ready) -> None:
    experiment, counts = event.experiment, event.parameters
    console.say(
        f"{experiment.method_name} on {experiment.model.backbone}: "
        f"{counts['trainable_parameters']:,} numbers train, {counts['stored_parameters']:,} "
        f"are stored, head {counts['head_parameters']:,} ({experiment.model.pooling} pooling), "
        f"{experiment.train.precision}"
    )
    for note in event.notes:
        console.say(("note: ", "yellow"), note)
    if event.doubt:
        console.say(("warning: ", "yellow"), event.doubt)
    if event.resumed_epoch:
        console.say(f"going on after epoch {event.resumed_epoch}")
