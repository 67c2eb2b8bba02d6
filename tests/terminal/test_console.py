"""What is said on stderr is harmless, and readable in any encoding."""

import io
import sys
from pathlib import Path

import pytest
from support.command import FAST, error_of, invoke, rows_options
from support.rows import save_rows

from unipelt_cli.gates.results import GateStatistics, Layer
from unipelt_cli.terminal import console, gates


def test_markup_and_control_characters_in_names_are_shown_harmless() -> None:
    message, _ = error_of("train", "--task", "[red]x\x1b[31m")
    assert message == r"data.task = '[red]x\x1b[31m': no such task"


def test_escapes_in_labels_and_texts_are_shown_harmless(bert: Path, tmp_path: Path) -> None:
    steering = "yes\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"
    lines = [
        f"the film {i} was {('good', 'bad')[i % 2]},{(steering, 'no')[i % 2]}" for i in range(60)
    ]
    rows = save_rows(tmp_path / "rows.csv", "\n".join(["text,label", *lines]) + "\n")
    out = tmp_path / "run"
    code, stdout, stderr = invoke(
        "train", *rows_options(rows), "--k", "24", "--model", bert, *FAST, "--out", out, "--json"
    )
    assert code == 0
    shown = stderr + stdout + invoke("inspect-gates", out, "--by", "class")[2]
    shown += invoke("predict", out, rows)[1]
    assert r"yes\x1b]0;owned\x07\x1b[2J\u202e\x9b31m" in stderr
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(shown)


def test_signs_have_a_stand_in_where_the_encoding_lacks_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(written, "ascii", write_through=True))
    gate = GateStatistics(
        mean=0.6,
        std=0.1,
        min=0.4,
        p05=0.5,
        median=0.6,
        p95=0.7,
        max=0.8,
        entropy=1.0,
        undecided=1.0,
    )
    gates.show_layers([Layer(0, {"lora": gate})], "mean \xb1 deviation")
    console.say("caf\xe9")
    assert [line.split() for line in written.getvalue().decode("ascii").splitlines()] == [
        ["mean", "~", "deviation"],
        ["layer", "lora"],
        ["0", "###..", "0.60", "~0.10"],
        [".50", ".60", ".70", "1.0"],
        ["caf?"],
    ]
