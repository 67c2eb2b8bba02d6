"""What a contender of the score table is, the rows it gets, and what is kept of its runs."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from datasets import Dataset
from pydantic import BaseModel, ConfigDict, ValidationError

from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.sections import Settings
from unipelt_cli.config.toml import dump
from unipelt_cli.data.manifest import digest_rows
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import ConfigError, RunError
from unipelt_cli.files import atomic
from unipelt_cli.metrics import Values
from unipelt_cli.models.evaluation import answers, references
from unipelt_cli.runs.run import Run, read_run
from unipelt_cli.tasks import Task
from unipelt_cli.training.events import BatchHalved, Epoch, Failed, Finished, Ready, Step
from unipelt_cli.training.execution import execute_together
from unipelt_cli.training.planning import RowCache

SCORED = ("dev", "test")
SELECTS_NOTHING = frozenset({"probe"})
"""Methods that read no dev row, however many are drawn."""


@dataclass(frozen=True)
class Rows:
    """A task's rows for one data seed, drawn once: every contender of the table gets these.

    `settings` are those of a contender; `prepared` holds dev rows to score on even where a
    contender is to read none.
    """

    task_name: str
    seed: int
    settings: Settings
    prepared: Prepared
    shared: RowCache

    @property
    def task(self) -> Task:
        return self.prepared.task

    @cached_property
    def digests(self) -> dict[str, str]:
        """Return each split's hash, of the rows themselves."""
        return {split: digest_rows(rows) for split, rows in self.prepared.splits.items()}


class Outcome(BaseModel):
    """One finished run of a contender, as it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    """All that was trained with: the experiment, or another library's settings."""
    packages: dict[str, str]
    """Versions that it was run with; other ones do not make it another run."""
    digests: dict[str, str]
    scores: dict[str, dict[str, float]]
    predictions: dict[str, list[float]]
    seconds: float
    """From rows at hand to the end of training."""
    inference_seconds: float
    labels_read: int
    selected_on_dev: bool
    """Whether the dev rows that are scored chose its best epoch."""


class Contender(Protocol):
    """What trains on rows and predicts others."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    def refusal(self, task: Task) -> str | None:
        """Say why it cannot learn a task; None where it can."""

    def absence(self) -> str | None:
        """Say why it cannot be run here; None where it can."""

    def caveat(self, task: Task) -> str | None:
        """Say how it reads a task otherwise than the others; None where it does not."""

    def recipe(self, rows: Rows) -> str:
        """Return all that a run on these rows depends on besides them."""

    def run(self, rows: Rows, directory: Path) -> Outcome:
        """Train, and predict dev and test; what is stored goes into `directory`."""


def score_all(
    task: Task, rows: Prepared, predicted: Mapping[str, Values]
) -> dict[str, dict[str, float]]:
    """Score each split's predictions by the task's metrics."""
    return {
        split: task.score(values, references(rows.splits[split]))
        for split, values in predicted.items()
    }


def find_kept(contender: Contender, rows: Rows, split: str, folder: Path) -> Outcome | None:
    """Return what was kept of a run; None where there is none.

    Raises RunError for a damaged one, and for one that read other rows, scored others on this
    split, or had another recipe. Dev rows that were neither read nor are scored may be others.
    """
    path = _path(contender, rows, folder)
    if not path.is_file():
        return None
    try:
        outcome = Outcome.model_validate_json(path.read_bytes())
    except ValidationError:
        raise RunError(f"{path}: damaged", "remove it: it is run again") from None
    matters = ("train", split, *(("dev",) if outcome.selected_on_dev else ()))
    if outcome.recipe != contender.recipe(rows):
        raise RunError(f"{path}: was run with other settings", "give another --out")
    if any(outcome.digests[name] != rows.digests[name] for name in matters):
        raise RunError(f"{path}: was run with other rows", "give another --out")
    return outcome


def run_and_keep(contender: Contender, rows: Rows, folder: Path) -> Outcome:
    """Train and predict, and keep what came of it: a run directory of ours goes beside."""
    path = _path(contender, rows, folder)
    outcome = contender.run(rows, path.with_suffix(""))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, outcome.model_dump())
    return outcome


def _path(contender: Contender, rows: Rows, folder: Path) -> Path:
    name = re.sub(r"[^\w.-]+", "-", contender.name)
    return folder / name / f"{rows.task_name}-d{rows.seed}.json"


@dataclass(frozen=True)
class Ours:
    """A method or a preset of this package; later layers of settings win."""

    name: str
    layers: tuple[Settings, ...]

    def refusal(self, task: Task) -> str | None:
        return None

    def absence(self) -> str | None:
        return None

    def caveat(self, task: Task) -> str | None:
        return None

    def recipe(self, rows: Rows) -> str:
        return dump(self.experiment(rows))

    def experiment(self, rows: Rows) -> Experiment:
        """Return the run's settings; raise ConfigError where they draw rows of their own."""
        experiment = resolve([("", rows.settings), *(("", layer) for layer in self.layers)])
        (prepared,) = rows.shared.prepare(experiment.data)
        for split in ("train", "test"):
            if digest_rows(prepared.splits[split]) != rows.digests[split]:
                raise ConfigError(
                    f"{self.name}: its settings draw other {split} rows than the table's",
                    "leave out what it sets in [data]: all contenders read the same rows",
                )
        return experiment

    def run(self, rows: Rows, directory: Path) -> Outcome:
        experiment = self.experiment(rows)
        seconds, inference = _train(experiment, directory, rows.shared)
        dev = _dev_rows_read(experiment, rows.shared)
        run = read_run(directory)
        predicted = _predictions(run, rows)
        return Outcome(
            recipe=dump(experiment),
            packages=run.environment["packages"],
            digests=rows.digests,
            scores=score_all(rows.task, rows.prepared, predicted),
            predictions={split: values.tolist() for split, values in predicted.items()},
            seconds=seconds,
            inference_seconds=inference,
            labels_read=len(rows.prepared.splits["train"]) + (0 if dev is None else len(dev)),
            selected_on_dev=dev is not None and digest_rows(dev) == rows.digests["dev"],
        )


def _dev_rows_read(experiment: Experiment, shared: RowCache) -> Dataset | None:
    """Return the dev rows that a run's training reads; None where it reads none."""
    if experiment.method_name in SELECTS_NOTHING:
        return None
    dev = shared.prepare(experiment.data)[0].splits.get("dev")
    return dev if dev is not None and len(dev) else None


def _train(experiment: Experiment, directory: Path, shared: RowCache) -> tuple[float, float]:
    """Train, or go on with, one run; return the seconds until its last step, and those after it.

    A run without steps, or one that had ended before, has all its seconds in the first. What the
    probe takes beside a run is in neither.
    """
    begun = time.perf_counter()
    trained: float | None = None
    is_resumed = False
    for _, event in execute_together([experiment], [directory], "resume", shared=shared):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Ready):
            is_resumed = event.taken > 0
        if isinstance(event, Step | BatchHalved | Epoch):
            trained = time.perf_counter()
        if isinstance(event, Finished):
            total = event.result["seconds"]
            if trained is None or is_resumed:
                return total, 0.0
            return round(trained - begun, 3), round(max(0.0, total - (trained - begun)), 3)
    raise AssertionError("a run ends finished or failed")


def _predictions(run: Run, rows: Rows) -> dict[str, Values]:
    """Return what a stored run predicts for the scored splits; test as it was stored."""
    stored = run.predictions()
    assert stored is not None
    length = run.experiment.model.max_length
    dev, _ = answers(run.build(), rows.task, [rows.prepared.splits["dev"]], length)
    return {"dev": dev, "test": stored[0]}
