"""Runs that were stopped go on; directories that are there are kept or replaced."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command import FAST, error_of, invoke, rows_options

from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import read_experiment
from unipelt_cli.training import execution
from unipelt_cli.training.events import Epoch


def test_resume_starts_goes_on_and_returns(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [
        "train",
        *rows_options(rows_file),
        "--k",
        "24",
        "--model",
        bert,
        *FAST,
        "--out",
        out,
    ]
    code, stdout, _ = invoke(*arguments, "--resume", "--json")
    assert code == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    again = invoke(*arguments, "--resume", "--json")
    assert again[:2] == (0, stdout)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    message, hint = error_of(*arguments, "--resume", "--set", "train.clip=2.0")
    assert message == f"{out}: holds another experiment, train.clip = 1.0 there, 2.0 here"
    assert hint == (
        "go on as it began with --set train.clip=1.0; else give another --out, or replace it with "
        "--overwrite"
    )
    assert invoke(*arguments, "--resume", "--set", "train.clip=1.0")[0] == 0
    changed = ("--set", "train.balanced=false", "--set", "train.warmup=0.2")
    message, hint = error_of(*arguments, "--resume", *changed)
    assert hint.startswith(
        "go on as it began with --set train.balanced=true --set train.warmup=0.1;"
    )
    assert error_of(*arguments, "--resume", "--seed", "3")[1] == (
        "give another --out, or replace it with --overwrite"
    )
    elsewhere = "give another --out, or replace it with --overwrite"
    assert error_of(*arguments, "--resume", "--data-seed", "9")[1] == elsewhere
    assert error_of(*arguments) == (
        f"{out}: exists already",
        "go on with --resume, replace it with --overwrite, or give another --out",
    )
    assert invoke(*arguments, "--overwrite")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_there_and_resume_ends_as_if_nothing_happened(
    bert: Path, rows_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    settings = ["--set", "train.epochs=60", "--set", "train.patience=60", "--device", "cpu"]
    arguments = ["train", *rows_options(rows_file), "--k", "24", "--model", str(bert), *settings]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert invoke(*arguments, "--out", whole)[0] == 0
    command = [sys.executable, "-m", "unipelt_cli", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("interrupted: go on with --resume")
    assert not (out / "result.json").exists()
    assert read_metrics(out)[-1]["kind"] == "interrupted"
    message, _ = error_of("eval", out)
    assert message.startswith(f"{out}: unfinished, stopped after epoch ")
    code, stdout, _ = invoke("list", "runs", tmp_path, "--json")
    status = {entry["run"]: entry["status"] for entry in json.loads(stdout)["runs"]}
    assert status["whole"] == "finished"
    assert status["run"].startswith("stopped after epoch ")
    code, _, stderr = invoke(*arguments, "--out", out, "--resume")
    assert code == 0, stderr
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (out / "state.safetensors").exists()
    kinds = [(event["kind"], event["epoch"]) for event in read_metrics(out)]
    assert kinds == [("epoch", epoch) for epoch in range(1, len(kinds) + 1)]


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in GLUE's layout that holds a made-up RTE."""
    root = tmp_path_factory.mktemp("glue")
    (root / "RTE").mkdir()
    for name, count in (("train", 60), ("dev", 12)):
        rows = []
        for i in range(count):
            animal, negation = (("cat", ""), ("dog", "not_"))[i % 2]
            label = f"{negation}entailment"
            rows.append(f"{i}\tthe cat {name} {i} sat\tthe {animal} sat\t{label}")
        content = "index\tsentence1\tsentence2\tlabel\n" + "\n".join(rows) + "\n"
        (root / "RTE" / f"{name}.tsv").write_text(content)
    return root


@pytest.mark.parametrize("flag", ["--prepared", "--source"])
def test_prepared_rows_resume_whatever_they_were_drawn_with(
    bert: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = ["--k", "16", "--data-seed", "222", "--dev-size", "10"]
    task = ["--task", "rte"]
    assert invoke("prepare", *task, *drawn, "--source", glue, "--out", "rows")[0] == 0
    arguments = ["train", *task, flag, "rows", "--model", bert, "--set", "train.epochs=1"]
    code, stdout, stderr = invoke(*arguments, "--json")
    assert code == 0, stderr
    name = "runs/rte-k16-unipelt-apl-bert-d222-s42"
    assert json.loads((tmp_path / name / "result.json").read_text()) == json.loads(stdout)
    assert invoke(*arguments, "--resume")[0] == 0
    monkeypatch.chdir(tmp_path.parent)
    assert invoke("eval", tmp_path / name)[0] == 0
    message, _ = error_of(
        "train", "--prepared", tmp_path / "rows", "--data-seed", "333", "--model", bert
    )
    assert "333" in message


def test_resume_goes_on_with_the_recorded_settings(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["train", *rows_options(rows_file), "--k", "24", "--model", str(bert), *FAST]
    out, whole = tmp_path / "run", tmp_path / "whole"
    sdpa = ["--set", "model.attention=sdpa"]
    assert invoke(*arguments, *sdpa, "--out", whole)[0] == 0
    events = execution.execute(read_experiment(whole), out)
    for event in events:
        if isinstance(event, Epoch):
            break
    events.close()
    (out / "environment.json").unlink()
    assert invoke(*arguments, "--out", out, "--resume")[0] == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert invoke("eval", out)[0] == 0


def test_overwrite_clears_what_a_killed_process_left(
    copy: Path, bert: Path, rows_file: Path
) -> None:
    (copy / ".unipelt-x").mkdir()
    (copy / ".unipelt-x" / "state.safetensors").write_bytes(b"half")
    arguments = [
        "train",
        *rows_options(rows_file),
        "--k",
        "24",
        "--model",
        bert,
        *FAST,
        "--out",
        copy,
    ]
    assert invoke(*arguments, "--overwrite")[0] == 0
    assert not list(copy.glob(".*"))
    (copy / "thesis.tex").write_text("mine")
    message, _ = error_of(*arguments, "--overwrite")
    assert message == f"{copy}: holds files that no run wrote, such as thesis.tex"
