"""The command among other programs: pipes that close, disks that fill, requests to end."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import error_of, invoke
from support.rows import write_rows

from unipelt_cli.terminal import console, progress

UNIPELT = f"{sys.executable} -m unipelt_cli"


@pytest.fixture(scope="module")
def place(backbone_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with rows, a backbone and a finished run."""
    root = tmp_path_factory.mktemp("shell")
    shutil.copytree(backbone_dir("bert"), root / "bert")
    write_rows(root / "rows.csv", 600)
    (root / "many.jsonl").write_text('{"text": "the film was good"}\n' * 3000)
    with contextlib.chdir(root):
        code, _, stderr = invoke(*OPTIONS.split(), "--set", "train.epochs=2", "--out", "run")
    assert code == 0, stderr
    return root


OPTIONS = (
    "train --train-file rows.csv --text text --label label --k 24 --model bert "
    "--set train.batch_size=8 --precision fp32 --device cpu --offline"
)
TRAIN = f"{UNIPELT} {OPTIONS}"


SLOW_PREDICT = pytest.param("predict run rows.csv", marks=pytest.mark.slow)


def shell(root: Path, script: str, stdin: str | None = "") -> tuple[int, str, str]:
    """Run a line of bash, which fails if any part of its pipe does."""
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        cwd=root,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    assert "Exception ignored" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    "command",
    [
        "predict run many.jsonl",
        pytest.param("inspect-gates run --by example", marks=pytest.mark.slow),
        "list tasks --json",
    ],
)
def test_a_reader_that_has_enough_ends_a_command_quietly(place: Path, command: str) -> None:
    code, stdout, stderr = shell(place, f"{UNIPELT} {command} 2>err | head -1; cat err >&2")
    assert code == 0
    assert len(stdout.splitlines()) == 1
    assert not stderr


@pytest.mark.parametrize("command", ["--help", "--version", "list tasks --json"])
def test_a_reader_that_was_never_there_ends_a_command_quietly(place: Path, command: str) -> None:
    assert shell(place, f"{UNIPELT} {command} | true") == (0, "", "")


@pytest.mark.parametrize("command", [SLOW_PREDICT, "list tasks --json", "--version"])
def test_an_answer_that_cannot_be_written_is_an_error(place: Path, command: str) -> None:
    code, _, stderr = shell(place, f"{UNIPELT} {command} >/dev/full")
    assert code == 2
    assert stderr.splitlines()[-2:] == [
        "error: the output cannot be written: No space left on device",
        "hint: check the disk, and where the output goes",
    ]


@pytest.mark.parametrize("command", [SLOW_PREDICT, "list tasks"])
def test_closed_outputs_harm_no_command(place: Path, command: str) -> None:
    assert shell(place, f"{UNIPELT} {command} 2>&-")[0] == 0
    assert shell(place, f"{UNIPELT} {command} >&- 2>&- <&-")[0] == 0


@pytest.mark.slow
def test_a_closed_input_is_an_error(place: Path) -> None:
    code, stdout, stderr = shell(place, f"{UNIPELT} predict run - <&-")
    assert (code, stdout) == (2, "")
    assert stderr.splitlines() == [
        "error: stdin is closed",
        "hint: give rows on it, or name a FILE",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("talk", ["2>/dev/full", "2>&-", "2> >(head -1 >/dev/null)"])
def test_progress_that_nobody_takes_ends_no_run(place: Path, tmp_path: Path, talk: str) -> None:
    out = tmp_path / "run"
    code, stdout, _ = shell(place, f"{TRAIN} --set train.epochs=3 --out {out} --json {talk}")
    assert code == 0
    assert json.loads(stdout) == json.loads((out / "result.json").read_text())


def begin(root: Path, script: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        script.split(),
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_keeps_what_was_trained(
    place: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    process = begin(place, f"{TRAIN} --set train.epochs=2000 --set train.patience=2000 --out {out}")
    assert process.stderr is not None
    while "epoch" not in process.stderr.readline():
        pass
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == f"interrupted: go on with --resume --out {out}"
    assert (out / "state.safetensors").is_file()
    assert not (out / "result.json").exists()
    assert not (out / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.3, 0.5, 0.8, 6.0])
def test_a_request_to_end_ends_any_command_quietly(
    place: Path, number: signal.Signals, seconds: float
) -> None:
    """Before, within and after its imports; then it waits for its input."""
    process = subprocess.Popen(
        f"{UNIPELT} predict run -".split(),
        cwd=place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs in a shell's background is told to ignore Ctrl-C, and may be running these.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    began = seconds > 2  # before that, on a busy machine, Python may still be starting
    assert process.returncode == 130 or (not began and process.returncode == -number)
    assert not (began and stderr)


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("export . --to adapters", "here-adapters"),
        ("reproduce .", "here-reproduced"),
    ],
)
def test_a_run_may_be_named_from_inside(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, made: str
) -> None:
    monkeypatch.chdir(shutil.copytree(place / "run", tmp_path / "here"))
    code, _, stderr = invoke(*command.split(), "--offline")
    assert code == 0, stderr
    assert {path.name for path in tmp_path.iterdir()} == {"here", made}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval run --split dev --file rows.csv", "--split dev and --file rows.csv contradict"),
        ("eval run --source x --file rows.csv", "--source x and --file rows.csv contradict"),
        ("eval run --label label", "--label 'label': the run knows its own"),
        ("train --task demo --tasks sst2,cola", "data.tas"),
        ("train --prepared x --source y", "data."),
        ("train --resume --overwrite", "--resume and --overwrite contradict each other"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(place)
    assert error_of(*command.split())[0].startswith(message)


def test_talk_beside_the_progress_of_a_terminal_comes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A console that writes to what stands in its own place never ends."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.live() as show:
        view = show("accuracy", 3)
        assert sys.stderr is terminal
        console.say("beside it")
        view.console.print("an epoch")
    assert "beside it\n" in terminal.getvalue()
    assert "an epoch\n" in terminal.getvalue()
