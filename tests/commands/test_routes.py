"""The way of settings and files through a command: checked once, read once."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.command import FAST, error_of, invoke
from support.runs import reseal

import unipelt_cli
from unipelt_cli import methods
from unipelt_cli.commands.shared.settings import complete
from unipelt_cli.config import experiment
from unipelt_cli.config.checks import resolve_method
from unipelt_cli.runs.names import EXPERIMENT

_opened: list[str] | None = None
"""What is opened for reading while somebody counts; a hook cannot be taken away again."""


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or _opened is None:
        return
    path, mode, flags = arguments
    is_read = "r" in mode if isinstance(mode, str) else not flags & (os.O_WRONLY | os.O_RDWR)
    if is_read and isinstance(path, str | os.PathLike):
        _opened.append(os.path.realpath(path))


sys.addaudithook(_note_opened)


@contextmanager
def counting_reads() -> Iterator[list[str]]:
    """Collect the real paths of the files that are opened for reading inside."""
    global _opened
    opened: list[str] = []
    _opened = opened
    try:
        yield opened
    finally:
        _opened = None


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the method of each experiment that is checked as a whole, in order."""
    names: list[str] = []

    def resolved(name: str, *arguments: Any) -> Any:
        names.append(name)
        return resolve_method(name, *arguments)

    monkeypatch.setattr(experiment, "resolve_method", resolved)
    return names


def train(bert: Path, rows: Path, *more: object) -> tuple[int, str, str]:
    options = ["--train-file", rows, "--folds", "none", "--model", bert, "--method", "lora"]
    return invoke("train", *options, *FAST, *more)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--dev-size", "8", "--data-seed", "7"]])
def test_training_checks_its_settings_and_reads_its_file_once(
    bert: Path, rows_file: Path, tmp_path: Path, checked: list[str], more: list[str]
) -> None:
    with counting_reads() as opened:
        code, _, stderr = train(bert, rows_file, "--out", tmp_path / "run", *more)
    assert code == 0, stderr
    assert "guessed text 'text', label 'label'" in stderr
    floor = [] if "--dry-run" in more else [methods.FLOOR]  # an experiment of its own
    assert checked == ["lora", *floor]
    assert opened.count(os.path.realpath(rows_file)) == 1


def test_preparing_checks_its_settings_and_reads_its_file_once(
    rows_file: Path, tmp_path: Path, checked: list[str]
) -> None:
    with counting_reads() as opened:
        code, _, stderr = invoke("prepare", "--train-file", rows_file, "--out", tmp_path / "rows")
    assert code == 0, stderr
    assert checked == [methods.DEFAULT]
    assert opened.count(os.path.realpath(rows_file)) == 1


def test_folds_read_the_file_once(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    options = ["--train-file", rows_file, "--model", bert, "--method", "lora", *FAST]
    with counting_reads() as opened:
        code, _, stderr = invoke("train", *options, "--out", tmp_path / "run")
    assert code == 0, stderr
    assert "fold 5" in stderr
    assert opened.count(os.path.realpath(rows_file)) == 1


@pytest.mark.parametrize("more", [[], ["--text", "text", "--label", "label"]])
def test_recommending_reads_its_file_once(
    bert: Path, rows_file: Path, tmp_path: Path, more: list[str]
) -> None:
    options = [
        "--methods",
        "probe,head",
        "--set",
        "train.epochs=1",
        "--budget",
        "1m",
        "--model",
        bert,
    ]
    with counting_reads() as opened:
        code, _, stderr = invoke(
            "recommend", "--train-file", rows_file, *more, *options, "--out", tmp_path / "best"
        )
    assert code == 0, stderr
    assert opened.count(os.path.realpath(rows_file)) == 1


def test_a_file_that_changes_after_the_guess_is_read_again(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unipelt_cli.data import column_guess

    rows = Path(shutil.copy(rows_file, tmp_path / "rows.csv"))
    columns = column_guess.columns

    def changing(path: Path, **options: Any) -> column_guess.Guess:
        guess = columns(path, **options)
        path.write_text(path.read_text() + "one more,good\n")
        return guess

    count = len(rows.read_text().splitlines()) - 1
    monkeypatch.setattr(column_guess, "columns", changing)
    code, stdout, stderr = train(bert, rows, "--dry-run")
    assert code == 0, stderr
    shown = [line.split() for line in stdout.splitlines()]
    drawn = [int(words[1]) for words in shown if words[:1] in (["train"], ["dev"], ["test"])]
    assert sum(drawn) == count + 1


@pytest.mark.parametrize("model", [False, True])
def test_predicting_checks_and_reads_the_runs_settings_once(
    bert: Path, run: Path, rows_file: Path, checked: list[str], model: bool
) -> None:
    moved = ["--model", bert] if model else []
    with counting_reads() as opened:
        code, _, stderr = invoke("predict", run, rows_file, *moved)
    assert code == 0, stderr
    assert len(checked) == 1
    assert opened.count(os.path.realpath(run / EXPERIMENT)) == 1
    assert opened.count(os.path.realpath(rows_file)) == 1


def test_python_opens_a_run_as_commands_do(run: Path, checked: list[str]) -> None:
    with counting_reads() as opened:
        unipelt_cli.load_run(run)
    assert len(checked) == 1
    assert opened.count(os.path.realpath(run / EXPERIMENT)) == 1


def test_what_reads_no_rows_of_the_run_asks_the_hub_for_none(
    copy: Path, rows_file: Path, run: Path
) -> None:
    path = copy / EXPERIMENT
    lines = path.read_text().splitlines()
    lines = [line for line in lines if not line.startswith("train_file = ")]
    lines.insert(lines.index("[data]") + 1, 'dataset = "owner/name"')
    path.write_text("\n".join(lines) + "\n")
    reseal(copy)
    assert error_of("eval", copy) == (
        "data set 'owner/name': not in the local cache, and the hub cannot be reached",
        "give files on disk with --source DIR or --train-file; "
        "`unipelt train --task demo` works offline",
    )
    for command in (["predict"], ["eval", "--file"]):
        expected = invoke(command[0], run, *command[1:], rows_file, "--offline")
        assert invoke(command[0], copy, *command[1:], rows_file, "--offline") == expected
        assert expected[0] == 0


@pytest.mark.parametrize("where", ["preset", "flag", "environment"])
def test_a_source_that_is_prepared_rows_is_taken_as_such_wherever_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "manifest.json").write_text("{}")  # only looked for here
    named = {"data": {"source": str(rows)}}
    monkeypatch.setenv("UNIPELT_DATA", str(rows if where == "environment" else tmp_path))
    layers = [(" (from p)", named)] if where == "preset" else []
    own = {"data": {"task": "sst2"} | (named["data"] if where == "flag" else {})}
    data = complete(layers, own).data
    assert (data.prepared, data.source) == (str(rows), None)
