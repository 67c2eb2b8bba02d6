"""Features of a frozen backbone, computed once, and heads that train on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command import FAST, invoke, rows_options
from support.models import experiment, loop_on_sixteen
from support.rows import write_rows

from unipelt_cli.config.experiment import resolve
from unipelt_cli.methods.partial.selective import Head
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import compute_logits
from unipelt_cli.runs.run import read_run
from unipelt_cli.training import execution, floor
from unipelt_cli.training.events import Epoch, Finished
from unipelt_cli.training.heads.frozen_features import read_features
from unipelt_cli.training.planning import RowCache, loop_of, plan


def test_cached_features_are_those_of_a_pass_in_evaluation_mode(bert: Path) -> None:
    tuned = build(experiment(bert, "head"), 2)
    loop = loop_on_sixteen(tuned)
    next(loop.events())
    assert loop.frozen is not None
    rows, _ = loop.dev
    with torch.inference_mode():
        passed = tuned.classifier.eval().features(**rows.batch(range(16), tuned.device))
    assert (loop.frozen.dev[0] - passed).abs().max() < 1e-6
    assert torch.equal(loop.frozen.dev[0], loop.frozen.train[0])
    difference = read_features(tuned, loop.frozen.dev[0].numpy(), 0) - compute_logits(tuned, rows)
    assert np.abs(difference).max() < 1e-6


def test_a_head_trained_on_them_is_that_of_passes_in_evaluation_mode(
    calm_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone whose own dropout is 0 gives the same in training and in evaluation mode."""
    settings = {"epochs": 3, "learning_rate": 1e-2}
    cached = build(experiment(calm_bert, "head"), 2)
    list(loop_on_sixteen(cached, **settings).events())
    monkeypatch.setattr(Head, "reads_frozen_features", False)
    passed = build(experiment(calm_bert, "head"), 2)
    loop = loop_on_sixteen(passed, **settings)
    assert loop.frozen is None
    list(loop.events())
    for name, tensor in passed.stored().items():
        assert (cached.stored()[name] - tensor).abs().max() < 1e-5, name


def test_a_pooler_that_trains_is_passed_through_at_every_step(bert_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = bert_copy / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if "pooler" not in name}
    save_file(kept, path, {"format": "pt"})
    tuned = build(experiment(bert_copy, "head", model={"pooling": "native"}), 2)
    assert tuned.untrained
    loop = loop_on_sixteen(tuned, epochs=1)
    list(loop.events())
    assert loop.frozen is None


def own_rows(bert: Path, rows: Path, method: str, **data: Any) -> Any:
    own = {"train_file": str(rows), "text": "text", "label": "label", "folds": 0, **data}
    sections = {"data": own, "model": {"backbone": str(bert)}, "method": {"name": method}}
    return resolve([("", {**sections, "train": {"device": "cpu", "precision": "fp32"}})])


def test_features_of_equal_rows_are_computed_once(
    bert: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, counted = RowCache(), list[int]()
    for method, seed in (("head", 42), ("head", 43), ("probe", 42)):
        settings = own_rows(bert, rows_file, method).with_("train", seed=seed, epochs=1)
        planned, prepared, tuned = plan(settings, shared)
        features = tuned.classifier.features

        def watched(*args: Any, features: Any = features, **inputs: Any) -> Any:
            counted.append(1)
            return features(*args, **inputs)

        monkeypatch.setattr(tuned.classifier, "features", watched)
        list(loop_of(planned, prepared, tuned, shared).events())
        if (method, seed) == ("head", 42):
            first = len(counted)
    assert len(counted) == first > 0


@pytest.mark.parametrize("epochs", [1, 50])
def test_a_probe_is_one_epoch_without_a_step(bert: Path, epochs: int) -> None:
    loop = loop_on_sixteen(build(experiment(bert, "probe"), 2), epochs=epochs)
    (event,) = loop.events()
    assert isinstance(event, Epoch)
    assert event.is_best
    assert event.dev == loop.progress.best_dev
    assert event.tokens == loop.train[0].lengths.sum()
    predicted = compute_logits(loop.tuned, loop.train[0]).argmax(1)
    assert (predicted == loop.train[1]).all()


def test_a_run_notes_what_the_probe_gives_on_its_rows(bert: Path, tmp_path: Path) -> None:
    """The same scores as those of a run of the probe, to the digit."""
    rows = write_rows(tmp_path / "rows.csv", 40)
    results = {}
    for method in ("lora", "probe"):
        settings = own_rows(bert, rows, method).with_("train", epochs=1)
        *_, last = execution.execute(settings, tmp_path / method)
        assert isinstance(last, Finished)
        results[method] = last.result
    assert "probe" not in results["probe"]
    noted = results["lora"]["probe"]
    assert noted == {split: results["probe"][split] for split in ("dev", "test")}
    assert read_run(tmp_path / "lora").result["probe"] == noted


def test_a_sweep_pays_once_for_each_set_of_rows(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    build_ = floor.build

    def watched(settings: Any, *rest: Any, **more: Any) -> Any:
        built.append(settings.method_name)
        return build_(settings, *rest, **more)

    monkeypatch.setattr(floor, "build", watched)
    grid = [
        own_rows(bert, rows_file, method, data_seed=data_seed).with_("train", epochs=1)
        for data_seed in (1, 2)
        for method in ("lora", "bitfit")
    ]
    shared = RowCache()
    for place, settings in enumerate(grid):
        list(execution.execute_together([settings], [tmp_path / str(place)], shared=shared))
    assert built == ["probe", "probe"]


def test_the_same_rows_in_other_folds_have_another_probe(bert: Path, rows_file: Path) -> None:
    shared = RowCache()
    for folds in (2, 3):
        settings = own_rows(bert, rows_file, "lora").with_("data", folds=folds, dev_size=0)
        settings, prepared, tuned = plan(settings, shared)
        noted = floor.beside(settings, prepared, tuned.pretrained, shared)
        assert noted == floor.beside(settings, prepared, tuned.pretrained, RowCache())
    assert len(shared.floors) == 2


def test_rows_that_a_method_pads_are_not_those_of_one_that_does_not(
    bert: Path, rows_file: Path
) -> None:
    shared, padded = RowCache(), []
    for options in ({"name": "lora"}, {"name": "unipelt-apl", "gate_pooling": "all"}):
        settings = own_rows(bert, rows_file, "unipelt-apl").settings()
        settings, prepared, tuned = plan(resolve([("", {**settings, "method": options})]), shared)
        padded.append(shared.encode(tuned, prepared[0], "train", settings).pad_to)
    assert padded == [None, settings.model.max_length]


def test_a_probe_that_does_not_fit_into_memory_loses_no_run(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(floor, "build", exhausted)
    given = [*rows_options(rows_file), "--k", 24, "--model", bert, "--method", "lora", *FAST]
    code, stdout, stderr = invoke("train", *given, "--out", tmp_path / "run", "--json")
    assert code == 0
    result = json.loads(stdout)
    assert "probe" not in result
    assert result["no_probe"] == "it does not fit into memory"
    assert "probe on the same rows: left out, it does not fit into memory" in stderr
    assert read_run(tmp_path / "run").result == result


def test_training_prints_the_probe_beside_its_own_scores(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    given = [*rows_options(rows_file), "--k", 24, "--model", bert, "--method", "lora", *FAST]
    code, stdout, stderr = invoke("train", *given, "--out", tmp_path / "run", "--json")
    assert code == 0
    noted = json.loads(stdout)["probe"]
    shown = ", ".join(f"{split} accuracy {own['accuracy']:.4f}" for split, own in noted.items())
    assert f"probe on the same rows: {shown}\n" in stderr


@pytest.mark.parametrize("method", ["head", "probe"])
def test_a_dry_run_says_what_it_would_take(bert: Path, rows_file: Path, method: str) -> None:
    given = [*rows_options(rows_file), "--k", 24, "--model", bert, "--method", method]
    code, stdout, stderr = invoke("train", *given, "--dry-run", "--json")
    assert code == 0, stderr
    seconds = json.loads(stdout)["seconds"]
    assert 0 < seconds["least"] <= seconds["most"] < 60


def test_pairs_are_noted_as_the_run_reads_them(bert: Path, tmp_path: Path) -> None:
    lines = [f"the film {i},{('good', 'awful')[i % 2]} film,{i % 2}" for i in range(40)]
    (tmp_path / "pairs.csv").write_text("\n".join(["a,b,label", *lines]) + "\n")
    results = {}
    for method in ("lora", "probe"):
        settings = own_rows(bert, tmp_path / "pairs.csv", method, text="a", text_pair="b")
        settings = settings.with_("train", epochs=1).with_("model", pairs="apart")
        settings = settings.with_("model", pooling="mean")
        *_, last = execution.execute(settings, tmp_path / method)
        assert isinstance(last, Finished)
        results[method] = last.result
    noted = results["lora"]["probe"]
    assert noted == {split: results["probe"][split] for split in ("dev", "test")}
