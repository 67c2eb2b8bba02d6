"""Closing a submodule loses what a pass without it loses."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.command import FAST, error_of, invoke, rows_options
from support.gates import inspected

from unipelt_cli.gates import ablation
from unipelt_cli.gates.results import Loss
from unipelt_cli.models.evaluation import compute_with_gates, encode_rows, gate_means
from unipelt_cli.runs.run import read_run


def test_what_closing_loses_is_what_a_pass_without_it_scores(run: Path) -> None:
    found = inspected(run, "--ablate")
    assert (found["split"], found["rows"]) == ("dev", 24)
    study = found["ablation"]
    assert list(study["all"]) == ["prefix", "lora", "adapter"]
    assert [own["layer"] for own in study["layers"]] == [0, 1]
    finished = read_run(run)
    assert study["score"] == pytest.approx(finished.result["dev"]["accuracy"], abs=1e-6)
    tuned, rows = finished.build(), finished.rows("dev")
    for layer in tuned.classifier.backbone.submodules.layers:  # type: ignore[union-attr]
        layer.adapter.up.weight.data.zero_()
        layer.adapter.up.bias.data.zero_()
    encoded = encode_rows(tuned, [rows["text"]], 128)
    logits, gates = compute_with_gates(tuned, encoded)
    score = float(np.mean(logits.argmax(1) == np.asarray(rows["label"])))
    silent = study["all"]["adapter"]
    assert silent["score"] == pytest.approx(score, abs=1e-6)
    assert silent["lost"] == pytest.approx(study["score"] - score, abs=1e-6)
    first = study["layers"][0]["lora"]["gate"]
    assert first == pytest.approx(
        np.mean([gate_means([gates])[0][f"lora_{place}"] for place in ("query", "value")]), abs=1e-5
    )
    code, shown, talk = invoke("inspect-gates", run, "--ablate", "--split", "test", "--rows", "6")
    assert code == 0
    assert "warning: these are test rows: choose nothing by them" in talk
    assert re.search(r"^run<i>, 6 test rows, accuracy \d\.\d{4}$", shown, re.MULTILINE)


def loss(layer: int | None, part: str, gate: float | None, lost: float) -> Loss:
    return Loss(layer, part, gate, 0.0, lost, 0)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [loss(0, "lora", 0.9, 0.02), loss(3, "prefix", 0.8, 0.0), loss(1, "lora", 0.2, 0.0)],
            "needed most: layer 0 lora (gate 0.90, costs 0.020); "
            "open but not needed: 1 of 3, such as layer 3 prefix (gate 0.80, costs 0.000)",
        ),
        (
            [loss(None, "lora", None, 0.5), loss(0, "lora", None, -0.01)],
            "no submodule is needed alone; not needed: 1 of 1, such as layer 0 lora (costs -0.010)",
        ),
        (
            [loss(0, "lora", 0.9, 0.02), loss(1, "lora", 0.3, 0.0)],
            "needed most: layer 0 lora (gate 0.90, costs 0.020); every open one is needed",
        ),
    ],
)
def test_one_line_says_what_is_open_and_what_is_needed(losses: list[Loss], said: str) -> None:
    assert ablation.verdict(losses) == said


def test_an_ungated_union_is_closed_too_and_another_method_refused(
    backbone_dir: Callable[[str], Path], rows_file: Path, tmp_path: Path
) -> None:
    train = ["train", *rows_options(rows_file), "--k", "24", "--model", backbone_dir("bert"), *FAST]
    for method in ("mam", "bitfit"):
        out = tmp_path / method
        assert invoke(*train, "--set", "train.epochs=1", "--method", method, "--out", out)[0] == 0
    page = tmp_path / "page.html"
    code, stdout, stderr = invoke(
        "inspect-gates", tmp_path / "mam", "--ablate", "--html", page, "--json"
    )
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["layers"] == []
    assert found["ablation"]["layers"][1]["parallel"]["gate"] is None
    assert re.search(r"^ +0 +- +-?0\.\d{4}", stderr, re.MULTILINE)
    assert "What closing a submodule loses" in page.read_text()
    message, hint = error_of("inspect-gates", tmp_path / "bitfit", "--ablate")
    assert message == "--ablate: method 'bitfit' is no union of submodules"
    assert hint == "drop it, or train a union, such as unipelt-apl"
