"""Columns are guessed where one reading is left, and never where two are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import FAST, error_of, invoke
from support.rows import TOPICS, sentence, write_rows, write_table

from unipelt_cli.config.presets import read_preset
from unipelt_cli.data import column_guess
from unipelt_cli.errors import DataError

GUESSES = [
    ("id,message,topic", lambda n: f"{n},{sentence(n)},{TOPICS[n % 3]}",
     {"text": "message", "label": "topic"},
     "guessed text 'message', label 'topic' (3 labels); to choose: --text COLUMN --label COLUMN"),
    ("what they wrote,who,outcome", lambda n: f"{sentence(n)},u{n},{TOPICS[n % 3]}",
     {"text": "what they wrote", "label": "outcome"},
     "guessed text 'what they wrote', label 'outcome' (3 labels); "
     "to choose: --text COLUMN --label COLUMN"),
    ("premise,hypothesis,label", lambda n: f"{sentence(n)},{sentence(n + 5)},{n % 2}",
     {"text": "premise", "text_pair": "hypothesis", "label": "label"},
     "guessed texts 'premise' and 'hypothesis', label 'label' (2 labels); "
     "to choose: --text COLUMN --text-pair COLUMN --label COLUMN"),
    ("comment,stars", lambda n: f"{sentence(n)},{n * 7 % 100}",
     {"text": "comment", "label": "stars", "kind": "regression"},
     "guessed text 'comment', label 'stars' (60 different numbers: regression); "
     "to choose: --text COLUMN --label COLUMN --set data.kind=classification"),
    ("0,1", lambda n: f"{sentence(n)},{n % 2}", {"text": "0", "label": "1"},
     "guessed text '0', label '1' (2 labels); to choose: --text COLUMN --label COLUMN"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "row", "settings", "said"), GUESSES)
def test_columns_are_guessed_and_said(
    header: str, row: Callable[[int], str], settings: dict[str, str], said: str, tmp_path: Path
) -> None:
    found = column_guess.columns(write_table(tmp_path / "mine.csv", header, row))
    assert (found.settings, found.note) == (settings, f"mine.csv: {said}")


REFUSED = [
    ("one,two,label", lambda n: f"{sentence(n)},{sentence(n + 9)},{n % 2}",
     "'one' and 'two' could each be the text",
     "give --text one, or both of a pair: --text one --text-pair two"),
    ("text,b,c", lambda n: f"{sentence(n)},{TOPICS[n % 3]},{n % 2}",
     "'b' and 'c' could each be the label", "give --label with one of them"),
    ("text,topic,class", lambda n: f"{sentence(n)},{TOPICS[n % 3]},{n % 2}",
     "'topic' and 'class' could each be the label", "give --label with one of them"),
    ("text,label", lambda n: f"{sentence(n)},x{n}",
     "no column looks like the label", "name it with --label; columns found: 'text', 'label'"),
    ("a,b", lambda n: f"{n % 2},{n % 3}",
     "no column looks like the text", "name it with --text; columns found: 'a', 'b'"),
    (f"{sentence(3)},fault", lambda n: f"{sentence(n)},{TOPICS[n % 3]}",
     f"its first line looks like a row, not like the names of columns: '{sentence(3)}', 'fault'",
     "write their names on a line before it, for example text,label"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "row", "message", "hint"), REFUSED)
def test_what_could_be_two_things_is_never_guessed(
    header: str, row: Callable[[int], str], message: str, hint: str, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "mine.csv", header, row)
    with pytest.raises(DataError) as caught:
        column_guess.columns(path)
    assert (caught.value.message, caught.value.hint) == (f"{path}: {message}", hint)


def test_what_is_named_is_kept_and_the_rest_guessed(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "mine.csv", "a,b,label", lambda n: f"{sentence(n)},{n % 3},{n % 2}"
    )
    found = column_guess.columns(path, label="b")
    assert found.settings == {"text": "a", "label": "b"}
    assert found.note == "mine.csv: guessed text 'a'; to choose: --text COLUMN"
    assert column_guess.columns(path, text="a").settings == {"text": "a", "label": "label"}


def test_every_command_records_the_columns_that_it_guessed(
    tmp_path: Path, backbone_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "mine.csv")
    note = "note: mine.csv: guessed text 'text', label 'label' (2 labels); to choose: "
    flags = ["--train-file", rows, "--k", "12", "--offline", "--json"]
    bert = ["--model", backbone_dir("bert"), *FAST]
    code, _, stderr = invoke("train", *flags, *bert, "--out", "run")
    assert (code, stderr.startswith(note)) == (0, True), stderr
    columns = read_preset("run/experiment.toml")["data"]
    assert (columns["text"], columns["label"]) == ("text", "label")
    code, _, stderr = invoke("train", "--preset", "run/experiment.toml", "--out", "again")
    assert (code, "guessed" in stderr) == (0, False)  # they are settings like any others now
    code, stdout, stderr = invoke("prepare", *flags)
    assert (code, json.loads(stdout)["text"], stderr.count(note)) == (0, ["text"], 1)
    code, stdout, stderr = invoke("sweep", *flags, *bert, "--methods", "lora,head", "--dry-run")
    assert (code, len(json.loads(stdout)["cells"]), stderr.count(note)) == (0, 2, 1)
    other = write_table(tmp_path / "dev.csv", "message,label", lambda n: f"{sentence(n)},yes")
    given = [*flags[:2], "--dev-file", other, *bert, "--dry-run"]
    code, _, stderr = invoke("train", *given)
    assert (code, stderr.splitlines()[1:]) == (
        2,
        [f"error: {other}: no column 'text'", "hint: columns found: 'message', 'label'"],
    )


def test_two_columns_that_could_be_the_label_are_refused(tmp_path: Path) -> None:
    lines = [f"{i},{i % 5},the film {i} was fine so far,{'abc'[i % 3]}" for i in range(60)]
    path = tmp_path / "own.csv"
    path.write_text("id,stars,review,aspect\n" + "\n".join(lines) + "\n")
    assert error_of("train", "--train-file", path, "--dry-run") == (
        f"{path}: 'stars' and 'aspect' could each be the label",
        "give --label with one of them",
    )
