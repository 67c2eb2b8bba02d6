"""The command `train`: its files, its options, what it refuses, and runs over seeds."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.command import FAST, error_of, invoke, rows_options
from support.rows import save_rows

from unipelt_cli.errors import CheckError
from unipelt_cli.models import evaluation
from unipelt_cli.runs import writer
from unipelt_cli.runs.names import RESULT
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import read_run
from unipelt_cli.training.step import Stepper


def test_train_writes_the_contracts_files_and_result(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "experiment.toml",
        "environment.json",
        "probe.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "predictions.safetensors",
        "result.json",
    }
    result = json.loads((run / "result.json").read_text())
    expected = {
        "task": "reviews",
        "method": "unipelt-apl",
        "k": 24,
        "data_seed": 111,
        "seed": 42,
        "metric": "accuracy",
        "epochs": 3,
        "precision": "fp32",
        "device": "cpu",
    }
    assert expected.items() <= result.items()
    assert {
        "backbone",
        "dev",
        "test",
        "best_epoch",
        "seconds",
        "trainable_parameters",
        "stored_parameters",
        "artifact_bytes",
        "peak_memory_bytes",
        "tokens_per_second",
        "collapsed",
    } <= result.keys()
    assert result["artifact_bytes"] == (run / "model.safetensors").stat().st_size
    epochs = [event for event in read_metrics(run) if event["kind"] == "epoch"]
    assert [event["epoch"] for event in epochs] == [1, 2, 3]
    assert {"train_loss", "dev", "train_seconds", "evaluation_seconds", "tokens"} <= epochs[
        0
    ].keys()


def test_the_stored_file_holds_the_folded_submodules_and_head_only(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    total = sum(tensor.numel() for tensor in tensors.values())
    result = json.loads((run / "result.json").read_text())
    assert total == result["stored_parameters"] + result["head_parameters"]
    assert tensors["backbone.submodules.prefix.rows"].shape == (2, 2, 10, 32)
    assert not any("prefix.up" in name or "embeddings" in name for name in tensors)


def test_the_resolved_file_repeats_the_run_byte_for_byte(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    code, _, stderr = invoke("train", "--preset", run / "experiment.toml", "--out", out)
    assert code == 0, stderr
    same = ("model.safetensors", "probe.safetensors", "predictions.safetensors", "experiment.toml")
    for name in same:
        assert (out / name).read_bytes() == (run / name).read_bytes(), name
    first, second = (json.loads((path / "result.json").read_text()) for path in (run, out))
    assert first["test"] == second["test"]


def test_prepare_then_train_on_it_gives_the_same_run(
    bert: Path, rows_file: Path, run: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    code, stdout, _ = invoke(
        "prepare", *rows_options(rows_file), "--k", "24", "--out", prepared, "--json"
    )
    assert code == 0
    answer = json.loads(stdout)
    assert answer["path"] == str(prepared)
    assert {name: split["rows"] for name, split in answer["splits"].items()} == {
        "train": 24,
        "dev": 24,
        "test": 12,
    }
    out = tmp_path / "run"
    code, stdout, stderr = invoke(
        "train", "--prepared", prepared, "--model", bert, *FAST, "--out", out, "--json"
    )
    assert code == 0, stderr
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert json.loads(stdout)["k"] == 24
    again = invoke(
        "train", "--prepared", prepared, "--model", bert, *FAST, "--out", out, "--resume"
    )
    assert again[0] == 0, again[2]
    assert invoke("eval", out)[0] == 0


FIRST_STEP = """
import gc, sys
from pathlib import Path
from unipelt_cli.config.experiment import resolve
from unipelt_cli.training import execution
from unipelt_cli.training.events import Step

prepared, backbone, out = sys.argv[1:]
data, model = {"prepared": prepared}, {"backbone": backbone}
train = {"device": "cpu", "precision": "fp32"}
experiment = resolve([("", {"data": data, "model": model, "train": train})])
events = execution.execute(experiment, Path(out))
while not isinstance(next(events), Step):
    pass
heavy = {"adapters", "matplotlib", "scipy", "sklearn"}
print(sorted(heavy & sys.modules.keys()), gc.isenabled())
events.close()
import sklearn.metrics
"""


def test_the_first_step_does_not_wait_for_what_it_does_not_use(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    assert invoke("prepare", *rows_options(rows_file), "--k", "24", "--out", prepared)[0] == 0
    command = [sys.executable, "-c", FIRST_STEP, prepared, bert, tmp_path / "run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("[] True", 0), result.stderr


def test_each_split_is_tokenized_once(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(columns: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(columns[0]))
        return encode(columns, *arguments, **options)

    encode = evaluation.encode
    monkeypatch.setattr(evaluation, "encode", counted)
    out = tmp_path / "run"
    code, _, stderr = invoke(
        "train", *rows_options(rows_file), "--k", "20", "--model", bert, *FAST, "--out", out
    )
    assert code == 0, stderr
    assert sizes == [20, 28, 12]  # train, dev, test


def test_a_prepared_directory_keeps_its_own_seed_and_size(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    prepared, out = tmp_path / "prepared", tmp_path / "run"
    assert (
        invoke(
            "prepare",
            *rows_options(rows_file),
            "--k",
            "16",
            "--data-seed",
            "222",
            "--out",
            prepared,
        )[0]
        == 0
    )
    code, stdout, _ = invoke(
        "train", "--prepared", prepared, "--model", bert, *FAST, "--out", out, "--json"
    )
    result = json.loads(stdout)
    assert (code, result["k"], result["data_seed"], result["task"]) == (0, 16, 222, "reviews")
    assert invoke("eval", out)[0] == 0


def test_several_seeds_are_ordinary_runs_and_a_table(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    given = (
        "train",
        *rows_options(rows_file),
        "--k",
        "24",
        "--model",
        bert,
        *FAST,
        "--out",
        tmp_path,
    )
    seeds = ("--data-seeds", "111,222", "--seeds", "1,2")
    code, stdout, stderr = invoke(*given, *seeds, "--json")
    assert code == 0, stderr
    answer = json.loads(stdout)
    found = [(result["data_seed"], result["seed"]) for result in answer["runs"]]
    assert found == [(111, 1), (111, 2), (222, 1), (222, 2)]
    scores = [result["test"]["accuracy"] for result in answer["runs"]]
    assert answer["mean"]["test"]["accuracy"] == pytest.approx(sum(scores) / 4)
    lines = stderr.splitlines()
    assert max(len(line) for line in lines if "epoch" in line) <= 80
    assert sum(line.startswith("d222 s2  epoch") for line in lines) == 3
    assert any(line.split()[:3] == ["run", "dev", "accuracy"] for line in lines)
    assert any(line.startswith("mean ") and "±" in line for line in lines)
    for result in answer["runs"]:
        directory = Path(result["run"])
        assert directory.parent == tmp_path
        assert read_run(directory).result["test"] == result["test"]
    assert invoke(*given, *seeds, "--json", "--resume")[0] == 0, "finished runs are returned"
    message, hint = error_of(*given, *seeds)
    assert message.endswith("-d111-s1: exists already")
    assert hint == "go on with --resume, replace it with --overwrite, or give another --out"


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (
            ("--data-seeds", "1,x"),
            "--data-seeds '1,x': not numbers with commas",
            "write it like 111,222,333",
        ),
        (("--seeds", "4,04"), "--seeds '4,04': a number is there twice", "give each once"),
        (
            ("--seeds", "1,2", "--seed", "3"),
            "--seed 3 and --seeds 1,2 contradict each other",
            "give one of them",
        ),
        (
            ("--data-seeds", "1,2", "--data-seed", "0"),
            "--data-seed 0 and --data-seeds 1,2 contradict each other",
            "give one of them",
        ),
    ],
)
def test_seeds_that_cannot_be_are_refused(
    bert: Path, rows_file: Path, tmp_path: Path, flags: tuple[str, ...], message: str, hint: str
) -> None:
    given = ("train", *rows_options(rows_file), "--model", bert, "--out", tmp_path / "none")
    assert error_of(*given, *flags) == (message, hint)
    assert not (tmp_path / "none").exists()


def test_prepared_rows_are_drawn_already(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    assert invoke("prepare", *rows_options(rows_file), "--k", "24", "--out", prepared)[0] == 0
    assert error_of("train", "--prepared", prepared, "--model", bert, "--data-seeds", "1,2") == (
        "--data-seeds 1,2: the rows of data.prepared are drawn already",
        "drop --data-seeds, or --prepared",
    )


def test_a_run_that_fails_among_several_is_said_and_the_others_are_kept(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Stepper.close

    def failing(self: Stepper, loss: torch.Tensor, moment: Any) -> float:
        if self.settings.seed == 2:
            raise CheckError("the loss is nan at step 1", "lower train.learning_rate (now 0.1)")
        return close(self, loss, moment)

    monkeypatch.setattr(Stepper, "close", failing)
    given = (
        "train",
        *rows_options(rows_file),
        "--k",
        "24",
        "--model",
        bert,
        *FAST,
        "--out",
        tmp_path,
    )
    code, stdout, stderr = invoke(*given, "--seeds", "1,2,3", "--json")
    assert code == 1
    answer = json.loads(stdout)
    assert [result["seed"] for result in answer["runs"]] == [1, 3]
    (failed,) = answer["failed"]
    assert failed["error"] == "the loss is nan at step 1"
    assert stderr.splitlines()[-2:] == [
        "error: 1 of 3 runs failed, the first with: the loss is nan at step 1",
        f"hint: see its directory {failed['run']}; the other runs are finished",
    ]
    states = {path.name[-2:]: (path / RESULT).is_file() for path in tmp_path.iterdir()}
    assert states == {"s1": True, "s2": False, "s3": True}


def test_dry_run_says_everything_and_writes_nothing(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = invoke(
        "train", *rows_options(rows_file), "--k", "24", "--model", bert, "--dry-run", "--json"
    )
    answer = json.loads(stdout)
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    assert answer["rows"] == {"train": 24, "dev": 24, "test": 12}
    assert answer["labels"]["train"].keys() == {"no", "yes"}
    # adapter 2(2*32*8+8+32), prefix 2*2*10*32, LoRA 2*2*2*32*32, three gate sets 3*2*33
    assert answer["stored_parameters"] == 1104 + 1280 + 8192 + 198
    assert answer["head_parameters"] == 2 * 33
    assert "nothing was written" in stderr


GOOD = "".join(f"good number {i},yes\nbad number {i},no\n" for i in range(20))


BAD_DATA: list[tuple[str | bytes, list[str], str]] = [
    (f"text,label\n{GOOD}", ["--k", "400"], "data.k = 400"),
    (
        "text,label\n" + GOOD.replace("no\n", "yes\n"),
        [],
        "every row has the label 'yes'",
    ),
    (b"", [], "empty"),
    (b"text,label\n\xff\xfe,yes\n", [], "UTF-8"),
    (f"texts,label\n{GOOD}", [], "no column 'text'"),
    (f"text,label\n{GOOD}nothing here,nan\n", [], "line 42"),
    (f"text,label\n{GOOD},yes\n", [], "line 42"),
]


@pytest.mark.parametrize(("content", "extra", "part"), BAD_DATA)
def test_bad_data_is_said_in_two_lines_and_leaves_nothing(
    bert: Path, tmp_path: Path, content: str | bytes, extra: list[str], part: str
) -> None:
    rows = save_rows(tmp_path / "rows.csv", content)
    out = tmp_path / "run"
    message, hint = error_of("train", *rows_options(rows), *extra, "--model", bert, "--out", out)
    assert part in message
    assert hint
    assert not out.exists()
    assert error_of("prepare", *rows_options(rows), *extra, "--out", out) == (message, hint)
    assert not out.exists()


def test_a_label_of_the_test_file_that_train_lacks_is_named(bert: Path, tmp_path: Path) -> None:
    rows = save_rows(tmp_path / "rows.csv", f"text,label\n{GOOD}")
    test = save_rows(tmp_path / "test.csv", "text,label\nso so,maybe\nfine,yes\n")
    message, _ = error_of(
        "train",
        *rows_options(rows),
        "--test-file",
        test,
        "--model",
        bert,
        "--out",
        tmp_path / "run",
    )
    assert "maybe" in message


@pytest.mark.parametrize("option", ["--model", "--preset", "--out", "--train-file"])
def test_a_path_too_long_is_an_error_of_two_lines(bert: Path, rows_file: Path, option: str) -> None:
    arguments = ["train", *rows_options(rows_file), "--model", str(bert), option, "/" + "x" * 300]
    message, _ = error_of(*arguments)
    assert "x" * 300 in message


def test_a_directory_without_permission_fails_before_training(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.os, "access", lambda *_: False)
    out = tmp_path / "run"
    message, _ = error_of("train", *rows_options(rows_file), "--model", bert, "--out", out)
    assert message == f"{out}: cannot be written (Permission denied)"


def test_a_directory_that_cannot_be_written_fails_before_training(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    blocked = save_rows(tmp_path / "file", "not a directory")
    message, hint = error_of(
        "train", *rows_options(rows_file), "--model", bert, "--out", blocked / "run"
    )
    assert message == f"{blocked / 'run'}: cannot be written (Not a directory)"
    assert hint == "free space or give an --out that can be written"


def test_a_dry_run_foresees_time_memory_disk_and_place(
    tmp_path: Path,
    rows_file: Path,
    backbone_dir: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [
        *rows_options(rows_file),
        "--k",
        "24",
        "--model",
        backbone_dir("bert"),
        *FAST,
        "--dry-run",
    ]
    code, stdout, stderr = invoke("train", *flags, "--json")
    found = json.loads(stdout)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert 0 < found["seconds"]["least"] <= found["seconds"]["most"] < 600
    assert 1e8 < found["memory_bytes"] < 1e10
    assert 4e4 < found["disk_bytes"] < 1e7
    assert found["run"] == "runs/reviews-k24-unipelt-apl-bert-d111-s42"
    assert found["problem"] is None
    assert "nothing was written\nrun: runs/reviews-k24-unipelt-apl-bert-d111-s42\n" in stderr
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "experiment.toml").touch()
    code, stdout, stderr = invoke("train", *flags, "--out", "there", "--json")
    assert (code, json.loads(stdout)["problem"]) == (0, "there: exists already")
    assert "warning: there: exists already: go on with --resume" in stderr
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["experiment.toml"]
