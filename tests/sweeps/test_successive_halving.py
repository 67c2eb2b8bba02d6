"""The search keeps the better third, on dev rows or by folds, and never looks at test."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from support.backbones import Backbones
from support.candidates import Clock, Scripted, on_dev
from support.rows import write_rows

from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.config.presets import recipe_settings
from unipelt_cli.data.folds import assign_folds
from unipelt_cli.data.prepared_directory import Prepared
from unipelt_cli.errors import CheckError, ConfigError
from unipelt_cli.models.evaluation import references
from unipelt_cli.runs.run import read_run
from unipelt_cli.sweeps import selection, successive_halving
from unipelt_cli.sweeps.candidates import Candidate, Choice, choices, make_candidates
from unipelt_cli.sweeps.judges import FOLDS, DevJudge, FoldJudge, judge_of
from unipelt_cli.training import execution
from unipelt_cli.training.planning import RowCache, loop_of, plan

Describe = Callable[[Choice], Experiment]


@pytest.fixture
def describe(backbone_dir: Backbones, rows_file: Path) -> Describe:
    """Return what makes an experiment with dev rows of a choice."""
    return describing(backbone_dir("bert"), rows_file, {"folds": 0})


def describing(backbone: Path, rows: Path, data: dict[str, Any], epochs: int = 16) -> Describe:
    def describe(choice: Choice) -> Experiment:
        train = {"learning_rate": choice.rate, "epochs": epochs, "device": "cpu"}
        settings = {
            "data": {"train_file": str(rows), "text": "text", "label": "label", **data},
            "model": {"backbone": str(backbone)},
            "train": {**train, "precision": "fp32"},
        }
        return resolve([("", recipe_settings(choice.method, choice.recipe)), ("", settings)])

    return describe


def candidates_of(describe: Describe, names: Sequence[str], *rates: float) -> list[Candidate]:
    return make_candidates(choices(names, rates, ["default"]), describe)


def judge(candidates: Sequence[Candidate]) -> DevJudge | FoldJudge:
    return judge_of(candidates[0].experiment, RowCache())


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert successive_halving.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0m", "-5m", "m", "1e9s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a time"):
        successive_halving.seconds_of(text)


def test_a_third_goes_on_from_where_it_stood(describe: Describe) -> None:
    tried = candidates_of(describe, ["lora", "head", "adapter"], 1e-3, 5e-3, 1e-2)
    turns = list(successive_halving.search(tried, judge(tried), 1000))
    (floor,) = selection.floors(tried)
    assert (floor.rung, floor.is_complete, len(floor.scores)) == (2, True, 1)
    assert turns.count(floor) == 1, "it is fitted at once: nothing is left to be known of it"
    assert len(turns) >= 10 + 3 + 3
    last = next(each for each in turns[13:16] if each is not floor)
    assert [trial.experiment.train.seed for trial in last.trials] == [42, 43, 44]
    assert all(trial.is_over for trial in last.trials)
    assert last.score == pytest.approx(fmean(last.scores))
    first = last.trials[0]
    experiment, prepared, tuned = plan(first.experiment)
    loop = loop_of(experiment, prepared, tuned, RowCache())
    list(loop.events())
    assert first.score == loop.progress.best_score, "as if it had trained in one go"
    assert first.epoch == loop.progress.epoch - 1
    chosen = selection.best(tried)
    assert chosen.is_complete
    assert all(selection.margin(each, chosen) <= 0 for each in tried)


def test_a_budget_ends_the_search_and_a_failure_does_not(
    describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = DevJudge.advance

    def failing(self: DevJudge, candidate: Candidate, *rest: Any) -> None:
        if candidate.choice.method == "head":
            raise CheckError("the loss is nan at step 1", "lower it")
        advance(self, candidate, *rest)

    monkeypatch.setattr(DevJudge, "advance", failing)
    tried = candidates_of(describe, ["head", "lora", "adapter"], 1e-3, 5e-3)
    turns = list(successive_halving.search(tried, judge(tried), 1e-6))
    assert [each.choice.method for each in turns] == ["probe", "head", "lora"]
    assert turns[1].error == "the loss is nan at step 1"
    ranked = selection.ranked(tried)
    assert {each.choice.method for each in ranked} == {"probe", "lora"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(successive_halving, "time", clock)
    return clock


SCORES = {
    "probe": [0.70],
    "lora": [0.90, 0.60, 0.60],  # lucky with its first seed
    "full": [0.85, 0.85, 0.82],
    "adapter": [0.71, 0.71, 0.71],
    "bitfit": [0.60, 0.60, 0.60],
}


def test_who_is_better_than_the_one_to_choose_is_trained_to_the_end_too(clock: Clock) -> None:
    tried = [on_dev(name, rung=-1) for name in SCORES]
    turns = list(successive_halving.search(tried, Scripted(SCORES, clock, 1.0), 1000))
    names = [each.choice.method for each in turns]
    assert names[:5] == list(SCORES)
    assert names[5:] == ["lora", "full", "lora", "full"], "lora fell below full, and full went on"
    chosen = selection.best(tried)
    assert (chosen.choice.method, chosen.is_complete) == ("full", True)


def test_a_rung_leaves_time_for_the_next_ones(clock: Clock) -> None:
    tried = [on_dev(name, rung=-1) for name in SCORES]
    turns = list(successive_halving.search(tried, Scripted(SCORES, clock, 1.0), 6.0))
    names = [(each.choice.method, each.rung) for each in turns]
    assert [name for name, _ in names] == ["probe", "lora", "full", "lora", "lora"]
    assert [each.choice.method for each in tried if each.rung < 0] == ["adapter", "bitfit"]
    chosen = selection.best(tried)
    assert chosen.choice.method == "full", "on one seed, yet clearly better than lora's mean"


def test_time_that_the_rungs_leave_is_spent_on_what_was_not_tried(clock: Clock) -> None:
    scores = {"probe": [0.70], "lora": [0.6] * 3, "full": [0.6] * 3, "bitfit": [0.8] * 3}
    tried = [on_dev(name, rung=-1) for name in scores]
    turns = list(successive_halving.search(tried, Scripted(scores, clock, 1.0), 8.0))
    assert [each.choice.method for each in turns] == [
        *("probe", "lora", "full", "bitfit"),  # until half of the six seconds
        *("bitfit", "bitfit"),
    ]
    clock.now = 0.0
    tried = [on_dev(name, rung=-1) for name in scores]
    turns = list(successive_halving.search(tried, Scripted(scores, clock, 1.3), 10.4))
    assert [each.choice.method for each in turns] == [
        *("probe", "lora", "full", "bitfit"),
        *("bitfit", "bitfit"),
    ]


def test_the_best_beside_the_floor_is_trained_to_the_end_while_there_is_time(clock: Clock) -> None:
    scores = {"probe": [0.90], "lora": [0.6] * 3, "full": [0.7] * 3}
    tried = [on_dev(name, rung=-1) for name in scores]
    turns = list(successive_halving.search(tried, Scripted(scores, clock, 3.0), 16.0))
    assert [(each.choice.method, each.is_complete) for each in turns[-1:]] == [("full", True)]
    assert selection.best(tried).choice.method == "probe"


def test_nothing_but_a_floor_is_a_search_too(clock: Clock) -> None:
    tried = [on_dev("probe")]
    assert list(successive_halving.search(tried, Scripted(SCORES, clock, 1.0), 10)) == tried
    assert tried[0].is_complete


@pytest.fixture
def folded(backbone_dir: Backbones, rows_file: Path) -> Describe:
    """Return what makes an experiment without dev rows of a choice: all rows train."""
    return describing(backbone_dir("bert"), rows_file, {}, epochs=2)


def test_without_dev_rows_all_are_judged_on_the_same_folds(folded: Describe) -> None:
    tried = candidates_of(folded, ["lora", "head", "adapter", "bitfit"], 1e-3, 5e-3)
    judging = judge(tried)
    assert isinstance(judging, FoldJudge)
    assert [rung.trainings for rung in judging.rungs] == [1, 2, 3]
    turns = list(successive_halving.search(tried, judging, 1000))
    assert len(turns) >= 9 + 3 + 3
    (floor,) = selection.floors(tried)
    assert (floor.rows, turns.count(floor)) == (60, 1)
    assert {each.rows for each in tried if each.rung == 0} == {20}
    for each in tried:
        answers = [trial.predicted for trial in each.trials if trial.predicted is not None]
        expected = np.concatenate(judging.expected[: len(answers)])
        right = np.concatenate(answers) == expected
        assert len(right) == each.rows == 20 * len(each.trials)
        assert each.score == pytest.approx(right.mean())
        assert each.pooled[0] == pytest.approx(right[:20].mean())
        assert each.epochs == (1 if each is floor else 2), "whole schedules, none cut short"
    assert selection.best(tried).is_complete


@pytest.mark.parametrize("method", ["lora", "unipelt-apl", "head", "probe"])
def test_a_fold_is_judged_as_a_run_of_it_would_be(
    method: str, backbone_dir: Backbones, rows_file: Path, tmp_path: Path
) -> None:
    described = describing(backbone_dir("bert"), rows_file, {"folds": FOLDS}, epochs=2)
    (candidate,) = make_candidates([Choice(method, 5e-3)], described)
    shared = RowCache()
    (whole,) = shared.prepare(candidate.experiment.data)
    seed = whole.manifest["data_seed"]  # the one before it makes the folds those of a run
    earlier = Prepared(whole.task, whole.splits, {**whole.manifest, "data_seed": seed - 1})
    judging = FoldJudge(earlier, shared)
    judging.advance(candidate, judging.rungs[-1], time.monotonic() + 1000)
    experiment = candidate.experiment.with_("data", fold=2)
    for _ in execution.execute(experiment, tmp_path / "run"):
        pass
    run = read_run(tmp_path / "run")
    answers, trial = run.predictions(), candidate.trials[1]
    assert answers is not None
    assert trial.predicted is not None
    assert run.rows("test")[:]["row"] == judging.parts[1].splits["test"][:]["row"]
    assert trial.predicted.tolist() == answers[0].tolist()
    assert trial.score == run.result["test"]["accuracy"]
    assert candidate.stored_parameters == run.result["stored_parameters"]


def test_test_rows_are_no_part_of_the_folds(backbone_dir: Backbones, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", 160)
    described = describing(backbone_dir("bert"), rows, {"k": 40, "dev_size": 0})
    experiment = described(Choice("head", 1e-3))
    shared = RowCache()
    (whole,) = shared.prepare(experiment.data)
    judging = judge_of(experiment, shared)
    assert isinstance(judging, FoldJudge)
    seen = {
        row for part in judging.parts for rows in part.splits.values() for row in rows[:]["row"]
    }
    assert seen == set(whole.splits["train"][:]["row"])
    assert len(whole.splits["test"]) == 120
    assert seen.isdisjoint(whole.splits["test"][:]["row"])


def test_the_folds_are_not_those_that_a_run_is_scored_by(folded: Describe) -> None:
    experiment = folded(Choice("head", 1e-3))
    shared = RowCache()
    (whole,) = shared.prepare(experiment.data)
    judging = judge_of(experiment, shared)
    assert isinstance(judging, FoldJudge)
    seed = whole.manifest["data_seed"]
    runs = assign_folds(whole.task, whole.splits["train"], FOLDS, seed)
    rows = np.asarray(whole.splits["train"][:]["row"])
    theirs = {frozenset(rows[runs == fold].tolist()) for fold in range(FOLDS)}
    ours = {frozenset(part.splits["test"][:]["row"]) for part in judging.parts}
    assert len(ours) == FOLDS
    assert not ours & theirs
    labels = [references(part.splits["test"]).tolist() for part in judging.parts]
    assert {(fold.count(0), fold.count(1)) for fold in labels} == {(10, 10)}


def test_the_time_ends_a_candidate_between_two_folds(folded: Describe) -> None:
    floor, candidate = candidates_of(folded, ["head"], 1e-3)
    judging = judge([candidate])
    for each in (floor, candidate):
        judging.advance(each, judging.rungs[-1], time.monotonic() - 1)
    assert (candidate.rows, len(candidate.trials)) == (20, 1)
    assert floor.rows == 60, "what is fitted at once is always judged on all rows"


def test_rows_that_cannot_be_folded_are_refused(backbone_dir: Backbones, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", 12)
    described = describing(backbone_dir("bert"), rows, {"dev_size": 0, "k": 2})
    with pytest.raises(ConfigError) as refused:
        judge_of(described(Choice("head", 1e-3)), RowCache())
    assert refused.value.message == (
        "no dev rows, and folds cannot be made: data.folds = 3: rows has 2 train rows of different "
        "texts"
    )
    assert refused.value.hint == "give more rows, or --dev-size N: then dev rows decide"
