"""What a grid would take: a few real steps of each method, and how many tokens its cells have."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unipelt_cli.config import Experiment
from unipelt_cli.errors import UnipeltError
from unipelt_cli.evaluation import compute_logits
from unipelt_cli.execution import Shared, loop_of, plan
from unipelt_cli.grid import Cell
from unipelt_cli.training import Step

STEPS = 4
ROWS = 64
SETUP_SECONDS = 1.0  # rows, model, reading back
OTHER_BYTES = 40_000  # a run directory without its tensors


@dataclass(frozen=True)
class Estimate:
    """What one cell takes, if nothing else runs beside it.

    Seconds if it stops as early as patience allows, and if it trains all its epochs.
    """

    least_seconds: float
    most_seconds: float
    disk_bytes: int


@dataclass(frozen=True)
class _Speed:
    train: float  # real tokens a second
    evaluation: float
    stored: int
    stages: int


def estimate(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Estimate | UnipeltError]]:
    """Measure each backbone, method and precision once, and count every cell's tokens.

    A cell that could not begin comes with the error instead.
    """
    shared, speeds = Shared(), dict[str, _Speed]()
    sizes: dict[Any, tuple[float, float, float]] = {}
    for cell in cells:
        experiment = cell.experiment
        key = _kind(experiment)
        data = experiment.data.model_copy(update={"data_seed": 0})
        place = (data, experiment.model.backbone, experiment.model.max_length)
        if key not in speeds or place not in sizes:
            try:
                speed, size = _measure(experiment, shared)
            except UnipeltError as error:
                yield cell, error
                continue
            speeds.setdefault(key, speed)
            sizes.setdefault(place, size)
        yield cell, _cost(experiment, speeds[key], sizes[place])


def _kind(experiment: Experiment) -> str:
    settings = experiment.settings()
    train = {key: settings["train"][key] for key in ("batch_size", "device", "precision")}
    return repr((settings["model"], settings["method"], train))


def _measure(experiment: Experiment, shared: Shared) -> tuple[_Speed, tuple[float, float, float]]:
    """Take a few steps, score a few rows, and count the tokens of train, dev and test."""
    experiment, prepared, tuned = plan(experiment, shared)
    loop = loop_of(experiment, prepared, tuned, shared)
    rates = []
    for event in loop.events():
        if isinstance(event, Step):
            rates.append(event.tokens_per_second)
            if len(rates) == STEPS:
                break
    dev = loop.dev[0]
    few = replace(dev, ids=dev.ids[:ROWS], types=dev.types and dev.types[:ROWS])
    compute_logits(tuned, few)
    start = time.perf_counter()
    compute_logits(tuned, few)
    evaluation = float(few.lengths.sum()) / (time.perf_counter() - start)
    counts = tuned.parameter_counts()
    stored = counts["stored_parameters"] + counts["head_parameters"]
    train = float(sum(course.train[0].lengths.sum() for course in loop.courses))
    scored = float(sum(course.dev[0].lengths.sum() for course in loop.courses))
    rows = sum(len(course.dev[0]) for course in loop.courses)
    test = scored / rows * sum(len(own.splits["test"]) for own in prepared)
    speed = _Speed(max(rates), evaluation, stored, len(loop.lengths))
    return speed, (train, scored, test)


def _cost(experiment: Experiment, speed: _Speed, size: tuple[float, float, float]) -> Estimate:
    train, dev, test = size
    settings = experiment.train
    epoch = train / speed.train + dev / speed.evaluation
    once = SETUP_SECONDS + test / speed.evaluation
    least = min(settings.epochs, speed.stages * (settings.patience + 1))
    disk = 4 * speed.stored + OTHER_BYTES
    return Estimate(once + least * epoch, once + settings.epochs * epoch, disk)
