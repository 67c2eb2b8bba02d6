"""The model card of an export: what it says, and that names in it stay names."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from support.backbones import Backbones
from support.exported import LABELS, make_run
from support.rows import write_rows

from unipelt_cli.config.experiment import resolve
from unipelt_cli.exports import export, job, model_card
from unipelt_cli.exports.report import ExportReport
from unipelt_cli.gates.report import inspect_gates
from unipelt_cli.runs.run import Run, read_run
from unipelt_cli.training import execution

HOSTILE = "<img src=x>\n# [a](http://b.c) `d` | *e* ![f](g) \x1b[31m\u202e www.h.i @j &lt; $k$"


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "ROWS", 24)


def card_of(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n\n(.*?)(?=\n\n## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


@pytest.fixture(scope="module")
def exported(
    backbone_dir: Backbones, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, ExportReport, Path]:
    """A run of own rows, exported to `adapters` with the card that its data gives."""
    root = tmp_path_factory.mktemp("card")
    (root / "secret").mkdir()
    rows = write_rows(root / "secret" / "rows.csv", 60)
    settings = {
        "data": {"folds": 0, "train_file": str(rows), "text": "text", "label": "label"},
        "model": {"backbone": str(backbone_dir("bert"))},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32"},
    }
    for _ in execution.execute(resolve([("", settings)]), root / "run"):
        pass
    run = read_run(root / "run")
    report = export.export_run(run, run.build(), "adapters", root / "out")
    assert report.written
    return run, report, root / "out"


def test_head_is_what_the_hub_reads(exported: tuple[Run, ExportReport, Path]) -> None:
    run, _, out = exported
    data = ModelCard(card_of(out)).data
    assert data.library_name == "adapter-transformers"
    assert data.pipeline_tag == "text-classification"
    assert {"unipelt", "unipelt-apl", "adapters"} <= set(data.tags)
    assert data.base_model is None  # a folder of this machine is no name for strangers
    assert {
        (own.metric_type, own.metric_value, own.dataset_split) for own in data.eval_results
    } == {(name, round(value, 4), "test") for name, value in run.result["test"].items()}


def test_scores_have_the_interval_of_rows_drawn_anew(
    exported: tuple[Run, ExportReport, Path],
) -> None:
    run, _, out = exported
    answers = run.predictions()
    assert answers is not None
    right = (answers[0] == answers[1]).astype(float)
    rows = {own[0]: own for own in table(section(card_of(out), "Scores"))}
    _, dev, test, between = rows["accuracy"]
    assert float(test) == pytest.approx(right.mean(), abs=1e-4)
    assert float(dev) == pytest.approx(run.result["dev"]["accuracy"], abs=1e-4)
    low, high = map(float, between.split(" to "))
    drawn = np.random.default_rng(5).choice(right, (4000, len(right))).mean(axis=1)
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.1)


def test_data_is_counted_and_hashed_and_no_text_or_path_is_in_it(
    exported: tuple[Run, ExportReport, Path],
) -> None:
    run, _, out = exported
    text = card_of(out)
    splits = run.environment["data"]["splits"]
    said = {own[0]: own for own in table(section(text, "Data"))}
    for name, own in splits.items():
        assert said[name][1] == str(own["rows"])
        assert said[name][3] == own["digest"][:12]
        assert re.fullmatch("[0-9a-f]{12}", said[name][2])
    assert said["yes"][1:] == [str(own["labels"]["yes"]) for own in splits.values()]
    for secret in ("secret", str(out.parent), "the film"):
        assert secret not in text


def test_gates_are_the_means_over_the_rows_compared(
    exported: tuple[Run, ExportReport, Path],
) -> None:
    run, _, out = exported
    tuned = run.build()
    rows = run.rows("test")
    layers = inspect_gates(run, tuned, rows).by_layer()
    header, *lines = table(section(card_of(out), "Gates"))
    assert set(header) == {"layer", "adapter", "prefix", "lora"}
    parity = job.find_rows(run, tuned)
    assert parity.from_test == len(rows)
    drawn = len(parity.encoded) - parity.from_test
    for layer, line in zip(layers, lines, strict=True):
        for name, value in zip(header[1:], line[1:], strict=True):
            assert float(value) == pytest.approx(
                layer.gates[name].mean, abs=0.01 + 0.1 * bool(drawn)
            )


def test_parity_and_protocol_are_those_of_the_report(
    exported: tuple[Run, ExportReport, Path],
) -> None:
    _, report, out = exported
    said = section(card_of(out), "Parity")
    parity = report.parity
    assert f"differ by {parity.max_abs_logit_diff:.1e} at most" in said
    assert f"over {parity.rows} rows ({parity.test_rows} of the test split" in said
    protocol = section(card_of(out), "Protocol")
    assert "k = all train rows, drawn by data seed 111; seed 42" in protocol
    assert "test was scored once" in protocol
    for note in report.notes:
        assert model_card.escaped(note) in section(card_of(out), "Notes")


def test_same_run_gives_the_same_card(
    exported: tuple[Run, ExportReport, Path], tmp_path: Path
) -> None:
    run, _, out = exported
    export.export_run(run, run.build(), "adapters", tmp_path / "out")
    cards = [card_of(tmp_path / "out"), card_of(out)]
    for title in ("Gates", "Parity"):  # measured: the last digits are not the run's
        cards = [text.replace(section(text, title), "") for text in cards]
    assert cards[0] == cards[1]


def test_limits_say_what_is_wrong_with_a_run(backbone_dir: Backbones, tmp_path: Path) -> None:
    run, tuned = make_run(backbone_dir("bert"), "lora", pooling="native")
    export.export_run(run, tuned, "hf", tmp_path / "good")
    limits = section(card_of(tmp_path / "good"), "Limits")
    assert "It saw no row of high." in limits
    assert "It saw 4 labelled rows" in limits
    assert "Collapsed" not in limits
    assert "## Gates" not in card_of(tmp_path / "good")
    run = replace(run, result={**run.result, "collapsed": True})
    export.export_run(run, tuned, "hf", tmp_path / "bad")
    assert "**Collapsed**" in section(card_of(tmp_path / "bad"), "Limits")


def test_names_of_strangers_are_text(backbone_dir: Backbones, tmp_path: Path) -> None:
    labels = (HOSTILE, *LABELS)
    run, tuned = make_run(backbone_dir("bert"), "lora", labels=labels, pooling="native")
    task = {**run.header["task"], "name": HOSTILE, "text": [HOSTILE]}
    run = replace(run, header={"task": task})
    export.export_run(run, tuned, "hf", tmp_path / "out")
    text = card_of(tmp_path / "out")
    _, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert " ".join(HOSTILE.split())[:20] in ModelCard(text).data.eval_results[0].dataset_name
    assert "\x1b" not in text
    assert "\u202e" not in text
    escaped = model_card.escaped(HOSTILE)
    assert body.count(escaped) == 4  # the title, the labels, the columns, the counts
    rest = body.replace(escaped, "")
    assert "img" not in rest
    unescaped = re.sub(r"\\.", "", escaped)
    for mark in ("<", ">", "`", "*", "[", "]", "!", "#", "|", "$", "://", "www.", "@", "\n"):
        assert mark not in unescaped.replace("&#", ""), mark
    lines = [line for line in section(body, "Data").splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines]
    assert cells == [4] * 4 + [3] * 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("how_to", r"how\_to"),
        ("a|b", r"a\|b"),
        ("a\n\n# b", r"a \# b"),
        ("<b>", "&#60;b&#62;"),
        ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("https://a.b", "https&#58;//a.b"),
        ("www.a.b", "www&#46;a.b"),
        ("&amp;", "&#38;amp;"),
        (r"\*", r"\\\*"),
    ],
)
def test_escaped(text: str, expected: str) -> None:
    assert model_card.escaped(text) == expected
