"""The search keeps the better third, on dev alone."""

from pathlib import Path
from typing import Any

import pytest
from support.backbones import Backbones
from support.models import experiment

from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.errors import CheckError, ConfigError
from unipelt_cli.sweeps import successive_halving
from unipelt_cli.sweeps.successive_halving import Candidate, Trial
from unipelt_cli.training.planning import Shared, loop_of, plan


def make(method: str, score: float | None, *, rung: int = 0, stored: int = 0) -> Candidate:
    made = experiment(Path("minilm"), method)
    trials = [] if score is None else [Trial(made, score=score)]
    return Candidate(made, trials, rung, stored_parameters=stored, metric="accuracy")


def test_every_suggested_method_is_tried_with_three_rates() -> None:
    made: list[tuple[str, float]] = []

    def base(name: str, rate: float) -> Any:
        made.append((name, rate))
        return experiment(Path("minilm"), name)

    assert len(successive_halving.candidates(base)) == len(made) == 22
    assert {("lora", 0.00017), ("lora", 0.0005), ("lora", 0.0015)} <= set(made)
    made.clear()
    successive_halving.candidates(base, ["head"], [0.1, 0.2])
    assert made == [("probe", 0.001), ("head", 0.1), ("head", 0.2)]
    with pytest.raises(ConfigError, match="method 'lorra': no such method"):
        successive_halving.candidates(base, ["lorra"])


def test_who_came_further_ranks_first_then_the_score_then_the_size() -> None:
    small = make("head", 0.7, stored=1)
    others = [make("lora", 0.7, stored=2), make("full", 0.9), make("bitfit", 0.6, rung=1)]
    failed = make("adapter", None)
    failed.error = "the loss is nan"
    found = successive_halving.ranked([*others, failed, small])
    assert [c.experiment.method_name for c in found] == ["bitfit", "full", "head", "lora"]
    assert successive_halving.best(found) is found[0]
    with pytest.raises(ConfigError, match="no candidate could be trained: the loss is nan"):
        successive_halving.best([failed])


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert successive_halving.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0m", "-5m", "m", "1e9s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a time"):
        successive_halving.seconds_of(text)


def settings(directory: Path, rows_file: Path, name: str, rate: float) -> Experiment:
    data = {"folds": 0, "train_file": str(rows_file), "text": "text", "label": "label"}
    train = {"learning_rate": rate, "epochs": 16, "device": "cpu", "precision": "fp32"}
    own = {"data": data, "model": {"backbone": str(directory)}, "train": train}
    return resolve([("", own | {"method": {"name": name}})])


def test_a_third_goes_on_from_where_it_stood(backbone_dir: Backbones, rows_file: Path) -> None:
    directory = backbone_dir("bert")
    found = successive_halving.candidates(
        lambda name, rate: settings(directory, rows_file, name, rate),
        ["lora", "head", "adapter"],
        [1e-3, 5e-3, 1e-2],
    )
    turns = list(successive_halving.search(found, 1000))
    assert [own.rung for own in successive_halving.ranked(found)] == [*[2] * 4, *[0] * 6]
    assert len(turns) == 10 + 4 + 4, "the floor goes on with those that are kept"
    (floor,) = [own for own in found if own.is_floor]
    assert len(set(floor.scores)) == 1, "it does not depend on a seed"
    last = next(own for own in successive_halving.ranked(found) if own is not floor)
    assert [trial.experiment.train.seed for trial in last.trials] == [42, 43, 44]
    assert all(trial.is_over for trial in last.trials)
    first = last.trials[0]
    experiment_, prepared, tuned = plan(first.experiment)
    loop = loop_of(experiment_, prepared, tuned, Shared())
    list(loop.events())
    assert first.score == loop.progress.best_score, "as if it had trained in one go"
    assert first.epoch == loop.progress.epoch - 1


def test_a_budget_ends_the_search_and_a_failure_does_not(
    backbone_dir: Backbones, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = backbone_dir("bert")
    advance = successive_halving._advance

    def failing(candidate: Candidate, *given: Any) -> None:
        if candidate.experiment.method_name == "head":
            raise CheckError("the loss is nan at step 1", "lower it")
        advance(candidate, *given)

    monkeypatch.setattr(successive_halving, "_advance", failing)
    found = successive_halving.candidates(
        lambda name, rate: settings(directory, rows_file, name, rate), ["head", "lora", "adapter"]
    )
    turns = list(successive_halving.search(found, 1e-6))
    assert [own.experiment.method_name for own in turns] == ["probe", "head", "lora"]
    assert turns[1].error == "the loss is nan at step 1"
    assert {own.experiment.method_name for own in successive_halving.ranked(found)} == {
        "probe",
        "lora",
    }
