"""A gated run that the tests of this folder only read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import FAST, invoke, rows_options
from support.rows import write_rows


@pytest.fixture(scope="module")
def run(backbone_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished gated run with two LoRA gates, on classes of hostile names."""
    directory = tmp_path_factory.mktemp("gates")
    rows = write_rows(directory / "rows.csv")
    hostile = rows.read_text().replace(",yes", ",</script><b>&yes\x1b[31m")
    rows.write_text(hostile)
    arguments = ["train", *rows_options(rows), "--k", "24", "--model", backbone_dir("bert"), *FAST]
    set_ = ["--set", "method.lora_gates=separate", "--set", "train.learning_rate=5e-3"]
    set_ += ["--set", "method.gate_rate=1.0"]  # at ten times this rate some would nearly close
    code, _, stderr = invoke(*arguments, *set_, "--out", directory / "run<i>")
    assert code == 0, stderr
    return directory / "run<i>"
