"""Texts that are cut, and pieces that the tokenizer does not know, are said before training."""

from pathlib import Path

import pytest
from support.command import FAST, invoke
from support.rows import write_table


def notes_of(path: Path, backbone: Path, *given: str) -> list[str]:
    named = ("--text", "text", "--label", "label", "--k", "24", "--model", backbone)
    code, _, stderr = invoke("train", "--train-file", path, *named, *FAST, *given)
    assert code == 0, stderr
    return [line for line in stderr.splitlines() if "train rows are" in line or "pieces" in line]


@pytest.mark.parametrize("given", [("--dry-run",), ()])
def test_texts_that_are_cut_are_counted(
    given: tuple[str, ...], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "the cat sat on the red mat and ran " * 3
    path = write_table(tmp_path / "a.csv", "text,label", lambda n: f"{long},{n % 2}")
    limit = ("--set", "model.max_length=16", "--set", "train.epochs=1")
    assert notes_of(path, bert, *limit, *given) == [
        "note: 24 of 24 train rows are longer than 16 tokens and are cut there; "
        "--set model.max_length=N reads more, up to 512"
    ]


def test_a_text_as_long_as_may_be_is_not_cut(bert: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", "text,label", lambda n: f"{'the cat sat ' * 2},{n % 2}")
    assert notes_of(path, bert, "--set", "model.max_length=8", "--dry-run") == []


def test_unknown_pieces_are_said_where_they_are_many(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "a.csv", "text,label", lambda n: f"\U0001f69a \U0001f4a5,{n % 2}")
    assert notes_of(path, bert, "--dry-run") == [
        "note: 100 % of the pieces of the train texts are unknown to the tokenizer of "
        f"{bert}: a backbone of their language reads them, or a multilingual one, such as --model "
        "xlm-roberta-base"
    ]
