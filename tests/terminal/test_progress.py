"""Progress moves where lines can be drawn again, and nowhere else."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.command import FAST, invoke, rows_options

from unipelt_cli.cli import app


def drained(ours: int, process: "subprocess.Popen[bytes] | None" = None) -> str:
    """Read a terminal until its other end is closed; end a process that never stops writing."""
    written = b""
    while True:
        try:
            piece = os.read(ours, 2**16)
        except OSError:
            break
        written += piece
        if process is not None and len(written) > 10**6:
            process.kill()
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


def terminal(columns: int) -> tuple[int, int]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a command on a terminal, and reads that."""
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path, columns: int = 80, **environment: str) -> str:
        ours, theirs = terminal(columns)
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
            for name, value in environment.items():
                patch.setenv(name, value)
            shown = pool.submit(drained, ours)
            with open(theirs, "w", encoding="utf-8") as stream:  # noqa: PTH123
                patch.setattr(sys, "stdout", stream)
                patch.setattr(sys, "stderr", stream)
                app([*map(str, arguments)], standalone_mode=False)
            return shown.result(60)

    return run


def flags_of(rows: Path, bert: Path) -> list[str]:
    return ["train", *rows_options(rows), "--k", "16", "--model", str(bert), *FAST, "--out"]


def test_progress_moves_on_a_terminal_and_what_is_said_is_said_once(
    rows_file: Path, backbone_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    ours, theirs = terminal(80)
    flags = [*flags_of(rows_file, backbone_dir("bert")), str(tmp_path / "run")]
    dropped = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    process = subprocess.Popen(
        [sys.executable, "-m", "unipelt_cli", *flags],
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(theirs)
    shown = drained(ours, process)
    assert process.wait(60) == 0
    assert "\x1b[2K" in shown
    assert shown.count("labels") == 1
    assert "run: " in shown


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb"}, {"TERM": "xterm-256color", "NO_COLOR": "1"}]
)
def test_progress_is_lines_where_nothing_can_move(
    environment: dict[str, str],
    on_a_terminal: Callable[..., str],
    rows_file: Path,
    backbone_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    flags = [*flags_of(rows_file, backbone_dir("bert")), tmp_path / "run"]
    shown = on_a_terminal(*flags, columns=60, **environment)
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "epoch  3/3" in shown


@pytest.mark.parametrize("what", ["tasks", "backbones", "presets"])
def test_tables_fit_the_width(what: str, on_a_terminal: Callable[..., str]) -> None:
    for columns in (60, 80):
        shown = on_a_terminal("list", what, TERM="dumb", columns=columns)
        assert max(map(len, shown.splitlines())) <= columns
        assert "\x1b" not in shown


def test_forced_colours_in_a_pipe_never_move_the_cursor(
    rows_file: Path,
    backbone_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    code, _, stderr = invoke(*flags_of(rows_file, backbone_dir("bert")), tmp_path / "run")
    assert code == 0
    assert "\x1b[1m" in stderr
    assert "\x1b[2K" not in stderr
    assert "\x1b[?25l" not in stderr
