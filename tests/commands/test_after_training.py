"""What a newcomer meets after the first run: changed rows, other precisions, the next step."""

import json
from pathlib import Path

import pytest
from support.backbones import Backbones
from support.command import FAST, error_of, invoke, rows_options
from support.rows import write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "reviews.csv")


def train(rows: Path, backbone: Path, out: Path, *more: str) -> tuple[int, str, str]:
    settings = ("--k", "24", "--method", "lora", "--model", str(backbone), *FAST)
    return invoke("train", *rows_options(rows), *settings, "--out", out, *more)


@pytest.fixture
def run(rows: Path, backbone_dir: Backbones, tmp_path: Path) -> Path:
    code, _, said = train(rows, backbone_dir("bert"), tmp_path / "run")
    assert code == 0, said
    lines = said.splitlines()
    assert lines[-1].startswith(f"next: unipelt predict {tmp_path / 'run'} FILE")
    return tmp_path / "run"


def test_a_finished_run_is_not_returned_for_rows_that_have_changed(
    rows: Path, run: Path, backbone_dir: Backbones
) -> None:
    before = json.loads((run / "result.json").read_text())
    code, answer, _ = train(rows, backbone_dir("bert"), run, "--resume", "--json")
    assert (code, json.loads(answer)) == (0, before)
    text = rows.read_text().replace("awful", "poor")
    rows.write_text(text)
    code, answer, said = train(rows, backbone_dir("bert"), run, "--resume", "--json")
    assert (code, answer) == (2, "")
    assert said.splitlines() == [
        f"error: {run}: its train rows have changed since it was trained",
        "hint: train on these with --overwrite, or into another --out",
    ]
    rows.unlink()  # the result is all that is left of them
    code, answer, _ = train(rows, backbone_dir("bert"), run, "--resume", "--json")
    assert (code, json.loads(answer)) == (0, before)


def test_rows_that_have_changed_do_not_spoil_a_run(rows: Path, run: Path) -> None:
    rows.write_text(rows.read_text().replace("awful", "poor"))
    assert error_of("eval", run) == (
        f"the test rows found now are not those of {run}",
        f"{rows} has changed: restore it, or score other rows with `unipelt eval --file`",
    )
    code, _, said = invoke("verify", run)
    assert code == 1
    assert said.splitlines()[-1] == (
        "hint: the run is whole, but its rows have changed since: restore them to check it on them"
    )
    (run / "metrics.jsonl").write_text("")
    code, _, said = invoke("verify", run)
    assert said.splitlines()[-1] == "hint: do not use this run: restore it, or train it again"


def test_a_run_computes_in_the_precision_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    lines = "good film\nthe plot was awful\n"
    answers = []
    for precision in ("fp32", "bf16"):
        code, answer, said = invoke("predict", run, "-", "--precision", precision, stdin=lines)
        assert code == 0, said
        answers.append(
            [next(iter(json.loads(line)["probabilities"].values())) for line in answer.splitlines()]
        )
    assert answers[0] != answers[1]
    assert answers[0] == pytest.approx(answers[1], abs=0.05)
    assert invoke("eval", run, "--precision", "fp32")[0] == 0
    assert "precision" in error_of("eval", run, "--precision", "fp64")[0]


def test_what_is_left_out_is_named(run: Path) -> None:
    assert error_of("export", run) == (
        "export: there is no --to FORMAT",
        "add --to with one of adapters, peft, hf, onnx",
    )
    assert error_of("predict", run, "the parcel is late") == (
        "the parcel is late: No such file or directory",
        f"give a text as a line: echo 'the parcel is late' | unipelt predict {run} -",
    )
    long = "late " * 200  # longer than a file's name can be
    assert error_of("predict", run, long)[1].startswith("give a text as a line: echo 'late late ")
    assert error_of("predict", run, "more.csv") == (
        "more.csv: No such file or directory",
        "name a file of rows, or - for stdin",
    )


def test_several_runs_end_with_their_names_and_what_to_do(
    rows: Path, backbone_dir: Backbones, tmp_path: Path
) -> None:
    code, _, said = train(
        rows,
        backbone_dir("bert"),
        tmp_path / "runs",
        "--data-seeds",
        "1,2",
        "--set",
        "train.epochs=1",
    )
    assert code == 0, said
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    shown = [line.strip() for line in said.splitlines()]
    assert all(name in shown for name in names)
    assert shown[-1] == f"next: unipelt compare {tmp_path / 'runs'}"


def test_a_run_that_patience_ended_says_so(
    rows: Path, backbone_dir: Backbones, tmp_path: Path
) -> None:
    settings = ("train.epochs=9", "train.patience=1", "train.learning_rate=1e-9")
    more = [word for setting in settings for word in ("--set", setting)]
    code, _, said = train(rows, backbone_dir("bert"), tmp_path / "run", *more)
    assert code == 0, said
    assert (
        "ended after 2 of 9: dev was not better for 1 epochs (* marks the best so far)"
        in said.splitlines()
    )
