"""Gates as tables on a terminal."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.gates import gate_report

from unipelt_cli.terminal.gates import show_classes, show_differences, show_layers


def test_many_gates_stand_in_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    show_layers(gate_report(*[[0.5, 0.6]] * 6, labels=[0, 0], names=("x",)).by_layer(), "")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "layer" in line] == [
        ["layer", *"abcd"],
        ["layer", *"ef"],
    ]
    assert max(map(len, lines)) <= 80


def test_many_classes_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(f"class {n} {'of a long name ' * 4}" for n in range(40))
    values = list(np.linspace(0.1, 0.9, 80))
    found = gate_report(values, labels=[n // 2 for n in range(80)], names=names)
    show_classes(found.by_class(), 80, "test")
    show_differences(found.differences())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 42 + 3
    assert max(map(len, lines[1:42])) <= 80
    assert "class 39" in lines[-1]


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
