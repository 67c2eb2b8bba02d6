"""A sweep shown live: which cells run, what ended, and a clean stop."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unipelt_cli.metrics import loses_to_mean
from unipelt_cli.sweeps.sweep import CellState, Engine, Sweep, best_so_far
from unipelt_cli.system.processes import ALONE
from unipelt_cli.terminal import console, progress
from unipelt_cli.terminal.interrupts import stop_on_request
from unipelt_cli.text import shown_score

SPLITS = ("dev", "test")


@dataclass(frozen=True)
class FailedCell:
    """A cell of a sweep that ended with an error."""

    run: str
    error: str | None
    hint: str | None


@dataclass(frozen=True)
class SweepOutcome:
    """How the cells of a sweep ended: the results of those that are finished, and what failed."""

    sweep: str
    cells: int
    runs: Sequence[Mapping[str, Any]]
    failed: Sequence[FailedCell]


def train_cells(plan: Sweep, engine: Engine, size: int, *, retry: bool) -> SweepOutcome:
    """Train what is left of a sweep and return its finished and failed cells.

    Raises KeyboardInterrupt after a request to stop: the same command goes on from there.
    """
    done = len(plan.of("finished"))
    total = len(plan.states)
    known = 0 if retry else len(plan.of("failed"))
    if done or known:
        console.say(f"{done} of {total} cells are finished already" + _failed_already(known))
    is_over = not plan.left(retry=retry)
    with stop_on_request(ALONE) as is_stopped:
        if not is_over:
            _watch_cells(plan, plan.run(engine, size, is_stopped, retry=retry), total - known, done)
        if is_stopped() and plan.of("waiting", "interrupted"):
            console.say(("interrupted", "yellow"), ": the same command goes on from there")
            raise KeyboardInterrupt
    runs = [
        {"run": str(plan.directory / state.cell.name), **state.result}
        for state in plan.of("finished")
        if state.result is not None
    ]
    failed = [
        FailedCell(str(plan.directory / state.cell.name), state.error, state.hint)
        for state in plan.of("failed")
    ]
    return SweepOutcome(str(plan.directory), total, runs, failed)


def _failed_already(count: int) -> str:
    return f", {count} have failed: --retry tries them again" if count else ""


def _watch_cells(plan: Sweep, moves: Iterator[CellState | None], total: int, done: int) -> None:
    with progress.SweepView(total, done) as view:
        for state in moves:
            if state is not None and state.status == "finished" and state.result is not None:
                name, result, metric = state.cell.name, state.result, state.result["metric"]
                scored = [split for split in SPLITS if result[split]]
                scores = "  ".join(f"{split} {result[split][metric]:.4f}" for split in scored)
                collapsed = ", collapsed" if result["collapsed"] else ""
                named = shown_score(metric, result.get("positive"))
                loses = any(map(loses_to_mean, result.get("against_mean", {}).values()))
                mean = ", no better than the train mean" if loses else ""
                described = f"{named} {scores}  {result['seconds']:.0f} s{collapsed}{mean}"
                view.end(name, described, failed=False)
            elif state is not None and state.status == "failed":
                view.end(state.cell.name, f"failed: {state.error}", failed=True)
            running = [
                (
                    state.cell.name,
                    f"{state.epoch}/{state.epochs}",
                    "" if state.score is None else f"{state.metric} {state.score:.4f}",
                )
                for state in plan.of("running")
            ]
            view.show(running, best_so_far(plan.of("finished")))
