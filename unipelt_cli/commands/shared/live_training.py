"""Consume the events of runs: progress and summaries on stderr, and a clean stop on request."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.sweeps import successive_halving
from unipelt_cli.sweeps.successive_halving import Candidate
from unipelt_cli.sweeps.sweep import Engine, Standing, Sweep, best_so_far
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.terminal import tables
from unipelt_cli.training import execution, loop
from unipelt_cli.training.execution import Failed, Finished, Mode, Ready
from unipelt_cli.training.trackers import Tracking

SPLITS = ("dev", "test")
ECHO_SECONDS = 5.0


def train(
    experiment: Experiment,
    directory: Path,
    mode: Mode,
    processes: Processes = ALONE,
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Carry one run out and return its result; a request to stop any process stops them all.

    Raises KeyboardInterrupt after a request to stop: then the run can go on from there.
    """
    hint = f"--resume --out {directory}"
    given = ({"": experiment}, [directory], mode, hint, processes, trackers)
    (ended,) = _watch(*given).values()
    if isinstance(ended, Failed):
        raise ended.error
    done, settings = ended.result["epochs"], experiment.train
    if done < settings.epochs:
        why = f"dev was not better for {settings.patience} epochs (* marks the best so far)"
        tables.say(f"ended after {done} of {settings.epochs}: {why}")
    tables.result_summary(ended.result, directory)
    tables.say(f"next: unipelt predict {directory} FILE, or inspect-gates, eval, export --to onnx")
    return ended.result


def train_together(
    grid: Mapping[str, Experiment],
    directories: Sequence[Path],
    mode: Mode,
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Carry several runs out; return their results by label, the means, and what failed.

    Raises KeyboardInterrupt after a request to stop: then the runs can go on from there.
    """
    hint = "the same command and --resume"
    ended = _watch(grid, directories, mode, hint, trackers=trackers)
    finished = {
        label: {"run": str(event.directory), **event.result}
        for label, event in ended.items()
        if isinstance(event, Finished)
    }
    failed = [
        {"run": str(event.directory), "error": event.error.message}
        for event in ended.values()
        if isinstance(event, Failed)
    ]
    if finished:
        tables.runs_summary(finished)
        tables.say("runs: ", (str(directories[0].parent), "bold"))
        for directory in directories:
            tables.say(f"  {directory.name}")
        tables.say(f"next: unipelt compare {directories[0].parent}")
    results = list(finished.values())
    means = {
        split: {name: fmean(r[split][name] for r in results) for name in results[0][split]}
        for split in ("dev", "test")
        if results
    }
    return {"runs": results, "mean": means, **({"failed": failed} if failed else {})}


def _watch(
    grid: Mapping[str, Experiment],
    directories: Sequence[Path],
    mode: Mode,
    hint: str,
    processes: Processes = ALONE,
    trackers: Sequence[str] = (),
) -> dict[str, Finished | Failed]:
    """Show the events of runs as they come; return how each ended, in the order of the grid."""
    labels, view = list(grid), None
    ended: dict[str, Finished | Failed] = {}
    events = execution.execute_together(list(grid.values()), directories, mode, processes)
    tracking = Tracking(trackers if processes.is_main else (), directories, tables.say)
    stop_requests = _stop_requests(processes)
    with (
        stop_requests as is_stopped,
        tables.live() as show,
        closing(tracking),
        closing(events),
    ):
        for place, event in events:
            label = f"{labels[place]}  " if labels[place] else ""
            match event:
                case Ready() if view is None:
                    view = show(event.metric, event.epochs)
                    summarise(event.manifests)
                    _announce(event)
                case loop.Step() if view is not None:
                    view.step(event, label)
                case loop.Halved() if view is not None:
                    view.halved(event, label)
                case loop.Epoch() if view is not None:
                    view.epoch(asdict(event), label)
                case Finished():
                    ended[labels[place]] = event
                case Failed():
                    ended[labels[place]] = event
                    if len(grid) > 1:
                        tables.error(f"{event.directory}: {event.error.message}", event.error.hint)
            tracking.see(place, event)
            if len(ended) < len(grid) and processes.any(is_stopped()):
                events.close()
                tables.say(("interrupted", "yellow"), f": go on with {hint}")
                raise KeyboardInterrupt
    return {label: ended[label] for label in labels}


def sweep(plan: Sweep, engine: Engine, size: int, *, retry: bool) -> dict[str, Any]:
    """Train what is left of a sweep and return its finished and failed cells.

    Raises KeyboardInterrupt after a request to stop: the same command goes on from there.
    """
    done = len(plan.of("finished"))
    total = len(plan.standings)
    known = 0 if retry else len(plan.of("failed"))
    if done or known:
        tables.say(f"{done} of {total} cells are finished already" + _failed_already(known))
    is_over = not plan.left(retry=retry)
    with _stop_requests(ALONE) as is_stopped:
        if not is_over:
            _watch_cells(plan, plan.run(engine, size, is_stopped, retry=retry), total - known, done)
        if is_stopped() and plan.of("waiting", "interrupted"):
            tables.say(("interrupted", "yellow"), ": the same command goes on from there")
            raise KeyboardInterrupt
    return {
        "sweep": str(plan.directory),
        "cells": total,
        "runs": [
            {"run": str(plan.directory / one.cell.name), **one.result}
            for one in plan.of("finished")
            if one.result is not None
        ],
        "failed": [
            {
                "run": str(plan.directory / one.cell.name),
                "error": one.error,
                "hint": one.hint,
            }
            for one in plan.of("failed")
        ],
    }


def search(found: Sequence[Candidate], budget: float) -> Candidate:
    """Search among candidates, show each one's turn and then all; return the best.

    A request to stop ends it at once: nothing is written yet.
    """
    many = f"{len(found)} candidates, {tables.duration(budget)}"
    tables.say(f"{many} in all: dev alone decides, test is not looked at")
    for candidate in successive_halving.search(found, budget):
        said = candidate.said()
        score = "failed" if candidate.score is None else f"{candidate.score:.4f}"
        seeds = f", {len(candidate.scores)} seeds" if len(candidate.scores) > 1 else ""
        tables.say(
            f"round {candidate.rung + 1}  {said['method']} at {said['learning_rate']:g}: "
            f"{candidate.metric} {score} after epoch {said['epochs']}{seeds}"
        )
    chosen = successive_halving.best(found)
    untried = [own.said() for own in found if own.score is None and own.error is None]
    if chosen.rung + 1 < len(successive_halving.RUNGS):
        names = ", ".join(f"{own['method']} at {own['learning_rate']:g}" for own in untried)
        left = f"; not tried: {names}" if names else ""
        ended = (
            f"the budget ended in round {chosen.rung + 1} of {len(successive_halving.RUNGS)}{left}"
        )
        tables.say(("warning: ", "yellow"), ended)
    rows = []
    for candidate in successive_halving.ranked(found):
        said = candidate.said()
        spread = f" ±{stdev(candidate.scores):.4f}" if len(candidate.scores) > 1 else ""
        rows.append(
            [
                ("* " if candidate is chosen else "  ") + said["method"],
                f"{said['learning_rate']:g}",
                f"{candidate.score:.4f}{spread}",
                str(len(candidate.scores)),
                str(said["epochs"]),
                f"{candidate.stored_parameters:,}",
            ]
        )
    columns = ("  method", "rate", f"dev {chosen.metric}", "seeds", "epochs", "stored")
    tables.table(columns, rows)
    for candidate in found:
        if candidate.error is not None:
            said = candidate.said()
            name = f"{said['method']} at {said['learning_rate']:g}"
            tables.say(("failed: ", "yellow"), f"{name}: {candidate.error}")
    return chosen


def _failed_already(count: int) -> str:
    return f", {count} have failed: --retry tries them again" if count else ""


def _watch_cells(plan: Sweep, moves: Iterator[Standing | None], total: int, done: int) -> None:
    with tables.SweepView(total, done) as view:
        for one in moves:
            if one is not None and one.status == "finished" and one.result is not None:
                name, result, metric = one.cell.name, one.result, one.result["metric"]
                scores = "  ".join(f"{split} {result[split][metric]:.4f}" for split in SPLITS)
                collapsed = ", collapsed" if result["collapsed"] else ""
                said = f"{metric} {scores}  {result['seconds']:.0f} s{collapsed}"
                view.end(name, said, failed=False)
            elif one is not None and one.status == "failed":
                view.end(one.cell.name, f"failed: {one.error}", failed=True)
            running = [
                (
                    own.cell.name,
                    f"{own.epoch}/{own.epochs}",
                    "" if own.score is None else f"{own.metric} {own.score:.4f}",
                )
                for own in plan.of("running")
            ]
            view.show(running, best_so_far(plan.of("finished")))


def summarise(manifests: Sequence[Mapping[str, Any]]) -> None:
    """Print each task's splits, under its name where there are several."""
    for manifest in manifests:
        if len(manifests) > 1:
            tables.say((manifest["task"], "bold"))
        tables.data_summary(manifest)


def _announce(event: Ready) -> None:
    experiment, counts = event.experiment, event.parameters
    tables.say(
        f"{experiment.method_name} on {experiment.model.backbone}: "
        f"{counts['trainable_parameters']:,} numbers train, {counts['stored_parameters']:,} "
        f"are stored, head {counts['head_parameters']:,} ({experiment.model.pooling} pooling), "
        f"{experiment.train.precision}"
    )
    if event.doubt:
        tables.say(("warning: ", "yellow"), event.doubt)
    if event.resumed_epoch:
        tables.say(f"going on after epoch {event.resumed_epoch}")


@contextmanager
def _stop_requests(processes: Processes) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second one interrupts.

    What launched several processes hands on what the terminal has told them already: an echo is
    no second request.
    """
    asked: float | None = None

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is None:
            asked = now
        elif not processes.are_several or now - asked > ECHO_SECONDS:
            processes.abandon()
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
