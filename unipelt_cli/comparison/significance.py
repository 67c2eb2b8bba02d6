"""Statistics on scores of several seeds and tasks: intervals, paired tests, and what they need.

Pure functions of numbers. Differences come in strata: one array for each task, its numbers being
one seed's difference each. Tasks are fixed, not a sample of tasks: nothing here speaks about
others than those given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from unipelt_cli.models.resampling import LEVEL, Interval
from unipelt_cli.models.weighted_metrics import Numbers

ALPHA = 0.05
POWER = 0.8
FLIPS = 9999  # sign patterns tried; all of them where there are no more (13 pairs)
MOST_SEEDS = 1000


def mean_interval(values: ArrayLike, level: float = LEVEL) -> Interval | None:
    """Return Student's interval of the mean over seeds; None where one value shows no spread."""
    scores = np.asarray(values, dtype=np.float64)
    return stratified([scores]).interval(level) if len(scores) > 1 else None


@dataclass(frozen=True)
class Estimate:
    """A mean over fixed strata, its standard error and Welch-Satterthwaite degrees of freedom."""

    value: float
    error: float
    degrees: float

    def interval(self, level: float = LEVEL) -> Interval:
        """Return the t interval of the mean."""
        reach = float(stats.t.ppf((1 + level) / 2, self.degrees)) * self.error
        return self.value - reach, self.value + reach

    def equivalence(self, margin: float) -> float:
        """Return the p value of two one-sided tests (Schuirmann 1987) that |mean| >= margin.

        At most 0.05 exactly where the 90 % interval lies within the margin on both sides.
        """
        if self.error == 0:
            return 0.0 if abs(self.value) < margin else 1.0
        nearest = (margin - abs(self.value)) / self.error
        return float(stats.t.sf(nearest, self.degrees))


def stratified(strata: Sequence[ArrayLike]) -> Estimate:
    """Estimate the mean over strata of their means; each needs two values or more."""
    arrays = [np.asarray(values, dtype=np.float64) for values in strata]
    sizes = np.array([len(values) for values in arrays])
    parts = np.array([values.var(ddof=1) for values in arrays]) / sizes
    total, spread = parts.sum(), (parts**2 / (sizes - 1)).sum()
    degrees = total**2 / spread if spread > 0 else float((sizes - 1).sum())
    mean = float(np.mean([values.mean() for values in arrays]))
    return Estimate(mean, float(np.sqrt(total)) / len(arrays), float(degrees))


def sign_flip(strata: Sequence[ArrayLike], seed: int = 0) -> float:
    """Return the two-sided p value of a paired sign-flip test that the mean difference is 0.

    Exact where all sign patterns can be tried, else over seeded random ones.
    """
    arrays = [np.asarray(values, dtype=np.float64) for values in strata]
    weighted = np.concatenate([values / (len(values) * len(arrays)) for values in arrays])
    result = stats.permutation_test(
        (weighted,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values that hold for the whole family (Holm 1979), in the order given."""
    count, largest = len(p_values), 0.0
    adjusted = [0.0] * count
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def average_ranks(scores: ArrayLike) -> Numbers:
    """Return each method's mean rank over tasks (1 is best) of scores (methods, tasks)."""
    ranks: Numbers = stats.rankdata(-np.asarray(scores, dtype=np.float64), axis=0).mean(axis=1)
    return ranks


def record(differences: Sequence[float], margin: float) -> tuple[int, int, int]:
    """Count wins, ties and losses; a tie is a difference of at most the margin."""
    wins = sum(difference > margin for difference in differences)
    losses = sum(difference < -margin for difference in differences)
    return wins, len(differences) - wins - losses, losses


def pairs_needed(alpha: float = ALPHA) -> int:
    """Return the least number of pairs for which an exact two-sided sign-flip test reaches alpha.

    With n pairs its smallest p value is 2 / 2^n: 6 pairs for 0.05.
    """
    return math.ceil(math.log2(2 / alpha))


def seeds_needed(
    strata: Sequence[ArrayLike], alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Return how many seeds a task would show the difference seen, were it and its spread true.

    None where it is more than 1,000. At least as many as the sign-flip test needs.
    """
    variances = np.array([np.var(np.asarray(values), ddof=1) for values in strata])
    difference = abs(float(np.mean([np.mean(np.asarray(values)) for values in strata])))
    least = max(2, math.ceil(pairs_needed(alpha) / len(variances)))
    if difference == 0:
        return None
    if not variances.any():
        return least
    per_seed = np.sqrt(variances.sum()) / len(variances)
    factor = variances.sum() ** 2 / (variances**2).sum()
    for seeds in range(least, MOST_SEEDS + 1):
        degrees, shift = factor * (seeds - 1), difference * np.sqrt(seeds) / per_seed
        if _power(shift, degrees, alpha) >= power:
            return seeds
    return None


def _power(shift: float, degrees: float, alpha: float) -> float:
    """Return how often a two-sided t test shows a mean that is `shift` standard errors from 0."""
    bound = float(stats.t.ppf(1 - alpha / 2, degrees))
    if shift > bound + 10:
        return 1.0
    return float(stats.nct.sf(bound, degrees, shift) + stats.nct.cdf(-bound, degrees, shift))
