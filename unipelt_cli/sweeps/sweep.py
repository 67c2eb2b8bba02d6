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
from unipelt_cli.files.lock import Claim, holder
from unipelt_cli.metrics import is_better
from unipelt_cli.runs.names import EXPERIMENT, RESULT
from unipelt_cli.runs.run import read_run
from unipelt_cli.sweeps import grid
from unipelt_cli.sweeps.grid import Cell

FAILURES = "failed.json"
Status = Literal["waiting", "running", "finished", "interrupted", "failed"]
Report = dict[str, Any]
Engine = Callable[[Sequence[list[dict[str, Any]]], Callable[[], bool]], Iterator[Report]]
"""Trains groups of cells, as `worker.Told`; yields reports of `worker.carry_out`, and ticks."""


@dataclass
class Standing:
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
        self.standings = {cell.name: self._look(cell, failures.get(cell.name)) for cell in cells}

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

    def _look(self, cell: Cell, failure: Mapping[str, str] | None) -> Standing:
        directory = self.directory / cell.name
        try:
            if os.path.lexists(directory / RESULT):
                return Standing(cell, "finished", read_run(directory).result)
            if (owner := holder(directory)) is not None:
                said = f"{directory}: {owner} is writing there"
                return Standing(cell, "failed", error=said, hint="wait until it has ended")
        except UnipeltError as error:
            return Standing(cell, "failed", error=error.message, hint=error.hint)
        if failure is not None:
            return Standing(cell, "failed", error=failure["error"], hint=failure["hint"])
        is_begun = (directory / EXPERIMENT).is_file()
        return Standing(cell, "interrupted" if is_begun else "waiting")

    def of(self, *statuses: Status) -> list[Standing]:
        """Return the cells that stand so."""
        return [one for one in self.standings.values() if one.status in statuses]

    def left(self, *, retry: bool) -> list[Cell]:
        """Return the cells that `run` would train; with `retry` those that failed as well."""
        wanted: tuple[Status, ...] = ("waiting", "interrupted", *(("failed",) if retry else ()))
        return [one.cell for one in self.of(*wanted)]

    def run(
        self, engine: Engine, size: int, is_stopped: Callable[[], bool], *, retry: bool
    ) -> Iterator[Standing | None]:
        """Train what is left, at most `size` runs in one pass; yield each cell that moved on.

        None is a moment in which nothing happened. Raises RunError while another process sweeps
        in the directory.
        """
        left = self.left(retry=retry)
        with atomic.writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with Claim(self.directory):
            for cell in left:
                self.standings[cell.name].status = "waiting"
            groups = [[self._told(cell) for cell in own] for own in grid.groups(left, size)]
            for report in engine(groups, is_stopped):
                if report["kind"] == "tick":
                    yield None
                elif (moved := self._take(report)) is not None:
                    yield moved
            for one in self.of("running"):
                one.status = "interrupted"

    def _told(self, cell: Cell) -> dict[str, Any]:
        directory = str((self.directory / cell.name).absolute())
        return {"directory": directory, "settings": cell.experiment.settings()}

    def _take(self, report: Report) -> Standing | None:
        """Write down what an engine reported; None for what moves no cell."""
        one = self.standings[Path(report["directory"]).name]
        match report["kind"]:
            case "ready":
                one.status, one.metric, one.epochs = "running", report["metric"], report["epochs"]
            case "epoch":
                one.epoch, one.score = report["epoch"], report["score"]
            case "finished":
                one.status, one.result, one.error = "finished", report["result"], None
                self._remember(one)
            case "failed":
                one.status, one.error, one.hint = "failed", report["error"], report["hint"]
                self._remember(one, report.get("traceback"))
            case _:
                return None
        return one

    def _remember(self, one: Standing, traceback: str | None = None) -> None:
        """Keep a failure until the cell is finished."""
        failures = self._read_failures()
        known = failures.pop(one.cell.name, None)
        if one.status == "failed":
            said = {"error": one.error, "hint": one.hint, "traceback": traceback}
            failures[one.cell.name] = {key: text for key, text in said.items() if text}
        elif known is None:
            return
        atomic.write_json(self.directory / FAILURES, failures)

    def _read_failures(self) -> dict[str, Any]:
        path = self.directory / FAILURES
        if not os.path.lexists(path):
            return {}
        failures = sealed.read_object(path)
        for said in failures.values():
            if not isinstance(said, dict) or not {"error", "hint"} <= said.keys():
                raise RunError(f"{path}: damaged", "remove it: failed cells are tried again")
        return failures


def best_so_far(standings: Sequence[Standing]) -> dict[str, tuple[str, float]]:
    """Return, by task and k, the method with the best mean score on dev, and that score."""
    scores: dict[str, dict[str, list[float]]] = {}
    metrics: dict[str, str] = {}
    for one in standings:
        if one.result is not None and one.result["dev"]:
            k = one.result["k"]
            place = f"{one.result['task']} k={'all' if k is None else k}"
            metrics[place] = one.result["metric"]
            score = one.result["dev"][metrics[place]]
            scores.setdefault(place, {}).setdefault(one.result["method"], []).append(score)
    best = {}
    for place, methods in scores.items():
        means = {name: sum(own) / len(own) for name, own in methods.items()}
        choose = max if is_better(metrics[place], 1.0, 0.0) else min
        name = choose(means, key=lambda own: means[own])
        best[place] = (name, means[name])
    return best
