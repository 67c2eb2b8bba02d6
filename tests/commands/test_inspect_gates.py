"""The command `inspect-gates`."""

import json
from pathlib import Path

import pytest
import torch
from support.command import error_of, invoke, rows_options

from unipelt_cli.runs.run import read_run


def test_inspect_gates_table_json_and_picture(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "gates.png"
    code, stdout, stderr = invoke("inspect-gates", run, "--plot", picture, "--json")
    answer = json.loads(stdout)
    assert (code, answer["rows"], len(answer["layers"])) == (0, 12, 2)
    for layer, gates in enumerate(answer["layers"]):
        assert gates["layer"] == layer
        for name in ("adapter", "prefix", "lora"):
            assert 0 < gates[name]["min"] <= gates[name]["mean"] <= gates[name]["max"] < 1
            assert gates[name]["std"] >= 0
            assert f"{gates[name]['mean']:.2f}" in stderr
    assert "gates of first, 12 test rows, mean ± standard deviation" in stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gates_are_what_a_hand_computation_gives(run: Path) -> None:
    found = read_run(run)
    tuned = found.build()
    rows = found.rows("test")
    _, stdout, _ = invoke("inspect-gates", run, "--by", "example", "--json")
    examples = json.loads(stdout)["examples"]
    inputs: list[torch.Tensor] = []
    layer = tuned.classifier.backbone.encoder.layer[0]
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    gate = tuned.classifier.backbone.submodules.layers[0].gates["lora"]
    for text, example in zip(rows["text"], examples, strict=True):
        tokens = tuned.tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            tuned.classifier(**tokens)
            by_hand = torch.sigmoid(gate(inputs[-1])).mean()
        assert example["layers"][0]["lora"] == pytest.approx(float(by_hand), abs=1e-5)


def test_gates_by_class_average_to_the_whole(run: Path) -> None:
    _, stdout, _ = invoke("inspect-gates", run, "--by", "class", "--json")
    answer = json.loads(stdout)
    assert [group["class"] for group in answer["classes"]] == ["no", "yes"]
    for layer in range(2):
        whole = answer["layers"][layer]["adapter"]["mean"]
        parts = [
            (group["rows"], group["layers"][layer]["adapter"]["mean"])
            for group in answer["classes"]
        ]
        weighted = sum(rows * mean for rows, mean in parts) / sum(rows for rows, _ in parts)
        assert weighted == pytest.approx(whole, abs=1e-5)


def test_a_method_without_gates_says_so(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    arguments = [
        "train",
        *rows_options(rows_file),
        "--k",
        "24",
        "--model",
        bert,
        "--method",
        "lora",
    ]
    assert invoke(*arguments, "--set", "train.epochs=1", "--out", out)[0] == 0
    message, hint = error_of("inspect-gates", out)
    assert message == f"{out}: method 'lora' has no gates"
    assert hint == "train a gated method, such as unipelt-apl"
