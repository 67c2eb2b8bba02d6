"""What the loop yields and keeps: batches, steps, epochs, and the ends of a run."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.sections import TrainSettings
from unipelt_cli.errors import UnipeltError
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.label_scale import RAW, LabelScale
from unipelt_cli.tasks import Task

Labelled = tuple[Encoded, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """Rows of one task for the next step; who drives the loop takes it and sends a `StepResult`."""

    task_index: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class StepResult:
    """A step on a batch was taken."""

    loss: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """One optimiser step was taken."""

    epoch: int
    step: int
    steps: int  # of this epoch
    loss: float
    tokens_per_second: float  # real ones, since the epoch began


@dataclass(frozen=True)
class BatchHalved:
    """A batch did not fit into memory: from now on it is computed so many rows at a time.

    The gradients of the parts are added up. The step stays the same unless its loss compares rows,
    which it then does within a part.
    """

    micro_batch_size: int
    compares_rows: bool = False


@dataclass(frozen=True)
class Epoch:
    """One epoch was trained, and scored on dev unless its stage selects nothing."""

    epoch: int
    train_loss: float  # of a regression in squared deviations of the train labels
    dev: Mapping[str, float]  # empty where nothing was scored
    train_seconds: float
    evaluation_seconds: float
    tokens: int  # real tokens trained on
    is_best: bool
    gates: tuple[Mapping[str, float], ...]  # by layer {gate: mean over the dev rows}, if gated


@dataclass(frozen=True)
class Folded:
    """Something happened to a training on all folds but one: `fold` counts from 1."""

    fold: int
    count: int
    event: "Event | Failed"


@dataclass(frozen=True)
class Ready:
    """Data and model are there; training starts, or goes on after `resumed_epoch`."""

    experiment: Experiment
    manifests: tuple[Mapping[str, Any], ...]
    metric: str
    parameters: dict[str, int]
    epochs: int
    resumed_epoch: int = 0
    taken: int = 0
    """Steps that were taken before."""
    doubt: str | None = None
    """What may not fit into memory."""

    @property
    def has_dev(self) -> bool:
        """Whether epochs are scored on dev rows, and the best of them is kept."""
        return "dev" in self.manifests[0]["splits"]

    notes: tuple[str, ...] = ()
    """What its user must know of the backbone, and of the train texts in its tokenizer's hands."""


@dataclass(frozen=True)
class Finished:
    """The run is finished and its directory whole."""

    directory: Path
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """A run among others ended with an error."""

    directory: Path
    error: UnipeltError


TrainingEvent = Step | BatchHalved | Epoch
Event = Ready | TrainingEvent | Finished | Folded


@dataclass(frozen=True)
class TaskRows:
    """One task to train on, with its rows."""

    task: Task
    train: Labelled
    dev: Labelled | None  # None where the schedule's end is the result
    scale: LabelScale = RAW

    @property
    def classes(self) -> NDArray[np.int64] | None:
        """The train rows' labels by number; None of a regression."""
        return None if self.task.is_regression else self.train[1]

    def scaled(self, settings: TrainSettings) -> "TaskRows":
        """Return the rows with the scale on which their labels are learned."""
        if not self.task.is_regression or settings.label_scale == "raw":
            return self
        choose = LabelScale.chosen if settings.label_scale == "auto" else LabelScale.of
        return replace(self, scale=choose(self.train[1]))


Count = Annotated[int, Field(ge=0)]


@checked(config=ConfigDict(strict=True, extra="forbid"))
class Progress:
    """The counters of a loop: with its tensors, all that going on needs."""

    epoch: Annotated[int, Field(ge=1)] = 1
    step: Count = 0  # within the epoch
    taken: Count = 0
    stage: Count = 0
    stage_epochs: Count = 0  # epochs that were over when the stage began
    stage_taken: Count = 0  # steps taken in the stage
    loss_sum: float = 0.0
    tokens: Count = 0
    train_seconds: float = 0.0
    best_epoch: Count = 0
    best_score: float = 0.0
    best_dev: dict[str, float] = field(default_factory=dict)
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None  # where a batch did not fit
    total_tokens: Count = 0
    total_train_seconds: float = 0.0


Turns = Generator[Batch | Step | Epoch, StepResult | None, None]
