"""Statistics on made-up data whose truth is known: they are as often wrong as they say."""

from collections.abc import Callable

import numpy as np
import pytest

from unipelt_cli.comparison import significance
from unipelt_cli.metrics import METRICS
from unipelt_cli.models import weighted_metrics
from unipelt_cli.models.resampling import Sample, bootstrap_interval
from unipelt_cli.tasks import TASKS, Task

TRIALS = 2000
NOISE = 4 * (0.05 * 0.95 / TRIALS) ** 0.5  # four standard errors of a share near 5 %


def share(trial: Callable[[np.random.Generator], bool], trials: int = TRIALS) -> float:
    drawn = np.random.default_rng(0)
    return float(np.mean([trial(drawn) for _ in range(trials)]))


def covers(interval: tuple[float, float] | None, truth: float) -> bool:
    assert interval is not None
    return interval[0] <= truth <= interval[1]


def test_the_interval_of_a_mean_covers_it_95_times_in_100() -> None:
    found = share(lambda drawn: covers(significance.mean_interval(drawn.normal(0.7, 0.1, 5)), 0.7))
    assert abs(found - 0.95) < NOISE
    # With the normal distribution's 1.96 it would not: five seeds are few.
    narrow = share(
        lambda drawn: covers(significance.mean_interval(drawn.normal(0.7, 0.1, 5), 0.85), 0.7)
    )
    assert abs(narrow - 0.95) > NOISE
    assert significance.mean_interval([0.7]) is None


def tasks(drawn: np.random.Generator, shift: float, spreads: tuple[float, ...]) -> list[np.ndarray]:
    """Draw each task's differences: the tasks' own means add up to `shift` on average."""
    own = np.linspace(-0.05, 0.05, len(spreads))
    return [shift + mean + drawn.normal(0, s, 5) for mean, s in zip(own, spreads, strict=True)]


def test_the_stratified_interval_covers_though_tasks_differ() -> None:
    spreads = (0.002, 0.01, 0.03, 0.1)

    def stratified(drawn: np.random.Generator) -> bool:
        estimate = significance.stratified(tasks(drawn, 0.02, spreads))
        return covers(estimate.interval(), 0.02)

    def pooled(drawn: np.random.Generator) -> bool:
        pairs = np.concatenate(tasks(drawn, 0.02, spreads))
        return covers(significance.mean_interval(pairs), 0.02)

    assert abs(share(stratified) - 0.95) < NOISE
    assert share(pooled) > 0.95 + NOISE  # what the tasks differ by would count as noise


@pytest.mark.parametrize("metric", ["accuracy", "f1", "spearman"])
def test_the_interval_over_rows_covers_the_score_on_all_rows(metric: str) -> None:
    is_value = metric == "spearman"
    task = Task("x", ("text",), () if is_value else ("no", "yes"), metric)
    population = np.random.default_rng(1)
    count = 100_000
    if is_value:
        expected = population.normal(size=count)
        predicted = np.stack([expected + population.normal(size=count) for _ in range(2)])
    else:
        expected = population.integers(0, 2, count)
        wrong = population.random((2, count)) < 0.2
        predicted = np.where(wrong, 1 - expected, expected)
    truth = np.mean([task.score(own, expected)[metric] for own in predicted])

    def trial(drawn: np.random.Generator) -> bool:
        rows = drawn.integers(0, count, 200)
        sample = Sample(expected[rows], predicted[:, rows], weighted_metrics.weighted_metric(task))
        return covers(bootstrap_interval([sample], drawn, draws=400), float(truth))

    trials = 400
    found = share(trial, trials)
    assert abs(found - 0.95) < 0.01 + 4 * (0.05 * 0.95 / trials) ** 0.5


@pytest.mark.parametrize("metric", METRICS)
def test_weighted_metrics_are_the_tasks_own_on_repeated_rows(metric: str) -> None:
    drawn = np.random.default_rng(2)
    is_value = metric in ("spearman", "pearson", "mse")
    for labels in [()] if is_value else [("a", "b"), ("a", "b", "c", "d")]:
        task = Task("x", ("text",), labels, metric)
        expected = drawn.integers(0, max(2, len(labels)), 30)
        noise = drawn.integers(0, max(2, len(labels)), 30)
        predicted = np.where(drawn.random(30) < 0.6, expected, noise)
        constant = np.zeros(30, dtype=np.int64)
        if is_value:
            expected, predicted = expected + drawn.random(30).round(1), predicted * 1.5
        weights = drawn.multinomial(30, [1 / 30] * 30, size=50)
        for own in (predicted, constant):
            found = weighted_metrics.weighted_metric(task)(own, expected, weights.astype(float))
            repeated = [
                task.score(np.repeat(own, w), np.repeat(expected, w))[metric] for w in weights
            ]
            np.testing.assert_allclose(found, repeated, atol=1e-12)


def test_the_paired_test_is_wrong_5_times_in_100_and_finds_what_is_there() -> None:
    def finds(shift: float) -> Callable[[np.random.Generator], bool]:
        return lambda drawn: (
            significance.sign_flip([drawn.normal(shift, 0.02, 4) for _ in range(2)]) <= 0.05
        )

    assert 0.05 - NOISE < share(finds(0.0)) < 0.05 + NOISE
    assert share(finds(0.03), 300) > 0.9


def test_the_paired_test_is_exact_and_six_pairs_are_the_least() -> None:
    assert significance.sign_flip([np.full(5, 0.1)]) == 2 / 2**5
    assert significance.sign_flip([np.full(6, 0.1)]) == 2 / 2**6
    assert significance.pairs_needed() == 6
    assert significance.sign_flip([[0.1, 0.2], [0.3, -0.05, 0.4]]) == pytest.approx(4 / 32)
    assert significance.sign_flip([np.zeros(6)]) == 1.0
    many = np.random.default_rng(0).normal(0.01, 0.03, 40)
    assert significance.sign_flip([many]) == significance.sign_flip([many])


def test_holm_keeps_the_whole_family_at_5_in_100() -> None:
    trials, drawn = 1000, np.random.default_rng(0)
    found = np.zeros(2)
    for _ in range(trials):
        p_values = [significance.sign_flip([drawn.normal(0, 0.02, 9)]) for _ in range(4)]
        found += [min(significance.holm(p_values)) <= 0.05, min(p_values) <= 0.05]
    corrected, plain = found / trials
    assert corrected < 0.05 + 4 * (0.05 * 0.95 / trials) ** 0.5
    assert plain > 0.1


def test_holm_by_hand() -> None:
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([]) == []


def test_equivalence_is_wrong_5_times_in_100_at_the_margins_edge() -> None:
    def equivalent(shift: float) -> Callable[[np.random.Generator], bool]:
        def trial(drawn: np.random.Generator) -> bool:
            estimate = significance.stratified(tasks(drawn, shift, (0.004, 0.004)))
            low, high = estimate.interval(0.9)
            found = estimate.equivalence(0.01) <= 0.05
            assert found == (low >= -0.01 and high <= 0.01)
            return found

        return trial

    assert abs(share(equivalent(0.01)) - 0.05) < NOISE
    assert abs(share(equivalent(-0.01)) - 0.05) < NOISE
    assert share(equivalent(0.0)) > 0.9


def test_equal_runs_are_equivalent_without_any_spread() -> None:
    estimate = significance.stratified([[0.0, 0.0], [0.0, 0.0]])
    assert (estimate.interval(), estimate.equivalence(0.01)) == ((0.0, 0.0), 0.0)
    assert significance.stratified([[0.02, 0.02]]).equivalence(0.01) == 1.0


def test_ranks_and_records() -> None:
    scores = [[0.9, 0.8, 0.7], [0.8, 0.8, 0.9], [0.7, 0.1, 0.8]]
    assert significance.average_ranks(scores).tolist() == pytest.approx([5.5 / 3, 4.5 / 3, 8 / 3])
    assert significance.record([0.02, 0.01, -0.01, 0.0, -0.3], 0.01) == (1, 3, 1)


def test_so_many_seeds_would_have_been_enough_4_times_in_5() -> None:
    """Seeds are counted for a difference of half its spread; the t test then finds it in 80 %."""
    values = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    values = 0.01 + values / values.std(ddof=1) * 0.02
    needed = significance.seeds_needed([values])
    assert needed == 34  # the textbook's: power 0.8 for an effect of 0.5 in a paired t test

    def finds(drawn: np.random.Generator) -> bool:
        low, high = significance.stratified([drawn.normal(0.01, 0.02, needed)]).interval()
        return not low <= 0 <= high

    assert abs(share(finds) - 0.8) < 4 * (0.2 * 0.8 / TRIALS) ** 0.5


def test_seeds_needed_at_the_ends() -> None:
    assert significance.seeds_needed([[0.1, 0.1]]) == 6
    assert significance.seeds_needed([[0.1, 0.1]] * 8) == 2
    assert significance.seeds_needed([[0.1, -0.1]]) is None
    assert significance.seeds_needed([[0.1, -0.0999]]) is None


def test_every_metric_of_a_task_has_a_weighted_one() -> None:
    assert weighted_metrics.METRICS.keys() == METRICS.keys()
    assert {task.metric for task in TASKS.values()} <= weighted_metrics.METRICS.keys()
