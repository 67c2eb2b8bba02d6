"""A run is what it says, can be had again, and does not depend on what it need not depend on."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.backbones import save_backbone
from support.command import invoke
from support.models import experiment
from support.rows import write_rows
from support.runs import reseal

from unipelt_cli.data import preparation
from unipelt_cli.data.prepared_directory import save_prepared
from unipelt_cli.files import atomic, sealed
from unipelt_cli.runs import verification
from unipelt_cli.runs.names import ENVIRONMENT, EXPERIMENT, MODEL, PROBE, RECORDED, RESULT
from unipelt_cli.runs.run import read_experiment, read_run
from unipelt_cli.training import execution

OPTIONS = {"prefix_length": 3, "prefix_width": 8, "rank": 2}


@pytest.fixture(scope="module")
def trained(backbone_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a finished run, its backbone and its rows."""
    root = tmp_path_factory.mktemp("trained")
    backbone = Path(shutil.copytree(backbone_dir("bert"), root / "bert"))
    rows = {
        **{"task": None, "folds": 0, "train_file": str(write_rows(root / "rows.csv")), "k": 24},
        **{"text": "text", "label": "label"},
    }
    training = {"epochs": 2, "batch_size": 8}
    plan = experiment(backbone, "unipelt-apl", data=rows, options=OPTIONS, train=training)
    for _ in execution.execute(plan, root / "run"):
        pass
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of it that lies elsewhere: the run still names the first place."""
    return Path(shutil.copytree(trained, tmp_path / "moved"))


def test_a_whole_run_is_verified(trained: Path) -> None:
    code, stdout, stderr = invoke("verify", trained / "run", "--json")
    assert code == 0
    answer = json.loads(stdout)
    assert answer["ok"]
    assert [check["what"] for check in answer["checks"]] == [
        *("result.json", *RECORDED, "backbone", "tensors and logits"),
        *(f"rows rows, {split}" for split in ("train", "dev", "test")),
    ]
    assert all(check["passed"] for check in answer["checks"])
    assert "FAILED" not in stderr


def checks_of(directory: Path, *options: object) -> tuple[int, dict[str, Any]]:
    code, stdout, _ = invoke("verify", directory, *options, "--json")
    checks = json.loads(stdout)["checks"]
    return code, {check["what"]: check["passed"] for check in checks}


@pytest.mark.parametrize("name", [*RECORDED, RESULT])
def test_a_flipped_bit_in_any_file_is_caught(root: Path, name: str) -> None:
    path = root / "run" / name
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    code, checks = checks_of(root / "run")
    assert code == 1
    assert [what for what, passed in checks.items() if passed is False] == [name]


def test_a_flipped_bit_in_a_tensor_is_caught_by_the_seal_as_well(root: Path) -> None:
    path = root / "run" / MODEL
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    reseal(root / "run")
    code, stdout, _ = invoke("verify", root / "run", "--json")
    assert code == 1
    failed = [check for check in json.loads(stdout)["checks"] if check["passed"] is False]
    assert [(check["what"], check["said"]) for check in failed] == [
        ("tensors and logits", f"{path}: its tensors are not those that were written")
    ]


def test_other_logits_are_caught(root: Path) -> None:
    path = root / "run" / PROBE
    tensors, header = sealed.open_tensors(path)
    del header[sealed.SEAL]
    sealed.write_tensors(path, {"logits": tensors["logits"] + 0.01}, header)
    reseal(root / "run")
    code, checks = checks_of(root / "run")
    assert (code, checks["tensors and logits"]) == (1, False)


@pytest.mark.parametrize(
    ("name", "differs"),
    [("model.safetensors", "model.safetensors"), ("vocab.txt", "vocab.txt")],
)
def test_another_backbone_or_tokenizer_is_caught(root: Path, name: str, differs: str) -> None:
    path = root / "bert" / name
    if name == "vocab.txt":
        path.write_text(path.read_text().replace("good\nbad", "bad\ngood"))
    else:
        tensors = load_file(path)
        tensors["embeddings.LayerNorm.bias"] += 1
        save_file(tensors, path, {"format": "pt"})
    code, stdout, _ = invoke("verify", root / "run", "--model", root / "bert", "--json")
    assert code == 1
    (failed,) = [check for check in json.loads(stdout)["checks"] if check["passed"] is False]
    assert failed["what"] == "backbone"
    assert f"but {root / 'bert'} is (" in failed["said"]
    assert failed["said"].endswith(f": other {differs}")


def test_rows_that_changed_fail_and_rows_that_are_gone_are_not_checked(
    trained: Path, root: Path
) -> None:
    run = root / "run"
    toml = (run / EXPERIMENT).read_text().replace(str(trained), str(root))
    (run / EXPERIMENT).write_text(toml)
    reseal(run)
    rows = root / "rows.csv"
    rows.write_text(rows.read_text().replace("film 7 ", "film seven "))
    code, checks = checks_of(run)
    assert code == 1
    assert False in [checks[f"rows rows, {split}"] for split in ("train", "dev", "test")]
    rows.unlink()
    code, checks = checks_of(run)
    assert (code, checks["rows rows"]) == (0, None)


def test_a_run_on_moved_data_and_backbone_is_read_by_options(
    trained: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = trained.with_name("away")
    trained.rename(away)
    try:
        assert invoke("verify", root / "run")[0] == 1
        moved = ["--model", root / "bert"]
        code, checks = checks_of(root / "run", *moved)
        assert (code, checks["backbone"], checks["tensors and logits"]) == (0, True, True)
        rows = ["--file", root / "rows.csv", "--label", "label"]
        assert invoke("eval", root / "run", *rows, *moved)[0] == 0
        assert invoke("predict", root / "run", root / "rows.csv", *moved)[0] == 0
        assert invoke("export", root / "run", "--to", "adapters", *moved)[0] == 0
        moved += ["--source", root]
        code, checks = checks_of(root / "run", *moved)
        assert (code, set(checks.values())) == (0, {True})
        assert invoke("eval", root / "run", *moved)[0] == 0
        assert invoke("reproduce", root / "run", *moved)[0] == 0
    finally:
        away.rename(trained)


def test_a_run_is_reproduced_to_the_byte(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    code, stdout, stderr = invoke("reproduce", trained / "run", "--out", out, "--json")
    assert code == 0
    answer = json.loads(stdout)
    assert answer == {
        "run": str(trained / "run"),
        "reproduction": str(out),
        "equal": True,
        "differences": [],
    }
    assert stderr.endswith("reproduced: the same scores and, to the byte, the same tensors\n")
    models = [(path / MODEL).read_bytes() for path in (trained / "run", out)]
    assert models[0] == models[1]
    code, _, stderr = invoke("reproduce", trained / "run", "--out", out)
    assert (code, stderr.splitlines()[0]) == (2, f"error: {out}: exists already")


def test_what_differs_in_a_reproduction_is_said(root: Path, tmp_path: Path) -> None:
    run = root / "run"
    toml = (run / EXPERIMENT).read_text()
    (run / EXPERIMENT).write_text(toml.replace("seed = 42", "seed = 43"))
    environment = json.loads((run / ENVIRONMENT).read_text())
    environment["packages"]["torch"] = "2.0.0"
    atomic.write_json(run / ENVIRONMENT, environment)
    reseal(run)
    code, stdout, stderr = invoke("reproduce", run, "--out", tmp_path / "again", "--json")
    assert code == 1
    differences = {d["what"]: (d["there"], d["here"]) for d in json.loads(stdout)["differences"]}
    assert differences["torch"] == ("2.0.0", torch.__version__)
    assert "tensors" in differences
    assert f"error: {run}: not reproduced in {tmp_path / 'again'}" in stderr


def test_runs_differ_in_what_they_say_they_differ_in(trained: Path, root: Path) -> None:
    assert verification.differences(read_run(trained / "run"), read_run(root / "run")) == []


PROGRAM = """
import sys
from pathlib import Path
from unipelt_cli.runs import run
from unipelt_cli.training import execution
plan = run.read_experiment(Path(sys.argv[1]))
for _ in execution.execute(plan, Path(sys.argv[2])):
    pass
"""


@pytest.mark.parametrize(
    "changes",
    [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "77", "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "PYTHONUTF8": "0"},
    ],
)
def test_no_hash_seed_locale_or_time_zone_changes_a_byte(
    trained: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(trained / "run"), str(tmp_path / "run")],
        env={**os.environ, **changes},
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    for name in (MODEL, PROBE, EXPERIMENT):
        expected = (trained / "run" / name).read_bytes()
        assert (tmp_path / "run" / name).read_bytes() == expected


def test_nothing_that_ran_before_in_the_process_changes_a_byte(
    trained: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    torch.rand(7)
    plan = read_experiment(trained / "run")
    other = save_backbone(tmp_path / "roberta", "roberta")
    for number, changed in enumerate(
        (plan.with_("train", seed=1), plan.with_("model", backbone=str(other)), plan)
    ):
        for _ in execution.execute(changed, tmp_path / str(number)):
            pass
    expected = (trained / "run" / MODEL).read_bytes()
    assert (tmp_path / "2" / MODEL).read_bytes() == expected


def test_prepared_rows_that_moved_are_found_by_source(trained: Path, tmp_path: Path) -> None:
    rows = {"prepared": str(tmp_path / "data")}
    save_prepared(preparation.prepare(read_experiment(trained / "run").data), tmp_path / "data")
    plan = experiment(trained / "bert", "lora", data={"task": None, **rows}, train={"epochs": 1})
    for _ in execution.execute(plan, tmp_path / "run"):
        pass
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert invoke("eval", tmp_path / "run")[0] == 2
    moved = ["--source", tmp_path / "elsewhere"]
    assert invoke("eval", tmp_path / "run", *moved)[0] == 0
    assert invoke("reproduce", tmp_path / "run", *moved)[0] == 0
