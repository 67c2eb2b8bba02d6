"""Statistics on scores of several seeds and tasks: intervals, paired tests, and what they need.

Pure functions of numbers. Differences come in strata: one array for each task, its numbers being
one seed's difference each. Tasks are fixed, not a sample of tasks: nothing here speaks about
others than those given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from unipelt_cli.comparison.weighted_metrics import Numbers, WeightedMetric
from unipelt_cli.metrics import Values

Interval = tuple[float, float]
LEVEL = 0.95
ALPHA = 0.05
POWER = 0.8
DRAWS = 1000
FLIPS = 9999  # sign patterns tried; all of them where there are no more (13 pairs)
MOST_SEEDS = 1000
_CHUNK = 2_000_000  # weights held in memory at a time


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
    own = [np.asarray(values, dtype=np.float64) for values in strata]
    sizes = np.array([len(values) for values in own])
    parts = np.array([values.var(ddof=1) for values in own]) / sizes
    total, spread = parts.sum(), (parts**2 / (sizes - 1)).sum()
    degrees = total**2 / spread if spread > 0 else float((sizes - 1).sum())
    mean = float(np.mean([values.mean() for values in own]))
    return Estimate(mean, float(np.sqrt(total)) / len(own), float(degrees))


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
            each = [sample.metric(own, patterns[0], weights) for own in patterns[1:]]
            scores[part] += sample.share * np.mean(each, axis=0)
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _patterns(sample: Sample) -> tuple[Values, NDArray[np.int64]]:
    """Return the distinct rows (references first, then each seed) and how often each occurs."""
    table = np.vstack([sample.references[None], sample.predictions])
    found, counts = np.unique(table, axis=1, return_counts=True)
    return cast(Values, found), counts.astype(np.int64)


def sign_flip(strata: Sequence[ArrayLike], seed: int = 0) -> float:
    """Return the two-sided p value of a paired sign-flip test that the mean difference is 0.

    Exact where all sign patterns can be tried, else over seeded random ones.
    """
    own = [np.asarray(values, dtype=np.float64) for values in strata]
    weighted = np.concatenate([values / (len(values) * len(own)) for values in own])
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
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        adjusted[place] = largest
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
