"""Choosing on dev alone: who goes on, what the budget leaves out, and that test is not touched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import experiment
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.presets import read_preset
from unipelt_cli.errors import CheckError, ConfigError
from unipelt_cli.runs.run import read_run
from unipelt_cli.sweeps import successive_halving
from unipelt_cli.sweeps.successive_halving import Candidate, Trial
from unipelt_cli.training.preparation import Shared, loop_of, plan

Backbones = Callable[[str], Path]


def make(method: str, score: float | None, *, rung: int = 0, stored: int = 0) -> Candidate:
    made = experiment(Path("minilm"), method)
    trials = [] if score is None else [Trial(made, score=score)]
    return Candidate(made, trials, rung, stored_parameters=stored, metric="accuracy")


def test_every_suggested_method_is_tried_with_three_rates() -> None:
    made: list[tuple[str, float]] = []

    def base(name: str, rate: float) -> Any:
        made.append((name, rate))
        return experiment(Path("minilm"), name)

    assert len(successive_halving.candidates(base)) == len(made) == 21
    assert {("lora", 0.00017), ("lora", 0.0005), ("lora", 0.0015)} <= set(made)
    made.clear()
    successive_halving.candidates(base, ["head"], [0.1, 0.2])
    assert made == [("head", 0.1), ("head", 0.2)]
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
    data = {"train_file": str(rows_file), "text": "text", "label": "label"}
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
    assert [own.rung for own in successive_halving.ranked(found)] == [2, 2, 2, *[0] * 6]
    assert len(turns) == 9 + 3 + 3
    last = successive_halving.best(found)
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
    assert [own.experiment.method_name for own in turns] == ["head", "lora"]
    assert turns[0].error == "the loss is nan at step 1"
    assert successive_halving.best(found) is turns[-1]


@pytest.fixture
def flags(backbone_dir: Backbones, rows_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("recommend", "--train-file", str(rows_file), "--text", "text", "--label", "label"),
        *("--model", str(backbone_dir("bert")), "--methods", "head,lora", "--rates", "1e-3,5e-3"),
        *("--set", "train.epochs=6", "--device", "cpu", "--out", str(tmp_path / "chosen")),
    ]


def test_the_command_leaves_preset_evidence_and_a_run_that_saw_test_once(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = Shared.encode

    def watched(self: Any, tuned: Any, own: Any, split: str, given: Any) -> Any:
        seen.append(split)
        return encode(self, tuned, own, split, given)

    monkeypatch.setattr(Shared, "encode", watched)
    done = CliRunner().invoke(app, [*flags, "--json"])
    assert done.exit_code == 0, done.stderr
    assert seen.count("test") == 1
    assert seen[-1] == "test"
    answer = json.loads(done.stdout)
    assert len(answer["candidates"]) == 4
    chosen = answer["candidates"][0]
    assert chosen == answer["chosen"]
    found = read_run(tmp_path / "chosen" / "run")
    assert found.result == answer["result"]
    assert found.experiment.method_name == chosen["method"]
    preset = read_preset(answer["preset"])
    assert preset["train"]["learning_rate"] == chosen["learning_rate"]
    assert json.loads((tmp_path / "chosen" / "evidence.json").read_text())["chosen"] == chosen
    again = CliRunner().invoke(app, flags)
    assert again.exit_code == 2
    assert f"{tmp_path / 'chosen'}: exists already" in again.stderr


def test_a_budget_that_ends_early_says_what_was_not_tried(flags: list[str]) -> None:
    done = CliRunner().invoke(app, [*flags, "--budget", "0.001s"])
    assert done.exit_code == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: the budget")]
    assert line == (
        "warning: the budget ended in round 1 of 3; not tried: lora at 0.001, head at 0.005, "
        "lora at 0.005"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--budget", "soon"], "--budget 'soon': not a time"),
        (["--rates", "fast"], "--rates 'fast': not numbers"),
        (["--rates", "100"], "train.learning_rate = 100.0 is not allowed"),
        (["--methods", "lorra"], "method 'lorra': no such method"),
    ],
)
def test_wrong_options_are_refused(flags: list[str], changed: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, [*flags, *changed])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[0] == f"error: {message}"
