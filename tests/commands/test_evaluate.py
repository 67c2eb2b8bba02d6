"""The command `eval`."""

import json
import subprocess
import sys
from pathlib import Path

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
