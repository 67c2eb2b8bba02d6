"""Training without a dev set, and scores by folds of the train rows, from the command line on."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.command import FAST, error_of, invoke
from support.rows import write_values
from support.runs import reseal

from unipelt_cli.config.experiment import Experiment, resolve
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.metrics import METRICS
from unipelt_cli.models.resampling import score_interval
from unipelt_cli.runs.discovery import runs_below
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import read_run
from unipelt_cli.training import execution
from unipelt_cli.training.events import Folded
from unipelt_cli.training.planning import RowCache, loop_of, plan
from unipelt_cli.training.step import Stepper

FILES = {
    *("experiment.toml", "environment.json", "probe.safetensors", "metrics.jsonl"),
    *("model.safetensors", "predictions.safetensors", "result.json"),
}


def columns(rows: Path) -> list[str]:
    return ["--train-file", str(rows), "--text", "text", "--label", "label"]


@pytest.fixture(scope="module")
def folded(
    bert: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, dict[str, Any]]:
    """Return a run on a small file of whose rows nothing else was said, its talk, its result."""
    out = tmp_path_factory.mktemp("folded") / "run"
    given = (*columns(rows_file), "--model", bert, *FAST, "--out", out, "--json")
    code, stdout, stderr = invoke("train", *given)
    assert code == 0, stderr
    return out, stderr, json.loads(stdout)


def settings_of(rows: Path, bert: Path, **train: Any) -> Experiment:
    data = {"train_file": str(rows), "text": "text", "label": "label"}
    quick = {"epochs": 2, "batch_size": 8, "device": "cpu", "precision": "fp32", **train}
    given = {"data": data, "model": {"backbone": str(bert)}, "method": {"name": "lora"}}
    return resolve([("", {**given, "train": quick})])


def test_a_small_file_trains_on_all_rows_and_is_scored_by_folds(
    folded: tuple[Path, str, dict[str, Any]],
) -> None:
    out, said, result = folded
    assert {path.name for path in out.iterdir()} == FILES
    assert (result["selection"], result["tested_on"], result["dev"]) == ("schedule", "folds", {})
    assert (result["best_epoch"], result["epochs"]) == (3, 3)
    folds = result["folds"]
    assert (folds["count"], folds["rows"]) == (5, 60)
    assert [own["rows"] for own in folds["each"]] == [12] * 5
    scores = [own["test"]["accuracy"] for own in folds["each"]]
    assert folds["mean"]["accuracy"] == pytest.approx(np.mean(scores))
    assert folds["spread"]["accuracy"] == pytest.approx(np.std(scores, ddof=1))
    assert result["test"]["accuracy"] == pytest.approx(np.mean(scores))  # of equal sizes
    assert result["interval"] == folds["interval"]
    low, high = folds["interval"]
    assert low < result["test"]["accuracy"] < high
    lines = said.splitlines()
    assert (
        "note: no dev set: trained to the end of its schedule; scored by 5 folds (chosen for 60 "
        "rows; --folds none holds test and dev rows back)" in lines
    )
    assert [line for line in lines if line.startswith("fold ")][:-1] == [
        f"fold {fold} of 5  accuracy {score:.4f}  {seconds['seconds']:5.1f} s"
        for fold, (score, seconds) in enumerate(zip(scores, folds["each"], strict=True), 1)
    ]
    assert [line.split()[:3] for line in lines if re.match(r"\d  ", line)] == [
        [str(fold), "12", f"{score:.4f}"] for fold, score in enumerate(scores, 1)
    ]
    mean, spread = folds["mean"]["accuracy"], folds["spread"]["accuracy"]
    assert any(line.startswith(f"mean        {mean:.4f} ±{spread:.4f}") for line in lines)
    assert any(line.startswith(f"5 folds  accuracy {mean:.4f}  f1 of 'yes' ") for line in lines)
    assert f"95 % interval of accuracy, rows drawn anew: {low:.4f} to {high:.4f}" in lines
    assert any(line.startswith("trained to the end of its schedule, epoch 3, ") for line in lines)


def test_what_is_stored_are_the_predictions_of_trainings_without_each_row(
    folded: tuple[Path, str, dict[str, Any]], bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = read_run(folded[0])
    answers = run.predictions()
    assert answers is not None
    predicted, expected = answers
    train = run.rows("train")
    assert expected.tolist() == train[:]["label"]
    where = {row: place for place, row in enumerate(train[:]["row"])}
    for fold in (2, 5):
        alone = tmp_path / str(fold)
        given = (*columns(rows_file), "--folds", 5, "--set", f"data.fold={fold}", "--model", bert)
        code, _, stderr = invoke("train", *given, *FAST, "--out", alone)
        assert code == 0, stderr
        one = read_run(alone)
        found = one.predictions()
        assert found is not None
        assert one.result["tested_on"] == "test"
        assert [predicted[where[row]] for row in one.rows("test")[:]["row"]] == found[0].tolist()
        assert one.result["test"] == run.result["folds"]["each"][fold - 1]["test"]
    header = load_file(folded[0] / "predictions.safetensors")
    assert header["predictions.0"].shape == (60,)


def test_readers_say_where_there_is_no_dev_or_test(
    folded: tuple[Path, str, dict[str, Any]],
) -> None:
    out = folded[0]
    lacking = (
        f"{out}: no test rows, its score is that of 5 folds of its train rows (`folds` in "
        "result.json)",
        "score other rows with `unipelt eval --file FILE`; --split train are those it learned",
    )
    assert error_of("eval", out) == lacking
    assert error_of("eval", out, "--split", "test") == lacking
    assert error_of("eval", out, "--split", "dev") == (
        f"{out}: no dev rows, it was trained to the end of its schedule",
        "choose train; or train with --dev-size N",
    )
    assert error_of("inspect-gates", out, "--by", "epoch") == (
        f"{out}: its epochs hold no gates, as there were no dev rows to see them on",
        "see those of its last epoch with --by layer, or train with --dev-size N",
    )
    code, stdout, _ = invoke("eval", out, "--split", "train", "--json")
    assert (code, json.loads(stdout)["rows"]) == (0, 60)
    code, stdout, stderr = invoke("inspect-gates", out, "--json")
    assert (code, json.loads(stdout)["rows"]) == (0, 60)
    code, stdout, _ = invoke("list", "runs", out.parent, "--json")
    (entry,) = json.loads(stdout)["runs"]
    assert (entry["dev"], entry["test"]) == (None, folded[2]["test"]["accuracy"])
    code, stdout, stderr = invoke("verify", out)
    assert code == 0, stderr
    assert re.search(r"reviews rows, train +ok  60, sha256 ", stdout)
    code, _, stderr = invoke("export", out, "--to", "onnx", "--static-gates")
    assert code == 2
    assert "no dev rows, it was trained to the end of its schedule" in stderr


def test_a_run_by_folds_is_repeated_from_its_own_file(
    folded: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    code, stdout, stderr = invoke("reproduce", folded[0], "--out", tmp_path / "again")
    assert code == 0, stderr
    assert "reproduced: the same scores and, to the byte, the same tensors" in stdout
    for name in ("experiment.toml", "predictions.safetensors", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folded[0] / name).read_bytes()
    given = ("train", "--preset", folded[0] / "experiment.toml", "--out", folded[0], "--resume")
    assert invoke(*given)[0] == 0


def test_the_same_command_goes_on_with_what_was_chosen(
    folded: tuple[Path, str, dict[str, Any]], bert: Path, rows_file: Path
) -> None:
    given = ("train", *columns(rows_file), "--model", bert, *FAST, "--out", folded[0], "--resume")
    code, stdout, stderr = invoke(*given, "--json")
    assert (code, json.loads(stdout)) == (0, folded[2]), stderr
    message, _ = error_of(*given, "--folds", "none")
    assert "data.dev_size = 0 there, 1000 here" in message


def happened(events: Iterator[Any]) -> list[Any]:
    return [own.event if isinstance(own, Folded) else own for own in events]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_stopped_in_its_folds_goes_on_as_if_it_had_not(
    bert: Path, rows_file: Path, tmp_path: Path, method: str
) -> None:
    planned = resolve(
        [("", {**settings_of(rows_file, bert).settings(), "method": {"name": method}})]
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    total = len(happened(execution.execute(planned, whole)))
    for seen in (total // 3, total // 3, total):
        with closing(execution.execute(planned, stopped, "resume")) as events:
            for _ in zip(range(seen), events, strict=False):
                pass
        if seen != total:
            assert (stopped / "folds" / "fold-1").is_dir()
            ((path, state),) = runs_below(tmp_path / "stopped")
            assert path == stopped
            assert isinstance(state, str)
    names = ("model.safetensors", "predictions.safetensors")
    assert {path.name for path in stopped.iterdir()} == FILES
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def test_a_stopped_run_is_replaced_with_its_folds(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    planned, out = settings_of(rows_file, bert), tmp_path / "run"
    with closing(execution.execute(planned, out)) as events:
        for _ in zip(range(9), events, strict=False):
            pass
    (out / "folds" / "mine.txt").write_text("kept")
    with pytest.raises(RunError) as caught:
        next(execution.execute(planned, out, "overwrite"))
    assert caught.value.message == f"{out}: holds files that no run wrote, such as folds"
    (out / "folds" / "mine.txt").unlink()
    for _ in execution.execute(planned, out, "overwrite"):
        pass
    assert {path.name for path in out.iterdir()} == FILES


def test_a_fold_that_fails_ends_the_run_with_its_error(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, calls = Stepper.close, []

    def fails(self: Stepper, *given: Any) -> float:
        calls.append(1)
        if len(calls) == 20:
            raise CheckError("the loss is nan", "lower the rate")
        return close(self, *given)

    monkeypatch.setattr(Stepper, "close", fails)
    with pytest.raises(CheckError) as caught:
        for _ in execution.execute(settings_of(rows_file, bert), tmp_path / "run"):
            pass
    assert caught.value.message == "the loss is nan"
    assert not (tmp_path / "run" / "result.json").exists()


def test_folds_of_other_rows_are_not_taken(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    planned, out = settings_of(rows_file, bert), tmp_path / "run"
    with closing(execution.execute(planned, out)) as events:
        for event in events:
            if not isinstance(event, Folded) and (out / "folds/fold-5/result.json").is_file():
                break
    shutil.rmtree(out / "folds" / "fold-2")
    shutil.copytree(out / "folds" / "fold-3", out / "folds" / "fold-2")
    reseal(out / "folds" / "fold-2")
    with pytest.raises(RunError) as caught:
        list(execution.execute(planned, out, "resume"))
    assert "data.fold = 3 there, 2 here" in caught.value.message


def test_the_floor_beside_a_run_by_folds_is_that_of_the_same_folds(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    found = {}
    for method in ("lora", "probe"):
        given = (*columns(rows_file), "--folds", 3, "--method", method, "--model", bert, *FAST)
        code, stdout, stderr = invoke("train", *given, "--out", tmp_path / method, "--json")
        assert code == 0, stderr
        found[method] = json.loads(stdout)
        if method == "lora":
            score = found["lora"]["probe"]["test"]["accuracy"]
            assert f"probe on the same rows: 3 folds accuracy {score:.4f}" in stderr.splitlines()
    assert found["lora"]["probe"] == {"test": found["probe"]["test"]}


def test_values_are_scored_by_folds_too(calm_bert: Path, tmp_path: Path) -> None:
    rows, out = write_values(tmp_path / "rows.csv", 100, 900, 40), tmp_path / "run"
    given = (*columns(rows), "--set", "data.kind=regression", "--folds", 4, "--model", calm_bert)
    code, stdout, stderr = invoke("train", *given, *FAST, "--out", out, "--json")
    assert code == 0, stderr
    result, run = json.loads(stdout), read_run(out)
    answers = run.predictions()
    assert answers is not None
    assert result["test"]["spearman"] == pytest.approx(METRICS["spearman"](*answers, 1))
    assert result["interval"] == list(score_interval(run.task, *answers) or ())
    assert set(result["against_mean"]) == {"rows"}


# Without a dev set, and without folds


@pytest.mark.parametrize("method", ["unipelt-apl", "adamix", "adapter"])
def test_without_dev_the_last_epochs_tensors_are_the_result(
    bert: Path, rows_file: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "run"
    given = (*columns(rows_file), "--dev-size", 0, "--method", method, "--model", bert, *FAST)
    code, stdout, stderr = invoke(
        *("train", *given, "--set", "train.patience=1", "--out", out, "--json")
    )
    assert code == 0, stderr
    result, lines = json.loads(stdout), stderr.splitlines()
    assert (result["dev"], result["selection"], result["tested_on"]) == ({}, "schedule", "test")
    assert result["best_epoch"] == result["epochs"] == 3
    assert "folds" not in result
    assert len(result["interval"]) == 2
    epochs = [event for event in read_metrics(out) if event["kind"] == "epoch"]
    assert [(event["dev"], event["is_best"]) for event in epochs] == [({}, False)] * 3
    assert "note: no dev set: trained to the end of its schedule" in lines
    assert [split for split in lines if re.match(r"(train|dev|test) +\d", split)] == [
        line for line in lines if re.match(r"(train +48|test +12) ", line)
    ]
    assert error_of("eval", out, "--split", "dev")[1] == (
        "choose train, test; or train with --dev-size N"
    )
    code, stdout, stderr = invoke("eval", out, "--json")
    assert json.loads(stdout)["scores"] == pytest.approx(result["test"])


@pytest.mark.parametrize(("method", "averaging"), [("diff-pruning", 0.0), ("lora", 0.9)])
def test_every_stage_ends_with_its_last_tensors_or_their_mean(
    bert: Path, rows_file: Path, method: str, averaging: float
) -> None:
    settings = settings_of(rows_file, bert, averaging=averaging, epochs=4, patience=1).settings()
    settings["data"] |= {"folds": 0, "dev_size": 0}
    planned = resolve([("", {**settings, "method": {"name": method}})])
    shared = RowCache()
    experiment, prepared, tuned = plan(planned, shared)
    loop = loop_of(experiment, prepared, tuned, shared)
    taken = [dict(loop.stepper.averaged) for _ in loop.events()]
    assert len(loop.lengths) == (2 if method == "diff-pruning" else 1)
    assert loop.progress.epoch - 1 == sum(loop.lengths)
    assert loop.best == {}
    if averaging:
        for name, mean in taken[-1].items():
            assert torch.equal(mean, loop.parameters[name].detach())


def test_runs_over_seeds_and_sweeps_go_without_dev(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    given = (*columns(rows_file), "--model", bert, *FAST, "--method", "lora")
    code, stdout, stderr = invoke(
        *("train", *given, "--folds", 2, "--data-seeds", "1,2", "--out", tmp_path, "--json")
    )
    assert code == 0, stderr
    answer = json.loads(stdout)
    assert [own["folds"]["count"] for own in answer["runs"]] == [2, 2]
    assert answer["mean"].keys() == {"dev", "test"}
    assert answer["mean"]["dev"] == {}
    assert re.search(r"^run +2 folds accuracy +2 folds f1", stderr, re.MULTILINE)
    floor = fmean(own["probe"]["test"]["accuracy"] for own in answer["runs"])
    told = f"probe on the same rows: 2 folds accuracy {floor:.4f}, the mean"
    assert told in stderr.splitlines()
    code, stdout, stderr = invoke(
        *("sweep", *columns(rows_file), "--folds", 2, "--model", bert, *FAST),
        *("--methods", "lora", "--data-seeds", "3", "--out", tmp_path / "sweep", "--json"),
    )
    assert code == 0, stderr
    assert [own["tested_on"] for own in json.loads(stdout)["runs"]] == ["folds"]
    assert re.search(r"  accuracy test \d\.\d{4}  ", stderr)


def test_runs_are_compared_with_those_tested_on_the_same_rows_alone(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    given = (*columns(rows_file), "--model", bert, *FAST, "--data-seeds", "1,2")
    for place, cut in enumerate((("--folds", 2), ("--folds", 3), ("--folds", "none"))):
        for method in ("lora", "head"):
            out = tmp_path / str(place)
            assert invoke("train", *given, *cut, "--method", method, "--out", out)[0] == 0
    code, stdout, _ = invoke("compare", tmp_path, "--json")
    assert code == 0
    answer = json.loads(stdout)
    tasks = {group["task"] for group in answer["groups"]}
    assert tasks == {"reviews #1", "reviews #2", "reviews #3"}
    assert "reviews #1 is scored by 2 folds of train rows" in answer["notes"]
    assert "reviews #2 is scored by 3 folds of train rows" in answer["notes"]
    pairs = [own for own in answer["comparisons"] if own["verdict"] != "refused"]
    assert pairs
    assert all(len(group["seeds"]) == 2 for group in answer["groups"])


def test_prepare_and_dry_run_show_what_there_is(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    code, stdout, _ = invoke(
        *("prepare", *columns(rows_file), "--folds", 4, "--out", tmp_path / "ready", "--json")
    )
    answer = json.loads(stdout)
    assert (code, answer["folds"], answer["dev_size"]) == (0, 4, 0)
    assert answer["splits"].keys() == {"train"}
    given = ("--prepared", tmp_path / "ready", "--model", bert, *FAST)
    code, stdout, stderr = invoke("train", *given, "--dry-run", "--json")
    assert code == 0, stderr
    assert "all 3 epochs, of 4 folds and of all rows" in stderr
    found = json.loads(stdout)
    assert found["rows"] == {"train": 60}
    assert found["seconds"]["least"] == found["seconds"]["most"]
    assert found["experiment"]["data"]["folds"] == 4
    code, stdout, stderr = invoke("train", *given, "--out", tmp_path / "run", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["folds"]["count"] == 4


MESSAGES = [
    (
        ("--folds", "1"),
        "data.folds = '1' is not allowed",
        "give 2 to 20, none, or auto",
    ),
    (
        ("--folds", "5", "--dev-size", "10"),
        "data.folds = 5: all train rows are trained on, and data.dev_size = 10",
        "drop --folds, or --dev-size",
    ),
    (
        ("--folds", "5", "--test-file", "b.csv"),
        "data.folds = 5: folds are trained and tested on train rows alone, and data.test_file is "
        "set",
        "drop --folds, or --test-file",
    ),
    (
        ("--dev-file", "b.csv", "--dev-size", "0"),
        "data.dev_file is set, and data.dev_size = 0",
        "drop one of them",
    ),
    (("--set", "data.fold=2"), "data.fold = 2 is set without data.folds", "give --folds N"),
    (
        ("--folds", "3", "--set", "data.fold=4"),
        "data.fold = 4: there are 3 folds",
        "give 1 to 3",
    ),
]


@pytest.mark.parametrize(("given", "message", "hint"), MESSAGES)
def test_settings_that_contradict_each_other_are_told(
    rows_file: Path, given: tuple[str, ...], message: str, hint: str
) -> None:
    assert error_of("train", *columns(rows_file), *given) == (message, hint)


def test_folds_are_one_tasks() -> None:
    assert error_of("train", "--tasks", "cola,rte", "--folds", "3") == (
        "data.folds = '3': one task's, but there are several",
        "drop it, or drop --tasks; own rows: `unipelt prepare` each, then --prepared A,B",
    )
