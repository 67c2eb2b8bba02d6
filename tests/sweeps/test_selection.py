"""Nobody is chosen who is clearly beaten on the rows that both were judged on."""

import itertools
import random

import pytest
from support.candidates import by_folds, on_dev

from unipelt_cli.errors import ConfigError
from unipelt_cli.sweeps.candidates import Candidate
from unipelt_cli.sweeps.selection import HALF_A_POINT, best, contender, floors, margin, ranked


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.choice.method for candidate in candidates]


def test_of_those_trained_to_the_end_the_best_mean_is_chosen() -> None:
    candidates = [
        on_dev("lora", 0.70, 0.74, 0.72, is_complete=True),
        on_dev("full", 0.60, 0.90, 0.60, is_complete=True),
        on_dev("probe", 0.71, is_complete=True),
    ]
    assert names(ranked(candidates)) == ["lora", "probe", "full"]


@pytest.mark.parametrize("rung", [0, 1])
def test_who_came_further_is_not_chosen_over_what_is_clearly_better(rung: int) -> None:
    further = on_dev("lora", 0.80, 0.80, 0.80, rung=2, is_complete=True)
    stopped = on_dev("full", 0.81, rung=rung)
    assert best([further, stopped]) is stopped
    stopped.trials[0].score = 0.804
    assert best([further, stopped]) is further, "within half a point the better known one"


def test_who_came_further_is_not_chosen_over_a_better_floor() -> None:
    floor = on_dev("probe", 0.85, rung=0)
    further = on_dev("lora", 0.80, 0.80, rung=2)
    assert best([further, floor]) is floor
    assert best([further, on_dev("probe", 0.70)]) is further


def test_a_floor_that_nothing_beats_is_chosen_also_where_it_is_matched() -> None:
    floor = on_dev("probe", 0.8, is_complete=True, stored=9)
    assert best([on_dev("head", 0.8, is_complete=True, stored=1), floor]) is floor
    assert best([on_dev("head", 0.79, is_complete=True, stored=1), floor]) is floor


def test_of_equal_ones_the_smaller_is_chosen() -> None:
    large, small = on_dev("full", 0.7, stored=2), on_dev("bitfit", 0.7, stored=1)
    assert ranked([large, small]) == [small, large]


def test_folds_are_compared_on_those_that_both_have() -> None:
    # On its one fold `full` is far ahead of others' means, and yet no better than `lora` there.
    thorough = by_folds("lora", 0.95, 0.90, 0.85, 0.85, 0.84)
    stopped = by_folds("full", 0.95)
    assert margin(stopped, thorough) == 0
    assert best([stopped, thorough]) is thorough
    ahead = by_folds("full", 1.0)
    assert margin(ahead, thorough) == pytest.approx(0.05)
    assert best([ahead, thorough]) is ahead


def test_where_folds_contradict_each_other_the_least_beaten_is_chosen() -> None:
    floor = by_folds("probe", 0.80, 0.80, 0.90, 0.90, 0.90)
    tried = by_folds("lora", 0.90, 0.90, 0.80)  # beaten by the floor on three folds
    stopped = by_folds("full", 0.83)  # beats the floor on one, and is beaten by `lora` there
    assert (margin(stopped, floor), margin(floor, tried), margin(tried, stopped)) == (
        pytest.approx(0.03),
        pytest.approx(0.1),
        pytest.approx(0.07),
    )
    assert best([tried, stopped, floor]) is floor


def test_an_error_is_better_the_smaller_it_is_and_has_no_half_point() -> None:
    known = on_dev("lora", 0.004, 0.004, rung=2, metric="mse")
    smaller = on_dev("full", 0.001, metric="mse")
    assert best([known, smaller]) is smaller
    assert names(ranked([known, smaller, on_dev("probe", 0.9, metric="mse")])) == [
        *("full", "lora", "probe"),
    ]


def test_no_candidate_beats_the_chosen_one_by_more_than_half_a_point_on_dev() -> None:
    drawn = random.Random(1)
    methods = ("lora", "full", "adapter", "bitfit", "head")
    for _ in range(300):
        candidates = [
            on_dev(
                method,
                *(drawn.choice((0.7, 0.702, 0.71, 0.75)) for _ in range(drawn.randint(1, 3))),
                rung=drawn.randint(0, 2),
                stored=drawn.randint(1, 9),
            )
            for method in methods
        ]
        floor = on_dev("probe", drawn.choice((0.7, 0.72)), is_complete=True)
        chosen = best([*candidates, floor])
        assert chosen.score is not None
        scores = [each.score for each in [*candidates, floor] if each.score is not None]
        assert max(scores) - chosen.score <= HALF_A_POINT + 1e-9


def test_no_order_of_candidates_changes_what_is_chosen() -> None:
    candidates = [on_dev("lora", 0.70), on_dev("full", 0.72, rung=1), on_dev("probe", 0.71)]
    for order in itertools.permutations(candidates):
        assert best(order) is candidates[1]


def test_what_failed_is_not_chosen_and_where_all_failed_the_first_reason_is_said() -> None:
    failed = on_dev("adapter", error="the loss is nan")
    assert ranked([failed]) == []
    assert contender([failed]) is None
    with pytest.raises(ConfigError, match="no candidate could be trained: the loss is nan"):
        best([failed])
    assert best([failed, on_dev("lora", 0.1)]).choice.method == "lora"


def test_who_must_be_trained_before_anyone_is_chosen() -> None:
    complete = on_dev("lora", 0.8, 0.8, 0.8, rung=2, is_complete=True)
    better, best_yet = on_dev("full", 0.802), on_dev("bitfit", 0.804)
    assert contender([complete, better, best_yet]) is best_yet
    assert contender([complete, on_dev("full", 0.8)]) is None
    far = on_dev("full", 0.9)
    assert contender([complete, far]) is far, "the one to choose, as it stands"


def test_the_floor_of_several_backbones_is_the_best_one() -> None:
    candidates = [on_dev("probe", 0.6), on_dev("lora", 0.9), on_dev("probe", 0.7)]
    assert floors(candidates) == [candidates[2], candidates[0]]
