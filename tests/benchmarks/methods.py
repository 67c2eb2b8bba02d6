"""Time every method against LoRA on the same rows, side by side.

    python tests/benchmarks/methods.py [METHOD ...]

One line a method: seconds of a pass over 96 train rows and over 300 dev rows, as medians of the
ratios to LoRA's in the same round. minilm, random tokens, lengths as in SST-2.
"""

import sys
import time
from statistics import median
from typing import Any

import numpy as np

from unipelt_cli import methods
from unipelt_cli.config.experiment import resolve
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import compute_logits
from unipelt_cli.tasks import get_task
from unipelt_cli.training.loop import Training

ROUNDS = 3
REFERENCE = "lora"


def rows(count: int) -> tuple[Encoded, Any]:
    """Draw rows of random tokens, 4 to 40 long, and labels in turn."""
    random = np.random.default_rng(0)
    ids = [random.integers(1000, 20000, random.integers(4, 41)).tolist() for _ in range(count)]
    return Encoded(ids, [[0] * len(row) for row in ids], 0), np.arange(count) % 2


def loop_of(name: str) -> Training:
    settings = {"data": {"task": "sst2"}, "method": {"name": name}, "train": {"epochs": 1000}}
    experiment = resolve([("", settings)])
    train, dev = rows(96), rows(300)
    loop = Training(build(experiment, 2), get_task("sst2"), train, dev, experiment.train)
    loop._prepare()
    return loop


def seconds(loop: Training) -> tuple[float, float]:
    """Return how long one epoch's training and one evaluation take."""
    start = time.perf_counter()
    for _ in loop.drive(loop.train_epoch()):
        pass
    middle = time.perf_counter()
    loop.progress.step = 0
    compute_logits(loop.tuned, loop.dev[0])
    return middle - start, time.perf_counter() - middle


def main() -> None:
    reference = loop_of(REFERENCE)
    seconds(reference)
    for name in sys.argv[1:] or methods.table():
        loop = loop_of(name)
        seconds(loop)
        pairs = [(seconds(loop), seconds(reference)) for _ in range(ROUNDS)]
        ratios = [median(own[part] / lora[part] for own, lora in pairs) for part in (0, 1)]
        spent = [median(own[part] for own, _ in pairs) for part in (0, 1)]
        sys.stdout.write(
            f"{name:20} train {spent[0]:6.2f} s, {ratios[0]:5.2f} of {REFERENCE}'s   "
            f"evaluation {spent[1]:6.2f} s, {ratios[1]:5.2f}\n"
        )


if __name__ == "__main__":
    main()
