"""What `recommend` shows of its search, to the letter, at 80 columns."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.candidates import Clock, Scripted, by_folds, on_dev
from support.models import experiment

from unipelt_cli.sweeps import successive_halving
from unipelt_cli.sweeps.candidates import Candidate, Choice
from unipelt_cli.terminal import search

SCORES = {
    "probe": [0.70],
    "lora": [0.90, 0.60, 0.60],
    "full": [0.85, 0.85, 0.82],
    "bitfit": [0.60, 0.60, 0.60],
}
Show = Callable[[list[Candidate], float], list[str]]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """Return what shows a search that takes a second a training, and gives its lines."""
    clock = Clock()
    monkeypatch.setattr(successive_halving, "time", clock)

    def show(candidates: list[Candidate], budget: float) -> list[str]:
        search.show_search(candidates, Scripted(SCORES, clock, 1.0), budget)
        talk, answer = (stream.splitlines() for stream in reversed(capsys.readouterr()))
        return [*talk, *answer]

    return show


def untried(*names: str) -> list[Candidate]:
    return [on_dev(name, rung=-1) for name in names]


def test_a_search_that_comes_to_its_end(show: Show) -> None:
    assert show(untried(*SCORES), 1000) == [
        "4 candidates, 17 min in all: dev alone decides, test is not looked at",
        "round 1  probe: accuracy 0.7000 after epoch 0",
        "round 1  lora at 0.0005: accuracy 0.9000 after epoch 0",
        "round 1  full at 2e-05: accuracy 0.8500 after epoch 0",
        "round 1  bitfit at 0.001: accuracy 0.6000 after epoch 0",
        "round 2  lora at 0.0005: accuracy 0.9000 after epoch 0",
        "round 3  lora at 0.0005: accuracy 0.7000 after epoch 0, 3 seeds",
        "round 3  full at 2e-05: accuracy 0.8400 after epoch 0, 3 seeds",
        "  method  rate    dev accuracy    seeds  epochs  stored",
        "* full    2e-05   0.8400 ±0.0173      3       0       0",
        "  probe   -       0.7000              1       0       0",
        "  lora    0.0005  0.7000 ±0.1732      3       0       0",
        "  bitfit  0.001   0.6000              1       0       0",
        "1 of 3 beat probe, which trains nothing in the backbone",
    ]


def test_a_search_that_the_budget_ends_in_its_first_round(show: Show) -> None:
    lines = show(untried("probe", "lora", "full"), 2.0)
    assert lines[3] == "warning: the budget ended in round 1 of 3; not tried: full at 2e-05"


def test_a_search_that_ends_in_time_but_does_not_try_all(show: Show) -> None:
    names = ("probe", "full", "lora", *["bitfit"] * 8)
    warned = [line for line in show(untried(*names), 12.0) if line.startswith("warning: ")]
    assert warned == [
        "warning: the budget was too short for all; not tried: "
        + ", ".join(["bitfit at 0.001"] * 6)
    ]
    names = ("probe", "full", "lora", *["bitfit"] * 9)
    warned = [line for line in show(untried(*names), 12.0) if line.startswith("warning: ")]
    assert warned[0].endswith(", ".join(["bitfit at 0.001"] * 6) + " and 1 more")


def test_folds_that_the_budget_left_undecided_are_said() -> None:
    floor = by_folds("probe", 0.80, 0.80, 0.90, 0.90, 0.90)
    tried, stopped = by_folds("lora", 0.90, 0.90, 0.80), by_folds("full", 0.83)
    assert search._undecided([floor, tried, stopped], floor) == (
        "on 20 rows full at 2e-05 has 0.8300, the chosen probe 0.8000: the budget ended before "
        "more folds could decide"
    )
    assert search._undecided([floor, tried], floor) is None


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (Choice("probe", 1e-3), "probe"),
        (Choice("lora", 5e-4), "lora at 0.0005"),
        (Choice("lora", 5e-4, "few-labels"), "lora few-labels at 0.0005"),
        (
            Choice("lora", 5e-4, "few-labels", "org/bge", "bge"),
            "lora few-labels at 0.0005 on bge",
        ),
    ],
)
def test_a_candidate_is_called_by_all_that_it_is_made_of(choice: Choice, name: str) -> None:
    assert Candidate(choice, experiment(Path("minilm"), choice.method)).name == name
