"""How sure a score is, as far as its rows say it: test rows drawn anew, again and again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from unipelt_cli.metrics import Values
from unipelt_cli.models.weighted_metrics import WeightedMetric, weighted_metric
from unipelt_cli.tasks import Task

Interval = tuple[float, float]
LEVEL = 0.95
DRAWS = 1000
MOST_VALUES = 2_000  # rows of a regression, whose interval takes a second: more are not drawn
_CHUNK = 2_000_000  # weights held in memory at a time


@dataclass(frozen=True)
class Sample:
    """Rows that several seeds predicted: `share` is their weight in the score, of 1 in total.

    references (rows,), predictions (seeds, rows).
    """

    references: Values
    predictions: Values
    metric: WeightedMetric
    share: float = 1.0


def bootstrap_interval(
    samples: Sequence[Sample],
    generator: np.random.Generator,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Return the percentile interval of the mean-over-seeds score when test rows are drawn anew.

    Rows are drawn with all seeds' predictions at once: the seeds saw the same rows.
    """
    scores = np.zeros(draws)
    for sample in samples:
        patterns, counts = _patterns(sample)
        size = max(1, _CHUNK // len(counts))
        for start in range(0, draws, size):
            part = slice(start, min(start + size, draws))
            weights = generator.multinomial(
                counts.sum(), counts / counts.sum(), size=part.stop - part.start
            ).astype(np.float64)
            each = [
                sample.metric(predictions, patterns[0], weights) for predictions in patterns[1:]
            ]
            scores[part] += sample.share * np.mean(each, axis=0)
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _patterns(sample: Sample) -> tuple[Values, NDArray[np.int64]]:
    """Return the distinct rows (references first, then each seed) and how often each occurs."""
    table = np.vstack([sample.references[None], sample.predictions])
    distinct, counts = np.unique(table, axis=1, return_counts=True)
    return cast(Values, distinct), counts.astype(np.int64)


def score_interval(task: Task, predictions: Values, references: Values) -> Interval | None:
    """Return the interval of a task's own metric on some rows (rows,); None where it takes long."""
    if task.is_regression and len(references) > MOST_VALUES:
        return None
    sample = Sample(references, predictions[None], weighted_metric(task))
    return bootstrap_interval([sample], np.random.default_rng(0))
