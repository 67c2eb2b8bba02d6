"""A newcomer's first hour: own files without flags, habits from elsewhere, doctor, terminals."""

import fcntl
import io
import json
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
from conftest import write_rows
from test_cli import FAST, error_of, invoke, own

from unipelt_cli.cli import app
from unipelt_cli.commands.doctor import examination, machine
from unipelt_cli.config.presets import read_preset
from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import column_guess, preparation
from unipelt_cli.errors import DataError
from unipelt_cli.system.check import Check
from unipelt_cli.terminal import console, gates

WORDS = ("parcel", "late", "refund", "money", "card", "wrong", "blue", "shirt", "bell", "crash")
TOPICS = ("refund", "fault", "status")


def sentence(row: int, length: int = 8) -> str:
    words = (WORDS[(row * step + step) % len(WORDS)] for step in range(1, length))
    return " ".join([f"order {row}", *words])


def write(path: Path, header: str, row: Callable[[int], str], rows: int = 60) -> Path:
    path.write_text("\n".join([header, *map(row, range(rows))]) + "\n", encoding="utf-8")
    return path


GUESSES = [
    ("id,message,topic", lambda n: f"{n},{sentence(n)},{TOPICS[n % 3]}",
     {"text": "message", "label": "topic"},
     "guessed text 'message', label 'topic' (3 labels); to choose: --text COLUMN --label COLUMN"),
    ("what they wrote,who,outcome", lambda n: f"{sentence(n)},u{n},{TOPICS[n % 3]}",
     {"text": "what they wrote", "label": "outcome"},
     "guessed text 'what they wrote', label 'outcome' (3 labels); "
     "to choose: --text COLUMN --label COLUMN"),
    ("premise,hypothesis,label", lambda n: f"{sentence(n)},{sentence(n + 5)},{n % 2}",
     {"text": "premise", "text_pair": "hypothesis", "label": "label"},
     "guessed texts 'premise' and 'hypothesis', label 'label' (2 labels); "
     "to choose: --text COLUMN --text-pair COLUMN --label COLUMN"),
    ("comment,stars", lambda n: f"{sentence(n)},{n * 7 % 100}",
     {"text": "comment", "label": "stars", "kind": "regression"},
     "guessed text 'comment', label 'stars' (60 different numbers: regression); "
     "to choose: --text COLUMN --label COLUMN"),
    ("0,1", lambda n: f"{sentence(n)},{n % 2}", {"text": "0", "label": "1"},
     "guessed text '0', label '1' (2 labels); to choose: --text COLUMN --label COLUMN"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "row", "settings", "said"), GUESSES)
def test_columns_are_guessed_and_said(
    header: str, row: Callable[[int], str], settings: dict[str, str], said: str, tmp_path: Path
) -> None:
    found = column_guess.columns(write(tmp_path / "mine.csv", header, row))
    assert (found.settings, found.said) == (settings, f"mine.csv: {said}")


REFUSED = [
    ("one,two,label", lambda n: f"{sentence(n)},{sentence(n + 9)},{n % 2}",
     "'one' and 'two' could each be the text",
     "give --text one, or both of a pair: --text one --text-pair two"),
    ("text,b,c", lambda n: f"{sentence(n)},{TOPICS[n % 3]},{n % 2}",
     "'b' and 'c' could each be the label", "give --label with one of them"),
    ("text,topic,class", lambda n: f"{sentence(n)},{TOPICS[n % 3]},{n % 2}",
     "'topic' and 'class' could each be the label", "give --label with one of them"),
    ("text,label", lambda n: f"{sentence(n)},x{n}",
     "no column looks like the label", "name it with --label; columns found: 'text', 'label'"),
    ("a,b", lambda n: f"{n % 2},{n % 3}",
     "no column looks like the text", "name it with --text; columns found: 'a', 'b'"),
    (f"{sentence(3)},fault", lambda n: f"{sentence(n)},{TOPICS[n % 3]}",
     f"its first line looks like a row, not like the names of columns: '{sentence(3)}', 'fault'",
     "write their names on a line before it, for example text,label"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "row", "message", "hint"), REFUSED)
def test_what_could_be_two_things_is_never_guessed(
    header: str, row: Callable[[int], str], message: str, hint: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.csv", header, row)
    with pytest.raises(DataError) as caught:
        column_guess.columns(path)
    assert (caught.value.message, caught.value.hint) == (f"{path}: {message}", hint)


def test_what_is_named_is_kept_and_the_rest_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", "a,b,label", lambda n: f"{sentence(n)},{n % 3},{n % 2}")
    found = column_guess.columns(path, label="b")
    assert found.settings == {"text": "a", "label": "b"}
    assert found.said == "mine.csv: guessed text 'a'; to choose: --text COLUMN"
    assert column_guess.columns(path, text="a").settings == {"text": "a", "label": "label"}


def test_every_command_records_the_columns_that_it_guessed(
    tmp_path: Path, backbone_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "mine.csv")
    note = "note: mine.csv: guessed text 'text', label 'label' (2 labels); to choose: "
    flags = ["--train-file", rows, "--k", "12", "--offline", "--json"]
    bert = ["--model", backbone_dir("bert"), *FAST]
    code, _, stderr = invoke("train", *flags, *bert, "--out", "run")
    assert (code, stderr.startswith(note)) == (0, True), stderr
    columns = read_preset("run/experiment.toml")["data"]
    assert (columns["text"], columns["label"]) == ("text", "label")
    code, _, stderr = invoke("train", "--preset", "run/experiment.toml", "--out", "again")
    assert (code, "guessed" in stderr) == (0, False)  # they are settings like any others now
    code, stdout, stderr = invoke("prepare", *flags)
    assert (code, json.loads(stdout)["text"], stderr.count(note)) == (0, ["text"], 1)
    code, stdout, stderr = invoke("sweep", *flags, *bert, "--methods", "lora,head", "--dry-run")
    assert (code, len(json.loads(stdout)["cells"]), stderr.count(note)) == (0, 2, 1)
    other = write(tmp_path / "dev.csv", "message,label", lambda n: f"{sentence(n)},yes")
    given = [*flags[:2], "--dev-file", other, *bert, "--dry-run"]
    code, _, stderr = invoke("train", *given)
    assert (code, stderr.splitlines()[1:]) == (
        2,
        [f"error: {other}: no column 'text'", "hint: columns found: 'message', 'label'"],
    )


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_spreadsheets_semicolons_are_read_and_said(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    write(path, f"text{mark}label", lambda n: f"{sentence(n)}, and{mark}{n % 2}")
    prepared = preparation.prepare(
        DataSettings(train_file=str(path), text="text", label="label", k=20)
    )
    assert prepared.splits["train"].num_rows == 20
    assert prepared.manifest["notes"][0] == f"mine.csv: read with {mark!r} between its fields"


FILES = [
    ("x.xlsx", b"PK", "unknown file type '.xlsx'",
     "give .csv, .tsv, .jsonl, .parquet: in the spreadsheet, save as CSV (UTF-8)"),
    ("x.json", b"[]", "unknown file type '.json'",
     "give .csv, .tsv, .jsonl, .parquet; JSON lines have one object a line: "
     "jq -c '.[]' FILE.json > FILE.jsonl"),
    ("x.txt", b"a", "unknown file type '.txt'",
     "give .csv, .tsv, .jsonl, .parquet: rename it to .tsv if tabs part its columns, and .csv if "
     "commas do"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message", "hint"), FILES)
def test_other_file_types_say_how_they_are_converted(
    name: str, content: bytes, message: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert error_of("train", "--train-file", path) == (f"{path}: {message}", hint)


@pytest.mark.parametrize(
    ("encoding", "said", "name"),
    [
        ("latin-1", "line 2: not UTF-8 (byte 0xe9 at offset 14)", "windows-1252"),
        ("utf-16", "line 1: not UTF-8 (byte 0xff at offset 0)", "utf-16"),
    ],
)
def test_other_encodings_say_how_they_are_converted(
    encoding: str, said: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("text,label\ncaf\u00e9,a\n", encoding=encoding)
    assert error_of("prepare", "--train-file", path) == (
        f"{path}, {said}",
        f"save it as UTF-8, for example: iconv -f {name} -t utf-8 FILE > NEW",
    )


def test_one_label_alone_is_told_before_anything_else(tmp_path: Path) -> None:
    path = write(tmp_path / "one.csv", "text,label", lambda n: f"{sentence(n)},same")
    assert error_of("prepare", *own(path)) == (
        "one: every row has the label 'same'",
        "give rows of at least two classes, or another column with --label",
    )


HABITS = [
    ("train --task demo --epochs 3", "No such option: --epochs", "write --set train.epochs=3"),
    ("train --task demo --lr=1e-3", "No such option: --lr", "write --set train.learning_rate=1e-3"),
    ("train --batch_size 8", "No such option: --batch_size", "write --set train.batch_size=8"),
    ("train --output-dir x", "No such option: --output-dir", "write --out x"),
    ("train --max-length 64", "No such option: --max-length", "write --set model.max_length=64"),
    ("train --gpu", "No such option: --gpu", "write --device cuda"),
    ("train --dev_size 9", "No such option: --dev_size", "write --dev-size 9"),
    ("train --epochs", "No such option: --epochs", "write --set train.epochs=VALUE"),
    ("eval --epochs 3 run", "No such option: --epochs", "see `unipelt eval --help`"),
    ("train mrpc", "Got unexpected extra argument (mrpc)", "write --task mrpc"),
    ("train lora", "Got unexpected extra argument (lora)", "write --method lora"),
    ("train mine.csv", "Got unexpected extra argument (mine.csv)", "write --train-file mine.csv"),
    ("train mrpc,sst2", "Got unexpected extra argument (mrpc,sst2)", "write --tasks mrpc,sst2"),
    ("train what", "Got unexpected extra argument (what)", "see `unipelt train --help`"),
    ("train --set train.epochs 3", "Got unexpected extra argument (3)",
     "write --set train.epochs=3"),
    ("train --seed 1,2,3", "--seed '1,2,3': not a whole number",
     "--seeds 1,2,3 trains a run for each"),
    ("train --k 100,500", "--k '100,500': not a whole number",
     "`unipelt sweep --k 100,500` trains a run for each"),
    ("train --k all", "--k 'all': not a whole number", "leave --k out to train on all rows"),
    ("train --k ten", "--k 'ten': not a whole number", "give a whole number"),
    ("train --task mrpc,sst2", "data.task = 'mrpc,sst2': no such task",
     "write --tasks mrpc,sst2 to train one model on them all"),
    ("train --task mine.csv", "data.task = 'mine.csv': no such task",
     "write --train-file mine.csv for rows of your own"),
    ("train --task demo --method LoRA", "method.name = 'LoRA': no such method",
     "did you mean lora? otherwise see `unipelt list methods`"),
    ("train --task demo --method lora,head", "method.name = 'lora,head': no such method",
     "a run has one method; write `unipelt sweep --methods lora,head` for a run of each"),
    ("train", "data.task is not set",
     "give --task NAME, or your own rows with --train-file FILE"),
    ("run", "No such command 'run'", "did you mean train?"),
    ("ls", "No such command 'ls'", "did you mean list?"),
    ("eval", "Missing argument 'RUN'",
     "give a run's directory; `unipelt list runs` shows those below runs/"),
    ("list", "Missing argument 'WHAT'",
     "give one of backbones, methods, presets, runs, sweeps, tasks"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message", "hint"), HABITS)
def test_habits_from_elsewhere_are_answered(line: str, message: str, hint: str) -> None:
    assert error_of(*line.split()) == (message, hint)


def test_a_directory_that_is_no_run_says_where_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-lora").mkdir(parents=True)
    (tmp_path / "runs" / "demo-lora" / "result.json").touch()
    assert error_of("eval", "runs") == (
        "runs: not a run directory",
        "it holds runs: give one of them, such as runs/demo-lora",
    )
    assert error_of("eval", "demo-lroa") == (
        "demo-lroa: not a run directory",
        "did you mean runs/demo-lora? otherwise see `unipelt list runs`",
    )


def test_a_dry_run_foresees_time_memory_disk_and_place(
    tmp_path: Path,
    rows_file: Path,
    backbone_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*own(rows_file), "--k", "24", "--model", backbone_dir("bert"), *FAST, "--dry-run"]
    code, stdout, stderr = invoke("train", *flags, "--json")
    found = json.loads(stdout)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert 0 < found["seconds"]["least"] <= found["seconds"]["most"] < 600
    assert 1e8 < found["memory_bytes"] < 1e10
    assert 4e4 < found["disk_bytes"] < 1e7
    assert found["run"] == "runs/reviews-k24-unipelt-apl-bert-d111-s42"
    assert found["problem"] is None
    assert "nothing was written\nrun: runs/reviews-k24-unipelt-apl-bert-d111-s42\n" in stderr
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "experiment.toml").touch()
    code, stdout, stderr = invoke("train", *flags, "--out", "there", "--json")
    assert (code, json.loads(stdout)["problem"]) == (0, "there: exists already")
    assert "warning: there: exists already: go on with --resume" in stderr
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["experiment.toml"]


def examined(model: str | None = None) -> dict[str, Check]:
    found = examination.examine(model, offline=True, terminal=("80 columns", None))
    return {check.what: check for check in found}


def test_doctor_finds_this_machine_fit(
    backbone_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "MRPC").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "MRPC" / name).touch()
    monkeypatch.setenv("UNIPELT_DATA", str(tmp_path))
    code, stdout, stderr = invoke("doctor", backbone_dir("t5"), "--offline", "--json")
    found = json.loads(stdout)
    assert (code, found["ok"]) == (0, True), stderr
    assert all(check.keys() == {"what", "ok", "found", "remedy"} for check in found["checks"])
    checks = {check["what"]: check for check in found["checks"]}
    assert checks["torch"]["ok"]
    assert checks["backbone minilm"]["found"] == "whole: 7 files by their sha256"
    assert checks["hub"] == {
        "what": "hub", "ok": None, "found": "not asked: offline", "remedy": None
    }  # fmt: skip
    data_said = f"{tmp_path}: mrpc; not there: cola, sst2, stsb, qqp, mnli, qnli, rte"
    assert checks["data"]["found"] == data_said
    assert checks["architecture"]["found"] == "t5, 2 layers of 32 numbers; attention eager"
    assert checks["parts"]["found"].startswith("adapter, prefix, lora; no bias: ")
    assert "; not bitfit: " in checks["methods"]["found"]
    for line in stderr.splitlines():
        assert len(line) <= 80


def test_doctor_says_what_is_broken_and_how_it_is_mended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIPELT_DATA", "/nowhere")
    monkeypatch.setattr(machine, "MEMORY", 1 << 60)
    monkeypatch.setattr(machine, "DISK", 1 << 60)
    checks = examined("nobody/nothing")
    assert (checks["memory"].ok, checks["disk"].ok, checks["data"].ok) == (False, False, False)
    assert checks["data"].remedy == (
        "set UNIPELT_DATA to a directory in GLUE's layout, with MRPC/train.tsv in it"
    )
    assert checks["backbone nobody/nothing"].found == "not in the local cache"
    code, _, stderr = invoke("doctor", tmp_path, "--offline")
    assert code == 1
    assert stderr.splitlines()[-2].startswith("error: 3 of ")
    assert stderr.splitlines()[-1] == (
        "hint: close programs: training the demo takes 1152921505 GB"
    )


def test_doctor_survives_a_package_that_cannot_be_imported(tmp_path: Path) -> None:
    for name, line in (("torch", "raise RuntimeError('no such driver')"), ("scipy", "import gone")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(line + "\n")
    root = Path(examination.__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-m", "unipelt_cli", "doctor", "--offline", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    checks = {check["what"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "cannot be imported (RuntimeError: no such driver)" in checks["torch"]["found"]
    assert checks["torch"]["remedy"].startswith("pip install --force-reinstall 'torch")
    assert "No module named 'gone'" in checks["scipy"]["found"]
    assert checks["cpu"]["found"] == "not checked: a package above is broken"
    assert checks["cpu"]["ok"] is None


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
    """Return a function that runs a command with a terminal as its stderr, and reads that."""
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path, columns: int = 80, **environment: str) -> str:
        ours, theirs = terminal(columns)
        with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
            for name, value in environment.items():
                patch.setenv(name, value)
            shown = pool.submit(drained, ours)
            with open(theirs, "w", encoding="utf-8") as stderr:  # noqa: PTH123
                patch.setattr(sys, "stderr", stderr)
                app([*map(str, arguments)], standalone_mode=False)
            return shown.result(60)

    return run


def flags_of(rows: Path, bert: Path) -> list[str]:
    return ["train", *own(rows), "--k", "16", "--model", str(bert), *FAST, "--out"]


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


def test_signs_have_a_stand_in_where_the_encoding_lacks_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "ascii", write_through=True))
    gate = {"mean": 0.6, "std": 0.1, "p05": 0.5, "median": 0.6, "p95": 0.7, "entropy": 1.0}
    gates.show_layers([{"layer": 0, "lora": gate}], "mean \xb1 deviation")
    console.say("caf\xe9")
    assert [line.split() for line in written.getvalue().decode("ascii").splitlines()] == [
        ["mean", "~", "deviation"],
        ["layer", "lora"],
        ["0", "###..", "0.60", "~0.10"],
        [".50", ".60", ".70", "1.0"],
        ["caf?"],
    ]


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
