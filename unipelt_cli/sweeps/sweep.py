"""A grid of runs in one directory: what is done stays done, what stopped goes on.

Every cell is an ordinary run directory, called by its settings' hash. Engines (`local_engine`,
`ray_engine`) train groups of cells; this module knows which are left, and remembers failures.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unipelt_cli.errors import RunError, UnipeltError
from unipelt_cli.files import atomic, sealed
from unipelt_cli.files.lock import DirectoryLock, lock_owner
from unipelt_cli.metrics import is_better
from unipelt_cli.runs.names import EXPERIMENT, RESULT
from unipelt_cli.runs.run import read_run
from unipelt_cli.sweeps import grid
from unipelt_cli.sweeps.cell_reports import (
    CellEpoch,
    CellFailed,
    CellFinished,
    CellReady,
    CellReport,
    CellSpec,
    CellStopped,
)
from unipelt_cli.sweeps.grid import Cell

FAILURES = "failed.json"
Status = Literal["waiting", "running", "finished", "interrupted", "failed"]
Engine = Callable[[Sequence[Sequence[CellSpec]], Callable[[], bool]], Iterator[CellReport | None]]
"""Trains groups of cells; yields what happens to them, and None now and then."""


@dataclass
class CellState:
    """How far one cell is."""

    cell: Cell
    status: Status = "waiting"
    result: Mapping[str, Any] | None = None
    error: str | None = None
    hint: str | None = None
    epoch: int = 0
    epochs: int = 0
    metric: str = ""
    score: float | None = None
    """The latest score on dev."""


class Sweep:
    """The cells of a directory; `run` trains those that are left."""

    def __init__(self, directory: Path, cells: Sequence[Cell]) -> None:
        """Look at what is there; raise RunError where the directory holds something else."""
        self.directory = directory
        self._check()
        failures = self._read_failures()
        self.states = {cell.name: self._look(cell, failures.get(cell.name)) for cell in cells}

    def _check(self) -> None:
        if not self.directory.exists():
            return
        with atomic.writing(self.directory):
            if (self.directory / EXPERIMENT).is_file():
                raise RunError(
                    f"{self.directory}: a run, and a sweep is a directory of runs",
                    "give another --out",
                )
            list(self.directory.iterdir())

    def _look(self, cell: Cell, failure: Mapping[str, str] | None) -> CellState:
        directory = self.directory / cell.name
        try:
            if os.path.lexists(directory / RESULT):
                return CellState(cell, "finished", read_run(directory).result)
            if (owner := lock_owner(directory)) is not None:
                busy = f"{directory}: {owner} is writing there"
                return CellState(cell, "failed", error=busy, hint="wait until it has ended")
        except UnipeltError as error:
            return CellState(cell, "failed", error=error.message, hint=error.hint)
        if failure is not None:
            return CellState(cell, "failed", error=failure["error"], hint=failure["hint"])
        is_begun = (directory / EXPERIMENT).is_file()
        return CellState(cell, "interrupted" if is_begun else "waiting")

    def of(self, *statuses: Status) -> list[CellState]:
        """Return the cells that stand so."""
        return [state for state in self.states.values() if state.status in statuses]

    def left(self, *, retry: bool) -> list[Cell]:
        """Return the cells that `run` would train; with `retry` those that failed as well."""
        wanted: tuple[Status, ...] = ("waiting", "interrupted", *(("failed",) if retry else ()))
        return [state.cell for state in self.of(*wanted)]

    def run(
        self, engine: Engine, size: int, is_stopped: Callable[[], bool], *, retry: bool
    ) -> Iterator[CellState | None]:
        """Train what is left, at most `size` runs in one pass; yield each cell that moved on.

        None is a moment in which nothing happened. Raises RunError while another process sweeps
        in the directory.
        """
        left = self.left(retry=retry)
        with atomic.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with DirectoryLock(self.directory):
            for cell in left:
                self.states[cell.name].status = "waiting"
            groups = [[self._spec(cell) for cell in group] for group in grid.groups(left, size)]
            for report in engine(groups, is_stopped):
                if report is None:
                    yield None
                elif (moved := self._take(report)) is not None:
                    yield moved
            for state in self.of("running"):
                state.status = "interrupted"

    def _spec(self, cell: Cell) -> CellSpec:
        directory = str((self.directory / cell.name).absolute())
        return CellSpec(directory, cell.experiment.settings())

    def _take(self, report: CellReport) -> CellState | None:
        """Write down what an engine reported; None for what moves no cell."""
        state = self.states[Path(report.directory).name]
        match report:
            case CellReady():
                state.status, state.metric, state.epochs = "running", report.metric, report.epochs
            case CellEpoch():
                state.epoch, state.score = report.epoch, report.score
            case CellFinished():
                state.status, state.result, state.error = "finished", report.result, None
                self._remember(state)
            case CellFailed():
                state.status, state.error, state.hint = "failed", report.error, report.hint
                self._remember(state, report.traceback)
            case CellStopped():
                return None
        return state

    def _remember(self, state: CellState, traceback: str | None = None) -> None:
        """Keep a failure until the cell is finished."""
        failures = self._read_failures()
        known = failures.pop(state.cell.name, None)
        if state.status == "failed":
            failure = {"error": state.error, "hint": state.hint, "traceback": traceback}
            failures[state.cell.name] = {key: text for key, text in failure.items() if text}
        elif known is None:
            return
        atomic.write_json(self.directory / FAILURES, failures)

    def _read_failures(self) -> dict[str, dict[str, str]]:
        path = self.directory / FAILURES
        if not os.path.lexists(path):
            return {}
        failures = sealed.read_object(path)
        for failure in failures.values():
            if not isinstance(failure, dict) or not {"error", "hint"} <= failure.keys():
                raise RunError(f"{path}: damaged", "remove it: failed cells are tried again")
        return failures


def best_so_far(states: Sequence[CellState]) -> dict[str, tuple[str, float]]:
    """Return, by task and k, the method with the best mean score on dev, and that score."""
    scores: dict[str, dict[str, list[float]]] = {}
    metrics: dict[str, str] = {}
    for state in states:
        if (result := state.result) is not None and result["dev"]:
            k = result["k"]
            task_and_k = f"{result['task']} k={'all' if k is None else k}"
            metrics[task_and_k] = result["metric"]
            score = result["dev"][metrics[task_and_k]]
            scores.setdefault(task_and_k, {}).setdefault(result["method"], []).append(score)
    best = {}
    for task_and_k, methods in scores.items():
        means = {name: sum(values) / len(values) for name, values in methods.items()}
        choose = max if is_better(metrics[task_and_k], 1.0, 0.0) else min
        name = choose(means, key=lambda method: means[method])
        best[task_and_k] = (name, means[name])
    return best
