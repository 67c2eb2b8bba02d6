"""Linear models fitted at once to features of few rows, by scikit-learn's solvers, from 0."""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
ABSENT = -30.0
"""Logit of a class without a train row: those of the others have a mean of 0."""


@dataclass(frozen=True)
class Linear:
    """A fitted model: a weight for each output and feature, and a bias for each output."""

    weight: Matrix  # (outputs, features)
    bias: Matrix  # (outputs,)

    def __call__(self, x: Matrix) -> Matrix:  # (rows, features) -> (rows, outputs)
        answers: Matrix = x @ self.weight.T + self.bias
        return answers

    def of_raw(self, mean: Matrix, deviation: Matrix) -> "Linear":
        """Return what gives the same on features that are not standardised."""
        weight = self.weight / deviation
        return Linear(weight, self.bias - weight @ mean)


def fit_values(x: Matrix, y: NDArray[Any], strength: float) -> Linear:
    """Fit ridge regression to values (rows,) of features (rows, size); 1 / `strength` penalises."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1 / strength).fit(x, y)
    return Linear(np.reshape(model.coef_, (1, -1)), np.reshape(model.intercept_, (1,)))


def fit_classes(x: Matrix, y: NDArray[Any], strength: float, outputs: int) -> Linear:
    """Fit logistic regression to the classes that have a row of features (rows, size).

    Of `outputs` classes one without a row gets a logit that is never largest. `strength` is
    scikit-learn's C.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((outputs, x.shape[1])), np.full(outputs, ABSENT)
    present = np.unique(y)
    bias[present] = 0.0
    if len(present) == 1:
        return Linear(weight, bias)
    # Matrices this small are shared out among threads at twenty times the cost of one.
    with _thread_pools().limit(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes")  # 77 of 100 rows may be
        model = LogisticRegression(C=strength, max_iter=1000).fit(x, y)
    # Of two classes there is one logit, their difference; of more their mean is taken out.
    halves = np.array([[-0.5], [0.5]]) if len(present) == 2 else np.eye(len(present))
    weights, offsets = halves @ model.coef_, halves @ model.intercept_
    weight[present] = weights - weights.mean(axis=0)
    bias[present] = offsets - offsets.mean()
    return Linear(weight, bias)


@cache
def _thread_pools() -> Any:
    """Return what limits the threads of the solvers' libraries: to find those takes a while."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
