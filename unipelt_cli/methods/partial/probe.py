"""The floor under every method: a linear model fitted at once to what the frozen backbone gives."""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.methods.base import CHECKS, AttachContext, Recipe
from unipelt_cli.methods.forms import LinearFit
from unipelt_cli.methods.linear_fits import Linear, Matrix, fit_classes, fit_values
from unipelt_cli.methods.partial.selective import Selective

FOLDS = 5
MOST_ROWS = 2000  # that the strength is chosen on; the last fit is on all
# 1 / the penalty, ten times apart. The first is taken where folds tell nothing.
PLAIN_STRENGTHS = (10.0, 1.0, 100.0, 1e3, 1e4)
STANDARDISED_STRENGTHS = (1e-2, 1e-4, 1e-3, 1e-1, 1.0)
LEAST = 1e-9  # probability that a held-out row is given at least
NARROWEST = 1e-6  # added to a feature's deviation: some never vary


@dataclass(frozen=True, config=CHECKS)
class Probe(Selective):
    """Fit a logistic regression, or ridge for values, to the frozen backbone's features.

    Its strength, and whether features are standardised first, is what folds of the train rows
    prefer by log loss or squared error: no dev row is read. scikit-learn's solvers, from 0.
    """

    @property
    def reads_frozen_features(self) -> bool:
        return True

    @property
    def has_closed_form(self) -> bool:
        return True

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        pass

    def fit_head(
        self, features: Tensor, labels: NDArray[Any], outputs: int, *, is_regression: bool
    ) -> LinearFit:
        x = features.detach().cpu().numpy().astype(np.float64)
        if is_regression:
            chosen = _choose(x, labels.astype(np.float64), fit_values, _squared_error)
        else:

            def fit(x: Matrix, y: NDArray[Any], strength: float) -> "Linear":
                return fit_classes(x, y, strength, outputs)

            chosen = _choose(x, labels.astype(np.int64), fit, _log_loss)
        return LinearFit(
            torch.from_numpy(chosen.weight.astype(np.float32)),
            torch.from_numpy(chosen.bias.astype(np.float32)),
        )


_Fit = Callable[[Matrix, NDArray[Any], float], Linear]
_Loss = Callable[[Matrix, NDArray[Any]], float]


def _choose(x: Matrix, y: NDArray[Any], fit: _Fit, loss: _Loss) -> Linear:
    """Fit with the normalisation and the strength that lose least on held-out train rows."""
    order = _dealt(y)
    few = np.sort(order[:: -(-len(order) // MOST_ROWS)])
    losses = [
        (_held_out_loss(x[few], y[few], fit, loss, strength, standardised), standardised, strength)
        for standardised, strengths in _CANDIDATES
        for strength in strengths
    ]
    _, standardised, strength = min(losses, key=lambda entry: entry[0])  # of equal ones the first
    return _fit_scaled(x, y, fit, strength, standardised)


_CANDIDATES = ((False, PLAIN_STRENGTHS), (True, STANDARDISED_STRENGTHS))


def _held_out_loss(
    x: Matrix, y: NDArray[Any], fit: _Fit, loss: _Loss, strength: float, standardised: bool
) -> float:
    """Return the summed loss of each row by a model of the other folds; 0 for too few rows."""
    return sum(
        loss(_fit_scaled(x[kept], y[kept], fit, strength, standardised)(x[held]), y[held])
        for kept, held in _folds(y)
    )


def _fit_scaled(
    x: Matrix, y: NDArray[Any], fit: _Fit, strength: float, standardised: bool
) -> Linear:
    if not standardised:
        return fit(x, y, strength)
    mean, deviation = x.mean(axis=0), x.std(axis=0) + NARROWEST
    return fit((x - mean) / deviation, y, strength).of_raw(mean, deviation)


def _dealt(y: NDArray[Any]) -> NDArray[np.int64]:
    """Return row numbers sorted by label, in their own order within it: dealt out, all alike."""
    return np.argsort(y, kind="stable")


def _folds(y: NDArray[Any]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (kept, held out) row numbers of stratified folds of two rows or more; else none."""
    count = min(FOLDS, len(y) // 2)
    if count < 2:
        return
    turns = np.empty(len(y), dtype=np.int64)
    turns[_dealt(y)] = np.arange(len(y)) % count
    for turn in range(count):
        yield np.flatnonzero(turns != turn), np.flatnonzero(turns == turn)


def _log_loss(logits: Matrix, y: NDArray[Any]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    chances = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    return float(-np.log(np.maximum(chances[np.arange(len(y)), y], LEAST)).sum())


def _squared_error(values: Matrix, y: NDArray[Any]) -> float:
    return float(np.square(values[:, 0] - y).sum())


METHODS = MappingProxyType(
    {
        "probe": Recipe(
            Probe(),
            1e-3,  # read by nothing: it takes no step
            "partial",
            "a linear model fitted to frozen features",
            "Alain and Bengio 2016",
            True,
            settings={
                "model": {"normalise": True, "head_dropout": 0.0},
                "train": {"epochs": 1},
            },
        )
    }
)
