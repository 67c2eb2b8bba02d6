"""Runs of earlier versions, whose settings lack what has become a setting since."""

import json
from pathlib import Path

import pytest
from support.command import FAST, error_of, invoke, rows_options
from support.runs import reseal

from unipelt_cli.runs.names import EXPERIMENT
from unipelt_cli.runs.run import read_experiment, read_run

EARLIER = {
    "hyperformer": {"generators": "per_block", "train_layer_norms": False},
    "adamix": {"stop_gradient": False},
    "adalora": {"penalty": "squared"},
}


def as_earlier(directory: Path, method: str) -> None:
    """Make a run one of the version that had no such settings."""
    path = directory / EXPERIMENT
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.split(" = ")[0] not in EARLIER[method]]
    assert len(lines) - len(kept) == len(EARLIER[method])
    path.write_text("".join(kept))
    reseal(directory)


@pytest.mark.parametrize("method", EARLIER)
def test_a_run_of_an_earlier_version_is_read_as_what_it_was(
    method: str, bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    rows = [*rows_options(rows_file), "--k", "24", "--model", bert]
    command = ["train", *rows, "--method", method, *FAST, "--out", out]
    settings = [
        part
        for key, value in EARLIER[method].items()
        for part in ("--set", f"method.{key}={json.dumps(value).strip(chr(34))}")
    ]
    code, stdout, stderr = invoke(*command, *settings, "--json")
    assert code == 0, stderr
    trained, written = json.loads(stdout), read_experiment(out)

    as_earlier(out, method)

    assert read_experiment(out) == written
    assert read_run(out).result["test"] == trained["test"]
    code, stdout, stderr = invoke("eval", out, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["scores"] == trained["test"]
    assert invoke("train", "--resume", *command[1:], *settings)[0] == 0
    key, value = next(iter(EARLIER[method].items()))
    today = getattr(read_experiment(out).method.__class__(), key)
    assert error_of(*command, "--resume") == (
        f"{out}: holds another experiment, method.{key} = {value!r} there, {today!r} here",
        "give another --out, or replace it with --overwrite",
    )
