"""The metrics by which predictions are scored: scikit-learn's and scipy's, as fractions."""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64] | NDArray[np.int64]


def _correlation(predictions: Values, references: Values, kind: str) -> float:
    from scipy import stats

    if len(predictions) < 2:
        return 0.0
    with warnings.catch_warnings():
        # A collapsed run predicts a constant: its correlation is undefined and counts as 0.
        warnings.simplefilter("ignore")
        value = float(getattr(stats, kind)(predictions, references).statistic)
    return 0.0 if np.isnan(value) else value


def _accuracy(predictions: Values, references: Values, outputs: int) -> float:
    return float(np.mean(predictions == references))


def _f1(predictions: Values, references: Values, outputs: int) -> float:
    from sklearn.metrics import f1_score

    average = "binary" if outputs == 2 else "macro"
    return float(f1_score(references, predictions, average=average, zero_division=0.0))


def _macro_f1(predictions: Values, references: Values, outputs: int) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def _matthews(predictions: Values, references: Values, outputs: int) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one label only: the library says so, and gives 0
        return float(matthews_corrcoef(references, predictions))


def _mean_squared_error(predictions: Values, references: Values, outputs: int) -> float:
    return float(np.mean((predictions - references) ** 2))


def compare_with_mean(predictions: Values, references: Values, mean: float) -> dict[str, float]:
    """Return the mean squared error of predictions, and of always saying the train labels' mean."""
    constant = np.full(len(references), mean)
    return {
        "mse": _mean_squared_error(predictions, references, 1),
        "mse_of_mean": _mean_squared_error(constant, references, 1),
    }


def loses_to_mean(compared: Mapping[str, float]) -> bool:
    """Say of what `compare_with_mean` returned whether the mean would have done as well."""
    return compared["mse"] > 0 and compared["mse"] >= compared["mse_of_mean"]


METRICS: Mapping[str, Callable[[Values, Values, int], float]] = MappingProxyType(
    {
        "accuracy": _accuracy,
        "f1": _f1,
        "macro_f1": _macro_f1,
        "matthews": _matthews,
        "spearman": lambda p, r, _: _correlation(p, r, "spearmanr"),
        "pearson": lambda p, r, _: _correlation(p, r, "pearsonr"),
        "mse": _mean_squared_error,
    }
)
CLASSIFICATION_METRICS = ("accuracy", "f1", "macro_f1", "matthews")
REGRESSION_METRICS = ("spearman", "pearson", "mse")


def is_better(metric: str, score: float, best: float) -> bool:
    """Say whether `score` is strictly better than `best`."""
    return score < best if metric == "mse" else score > best


def lost(metric: str, before: float, after: float) -> float:
    """Return how much worse a score has become; below 0 where it is better."""
    return after - before if is_better(metric, 0, 1) else before - after
