"""The command `predict`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import invoke


def test_predict_gives_one_object_a_row_in_the_order_of_the_input(
    run: Path, tmp_path: Path
) -> None:
    texts = ["the film was good", "awful", "the cat sat on the red mat and ran " * 5]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, stdout, stderr = invoke("predict", run, path)
    assert (code, stderr) == (0, "")
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row.keys() == {"label", "probabilities"}
        assert row["probabilities"].keys() == {"no", "yes"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    alone = [json.loads(invoke("predict", run, "-", stdin=text + "\n")[1]) for text in texts]
    for one, other in zip(rows, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('{"text": "the film was good"}\n' * 3000)
    command = f"'{sys.executable}' -m unipelt_cli predict '{run}' '{path}' | head -n 1"
    result = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    first, status = result.stdout.splitlines()
    assert json.loads(first)["label"] in ("yes", "no")
    assert (status, result.stderr) == ("0", "")
