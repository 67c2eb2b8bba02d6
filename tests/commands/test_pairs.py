"""Pairs read apart from the command line: trained, read back, asked, looked into, exported."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command import FAST, error_of, invoke
from support.pairs import FIRST, SECOND, pair_options, sentence_encoder, write_pairs
from support.runs import reseal

from unipelt_cli import load_run, load_runs
from unipelt_cli.runs.names import EXPERIMENT, RESULT
from unipelt_cli.runs.run import read_experiment

NOTE = "note: the two texts of a pair are read each by itself, and compared"
PAIRS = list(zip(FIRST, SECOND, strict=True))


@pytest.fixture(scope="module")
def encoder(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_encoder(tmp_path_factory.mktemp("encoder") / "encoder", bert)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.csv")


def train(pairs: Path, encoder: Path, out: Path, *more: str) -> tuple[dict[str, Any], str]:
    command = ("train", *pair_options(pairs), "--model", encoder, *FAST, "--out", out, *more)
    code, stdout, stderr = invoke(*command, "--json")
    assert code == 0, stderr
    return json.loads(stdout), stderr


@pytest.fixture(scope="module")
def run(encoder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result, stderr = train(pairs, encoder, out)
    assert NOTE in stderr
    assert result["head_parameters"] == 2 * 65 + 2
    return out


def test_a_run_is_read_back_scored_and_verified_as_it_was(run: Path) -> None:
    assert read_experiment(run).model.pairs == "apart"
    code, stdout, stderr = invoke("eval", run, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["scores"] == json.loads((run / RESULT).read_text())["test"]
    assert invoke("verify", run)[0] == 0


def test_rows_are_answered_one_by_one_and_together_alike(run: Path, tmp_path: Path) -> None:
    loaded = load_run(run)
    together = loaded.logits(PAIRS)
    alone = np.concatenate([loaded.logits([pair]) for pair in PAIRS])
    assert together == pytest.approx(alone, abs=1e-5)
    path = tmp_path / "rows.jsonl"
    rows = [{"first": first, "second": second} for first, second in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, stdout, stderr = invoke("predict", run, path)
    assert code == 0, stderr
    labels = [json.loads(line)["label"] for line in stdout.splitlines()]
    assert labels == [said.label for said in loaded.predict(PAIRS)]


def test_several_runs_answer_in_one_pass_as_each_does_alone(
    run: Path, encoder: Path, pairs: Path, tmp_path: Path
) -> None:
    other, joint = tmp_path / "other", tmp_path / "joint"
    train(pairs, encoder, other, "--seed", "7")
    _, stderr = train(pairs, encoder, joint, "--set", "model.pairs=joint")
    assert NOTE not in stderr
    assert read_experiment(joint).model.pairs == "joint"
    directories = (run, other, joint)
    together = load_runs(directories).predict(PAIRS)
    for directory in directories:
        alone = load_run(directory).predict(PAIRS)
        for row, said in enumerate(alone):
            assert said.probabilities is not None
            probabilities = together[row][directory.name].probabilities
            assert probabilities == pytest.approx(said.probabilities, abs=1e-5)


def test_gates_are_shown_row_by_row_and_by_class(run: Path) -> None:
    for by in ("layer", "class", "example"):
        code, stdout, stderr = invoke("inspect-gates", run, "--by", by, "--json")
        assert code == 0, stderr
    rows = json.loads(stdout)["examples"]
    assert len(rows) == len({row["row"] for row in rows}) > 1
    assert all(0 < value < 1 for row in rows for own in row["layers"] for value in own.values())
    code, stdout, stderr = invoke("inspect-gates", run, "--ablate", "--json")
    assert code == 0, stderr


def test_runs_over_seeds_share_passes_and_are_what_each_is_alone(
    encoder: Path, pairs: Path, tmp_path: Path
) -> None:
    command = ("train", *pair_options(pairs), "--model", encoder, *FAST)
    code, _, stderr = invoke(*command, "--seeds", "1,2", "--out", tmp_path / "both")
    assert code == 0, stderr
    for seed in (1, 2):
        alone = tmp_path / f"alone-{seed}"
        train(pairs, encoder, alone, "--seed", str(seed))
        (directory,) = [
            path.parent
            for path in (tmp_path / "both").rglob(RESULT)
            if json.loads(path.read_text())["seed"] == seed
        ]
        assert json.loads((directory / RESULT).read_text())["together"] == 2
        logits = [load_run(own).logits(PAIRS) for own in (directory, alone)]
        assert logits[0] == pytest.approx(logits[1], abs=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_end(
    run: Path, encoder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unipelt_cli.training.loop import Training

    score, epochs = Training.score_epoch, list[int]()

    def stop(self: Training) -> Any:
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return score(self)

    out = tmp_path / "run"
    command = ("train", *pair_options(pairs), "--model", encoder, *FAST, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "score_epoch", stop)
        assert invoke(*command)[0] == 130
    code, _, stderr = invoke(*command, "--resume")
    assert code == 0, stderr
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_run_of_an_earlier_version_is_joint_and_goes_on_so(
    encoder: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(pairs, encoder, out, "--set", "model.pairs=joint")
    path = out / EXPERIMENT
    kept = [line for line in path.read_text().splitlines(keepends=True) if "pairs = " not in line]
    path.write_text("".join(kept))
    reseal(out)
    assert read_experiment(out).model.pairs == "joint"
    assert load_run(out).tuned.pairs == "joint"
    train(pairs, encoder, out, "--resume")
    told = error_of(
        *("train", *pair_options(pairs), "--model", encoder, *FAST, "--out", out, "--resume"),
        *("--set", "model.pairs=apart"),
    )
    assert told == (
        f"{out}: holds another experiment, model.pairs = 'joint' there, 'apart' here",
        "go on as it began with --set model.pairs=joint; else give another --out, or replace it "
        "with --overwrite",
    )


def test_apart_with_one_text_changes_nothing_and_says_so(
    rows_file: Path, encoder: Path, tmp_path: Path
) -> None:
    named = ("--train-file", rows_file, "--text", "text", "--label", "label", "--k", "24")
    command = ("train", *named, "--model", encoder, *FAST)
    stored = []
    for kind in ("auto", "apart"):
        out = tmp_path / kind
        code, _, stderr = invoke(*command, "--out", out, "--set", f"model.pairs={kind}")
        assert code == 0, stderr
        said = "note: model.pairs = 'apart' changes nothing here: a row has one text"
        assert (said in stderr) == (kind == "apart")
        stored.append(load_run(out).logits(FIRST))
        resumed = ("--out", out, "--set", f"model.pairs={kind}", "--resume")
        assert invoke(*command, *resumed)[0] == 0
    assert np.array_equal(*stored)
    assert read_experiment(tmp_path / "auto").model.pairs == "joint"


def test_a_text_that_is_cut_is_counted_by_itself(encoder: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.csv")
    limit = ("--set", "model.max_length=8", "--dry-run")
    command = ("train", *pair_options(path), "--model", encoder, *FAST, *limit)
    code, _, stderr = invoke(*command)
    assert code == 0, stderr
    assert re.search(r"note: \d+ of 48 texts of the train rows are longer than 8 tokens", stderr)


def test_a_regression_on_pairs_is_read_back_on_its_labels(encoder: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.csv", regression=True)
    result, _ = train(path, encoder, tmp_path / "run", "--set", "data.kind=regression")
    assert result["head_parameters"] == 65 + 1
    assert np.isfinite(load_run(tmp_path / "run").logits(PAIRS)).all()
