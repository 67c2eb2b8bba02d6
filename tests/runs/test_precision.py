"""A run computes in either precision, whichever it was trained in, and is checked in both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import invoke
from support.models import experiment
from support.rows import write_rows
from support.runs import reseal
from torch import Tensor

from unipelt_cli import load_run
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.files import sealed
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.names import METRICS, MODEL, PREDICTIONS, PROBE
from unipelt_cli.runs.probe import likeness
from unipelt_cli.runs.run import read_run
from unipelt_cli.training import execution, session

PRECISIONS = ("fp32", "bf16")
LINES = "good film\nthe plot was awful\n"


def train(root: Path, backbone: Path, precision: str) -> Path:
    rows = root / "rows.csv"
    if not rows.is_file():
        write_rows(rows)
    data = {
        "task": None,
        "folds": 0,
        "train_file": str(rows),
        "k": 24,
        "text": "text",
        "label": "label",
    }
    plan = experiment(
        backbone,
        "lora",
        data=data,
        model={"pooling": "native"},
        # So many steps that the logits are far apart, and with them the two precisions.
        train={"epochs": 6, "batch_size": 4, "learning_rate": 2e-2, "precision": precision},
    )
    for _ in execution.execute(plan, root / precision):
        pass
    return root / precision


@pytest.fixture(scope="module")
def runs(
    backbone_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("precisions")
    return {precision: train(root, backbone_dir("bert"), precision) for precision in PRECISIONS}


def as_earlier(run: Path, target: Path, **changed: Tensor) -> Path:
    """Copy a run, with its own logits alone as earlier versions had, or with others."""
    shutil.copytree(run, target)
    tensors, header = sealed.open_tensors(target / PROBE)
    del header[sealed.SEAL]
    sealed.write_tensors(target / PROBE, {"logits": tensors["logits"], **changed}, header)
    reseal(target)
    return target


@pytest.mark.parametrize("asked", PRECISIONS)
@pytest.mark.parametrize("trained", PRECISIONS)
def test_a_run_answers_in_either_precision(
    runs: dict[str, Path], trained: str, asked: str, tmp_path: Path
) -> None:
    earlier = as_earlier(runs[trained], tmp_path / "earlier")
    for run in (runs[trained], earlier):
        code, answer, said = invoke("predict", run, "-", "--precision", asked, stdin=LINES)
        assert (code, len(answer.splitlines())) == (0, 2), said
        code, _, said = invoke("eval", run, "--precision", asked)
        assert code == 0, said


@pytest.mark.parametrize("trained", PRECISIONS)
def test_python_asks_for_a_precision_as_the_command_does(
    runs: dict[str, Path], trained: str
) -> None:
    rows = LINES.splitlines()
    answers = {p: load_run(runs[trained], precision=p).logits(rows) for p in PRECISIONS}
    assert (load_run(runs[trained]).logits(rows) == answers[trained]).all()
    assert 0 < abs(answers["fp32"] - answers["bf16"]).max() < 0.1
    with pytest.raises(ConfigError, match="precision"):
        load_run(runs[trained], precision="fp64")


@pytest.mark.parametrize("trained", PRECISIONS)
def test_a_run_is_verified_and_exported_in_the_precisions_it_has(
    runs: dict[str, Path], trained: str, tmp_path: Path
) -> None:
    code, answer, error = invoke("verify", runs[trained], "--json")
    assert code == 0, error
    said = {c["what"]: c["said"] for c in json.loads(answer)["checks"] if "logits" in c["what"]}
    exact = "64 rows differ by 0.0e+00 at most, 1e-04 allowed"
    if trained == "fp32":
        assert said == {"tensors and logits": exact}
    else:
        assert said.pop("logits in fp32") == exact
        assert said.keys() == {"tensors and logits"}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        code, answer, _ = invoke("verify", runs[trained], "--json")
    finally:
        torch.set_num_threads(threads)
    noted = f", with {threads + 1} threads instead of {threads}"
    assert (code, answer.count(noted)) == (0, 1 + (trained == "bf16"))
    for to in ("hf", "peft"):
        code, answer, error = invoke(
            *("export", runs[trained], "--to", to, "--out", tmp_path / to, "--json")
        )
        assert code == 0, error
        assert json.loads(answer)["parity"]["max_abs_logit_diff"] < 1e-4
    code, _, error = invoke("verify", as_earlier(runs[trained], tmp_path / "earlier"))
    assert code == 0, error


def test_a_probe_holds_the_logits_of_both_precisions(runs: dict[str, Path]) -> None:
    for trained, names in (("fp32", {"logits"}), ("bf16", {"logits", "logits.fp32"})):
        tensors, _ = sealed.open_tensors(runs[trained] / PROBE)
        assert tensors.keys() == names
        for asked in PRECISIONS:
            _, found = read_run(runs[trained]).build_compared(precision=asked)
            if (trained, asked) == ("fp32", "bf16"):
                assert 1e-4 < found.difference <= found.allowed
            else:
                assert found.difference == 0.0


def test_what_bf16_cannot_tell_is_told_in_fp32(runs: dict[str, Path], tmp_path: Path) -> None:
    exact = sealed.open_tensors(runs["bf16"] / PROBE)[0]["logits.fp32"]
    run = as_earlier(runs["bf16"], tmp_path / "run", **{"logits.fp32": exact + 1e-3})
    assert invoke("eval", run)[0] == 0
    refused = f"{run}: computes other logits than when it was saved (in fp32 they differ by 0.001"
    code, _, said = invoke("eval", run, "--precision", "fp32")
    assert code == 2
    assert said.startswith(f"error: {refused}, and may by 0.0001)\n")
    assert invoke("verify", run)[0] == 1


@pytest.mark.parametrize("shape", [(1,), (64, 3)])
def test_logits_that_cannot_be_its_own_are_damage(
    runs: dict[str, Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    run = as_earlier(runs["bf16"], tmp_path / "run", **{"logits.fp32": torch.zeros(shape)})
    code, _, said = invoke("eval", run)
    assert (code, said.splitlines()[0]) == (2, f"error: {run / PROBE}: damaged")


def test_the_probe_in_fp32_changes_nothing_else(
    runs: dict[str, Path],
    backbone_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = torch.random.get_rng_state()
    monkeypatch.setattr(session, "_exact_probe", lambda *_: None)
    shutil.copy(runs["bf16"].parent / "rows.csv", tmp_path)
    bare = train(tmp_path, backbone_dir("bert"), "bf16")
    assert torch.equal(state, torch.random.get_rng_state())
    for name in (MODEL, PREDICTIONS):
        assert (bare / name).read_bytes() == (runs["bf16"] / name).read_bytes()
    losses = [
        [json.loads(line)["train_loss"] for line in (run / METRICS).read_text().splitlines()]
        for run in (bare, runs["bf16"])
    ]
    assert losses[0] == losses[1]
    tensors, _ = sealed.open_tensors(bare / PROBE)
    assert torch.equal(tensors["logits"], sealed.open_tensors(runs["bf16"] / PROBE)[0]["logits"])


@pytest.mark.parametrize(
    "error", [BackboneError("backbone takes 9 GiB", "-"), MemoryError(), torch.OutOfMemoryError()]
)
def test_no_run_is_lost_where_its_copy_in_fp32_does_not_fit(
    backbone_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    read = session.read_stored

    def read_stored(directory: Path, plan: Any, *rest: Any) -> TunedModel:
        if plan.train.precision == "fp32":
            raise error
        return read(directory, plan, *rest)

    monkeypatch.setattr(session, "read_stored", read_stored)
    run = train(tmp_path, backbone_dir("bert"), "bf16")
    assert sealed.open_tensors(run / PROBE)[0].keys() == {"logits"}
    assert invoke("verify", run)[0] == 0


def test_what_is_allowed_goes_with_the_logits() -> None:
    logits = torch.tensor([[-4.0, 4.0], [2.0, -1.0]])
    for size, offset in ((1.0, 0.0), (1000.0, 0.0), (1000.0, 1e6)):
        expected = logits.double() * size + offset

        def holds(
            apart: float, precision: str, is_alike: bool, expected: Tensor = expected
        ) -> bool:
            found = likeness(expected + apart, expected, precision, is_alike=is_alike)
            return found.holds

        for precision, is_alike in (("bf16", True), ("bf16", False), ("fp32", False)):
            assert holds(0.39 * size, precision, is_alike)
            assert not holds(0.41 * size, precision, is_alike)
        assert holds(0.9e-4, "fp32", True)
        assert not holds(1.1e-4 * max(size, offset), "fp32", True)
        assert not holds(float("nan"), "fp32", True)
    calm = torch.full((2, 2), 0.5)  # a model that says the same of every row
    assert likeness(calm + 0.01, calm, "bf16", is_alike=True).holds
