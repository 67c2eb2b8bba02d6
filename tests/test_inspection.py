"""Gates that answer questions: views, what closing loses, pictures and the page."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import experiment, reseal, write_rows
from datasets import Dataset
from test_cli import FAST, error_of, invoke, own

from unipelt_cli.gates import ablation
from unipelt_cli.gates.report import GateReport
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import compute_with_gates, encode_rows, gate_means
from unipelt_cli.runs.names import METRICS
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import read_run
from unipelt_cli.terminal.gates import show_classes, show_differences, show_layers, show_legend
from unipelt_cli.training import execution

LINES = re.compile(r"[█▏▎▍▌▋▊▉·]+")


@pytest.fixture(scope="module")
def run(backbone_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished gated run with two LoRA gates, on classes of hostile names."""
    directory = tmp_path_factory.mktemp("gates")
    rows = write_rows(directory / "rows.csv")
    hostile = rows.read_text().replace(",yes", ",</script><b>&yes\x1b[31m")
    rows.write_text(hostile)
    arguments = ["train", *own(rows), "--k", "24", "--model", backbone_dir("bert"), *FAST]
    set_ = ["--set", "method.lora_gates=separate", "--set", "train.learning_rate=5e-3"]
    code, _, stderr = invoke(*arguments, *set_, "--out", directory / "run<i>")
    assert code == 0, stderr
    return directory / "run<i>"


def answer(*arguments: str | Path) -> dict[str, Any]:
    code, stdout, stderr = invoke("inspect-gates", *arguments, "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def report(*columns: list[float], labels: list[int], names: tuple[str, ...]) -> Any:
    """Make a report of one layer whose gates are called a, b, ... from their values by row."""
    gates = [{chr(97 + n): np.array(own, dtype=np.float32) for n, own in enumerate(columns)}]
    rows = Dataset.from_dict({"row": [10 + n for n in range(len(labels))], "label": labels})
    return GateReport(gates, rows, names)


def test_a_layer_says_how_much_a_gate_tells_and_how_undecided_it_is() -> None:
    half = report([0.5] * 4, [0.0, 1.0] * 2, [0.05] * 4, labels=[0] * 4, names=("one",))
    (layer,) = half.by_layer()
    found = {name: (layer[name]["entropy"], layer[name]["undecided"]) for name in "abc"}
    assert found["a"] == (0.0, 1.0), "a constant, half open"
    assert found["b"] == (1.0, 0.0), "either open or closed, by row"
    assert found["c"] == (0.0, pytest.approx(0.286397, abs=1e-5))
    assert half.nearly_closed() == [{"layer": 0, "gate": "c", "mean": 0.05}]


def test_classes_are_compared_by_what_their_rows_differ_by_anyway() -> None:
    steady, noisy = [0.50, 0.52, 0.60, 0.62, 0.9], [0.1, 0.5, 0.5, 0.9, 0.9]
    found = report(steady, noisy, labels=[0, 0, 1, 1, 2], names=("x", "y", "alone"))
    first, second = found.differences()
    assert (first["gate"], second["gate"]) == ("a", "b")
    assert first["most"] == {"class": "y", "mean": 0.61}
    assert first["least"] == {"class": "x", "mean": 0.51}
    assert (first["difference"], first["spread"]) == (0.1, 0.01)
    assert first["effect"] == pytest.approx(10, abs=1e-3)
    assert second["effect"] == pytest.approx(2, abs=1e-3)
    assert report(steady, labels=[0] * 5, names=("x",)).differences() == []
    flat = report([0.5] * 4, labels=[0, 0, 1, 1], names=("x", "y")).differences()
    assert flat[0]["effect"] is None


def test_the_rows_at_both_ends_are_found() -> None:
    found = report([0.1, 0.9, 0.5], [0.9, 0.8, 0.0], labels=[0, 1, 0], names=("x", "y")).top(1)
    ends = {own["gate"]: (own["most"][0]["row"], own["least"][0]["row"]) for own in found}
    assert ends == {"a": (11, 10), "b": (10, 12), "all": (11, 12)}
    assert found[0]["most"] == [{"row": 11, "label": "y", "value": 0.9}]


def test_layers_show_spread_quantiles_and_both_lora_gates(run: Path) -> None:
    code, _, stderr = invoke("inspect-gates", run)
    lines = stderr.splitlines()
    assert code == 0
    assert lines[0] == "gates of run<i>, 12 test rows, mean ± standard deviation"
    assert lines[1].split() == ["layer", "prefix", "lora_query", "lora_value", "adapter"]
    found = answer(run)
    for layer in found["layers"]:
        for name in lines[1].split()[1:]:
            values = layer[name]
            assert {"mean", "std", "min", "p05", "median", "p95", "max", "entropy"} < values.keys()
            assert f"{values['mean']:.2f} ±{values['std']:.2f}" in stderr
    assert len(lines) == 2 + 2 * 2 + 1
    assert max(map(len, lines)) <= 80
    assert found["nearly_closed"] == []


def test_nearly_closed_gates_are_marked_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = report([0.5] * 4, [0.04] * 4, labels=[0] * 4, names=("x",))
    show_layers(found.by_layer(), "title")
    show_legend(found.nearly_closed())
    shown = capsys.readouterr().err
    assert LINES.sub("=", shown.splitlines()[2]).split() == [
        "0",
        "=",
        "0.50",
        "±0.00",
        "=!0.04",
        "±0.00",
    ]
    assert "! nearly closed (mean below 0.1): layer 0 b" in shown


def test_many_gates_stand_in_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    show_layers(report(*[[0.5, 0.6]] * 6, labels=[0, 0], names=("x",)).by_layer(), "")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split() for line in lines if "layer" in line] == [
        ["layer", *"abcd"],
        ["layer", *"ef"],
    ]
    assert max(map(len, lines)) <= 80


def test_classes_and_rows_are_shown_harmless_in_eighty_columns(run: Path) -> None:
    for arguments in (["--by", "class"], ["--by", "example", "--top", "2"]):
        code, stdout, stderr = invoke("inspect-gates", run, *arguments)
        assert (code, stdout) == (0, "")
        assert "\x1b" not in stderr
        assert max(map(len, stderr.splitlines())) <= 85
    found = answer(run, "--by", "class")
    assert found["differences"][0]["effect"] == max(o["effect"] for o in found["differences"])
    top = answer(run, "--by", "example", "--top", "2")
    assert "examples" not in top
    assert "film" not in json.dumps(top), "no text leaves by JSON"
    assert [own["gate"] for own in top["top"]][-1] == "all"
    assert all(len(own[end]) == 2 for own in top["top"] for end in ("most", "least"))


def test_many_classes_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(f"class {n} {'of a long name ' * 4}" for n in range(40))
    values = list(np.linspace(0.1, 0.9, 80))
    found = report(values, labels=[n // 2 for n in range(80)], names=names)
    answer = {"rows": 80, "layers": found.by_layer(), "classes": found.by_class()}
    show_classes(answer, "test")
    show_differences(found.differences())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 42 + 3
    assert max(map(len, lines[1:42])) <= 80
    assert "class 39" in lines[-1]


def test_each_epoch_records_the_gates_of_its_dev_pass(run: Path) -> None:
    found = answer(run, "--by", "epoch")
    assert [own["epoch"] for own in found["epochs"]] == [1, 2, 3]
    best = next(own for own in found["epochs"] if own["is_best"])
    assert best["epoch"] == found["best_epoch"]
    there = answer(run, "--split", "dev")["layers"]
    for recorded, layer, short in zip(best["layers"], there, found["layers"], strict=True):
        assert recorded.keys() == layer.keys()
        for name in recorded.keys() - {"layer"}:
            assert recorded[name] == pytest.approx(layer[name]["mean"], abs=1e-5)
            assert short[name] == {"mean": recorded[name]}
    assert found["epochs"][0]["layers"] != found["epochs"][2]["layers"]
    _, _, shown = invoke("inspect-gates", run, "--by", "epoch")
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


def test_what_closing_loses_is_what_a_pass_without_it_scores(run: Path) -> None:
    found = answer(run, "--ablate")
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
    code, _, shown = invoke("inspect-gates", run, "--ablate", "--split", "test", "--rows", "6")
    assert code == 0
    assert "warning: these are test rows: choose nothing by them" in shown
    assert re.search(r"^run<i>, 6 test rows, accuracy \d\.\d{4}$", shown, re.MULTILINE)


def loss(layer: int | None, part: str, gate: float | None, lost: float) -> ablation.Loss:
    return ablation.Loss(layer, part, gate, 0.0, lost, 0)


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
def test_one_line_says_what_is_open_and_what_is_needed(
    losses: list[ablation.Loss], said: str
) -> None:
    assert ablation.verdict(losses) == said


def test_an_ungated_union_is_closed_too_and_another_method_refused(
    backbone_dir: Callable[[str], Path], rows_file: Path, tmp_path: Path
) -> None:
    train = ["train", *own(rows_file), "--k", "24", "--model", backbone_dir("bert"), *FAST]
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


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            tag = self.tags[-1][0]
            self.texts[tag] = self.texts.get(tag, "") + data


def test_the_page_holds_all_loads_nothing_and_trusts_no_name(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.html"
    found = answer(run, "--ablate", "--rows", "20", "--html", path)
    page = Page(path.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"b", "i", "img", "link", "iframe", "object", "form"}
    assert not any(
        key in ("src", "onload") or "//" in (value or "")
        for _, own in page.tags
        for key, value in own.items()
    )
    policy = next(own for _, own in page.tags if own.get("http-equiv"))["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    scripts = [own for tag, own in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "gates"}]
    held = json.loads(page.texts["script"])
    assert held["layers"] == found["layers"]
    assert held["ablation"] == found["ablation"]
    assert "url(" not in page.texts["style"]
    assert "\x1b" not in path.read_text(encoding="utf-8")
    sections = [own["id"] for tag, own in page.tags if tag == "section"]
    assert sections == ["class=1", "class=2", "all"]
    cells = [own for tag, own in page.tags if tag == "td"]
    assert len(cells) == 3 * 2 * 4 + 3 * 3
    assert all(own["tabindex"] == "0" for own in cells)
    assert f"mean {found['layers'][0]['prefix']['mean']:.3f} ±" in page.texts["span"]
    assert (
        f"closed: {found['ablation']['layers'][0]['lora']['lost']:.4f} accuracy lost"
        in page.texts["span"]
    )
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 2 * 4


def test_pictures_of_every_view_are_drawn_whole(run: Path, tmp_path: Path) -> None:
    views = [["--by", "class"], ["--by", "epoch"], ["--ablate", "--rows", "4"]]
    for number, view in enumerate(views):
        picture = tmp_path / f"{number}.png"
        assert invoke("inspect-gates", run, *view, "--plot", picture)[0] == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    missing = tmp_path / "no" / "a.png"
    code, _, stderr = invoke("inspect-gates", run, "--by", "epoch", "--plot", missing)
    assert code == 2
    assert f"error: {missing}: cannot be written (No such file or directory)" in stderr


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


def test_progress_on_a_terminal_comes_to_an_end(tmp_path: Path) -> None:
    """What is redirected to the console must not be what the console writes to."""
    code = (
        "from types import SimpleNamespace\n"
        "from unipelt_cli.terminal import console, progress\n"
        "assert list(progress.tracked(iter([1, 2]), 2, 'closing')) == [1, 2]\n"
        "with progress.live() as show:\n"
        "    view = show('accuracy', 3)\n"
        "    view.step(SimpleNamespace(epoch=1, step=1, steps=2, tokens_per_second=9.0))\n"
        "    console.say('said')\n"
    )
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    try:
        subprocess.run(
            [sys.executable, "-c", code], stderr=theirs, env=environment, check=True, timeout=60
        )
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "closing" in shown
    assert shown.count("said") == 1
