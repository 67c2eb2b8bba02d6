"""Regressions on labels of any size: what a run says, stores and goes on from."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command import invoke
from support.models import experiment
from support.rows import write_values
from support.runs import reseal

from unipelt_cli import load_run
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.files import sealed
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.label_scale import RAW
from unipelt_cli.runs import verification
from unipelt_cli.runs.names import EXPERIMENT, MODEL, PROBE, RESULT
from unipelt_cli.runs.run import read_run
from unipelt_cli.tasks import get_task
from unipelt_cli.training import execution
from unipelt_cli.training.events import Epoch, Finished, TaskRows
from unipelt_cli.training.loop import Training

BOUNDS = {"scores": (16, 84), "prices": (105_534, 968_881), "years": (1987, 2023), "cold": (-61, 2)}
TEXTS = ["the film 7 was good", "the film 8 was awful", "the film 9 was good great awful"]


def plan(backbone: Path, rows: Path, seed: int = 111, **train: Any) -> Experiment:
    files = {
        "task": None,
        "folds": 0,
        "train_file": str(rows),
        "text": "text",
        "label": "label",
        "k": 32,
    }
    fast = {"epochs": 12, "patience": 12, "batch_size": 8, "learning_rate": 5e-3}
    data = files | {"data_seed": seed, "kind": "regression"}
    return experiment(backbone, "unipelt-apl", data=data, train=fast | train)


def finish(planned: Experiment, out: Path, mode: Any = "new") -> Mapping[str, Any]:
    *_, ended = execution.execute(planned, out, mode)
    assert isinstance(ended, Finished)
    return ended.result


@pytest.fixture(scope="module")
def prices(calm_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run on prices; tests must not change it."""
    folder = tmp_path_factory.mktemp("prices")
    finish(plan(calm_bert, write_values(folder / "rows.csv", *BOUNDS["prices"])), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("name", BOUNDS)
def test_values_are_on_the_scale_of_the_labels(calm_bert: Path, tmp_path: Path, name: str) -> None:
    low, high = BOUNDS[name]
    rows = write_values(tmp_path / "rows.csv", low, high)
    result = finish(plan(calm_bert, rows), tmp_path / "run")
    spread = (high - low) ** 2
    compared = result["against_mean"]["rows"]
    assert compared["mse"] == result["test"]["mse"] < 0.06 * spread < compared["mse_of_mean"]
    assert result["dev"]["mse"] < 0.06 * spread
    good, awful, _ = (said.value for said in load_run(tmp_path / "run").predict(TEXTS))
    assert good is not None
    assert awful is not None
    assert low - 0.1 * (high - low) < awful < good < high + 0.1 * (high - low)
    assert good - awful > 0.4 * (high - low)
    predicted, expected = read_run(tmp_path / "run").predictions() or ([], [])
    assert np.mean((predicted - expected) ** 2) == pytest.approx(result["test"]["mse"])


def test_a_new_process_says_the_same_and_scores_the_same(prices: Path) -> None:
    command = [sys.executable, "-m", "unipelt_cli"]
    told = subprocess.run(
        [*command, "predict", str(prices), "-", "--offline"],
        input="\n".join(TEXTS),
        capture_output=True,
        check=True,
        text=True,
    )
    values = [json.loads(line)["value"] for line in told.stdout.splitlines()]
    loaded = load_run(prices)
    assert values == pytest.approx([said.value for said in loaded.predict(TEXTS)], rel=1e-6)
    assert loaded.logits(TEXTS)[:, 0] == pytest.approx(values, rel=1e-6)
    scored = subprocess.run(
        [*command, "eval", str(prices), "--json", "--offline"], capture_output=True, check=True
    )
    result = json.loads((prices / RESULT).read_text())
    answer = json.loads(scored.stdout)
    assert answer["scores"] == result["test"]
    assert answer["against_mean"] == result["against_mean"]
    code, stdout, _ = invoke("eval", prices, "--split", "dev", "--json")
    assert code == 0
    assert json.loads(stdout)["scores"] == pytest.approx(result["dev"], rel=1e-4)


def test_the_scale_is_stored_and_sealed(prices: Path) -> None:
    run = read_run(prices)
    (scale,) = run.scales
    labels = run.rows("train")["label"]
    assert (scale.mean, scale.deviation) == pytest.approx((np.mean(labels), np.std(labels)))
    assert 'label_scale = "standardised"' in (prices / EXPERIMENT).read_text()
    assert all(check.ok for check in verification.verify(prices))


def test_other_logits_are_told_in_the_unit_of_the_labels(prices: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(prices, tmp_path / "run"))
    tensors, header = sealed.open_tensors(copy / PROBE)
    (scale,) = read_run(copy).scales
    for factor, is_same in ((0.5, True), (2.0, False)):
        moved = {"logits": tensors["logits"] + factor * 1e-4 * scale.deviation}
        sealed.write_tensors(copy / PROBE, moved, {"rows": header["rows"]})
        reseal(copy)
        (check,) = (c for c in verification.verify(copy) if c.what == "tensors and logits")
        assert check.ok == is_same


@pytest.mark.parametrize("stop_after", [3, 30])
def test_a_resumed_run_ends_as_an_unbroken_one(
    calm_bert: Path, prices: Path, tmp_path: Path, stop_after: int
) -> None:
    planned = plan(calm_bert, prices.parent / "rows.csv")
    events = execution.execute(planned, tmp_path / "run")
    list(islice(events, stop_after))
    events.close()
    finish(planned, tmp_path / "run", "resume")
    whole, resumed = read_run(prices), read_run(tmp_path / "run")
    assert verification.is_equal(whole, resumed)
    assert whole.scales == resumed.scales


def test_runs_in_one_pass_have_a_scale_each(calm_bert: Path, prices: Path, tmp_path: Path) -> None:
    plans = [plan(calm_bert, prices.parent / "rows.csv", seed) for seed in (111, 222)]
    places = [tmp_path / "a", tmp_path / "b"]
    for _ in execution.execute_together(plans, places):
        pass
    alone, *together = (read_run(path) for path in (prices, *places))
    assert [run.result["together"] for run in together] == [2, 2]
    assert alone.scales == together[0].scales != together[1].scales
    for run in together:
        assert run.result["test"]["mse"] < run.result["against_mean"]["rows"]["mse_of_mean"] / 2
    said = [load_run(path).logits(TEXTS) for path in (prices, places[0])]
    assert said[0] == pytest.approx(said[1], abs=1e-3 * alone.scales[0].deviation)


@pytest.mark.parametrize(
    ("bounds", "asked", "scale"),
    [
        ((0, 5), "auto", "raw"),  # STS-B's, as the defaults were measured on
        ((0, 5), "standardised", "standardised"),
        ((16, 84), "auto", "standardised"),
        ((16, 84), "raw", "raw"),
    ],
)
def test_the_scale_is_chosen_by_the_labels_and_recorded(
    calm_bert: Path, tmp_path: Path, bounds: tuple[int, int], asked: str, scale: str
) -> None:
    rows = write_values(tmp_path / "rows.csv", *bounds)
    planned = plan(calm_bert, rows, epochs=1, label_scale=asked)
    finish(planned, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.experiment.train.label_scale == scale
    assert (run.scales == (RAW,)) == (scale == "raw")
    assert finish(planned, tmp_path / "run", "resume") == run.result


def as_before(directory: Path) -> None:
    """Make a run what one was before labels had a scale: nothing in it says any."""
    path = directory / EXPERIMENT
    text, count = re.subn(r"label_scale = .*\n", "", path.read_text())
    assert count == 1
    path.write_text(text)
    if (directory / RESULT).is_file():
        result = json.loads((directory / RESULT).read_text())
        del result["against_mean"]
        (directory / RESULT).write_text(json.dumps(result))
        reseal(directory)


def test_a_run_of_before_says_what_it_said(calm_bert: Path, prices: Path, tmp_path: Path) -> None:
    planned = plan(calm_bert, prices.parent / "rows.csv", label_scale="raw")
    finish(planned, tmp_path / "run")
    assert "label_scale" not in sealed.read_header(tmp_path / "run" / MODEL)["task"]
    before = load_run(tmp_path / "run").logits(TEXTS)
    assert np.abs(before).max() < 10, "raw prices are never reached"
    as_before(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.scales == (RAW,)
    assert run.experiment.train.label_scale == "raw"
    assert (load_run(tmp_path / "run").logits(TEXTS) == before).all()
    code, _, stderr = invoke("eval", tmp_path / "run")
    assert code == 0
    assert re.search(r"warning: rows: the squared error on test, [\d.e+]+, is not below", stderr)


def test_an_interrupted_run_of_before_goes_on_as_it_was(
    calm_bert: Path, prices: Path, tmp_path: Path
) -> None:
    rows = prices.parent / "rows.csv"
    raw = plan(calm_bert, rows, label_scale="raw", epochs=3)
    finish(raw, tmp_path / "whole")
    events = execution.execute(raw, tmp_path / "run")
    list(islice(events, 8))
    events.close()
    as_before(tmp_path / "run")
    finish(plan(calm_bert, rows, epochs=3), tmp_path / "run", "resume")
    assert verification.is_equal(read_run(tmp_path / "whole"), read_run(tmp_path / "run"))


def test_equal_labels_are_said_before_and_predicted_exactly(
    calm_bert: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    write_values(rows, 2000, 2000)
    own = (
        "--train-file",
        rows,
        "--text",
        "text",
        "--label",
        "label",
        "--folds",
        "none",
        "--device",
        "cpu",
    )
    settings = ("--set", "train.epochs=1", "--precision", "fp32", "--model", calm_bert)
    settings += ("--set", "data.kind=regression", "--out", tmp_path / "run")
    code, _, stderr = invoke("train", *own, *settings)
    assert code == 0, stderr
    said = "note: train: every row has the label 2000, so there is nothing to learn"
    assert said in " ".join(stderr.split())
    assert "is not below" not in stderr
    assert [own.value for own in load_run(tmp_path / "run").predict(TEXTS)] == [2000.0] * 3


def test_one_train_row_is_enough(calm_bert: Path, tmp_path: Path) -> None:
    rows = write_values(tmp_path / "rows.csv", 16, 84)
    planned = plan(calm_bert, rows, epochs=1).with_("data", k=1)
    result = finish(planned, tmp_path / "run")
    assert result["collapsed"]
    (label,) = read_run(tmp_path / "run").rows("train")["label"]
    assert [said.value for said in load_run(tmp_path / "run").predict(TEXTS)] == pytest.approx(
        [label] * 3, rel=1e-6
    )


def test_a_run_that_loses_to_the_mean_says_so(calm_bert: Path, tmp_path: Path) -> None:
    rows = write_values(tmp_path / "rows.csv", 16, 84)
    own = (
        "--train-file",
        rows,
        "--text",
        "text",
        "--label",
        "label",
        "--folds",
        "none",
        "--device",
        "cpu",
    )
    settings = ("--set", "train.epochs=1", "--precision", "fp32", "--model", calm_bert)
    settings += ("--set", "data.kind=regression")
    raw = ("--set", "train.label_scale=raw", "--out", tmp_path / "run", "--json")
    code, stdout, stderr = invoke("train", *own, *settings, *raw)
    assert code == 0, stderr
    compared = json.loads(stdout)["against_mean"]["rows"]
    assert compared["mse"] > compared["mse_of_mean"]
    assert (
        f"warning: rows: the squared error on test, {compared['mse']:.4g}, is not below that of "
        f"always saying the train rows' mean, {compared['mse_of_mean']:.4g}"
    ) in " ".join(stderr.split())


@pytest.mark.parametrize("averaging", [0.0, 0.5])
def test_each_of_several_tasks_has_its_own_scale(calm_bert: Path, averaging: float) -> None:
    train = {"epochs": 20, "patience": 20, "batch_size": 4, "learning_rate": 1e-2}
    settings = experiment(calm_bert, "unipelt-multi", train=train | {"averaging": averaging})
    tuned = build(settings, [2, 1, 1])
    texts = [f"the film {row} was {('good', 'awful')[row % 2]}" for row in range(16)]
    rows = encode_rows(tuned, [texts], 128)
    labels = np.arange(16) % 2
    values = [low + (high - low) * labels for low, high in (BOUNDS["prices"], BOUNDS["years"])]
    more = [TaskRows(get_task("stsb"), (rows, own), (rows, own)) for own in values]
    first = rows, labels
    loop = Training(tuned, get_task("sst2"), first, first, settings.train, more)
    events = [event for event in loop.events() if isinstance(event, Epoch)]
    assert loop.courses[0].scale == RAW
    assert max(event.train_loss for event in events) < 3, "in squared deviations"
    for place, own in enumerate(values, 1):
        tuned.classifier.eval().select(place)
        with torch.no_grad():
            said = tuned.classifier(**rows.batch(range(16), tuned.device))[:, 0].numpy()
        assert np.mean((said - own) ** 2) < own.var() / 2
