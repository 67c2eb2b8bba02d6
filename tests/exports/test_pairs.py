"""Heads that no library has: onnx holds them, the others say what they read and what to do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.backbones import Backbones
from support.command import FAST, error_of, invoke
from support.exported import make_run
from support.pairs import FIRST, SECOND, pair_options, sentence_encoder, write_pairs
from support.snippets import run_snippet

from unipelt_cli.errors import RunError
from unipelt_cli.exports import export
from unipelt_cli.models import evaluation

APART = {"pairs": "apart"}
pytestmark = pytest.mark.usefixtures("few_rows")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "t5", "modernbert", "mpnet"])
def test_onnx_takes_both_texts_under_names_of_their_own(
    backbone_dir: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    run, tuned = make_run(backbone_dir(model_type), "unipelt-apl", pooling="mean", **APART)
    report = export.export_run(run, tuned, "onnx", tmp_path / "out")

    assert report.holds, report
    assert report.parity.rows == 8 + 3
    names = run_snippet(tmp_path / "out", list(zip(FIRST, SECOND, strict=True)), monkeypatch)
    expected = evaluation.compute_logits(tuned, evaluation.encode_rows(tuned, [FIRST, SECOND], 32))
    assert np.abs(names["logits"] - expected).max() <= 2e-5
    inputs = [own.name for own in names["session"].get_inputs()]
    first = [name for name in inputs if not name.endswith("_pair")]
    assert inputs == [*first, *(f"{name}_pair" for name in first)]
    lengths = [len(names["feeds"][name][0]) for name in ("input_ids", "input_ids_pair")]
    assert lengths[0] != lengths[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- each text of a pair cut to 32 tokens and read by itself, mean pooling" in card


@pytest.mark.parametrize("to", ["adapters", "peft"])
@pytest.mark.parametrize("pooling", ["mean", "native"])
@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({"pairs": "apart"}, "the texts of a pair apart"),
        ({"normalise": True}, "features of length 1"),
    ],
)
def test_a_folder_beside_the_backbone_holds_its_part_without_a_head(
    backbone_dir: Backbones,
    tmp_path: Path,
    adapters: Any,
    to: str,
    pooling: str,
    changes: dict[str, Any],
    reads: str,
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling=pooling, **changes)
    report = export.export_run(run, tuned, to, tmp_path / "out")

    assert report.holds, report
    (note,) = [own for own in report.notes if "and the parity is that of hidden states" in own]
    both = f"mean pooling and {reads}" if pooling == "mean" else reads
    assert both in note
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model_head.safetensors" not in written


@pytest.mark.parametrize(
    ("changes", "reads", "flags"),
    [
        (
            {"pooling": "native", "pairs": "apart"},
            "the texts of a pair apart",
            "--set model.pairs=joint",
        ),
        (
            {"pooling": "native", "normalise": True},
            "features of length 1",
            "--set model.normalise=false",
        ),
        (
            {"pooling": "mean", "normalise": True, "pairs": "apart"},
            "mean pooling and the texts of a pair apart",  # whose features keep their lengths
            "--set model.pooling=native --set model.normalise=false --set model.pairs=joint",
        ),
    ],
)
def test_a_plain_classifier_is_refused_with_the_reason_and_the_remedy(
    backbone_dir: Backbones, tmp_path: Path, changes: dict[str, Any], reads: str, flags: str
) -> None:
    run, tuned = make_run(backbone_dir("bert"), "lora", **changes)
    assert not tuned.has_library_head
    with pytest.raises(RunError) as error:
        export.export_run(run, tuned, "hf", tmp_path / "out")
    assert error.value.message == (
        "the-run: no plain classifier computes the same, "
        f"the library's own classifier does not read {reads}"
    )
    assert error.value.hint == f"use --to adapters or --to onnx, or train with {flags}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["bert", "albert", "roberta"])
def test_features_of_length_1_are_exported_as_onnx(
    backbone_dir: Backbones, tmp_path: Path, model_type: str
) -> None:
    run, tuned = make_run(backbone_dir(model_type), "lora", pooling="native", normalise=True)
    assert export.export_run(run, tuned, "onnx", tmp_path / "onnx").holds
    assert export.export_run(run, tuned, "peft", tmp_path / "peft").holds


def test_a_part_of_the_gates_is_made_constant_for_pairs_too(
    backbone_dir: Backbones, tmp_path: Path
) -> None:
    encoder = sentence_encoder(tmp_path / "encoder", backbone_dir("bert"))
    rows = pair_options(write_pairs(tmp_path / "pairs.csv"))
    out = tmp_path / "run"
    rows += ["--folds", "none"]  # what constant gates cost is measured on dev
    code, _, stderr = invoke("train", *rows, "--model", encoder, *FAST, "--out", out)
    assert code == 0, stderr
    static = ("--static-gates", "--cost", "1", "--out", tmp_path / "onnx", "--json")
    code, answer, stderr = invoke("export", out, "--to", "onnx", *static)
    assert code == 0, stderr
    assert json.loads(answer)["parity"]["max_abs_logit_diff"] <= 1e-4
    assert error_of("export", out, "--to", "hf", "--static-gates") == (
        "--to hf: holds no head that reads mean pooling and the texts of a pair apart, "
        "with or without gates",
        "train with --set model.pooling=native --set model.normalise=false "
        "--set model.pairs=joint, or use --to adapters or --to onnx",
    )
