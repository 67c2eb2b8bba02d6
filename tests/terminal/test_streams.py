"""What a command was asked for is on stdout, in any shell; what it says beside that is not."""

from pathlib import Path

import pytest
from support.command import FAST, invoke, rows_options


@pytest.mark.parametrize("command", ["eval", "verify", "inspect-gates"])
def test_answers_about_a_run_are_all_of_stdout_and_fit_80_columns(run: Path, command: str) -> None:
    code, stdout, stderr = invoke(command, run)
    assert (code, stderr) == (0, "")
    assert len(stdout.splitlines()) >= 2
    assert max(map(len, stdout.splitlines())) <= 80
    assert not any(line != line.rstrip() for line in stdout.splitlines())


def test_training_answers_with_its_scores(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    command = ["train", *rows_options(rows_file), "--k", "24", "--model", bert, *FAST, "--out"]
    code, stdout, stderr = invoke(*command, tmp_path / "run")
    assert code == 0
    assert stdout.splitlines()[0].split() == ["split", "scores"]
    assert "accuracy" in stdout
    assert "epoch" in stderr
    assert "run: " in stderr
    code, stdout, stderr = invoke(*command, tmp_path / "again", "--json")
    assert (code, stdout[0]) == (0, "{")
    assert "split  scores" in stderr, "the next command begins anew"
    assert invoke("eval", tmp_path / "run")[1].startswith("split")
