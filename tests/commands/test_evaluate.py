"""The command `eval`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import FAST, error_of, invoke, rows_options
from support.rows import write_rows


def test_eval_in_a_new_process_gives_exactly_the_test_scores(run: Path) -> None:
    command = [sys.executable, "-m", "unipelt_cli", "eval", str(run), "--json", "--offline"]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    result = json.loads((run / "result.json").read_text())
    assert answer == {"split": "test", "rows": 12, "scores": result["test"], "positive": "yes"}


def test_eval_dev_and_file(run: Path, tmp_path: Path) -> None:
    code, stdout, _ = invoke("eval", run, "--split", "dev", "--json")
    result = json.loads((run / "result.json").read_text())
    assert (code, json.loads(stdout)["scores"]) == (0, result["dev"])
    other = write_rows(tmp_path / "other.csv", 8, start=100)
    code, stdout, _ = invoke("eval", run, "--file", other, "--json")
    assert (code, json.loads(stdout)["rows"]) == (0, 8)


def test_rows_that_changed_since_are_refused(bert: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv")
    out = tmp_path / "run"
    assert (
        invoke("train", *rows_options(rows), "--k", "24", "--model", bert, *FAST, "--out", out)[0]
        == 0
    )
    rows.write_text(rows.read_text().replace("film", "book"))
    message, _ = error_of("eval", out)
    assert message == f"the test rows found now are not those of {out}"


def test_a_file_may_call_its_columns_otherwise(run: Path, rows_file: Path, tmp_path: Path) -> None:
    expected = invoke("eval", run, "--file", rows_file, "--json")
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(rows_file.read_text().replace("text,label", "review,stars", 1))
    told = ("--text", "review", "--label", "stars")
    code, answer, stderr = invoke("eval", run, "--file", renamed, *told, "--json")
    assert code == 0, stderr
    assert json.loads(answer)["scores"] == json.loads(expected[1])["scores"]
    _, lines, _ = invoke("predict", run, rows_file)
    assert invoke("predict", run, renamed, "--text", "review")[1] == lines
    piped = invoke("predict", run, "-", "--text", "review", stdin=renamed.read_text())
    assert piped[1] == lines


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["predict", "RUN", "FILE", "--text-pair", "b"],
            "--text-pair b: the run reads 'text'",
            "give --text COLUMN",
        ),
        (
            ["predict", "RUN", "FILE", "--text", "a", "--text-pair", "b"],
            "--text a --text-pair b: the run reads 'text'",
            "give --text COLUMN",
        ),
        (
            ["predict", "RUN", "FILE", "--text", "reviews"],
            "FILE: no column 'reviews'",
            "columns found: 'text', 'label'; rename the one that is meant to 'reviews'",
        ),
        (
            ["eval", "RUN", "--text", "review"],
            "--text 'review': the run knows its own",
            "drop it, or give --file",
        ),
    ],
)
def test_columns_that_cannot_be_are_said(
    run: Path, rows_file: Path, arguments: list[str], message: str, hint: str
) -> None:
    places = {"RUN": str(run), "FILE": str(rows_file)}
    found = error_of(*(places.get(word, word) for word in arguments))
    assert found == (message.replace("FILE", str(rows_file)), hint)
