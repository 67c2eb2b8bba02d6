"""An export is written whole, on rows of the run, or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.backbones import Backbones
from support.exported import TINY, make_run

from unipelt_cli.config.experiment import resolve
from unipelt_cli.data import preparation
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.exports import export, job, transformers_model
from unipelt_cli.files.as_json import as_json
from unipelt_cli.runs.probe import probe_rows
from unipelt_cli.runs.run import read_run
from unipelt_cli.training import execution

# What is refused, and what stays behind


@pytest.mark.parametrize(
    ("to", "model_type", "method", "pooling", "said", "hint"),
    [
        ("adapters", "bert", "full", "native", "method 'full' adds no submodules", "use --to hf"),
        (
            "adapters",
            "bert",
            "head",
            "mean",
            "method 'head' adds no submodules",
            "train with --set model.pooling=native and use --to hf",
        ),
        (
            "adapters",
            "bert",
            "unipelt-aplb",
            "cls",
            "the part 'bias', and adapters has no such part",
            "(--set method.parts=adapter,prefix,lora), or try --to hf",
        ),
        (
            "adapters",
            "camembert",
            "unipelt-apl",
            "cls",
            "is a camembert",
            "xlm-roberta, or try --to hf",
        ),
        ("adapters", "t5", "unipelt-apl", "mean", "the encoder of a t5", "such as a bert"),
        ("adapters", "t5", "head", "mean", "the encoder of a t5", "and use --to hf"),
        ("hf", "t5", "lora", "mean", "does not read mean pooling", "use --to onnx"),
        (
            "hf",
            "bert",
            "unipelt-apl",
            "native",
            "gates depend on the input",
            "use --to adapters or --to onnx, "
            "or see with --static-gates what constant gates would cost",
        ),
        (
            "hf",
            "bert",
            "adapter",
            "native",
            "what its adapter does",
            "use --to adapters or --to onnx",
        ),
        (
            "hf",
            "bert",
            "full",
            "mean",
            "does not read mean pooling",
            "train with --set model.pooling=native",
        ),
        (
            "hf",
            "bert",
            "lora",
            "mean",
            "does not read mean pooling",
            "use --to adapters or --to onnx, or train with --set model.pooling=native",
        ),
        (
            "hf",
            "bert",
            "unipelt-apl",
            "mean",
            "does not read mean pooling",
            "use --to adapters or --to onnx",
        ),
        (
            "hf",
            "bert",
            "unipelt-aplb",
            "native",
            "gates depend on the input",
            "use --to onnx, or see with --static-gates what constant gates would cost",
        ),
    ],
)
def test_refusals(
    backbone_dir: Backbones,
    tmp_path: Path,
    to: str,
    model_type: str,
    method: str,
    pooling: str,
    said: str,
    hint: str,
) -> None:
    run, tuned = make_run(backbone_dir(model_type), method, pooling=pooling)
    with pytest.raises(RunError) as refused:
        export.export_run(run, tuned, to, tmp_path / "new" / "out")

    assert "the-run" in refused.value.message
    assert said in refused.value.message
    assert refused.value.hint.endswith(hint)
    assert refused.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_target_that_exists_is_refused_and_kept(
    backbone_dir: Backbones, tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "out"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    with pytest.raises(RunError, match="exists already"):
        export.export_run(run, tuned, "hf", target)
    assert list(tmp_path.iterdir()) == [target]


def test_target_that_cannot_be_written_is_refused(backbone_dir: Backbones, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    with pytest.raises(RunError, match="cannot be written"):
        export.export_run(run, tuned, "hf", tmp_path / "file" / "out")


def test_failure_leaves_nothing_behind(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path) -> None:
        raise CheckError("failed", "")

    monkeypatch.setattr(transformers_model, "_load", fail)
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    with pytest.raises(CheckError):
        export.export_run(run, tuned, "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# A run that was really trained


@pytest.mark.parametrize(("to", "method"), [("adapters", "unipelt-apl"), ("hf", "lora")])
def test_trained_run_is_exported(
    backbone_dir: Backbones, rows_file: Path, tmp_path: Path, to: str, method: str
) -> None:
    rows = {"folds": 0, "train_file": str(rows_file), "text": "text", "label": "label"}
    settings = {
        "data": rows,
        "model": {"backbone": str(backbone_dir("bert"))},
        "method": {"name": method, **TINY},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32"},
    }
    for _ in execution.execute(resolve([("", settings)]), tmp_path / "run"):
        pass
    run = read_run(tmp_path / "run")
    report = export.export_run(run, run.build(), to, tmp_path / "out")

    assert report.holds
    assert report.parity.rows == 256
    assert 0 < report.parity.test_rows == run.environment["data"]["splits"]["test"]["rows"]
    assert report.format == to
    assert report.path == str(tmp_path / "out")
    json.dumps(as_json(report))


def test_rows_are_the_runs_own_and_made_up_where_they_are_too_few(
    backbone_dir: Backbones, rows_file: Path
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl")
    lost = job.find_rows(run, tuned)
    assert (len(lost.encoded), lost.from_test) == (256, 0)
    assert lost.encoded.ids == probe_rows(tuned, 256).ids
    settings = {
        "task": None,
        "folds": 0,
        "train_file": str(rows_file),
        "text": "text",
        "label": "label",
    }
    found = preparation.prepare(run.experiment.with_("data", **settings).data)
    run = replace(
        run,
        experiment=run.experiment.with_("data", **settings),
        environment={"data": found.manifest},
        header={"task": {**run.header["task"], "text": ["text"]}},
    )
    rows = job.find_rows(run, tuned)
    test = list(found.splits["test"]["text"])
    assert 0 < rows.from_test == len(test)
    assert len(rows.encoded) == 256
    assert rows.encoded.ids[: len(test)] == tuned.tokenizer(test)["input_ids"]
