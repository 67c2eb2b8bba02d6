"""What a run becomes as an ONNX file, run by ONNX Runtime as somebody without us would."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.backbones import Backbones
from support.exported import LABELS, make_run
from support.rows import SENTENCES as SHORT
from support.rows import write_rows
from support.snippets import run_snippet
from typer.testing import CliRunner

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.cli import app
from unipelt_cli.config.experiment import resolve
from unipelt_cli.errors import RunError
from unipelt_cli.exports import export, job, onnx_model
from unipelt_cli.models import evaluation
from unipelt_cli.runs.run import read_run
from unipelt_cli.training import execution

SENTENCES = [*SHORT, "the film was good but " * 20]  # the last one is cut


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many exports are made here; one test compares all rows."""
    monkeypatch.setattr(job, "ROWS", 24)


def logits_of(tuned: Any, columns: list[list[str]]) -> Any:
    return evaluation.compute_logits(tuned, evaluation.encode_rows(tuned, columns, 32))


@pytest.mark.parametrize("model_type", [*BACKBONES, "deberta-v2-separate", "t5-gated"])
def test_every_architecture_is_the_same_for_other_sizes_than_the_traced_one(
    backbone_dir: Backbones,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    run, tuned = make_run(backbone_dir(model_type), "unipelt-apl")
    report = export.export_run(run, tuned, "onnx", tmp_path / "out")

    assert report.holds, report
    assert report.parity.rows == 24 + 3
    names = run_snippet(tmp_path / "out", SENTENCES, monkeypatch)
    assert np.abs(names["logits"] - logits_of(tuned, [SENTENCES])).max() <= 2e-5
    expected = [LABELS[place] for place in logits_of(tuned, [SENTENCES]).argmax(1)]
    assert names["said"] == str(expected)


@pytest.mark.parametrize(
    ("method", "settings", "pooling"),
    [
        ("unipelt-apl", {"gate_pooling": "all"}, "cls"),
        ("unipelt-aplb", {}, "native"),
        ("mam", {}, "mean"),
        ("prompt", {}, "native"),
        ("ia3", {}, "eos"),
        ("full", {}, "native"),
        ("fish-mask", {}, "mean"),
        ("dora", {}, "mean"),
        ("lst", {}, "mean"),
        ("loreft", {}, "mean"),
    ],
)
def test_other_methods_and_poolings(
    backbone_dir: Backbones,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, Any],
    pooling: str,
) -> None:
    run, tuned = make_run(backbone_dir("bert"), method, settings, pooling=pooling)
    report = export.export_run(run, tuned, "onnx", tmp_path / "out")

    assert report.holds, report
    names = run_snippet(tmp_path / "out", SENTENCES, monkeypatch)
    assert np.abs(names["logits"] - logits_of(tuned, [SENTENCES])).max() <= 2e-5


def test_native_head_of_bart_reads_the_last_token_of_each_row(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("bart"), "unipelt-apl", pooling="native")
    assert export.export_run(run, tuned, "onnx", tmp_path / "out").holds


def test_folder_holds_what_it_needs_and_nothing_of_this_machine(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    directory = backbone_dir("bert")
    run, tuned = make_run(directory, "unipelt-apl")
    export.export_run(run, tuned, "onnx", tmp_path / "out")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    assert {"README.md", "config.json", "model.onnx", "tokenizer.json"} <= files.keys()
    config = json.loads(files["config.json"])
    assert config["id2label"] == {str(place): name for place, name in enumerate(LABELS)}
    assert config["max_length"] == 32
    for name, content in files.items():
        for place in (directory.parent, tmp_path, Path(onnx.__file__).parent.parent, "secret"):
            assert str(place).encode() not in content, name
    code = re.findall(r"```python\n(.*?)\n```", files["README.md"].decode(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 16


def test_float16_is_half_as_large_and_has_its_own_tolerance(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl")
    report = export.export_run(run, tuned, "onnx", tmp_path / "half", half=True)
    assert report.written, report
    assert report.tolerance == onnx_model.HALF_TOLERANCE
    assert report.parity.max_abs_logit_diff > 1e-6
    export.export_run(run, tuned, "onnx", tmp_path / "whole")
    graphs = [onnx.load(tmp_path / name / "model.onnx").graph for name in ("half", "whole")]
    sizes = [sum(len(own.raw_data) for own in graph.initializer) for graph in graphs]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.05)
    for graph in graphs:
        kinds = {own.name: own.type.tensor_type.elem_type for own in [*graph.input, *graph.output]}
        assert kinds["input_ids"] == onnx.TensorProto.INT64
        assert kinds["logits"] == onnx.TensorProto.FLOAT


def test_size_that_was_traced_in_by_mistake_is_found(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl")
    forward = onnx_model._Graph.forward

    def fixed(self: Any, *tensors: torch.Tensor) -> torch.Tensor:
        logits = forward(self, *tensors)
        return logits + 0.001 * tensors[0].shape[1].item()  # a number, once and for all

    monkeypatch.setattr(onnx_model._Graph, "forward", fixed)
    report = export.export_run(run, tuned, "onnx", tmp_path / "out")
    assert not report.written
    assert list(tmp_path.iterdir()) == []


def test_pass_that_cannot_be_traced_is_refused(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*tensors: Any) -> None:
        raise RuntimeError("no such operator\nand more")

    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl")
    monkeypatch.setattr(onnx_model._Graph, "forward", fail)
    with pytest.raises(RunError) as refused:
        export.export_run(run, tuned, "onnx", tmp_path / "out")
    assert "cannot be written as ONNX (no such operator)" in refused.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pairs", [False, True])
def test_own_rows_score_the_same_without_this_package(
    backbone_dir: Backbones,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pairs: bool,
) -> None:
    """The whole way: a CSV, a run, an export, and the accuracy of the card's own code on it."""
    monkeypatch.undo()
    rows = write_rows(tmp_path / "rows.csv", 60)
    if pairs:
        first, *rest = rows.read_text().splitlines()
        rows.write_text("\n".join([f"other,{first}", *(f"so {n},{r}" for n, r in enumerate(rest))]))
    own = {"folds": 0, "train_file": str(rows), "text": "text", "label": "label"}
    settings = {
        "data": own | ({"text_pair": "other"} if pairs else {}),
        "model": {"backbone": str(backbone_dir("bert"))},
        "train": {"epochs": 3, "batch_size": 8, "device": "cpu", "precision": "fp32"},
    }
    for _ in execution.execute(resolve([("", settings)]), tmp_path / "run"):
        pass
    said = CliRunner().invoke(
        app, ["export", str(tmp_path / "run"), "--to", "onnx", "--out", str(tmp_path / "out")]
    )
    assert said.exit_code == 0, said.stderr
    scored = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--file", str(rows), "--json"])
    run = read_run(tmp_path / "run")
    header, *lines = [line.split(",") for line in rows.read_text().splitlines()]
    cells = [dict(zip(header, line, strict=True)) for line in lines]
    texts = [tuple(cell[column] for column in run.task.text) for cell in cells]
    with monkeypatch.context() as patch:
        names = run_snippet(
            tmp_path / "out", texts if pairs else [text for (text,) in texts], patch
        )
    labels = [run.task.labels[place] for place in names["logits"].argmax(1)]
    accuracy = np.mean([label == cell["label"] for label, cell in zip(labels, cells, strict=True)])
    assert json.loads(scored.stdout)["scores"]["accuracy"] == pytest.approx(accuracy)
    assert json.loads(scored.stdout)["rows"] == 60
    assert len(set(labels)) > 1


def test_regression_prints_numbers(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "unipelt-apl", labels=())
    export.export_run(run, tuned, "onnx", tmp_path / "out")
    names = run_snippet(tmp_path / "out", SENTENCES, monkeypatch)
    assert names["logits"].shape == (5, 1)
