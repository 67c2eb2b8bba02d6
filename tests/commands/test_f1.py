"""F1 of two labels is that of a named one: the rarer of own rows, or the one that is chosen."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from support.command import FAST, error_of, invoke, rows_options
from support.data_files import glue, own_file, prepare_glue, prepare_own
from support.rows import sentence, write_table

from unipelt_cli.data.prepared_directory import load_prepared, save_prepared
from unipelt_cli.files.sealed import open_tensors, with_seal, write_tensors
from unipelt_cli.models.weighted_metrics import weighted_metric
from unipelt_cli.runs.run import read_run
from unipelt_cli.tasks import TASKS, Task

FRAUD = Task("mail", ("text",), ("fraud", "legit"), "f1", ("accuracy",), positive="fraud")
PREDICTED = np.array([0, 1, 0, 1, 1, 1, 0, 1])
EXPECTED = np.array([0, 1, 1, 1, 1, 0, 0, 1])


def rare(path: Path) -> Path:
    """Write rows of which every fifth is fraud: the first label by the alphabet."""
    return write_table(path, "text,label", lambda n: f"{sentence(n)},{'legit' if n % 5 else 'fraud'}")  # fmt: skip  # noqa: E501


def test_f1_is_that_of_the_positive_label() -> None:
    second = Task("mail", ("text",), ("fraud", "legit"), "f1", ("macro_f1", "matthews"))
    first = f1_score(EXPECTED, PREDICTED, pos_label=0)
    other = f1_score(EXPECTED, PREDICTED, pos_label=1)
    assert FRAUD.score(PREDICTED, EXPECTED)["f1"] == pytest.approx(first)
    scores = second.score(PREDICTED, EXPECTED)
    assert scores["f1"] == pytest.approx(other)
    assert scores["macro_f1"] == pytest.approx((first + other) / 2)
    assert [TASKS[name].positive_label for name in ("mrpc", "qqp", "mnli", "stsb")] == [
        *("equivalent", "duplicate", None, None)
    ]


@pytest.mark.parametrize("labels", [("fraud", "legit"), ("a", "b", "c")])
@pytest.mark.parametrize("metric", ["f1", "macro_f1"])
def test_weighted_rows_give_what_repeated_rows_give(labels: tuple[str, ...], metric: str) -> None:
    positive = labels[0] if len(labels) == 2 else None
    task = Task("mail", ("text",), labels, metric, positive=positive)
    random = np.random.default_rng(0)
    predicted, expected = random.integers(0, len(labels), (2, 12))
    weights = random.integers(0, 4, (5, 12))
    found = weighted_metric(task)(predicted, expected, weights.astype(np.float64))
    repeated = [task.score(*np.repeat([predicted, expected], own, axis=1)) for own in weights]
    assert found == pytest.approx([scores[metric] for scores in repeated])


def test_the_rarer_label_is_the_same_for_every_draw_and_another_may_be_chosen(
    tmp_path: Path,
) -> None:
    path = rare(tmp_path / "mail.csv")
    for seed in (1, 2, 3):
        assert prepare_own(path, k=10, data_seed=seed).task.positive_label == "fraud"
    assert prepare_own(own_file(tmp_path)).task.positive_label == "good"  # as many of both
    chosen = prepare_own(path, positive="legit")
    assert (chosen.task.positive_label, chosen.manifest["positive"]) == ("legit", "legit")
    save_prepared(prepare_own(path), tmp_path / "ready")
    assert load_prepared(tmp_path / "ready").task.positive_label == "fraud"
    glue(tmp_path / "glue", "mrpc")
    assert prepare_glue(tmp_path / "glue", "mrpc", k=20).manifest["positive"] == "equivalent"


def test_a_label_that_f1_cannot_be_of_is_refused(tmp_path: Path) -> None:
    path = rare(tmp_path / "mail.csv")
    given = ("prepare", "--train-file", path, "--text", "text", "--label", "label", "--set")
    assert error_of(*given, "data.positive=spam") == (
        "data.positive = 'spam': no label of mail",
        "choose one of 'fraud', 'legit'",
    )
    assert error_of("prepare", "--task", "demo", "--set", "data.positive=fault") == (
        "data.positive = 'fault': demo has 6 labels",
        "drop it; F1 of more than two labels is the mean over them, as data.metric=macro_f1",
    )


def test_the_class_is_named_where_f1_is_shown_and_recorded(bert: Path, tmp_path: Path) -> None:
    path, out = rare(tmp_path / "mail.csv"), tmp_path / "run"
    given = (*rows_options(path), "--k", "24", "--model", bert, *FAST, "--out", out)
    code, stdout, stderr = invoke("train", *given, "--set", "data.metric=f1", "--json")
    assert code == 0, stderr
    result, lines = json.loads(stdout), stderr.splitlines()
    assert result["positive"] == "fraud"
    assert sum("  dev f1 of 'fraud' " in line for line in lines) == result["epochs"]
    score = result["test"]["f1"]
    assert any(line.startswith(f"test   f1 of 'fraud' {score:.4f}  accuracy ") for line in lines)
    predicted, expected = read_run(out).predictions() or (None, None)
    assert score == pytest.approx(f1_score(expected, predicted, pos_label=0, zero_division=0))
    code, stdout, stderr = invoke("eval", out, "--json")
    assert json.loads(stdout) == {
        "split": "test", "rows": 12, "scores": result["test"], "positive": "fraud"
    }  # fmt: skip
    assert "f1 of 'fraud'" in stderr.splitlines()[0]
    assert json.loads((out / "environment.json").read_text())["data"]["positive"] == "fraud"
    older = as_an_earlier_version_wrote(out, tmp_path / "older")
    assert read_run(older).task.positive_label == "legit"
    code, stdout, _ = invoke("eval", older, "--json")
    swapped = f1_score(expected, predicted, pos_label=1, zero_division=0)
    assert json.loads(stdout)["scores"]["f1"] == pytest.approx(swapped)
    assert read_run(older).as_it_was().data.positive == "legit"


def as_an_earlier_version_wrote(run: Path, directory: Path) -> Path:
    """Copy a run without what says which label its F1 is of."""
    from unipelt_cli.files.sealed import file_digest, read_header

    shutil.copytree(run, directory)
    header = read_header(directory / "model.safetensors")
    del header["task"]["positive"]
    tensors, _ = open_tensors(directory / "model.safetensors")
    del header["sha256"]
    write_tensors(directory / "model.safetensors", tensors, header)
    result = json.loads((directory / "result.json").read_text())
    result["files"]["model.safetensors"] = file_digest(directory / "model.safetensors")
    del result["positive"], result["sha256"]
    from unipelt_cli.files import atomic

    (directory / "result.json").write_bytes(atomic.dumps(with_seal(result)).encode())
    return directory
