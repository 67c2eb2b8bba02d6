"""What trackers are told: the run's numbers, on the run's own steps, and nothing of its texts."""

import errno
import importlib.util
import json
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from support.command import error_of, invoke
from support.command import rows_options as rows_of
from support.models import experiment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unipelt_cli.config.experiment import Experiment
from unipelt_cli.runs.names import RECORDED, RESULT, STATE
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.terminal import console
from unipelt_cli.training import execution, trackers
from unipelt_cli.training.events import Epoch, Finished, Step
from unipelt_cli.training.session import Mode
from unipelt_cli.training.trackers import Tracking

FAST = [
    *("--set", "train.epochs=2", "--set", "train.batch_size=8", "--k", "24"),
    *("--device", "cpu", "--precision", "fp32", "--method", "lora"),
]


@pytest.fixture
def plan(bert: Path, rows_file: Path) -> Experiment:
    rows = {
        "task": None,
        "folds": 0,
        "train_file": str(rows_file),
        "text": "text",
        "label": "label",
        "k": 24,
    }
    return experiment(bert, "lora", data=rows, train={"epochs": 3, "batch_size": 8})


def scalars(root: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """Read back what a TensorBoard run shows: its points by tag, as (step, value)."""
    found = EventAccumulator(str(root / "tensorboard" / name)).Reload()
    return {
        tag: [(point.step, point.value) for point in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def track(
    plan: Experiment, directory: Path, mode: Mode = "new", steps: int | None = None
) -> Mapping[str, Any] | None:
    """Run an experiment with TensorBoard beside it, and stop it after so many steps."""
    tracks, taken = Tracking(["tensorboard"], [directory], console.say), 0
    with closing(tracks), closing(execution.execute(plan, directory, mode)) as events:
        for event in events:
            tracks.see(0, event)
            taken += isinstance(event, Step)
            if isinstance(event, Finished):
                return event.result
            if taken == steps:
                break
    return None


def test_tensorboard_shows_the_runs_own_numbers(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    command = ["train", *rows_of(rows_file), "--model", bert, *FAST, "--out", tmp_path / "run"]
    code, _, stderr = invoke(*command, "--track", "tensorboard")
    assert code == 0, stderr
    assert f"tensorboard: {tmp_path / 'tensorboard'}" in stderr.splitlines()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*RECORDED, RESULT}
    found = scalars(tmp_path, "run")
    epochs = [event for event in read_metrics(tmp_path / "run") if event["kind"] == "epoch"]
    assert [step for step, _ in found["epoch"]] == [3, 6]
    assert [step for step, _ in found["step_loss"]] == [1, 2, 3, 4, 5, 6]
    for tag, told in {
        "train_loss": [event["train_loss"] for event in epochs],
        "dev/accuracy": [event["dev"]["accuracy"] for event in epochs],
        "train_seconds": [event["train_seconds"] for event in epochs],
        "tokens_per_second": [event["tokens"] / event["train_seconds"] for event in epochs],
    }.items():
        assert [value for _, value in found[tag]] == pytest.approx(told), tag
    result = json.loads((tmp_path / "run" / RESULT).read_text())
    assert found["test/accuracy"] == [(6, pytest.approx(result["test"]["accuracy"]))]
    assert found["result/stored_parameters"] == [(6, result["stored_parameters"])]
    known = EventAccumulator(str(tmp_path / "tensorboard" / "run")).Reload()
    settings = known.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"train.batch_size" in settings
    assert b"dev/accuracy" in known.PluginTagToContent("hparams")["_hparams_/experiment"]


def test_a_resumed_run_goes_on_at_its_step_and_a_replaced_one_begins_again(
    plan: Experiment, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    track(plan, out, steps=5)
    assert [step for step, _ in scalars(tmp_path, "run")["step_loss"]] == [1, 2, 3, 4, 5]
    before = trackers._identity(out)
    assert track(plan, out, "resume") is not None
    found = scalars(tmp_path, "run")
    assert [step for step, _ in found["step_loss"]] == [*range(1, 10)]
    assert [value for _, value in found["epoch"]] == [1, 2, 3]
    assert trackers._identity(out) == before
    track(plan, out, "overwrite", steps=4)
    assert [step for step, _ in scalars(tmp_path, "run")["step_loss"]] == [1, 2, 3, 4]
    assert trackers._identity(out) != before


def test_steps_that_a_killed_run_told_after_its_state_are_shown_once(
    plan: Experiment, tmp_path: Path
) -> None:
    out, seen = tmp_path / "run", 0
    tracks = Tracking(["tensorboard"], [out], console.say)
    events = execution.execute(plan, out)
    for event in events:
        tracks.see(0, event)
        if isinstance(event, Epoch):
            state = (out / STATE).read_bytes()
        seen += isinstance(event, Step)
        if seen == 5:
            break
    tracks.close()
    events.close()
    (out / STATE).write_bytes(state)  # as after step 3
    track(plan, out, "resume")
    assert [step for step, _ in scalars(tmp_path, "run")["step_loss"]] == [*range(1, 10)]


def test_a_tracker_that_breaks_is_warned_of_once_and_no_run_ends_by_it(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def log(self: object, values: object, step: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the middle of the first epoch
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    command = ["train", *rows_of(rows_file), "--model", bert, *FAST, "--data-seeds", "1,2"]
    code, stdout, stderr = invoke(*command, "--out", tmp_path, "--track", "tensorboard", "--json")
    assert code == 0, stderr
    assert len(json.loads(stdout)["runs"]) == 2
    warnings = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    assert [line for line in warnings if "predicts the same" not in line] == [
        "warning: tensorboard has failed, and nothing more is told to it "
        "([Errno 28] No space left on device)"
    ]
    names = {path.name for path in tmp_path.iterdir()} - {"tensorboard"}
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == names
    assert calls == 5


def test_wandb_keeps_runs_on_the_disk_and_nothing_of_their_texts(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")  # --offline wins
    command = ["train", *rows_of(rows_file), "--model", bert, *FAST, "--data-seeds", "1,2"]
    code, _, stderr = invoke(*command, "--out", tmp_path, "--track", "wandb", "--offline")
    assert code == 0, stderr
    told = [line for line in stderr.splitlines() if line.startswith("wandb")]
    found = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert sorted(line.removeprefix("wandb: wandb sync ") for line in told) == [*map(str, found)]
    names = set()
    for directory in found:
        (record,) = directory.glob("*.wandb")
        content = record.read_bytes()
        for expected in (b"test/accuracy", b"dev/accuracy", b"data.train_file"):
            assert expected in content
        assert b"the film" not in content
        assert not list((directory / "files").iterdir())
        names |= set(re.findall(rb"d[12]-s42", content))
    assert names == {b"d1-s42", b"d2-s42"}


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["--track", "tensorbord"],
            "--track 'tensorbord': no such tracker",
            "did you mean tensorboard? otherwise choose one of tensorboard, wandb",
        ),
        (
            ["--track", "tensorboard,"],
            "--track '': no such tracker",
            "choose one of tensorboard, wandb",
        ),
        (
            ["--track", "wandb"],
            "--track wandb: not logged in there",
            "log in with `wandb login`, set WANDB_API_KEY, or add --offline and sync later",
        ),
    ],
)
def test_a_tracker_that_cannot_be_told_anything_is_refused_at_once(
    arguments: list[str], message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert error_of("train", "--task", "demo", *arguments) == (message, hint)


def test_a_tracker_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else find(name)
    )
    assert error_of("train", "--task", "demo", "--track", "wandb") == (
        "--track wandb: wandb is not installed",
        "install the extra: pip install 'unipelt[trackers]'",
    )
