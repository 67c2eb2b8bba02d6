"""What runs would take: a few real steps of each method, and how many tokens they have."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import UnipeltError
from unipelt_cli.models.build import OPTIMISED
from unipelt_cli.models.evaluation import compute_logits
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system import imports
from unipelt_cli.system.devices import choose_device
from unipelt_cli.system.memory import activations as memory_activations
from unipelt_cli.system.memory import available
from unipelt_cli.system.memory import held as memory_held
from unipelt_cli.training.events import Step
from unipelt_cli.training.loop import Training
from unipelt_cli.training.planning import RowCache, longest_batch, loop_of, plan
from unipelt_cli.training.text_notes import text_notes

STEPS = 4
FROZEN_STEP_SECONDS = 1e-3  # of a head on features that are there, measured
FIT_SECONDS = 2.0  # of a head that is fitted at once to 100 rows, measured
ROWS = 64
SETUP_SECONDS = 1.0  # rows, model, reading back
KEPT = 3  # times a batch's memory that a CPU's allocator keeps in the end, measured
OTHER_BYTES = 40_000  # a run directory without its tensors


@dataclass(frozen=True)
class Estimate:
    """What one run takes, if nothing else runs beside it.

    Seconds if it stops as early as patience allows, and if it trains all its epochs.
    """

    least_seconds: float
    most_seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class Memory:
    """The bytes that a run holds at its peak, and those that the device can still give."""

    process: int
    """Held before the model: Python, the libraries, the rows. Nothing on a GPU."""
    weights: int
    """Of the model, and in float32 of the one that is read back to be checked at the end."""
    states: int
    """A gradient and two moments of each number that trains."""
    activations: int
    """What the longest batch keeps for the backward pass."""
    free: int | None

    @property
    def total(self) -> int:
        """The peak."""
        return self.process + self.weights + self.states + self.activations

    @property
    def fits(self) -> bool | None:
        """Whether the device can give what is not held yet; None where it does not say."""
        return None if self.free is None else self.total - self.process <= self.free


@dataclass(frozen=True)
class Outlook:
    """One run before it is trained: what it would train on, and what that would take."""

    experiment: Experiment
    prepared: tuple[Prepared, ...]
    tuned: TunedModel
    cost: Estimate
    memory: Memory
    notes: tuple[str, ...] = ()
    """What the tokenizer makes of the train texts, where it is odd."""


@dataclass(frozen=True)
class _Speed:
    train: float  # real tokens a second
    evaluation: float
    stored: int
    stages: int
    frozen_seconds: float | None = None  # of an epoch whose features are there, where they are kept


@dataclass(frozen=True)
class _Size:
    """The tokens of each split, and in how many folds the train rows are tested."""

    train: float
    dev: float
    test: float
    folds: int


def estimate(
    experiments: Mapping[str, Experiment],
) -> Iterator[tuple[str, Estimate | UnipeltError]]:
    """Measure each backbone, method and precision once, and count every run's tokens.

    Yields each run's name; one that could not begin comes with the error instead.
    """
    shared, speeds = RowCache(), dict[str, _Speed]()
    sizes: dict[Any, _Size] = {}
    for name, experiment in experiments.items():
        key = _kind(experiment)
        data = experiment.data.model_copy(update={"data_seed": 0})
        size_key = (data, experiment.model.backbone, experiment.model.max_length)
        if key not in speeds or size_key not in sizes:
            try:
                planned, prepared, tuned = plan(experiment, shared)
                loop = loop_of(planned, prepared, tuned, shared)
                speed, size = _measure(loop, prepared)
            except UnipeltError as error:
                yield name, error
                continue
            speeds.setdefault(key, speed)
            sizes.setdefault(size_key, size)
        yield name, _cost(experiment, speeds[key], sizes[size_key])


def outlook(experiment: Experiment, shared: RowCache) -> Outlook:
    """Make everything ready that a run needs, and take a few steps; write nothing.

    Raises what the run itself would raise before it trains.
    """
    shared.prepare(experiment.data)
    imports.transformers()
    device = choose_device(experiment.train.device)
    held, free = memory_held(device), available(device)
    experiment, prepared, tuned = plan(experiment, shared)
    loop = loop_of(experiment, prepared, tuned, shared)
    needed = Memory(held, *_needed(loop), free)
    notes = text_notes(experiment, prepared, tuned, loop)
    cost = _cost(experiment, *_measure(loop, prepared))
    return Outlook(experiment, prepared, tuned, cost, needed, notes)


def _needed(loop: Training) -> tuple[int, int, int]:
    """Return the bytes of weights, states and activations."""
    classifier, device = loop.tuned.classifier, loop.tuned.device
    tensors = [*classifier.parameters(), *classifier.buffers()]
    weights = sum(tensor.numel() * (tensor.element_size() + 4) for tensor in tensors)
    trained = sum(tensor.numel() for tensor in classifier.parameters() if tensor.requires_grad)
    activations = memory_activations(*longest_batch(loop), classifier.backbone.config)
    times = 1 if device.type == "cuda" else KEPT
    return weights, 4 * OPTIMISED * trained, times * activations


def _kind(experiment: Experiment) -> str:
    settings = experiment.settings()
    train = {key: settings["train"][key] for key in ("batch_size", "device", "precision")}
    return repr((settings["model"], settings["method"], train))


def _measure(loop: Training, prepared: Sequence[Prepared]) -> tuple[_Speed, _Size]:
    """Take a few steps, score a few rows, and count the tokens of train, dev and test."""
    tuned, rates = loop.tuned, list[float]()
    is_frozen = loop.frozen is not None
    for event in () if is_frozen else loop.events():
        if isinstance(event, Step):
            rates.append(event.tokens_per_second)
            if len(rates) == STEPS:
                break
    read = (loop.dev or loop.train)[0]
    few = read.select(range(min(ROWS, len(read))))
    compute_logits(tuned, few)
    start = time.perf_counter()
    compute_logits(tuned, few)
    evaluation = float(few.lengths.sum()) / (time.perf_counter() - start)
    counts = tuned.parameter_counts()
    stored = counts["stored_parameters"] + counts["head_parameters"]
    train = float(sum(course.train[0].lengths.sum() for course in loop.courses))
    dev = float(sum(course.dev[0].lengths.sum() for course in loop.courses if course.dev))
    per_row = dev / _count(prepared, "dev") if dev else train / loop.rows
    test = per_row * _count(prepared, "test")
    if is_frozen:  # each row goes through the backbone once, as when it is scored
        fits = tuned.method.has_closed_form
        seconds = FIT_SECONDS if fits else FROZEN_STEP_SECONDS * loop.steps
        speed = _Speed(evaluation, evaluation, stored, len(loop.lengths), seconds)
    else:
        speed = _Speed(max(rates), evaluation, stored, len(loop.lengths))
    return speed, _Size(train, dev, test, prepared[0].manifest.get("folds", 0))


def _count(prepared: Sequence[Prepared], split: str) -> int:
    return sum(len(dataset.splits[split]) for dataset in prepared if split in dataset.splits)


def _cost(
    experiment: Experiment,
    speed: _Speed,
    size: _Size,
    setup: float = SETUP_SECONDS,
) -> Estimate:
    settings = experiment.train
    epoch = size.train / speed.train + size.dev / speed.evaluation
    once = setup + size.test / speed.evaluation
    if speed.frozen_seconds is not None:
        epoch, once = speed.frozen_seconds, once + epoch
    fits = experiment.method.has_closed_form
    epochs = 1 if fits else settings.epochs
    least = epochs
    if size.dev:
        least = min(least, speed.stages * (settings.patience + 1))
    if not fits:  # what the floor takes beside it
        once += (size.train + size.dev + size.test) / speed.evaluation + FIT_SECONDS
    if size.folds:  # as many trainings, each without one of them, and one on all rows
        epoch, once = size.folds * epoch, (size.folds + 1) * once
    disk = 4 * speed.stored + OTHER_BYTES
    return Estimate(once + least * epoch, once + epochs * epoch, disk)
