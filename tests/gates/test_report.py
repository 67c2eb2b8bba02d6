"""What is read off gates: spread, classes, rows and epochs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import error_of, invoke
from support.gates import LINES, gate_report, inspected
from support.models import experiment
from support.runs import reseal

from unipelt_cli.gates.results import ClassMean, LayerGate, RowGate
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import compute_with_gates, encode_rows, gate_means
from unipelt_cli.runs.names import METRICS
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.terminal.gates import show_layers, show_legend
from unipelt_cli.training import execution


def test_a_layer_says_how_much_a_gate_tells_and_how_undecided_it_is() -> None:
    half = gate_report([0.5] * 4, [0.0, 1.0] * 2, [0.05] * 4, labels=[0] * 4, names=("one",))
    (layer,) = half.by_layer()
    found = {name: (layer.gates[name].entropy, layer.gates[name].undecided) for name in "abc"}
    assert found["a"] == (0.0, 1.0), "a constant, half open"
    assert found["b"] == (1.0, 0.0), "either open or closed, by row"
    assert found["c"] == (0.0, pytest.approx(0.286397, abs=1e-5))
    assert half.nearly_closed() == (LayerGate(0, "c", 0.05),)


def test_classes_are_compared_by_what_their_rows_differ_by_anyway() -> None:
    steady, noisy = [0.50, 0.52, 0.60, 0.62, 0.9], [0.1, 0.5, 0.5, 0.9, 0.9]
    found = gate_report(steady, noisy, labels=[0, 0, 1, 1, 2], names=("x", "y", "alone"))
    first, second = found.differences()
    assert (first.gate, second.gate) == ("a", "b")
    assert first.most == ClassMean("y", 0.61)
    assert first.least == ClassMean("x", 0.51)
    assert (first.difference, first.spread) == (0.1, 0.01)
    assert first.effect == pytest.approx(10, abs=1e-3)
    assert second.effect == pytest.approx(2, abs=1e-3)
    assert gate_report(steady, labels=[0] * 5, names=("x",)).differences() == ()
    flat = gate_report([0.5] * 4, labels=[0, 0, 1, 1], names=("x", "y")).differences()
    assert flat[0].effect is None


def test_the_rows_at_both_ends_are_found() -> None:
    found = gate_report([0.1, 0.9, 0.5], [0.9, 0.8, 0.0], labels=[0, 1, 0], names=("x", "y")).top(1)
    ends = {gate.gate: (gate.most[0].row, gate.least[0].row) for gate in found}
    assert ends == {"a": (11, 10), "b": (10, 12), "all": (11, 12)}
    assert found[0].most == (RowGate(11, "y", 0.9),)


def test_layers_show_spread_quantiles_and_both_lora_gates(run: Path) -> None:
    code, stdout, stderr = invoke("inspect-gates", run)
    lines = stdout.splitlines()
    assert stderr == ""
    assert code == 0
    assert lines[0] == "gates of run<i>, 12 test rows, mean ± standard deviation"
    assert lines[1].split() == ["layer", "prefix", "lora_query", "lora_value", "adapter"]
    found = inspected(run)
    for layer in found["layers"]:
        for name in lines[1].split()[1:]:
            values = layer[name]
            assert {"mean", "std", "min", "p05", "median", "p95", "max", "entropy"} < values.keys()
            assert f"{values['mean']:.2f} ±{values['std']:.2f}" in stdout
    assert len(lines) == 2 + 2 * 2 + 1
    assert max(map(len, lines)) <= 80
    assert found["nearly_closed"] == []


def test_nearly_closed_gates_are_marked_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = gate_report([0.5] * 4, [0.04] * 4, labels=[0] * 4, names=("x",))
    show_layers(found.by_layer(), "title")
    show_legend(found.nearly_closed())
    shown = capsys.readouterr().out
    assert LINES.sub("=", shown.splitlines()[2]).split() == [
        "0",
        "=",
        "0.50",
        "±0.00",
        "=!0.04",
        "±0.00",
    ]
    assert "! nearly closed (mean below 0.1): layer 0 b" in shown


def test_classes_and_rows_are_shown_harmless_in_eighty_columns(run: Path) -> None:
    for arguments in (["--by", "class"], ["--by", "example", "--top", "2"]):
        code, stdout, stderr = invoke("inspect-gates", run, *arguments)
        assert (code, stderr) == (0, "")
        assert "\x1b" not in stdout
        assert max(map(len, stdout.splitlines())) <= 80
    found = inspected(run, "--by", "class")
    assert found["differences"][0]["effect"] == max(o["effect"] for o in found["differences"])
    top = inspected(run, "--by", "example", "--top", "2")
    assert "examples" not in top
    assert "film" not in json.dumps(top), "no text leaves by JSON"
    assert [own["gate"] for own in top["top"]][-1] == "all"
    assert all(len(own[end]) == 2 for own in top["top"] for end in ("most", "least"))


def test_each_epoch_records_the_gates_of_its_dev_pass(run: Path) -> None:
    found = inspected(run, "--by", "epoch")
    assert [own["epoch"] for own in found["epochs"]] == [1, 2, 3]
    best = next(own for own in found["epochs"] if own["is_best"])
    assert best["epoch"] == found["best_epoch"]
    there = inspected(run, "--split", "dev")["layers"]
    for recorded, layer, short in zip(best["layers"], there, found["layers"], strict=True):
        assert recorded.keys() == layer.keys()
        for name in recorded.keys() - {"layer"}:
            assert recorded[name] == pytest.approx(layer[name]["mean"], abs=1e-5)
            assert short[name] == {"mean": recorded[name]}
    assert found["epochs"][0]["layers"] != found["epochs"][2]["layers"]
    _, shown, _ = invoke("inspect-gates", run, "--by", "epoch")
    assert re.search(rf"^ *{best['epoch']} \* ", shown, re.MULTILINE)


def test_epochs_without_gates_are_an_error(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    path = copy / METRICS
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**own, "gates": []}) + "\n" for own in events))
    message, hint = error_of("inspect-gates", copy, "--by", "epoch")
    assert message == f"{path}: changed since it was written"
    reseal(copy)
    message, hint = error_of("inspect-gates", copy, "--by", "epoch")
    assert message == f"{copy}: its epochs hold no gates"
    assert hint == "train a gated method with this version: its epochs record them"
    path.write_text("".join(json.dumps({**own, "gates": [{"a": "b"}]}) + "\n" for own in events))
    reseal(copy)
    message, _ = error_of("inspect-gates", copy, "--by", "epoch")
    assert message.startswith(f"{path}: damaged, gates.0.a: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "row"], "--by 'row': no such view"),
        (["--top", "3"], "--top 3: only --by example shows rows"),
        (["--ablate", "--by", "class"], "--ablate and --by class contradict each other"),
        (["--by", "epoch", "--task", "x"], "--by epoch and --task x contradict each other"),
        (
            ["--by", "epoch", "--html", "a.html"],
            "--by epoch and --html a.html contradict each other",
        ),
        (["--plot", "a.xyz"], "--plot 'a.xyz': no such format"),
        (["--html", "a.png"], "--html 'a.png': no such format"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    run: Path, arguments: list[str], message: str
) -> None:
    assert error_of("inspect-gates", run, *arguments)[0] == message


def test_recording_changes_no_byte_of_a_run(
    backbone_dir: Callable[[str], Path],
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from unipelt_cli.models import evaluation
    from unipelt_cli.training import loop

    for name in ("with", "without"):
        settings = experiment(
            backbone_dir("bert"),
            "unipelt-apl",
            data={
                "task": None,
                "k": 24,
                "folds": 0,
                "train_file": str(rows_file),
                "text": "text",
                "label": "label",
            },
            train={"epochs": 2},
        )
        if name == "without":
            monkeypatch.setattr(
                loop,
                "compute_with_gates",
                lambda *given: (evaluation.compute_logits(*given), []),
            )
        list(execution.execute(settings, tmp_path / name, "new"))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]
    assert read_metrics(tmp_path / "without")[0]["gates"] == []
    assert read_metrics(tmp_path / "with")[0]["gates"] != []


def test_a_method_without_gates_records_none(backbone_dir: Callable[[str], Path]) -> None:
    for method in ("bitfit", "apl-ungated"):
        tuned = build(experiment(backbone_dir("bert"), method), 2)
        rows = encode_rows(tuned, [["good film", "a bad cat"]], 128)
        assert compute_with_gates(tuned, rows)[1] == []
    assert gate_means([]) == ()
