"""The command `doctor` on this machine, and on broken ones."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import invoke

import unipelt_cli
from unipelt_cli.commands.doctor import examination, machine
from unipelt_cli.system.check import Check


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
    assert checks["backbone minilm"]["found"] == "whole: 9 files by their sha256"
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
    assert checks["backbone nobody/nothing"].outcome == "not in the local cache"
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
    root = Path(unipelt_cli.__file__).parent
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
