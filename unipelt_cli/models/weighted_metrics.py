"""The tasks' metrics on weighted rows, for many weightings at once: what a bootstrap asks for.

A weight says how often a row was drawn: each function gives what the one of `metrics.METRICS` gives
on rows repeated so often.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

import numpy as np
from numpy.typing import NDArray

from unipelt_cli.metrics import Values
from unipelt_cli.tasks import Task

Numbers = NDArray[np.float64]
WeightedMetric = Callable[[Values, Values, Numbers], Numbers]
"""(predictions (rows,), references (rows,), weights (draws, rows)) -> scores (draws,)."""
_Kind = Callable[[Values, Values, Numbers, int], Numbers]


def weighted_metric(task: Task) -> WeightedMetric:
    """Return a task's own metric as a function of weighted rows."""
    kind, outputs = METRICS[task.metric], task.outputs
    return lambda predictions, references, weights: kind(
        task.positive_last(predictions), task.positive_last(references), weights, outputs
    )


def _accuracy(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    return _mean((predictions == references).astype(np.float64), weights)


def _mse(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    return _mean(((predictions - references) ** 2).astype(np.float64), weights)


def _mean(values: Numbers, weights: Numbers) -> Numbers:
    return cast(Numbers, weights @ values / weights.sum(axis=1))


def _confusion(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    """Return how often each label (second axis) was taken for each (third): (draws, n, n)."""
    cells = np.eye(outputs * outputs)[references.astype(int) * outputs + predictions.astype(int)]
    return cast(Numbers, (weights @ cells).reshape(-1, outputs, outputs))


def _f1(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    scores, occurs = _f1_by_label(predictions, references, weights, outputs)
    return scores[:, 1] if outputs == 2 else _divide(scores.sum(axis=1), occurs.sum(axis=1))


def _macro_f1(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    scores, occurs = _f1_by_label(predictions, references, weights, outputs)
    return _divide(scores.sum(axis=1), occurs.sum(axis=1))


def _f1_by_label(
    predictions: Values, references: Values, weights: Numbers, outputs: int
) -> tuple[Numbers, NDArray[np.bool_]]:
    """Return each label's F1 (draws, outputs), and whether it occurs at all."""
    counts = _confusion(predictions, references, weights, outputs)
    both = counts.sum(axis=1) + counts.sum(axis=2)
    return _divide(2 * np.einsum("dii->di", counts), both), both > 0


def _matthews(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    """Gorodkin 2004: the correlation of two labellings from their confusion matrix."""
    counts = _confusion(predictions, references, weights, outputs)
    total, right = counts.sum(axis=(1, 2)), np.einsum("dii->d", counts)
    true, predicted = counts.sum(axis=2), counts.sum(axis=1)
    common = right * total - (true * predicted).sum(axis=1)
    spread = (total**2 - (true**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    return _divide(common, np.sqrt(spread))


def _pearson(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    shape = weights.shape
    return _correlation(
        np.broadcast_to(predictions, shape), np.broadcast_to(references, shape), weights
    )


def _spearman(predictions: Values, references: Values, weights: Numbers, outputs: int) -> Numbers:
    return _correlation(_ranks(predictions, weights), _ranks(references, weights), weights)


def _ranks(values: Values, weights: Numbers) -> Numbers:
    """Return each row's middle rank (draws, rows) among rows repeated by their weights."""
    _, places = np.unique(values, return_inverse=True)
    sums = np.zeros((places.max() + 1, len(weights)))
    np.add.at(sums, places, weights.T)
    ranks = sums.cumsum(axis=0) - (sums - 1) / 2
    return ranks[places].T


def _correlation(first: Numbers, second: Numbers, weights: Numbers) -> Numbers:
    total = weights.sum(axis=1, keepdims=True)
    first = first - (weights * first).sum(axis=1, keepdims=True) / total
    second = second - (weights * second).sum(axis=1, keepdims=True) / total
    squares = [(weights * values**2).sum(axis=1) for values in (first, second)]
    return _divide((weights * first * second).sum(axis=1), np.sqrt(squares[0] * squares[1]))


def _divide(numerator: Numbers, denominator: Numbers) -> Numbers:
    """Divide, where 0 / 0 (constant predictions) counts as 0."""
    known = denominator > 0
    return np.where(known, numerator, 0.0) / np.where(known, denominator, 1.0)


METRICS: Mapping[str, _Kind] = MappingProxyType(
    {
        "accuracy": _accuracy,
        "f1": _f1,
        "macro_f1": _macro_f1,
        "matthews": _matthews,
        "spearman": _spearman,
        "pearson": _pearson,
        "mse": _mse,
    }
)
