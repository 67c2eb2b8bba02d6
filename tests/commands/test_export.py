"""The command `export`."""

import importlib.util
import json
from pathlib import Path

import pytest
from support.backbones import Backbones
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.config.experiment import resolve
from unipelt_cli.exports import formats
from unipelt_cli.training import execution

# The command


@pytest.fixture(scope="module")
def trained(
    backbone_dir: Backbones, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of LoRA with the library's own head, trained for one epoch."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    settings = {
        "data": {"folds": 0, "train_file": str(rows_file), "text": "text", "label": "label"},
        "model": {"backbone": str(backbone_dir("bert")), "pooling": "native"},
        "method": {"name": "lora"},
        "train": {"epochs": 1, "device": "cpu", "precision": "fp32"},
    }
    for _ in execution.execute(resolve([("", settings)]), directory):
        pass
    return directory


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_export_prints_the_contracts_object(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = invoke(trained, "--to", "hf", "--out", out, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report.keys() == {
        *("format", "path", "written", "parity", "tolerance", "notes", "bytes"),
    }
    assert report["parity"].keys() == {
        *("rows", "max_abs_logit_diff", "mean_abs_logit_diff", "label_flips", "test_rows"),
    }
    assert report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert (report["written"], report["tolerance"]) == (True, 1e-4)


def test_export_that_is_too_far_off_exits_1_and_leaves_nothing(
    trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = invoke(
        trained, "--to", "hf", "--out", out, "--tolerance", "1e-12", "--json"
    )
    report = json.loads(stdout)
    difference = report["parity"]["max_abs_logit_diff"]
    assert (code, report["written"]) == (1, False)
    assert stderr.splitlines()[-2:] == [
        f"error: {out}: not written, its logits differ by {difference:.2g}, and 1e-12 is allowed",
        "hint: please report it with the run's experiment.toml",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ["--to", "onix"],
            "--to 'onix': no such format",
            "did you mean onnx? otherwise choose one of adapters, hf, onnx, peft",
        ),
        (["--to", "hf", "--fp16"], "--fp16: not for --to hf", "drop it, or use --to onnx"),
        (
            ["--to", "hf", "--part", "lora"],
            "--part lora: not for --to hf",
            "drop it, or use --to peft",
        ),
        (
            ["--to", "hf", "--tolerance", "0"],
            "--tolerance 0.0: not above 0",
            "give a number such as 1e-4",
        ),
    ],
)
def test_wrong_options_are_said_in_two_lines(
    trained: Path, arguments: list[str], message: str, hint: str
) -> None:
    code, stdout, stderr = invoke(trained, *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.splitlines() == [f"error: {message}", f"hint: {hint}"]


@pytest.mark.parametrize(
    ("to", "package"), [("peft", "peft"), ("onnx", "onnx"), ("onnx", "onnxruntime")]
)
def test_missing_extra_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, to: str, package: str
) -> None:
    def find(name: str) -> object:
        return None if name == package else importlib.util.find_spec(name)

    monkeypatch.setattr(formats, "find_spec", find)
    code, _, stderr = invoke(trained, "--to", to)
    assert code == 2
    assert stderr.splitlines() == [
        f"error: --to {to}: the package {package} is not installed",
        f"hint: pip install 'unipelt[{to}]'",
    ]


def test_help_lists_the_table_of_formats() -> None:
    code, stdout, _ = invoke("--help")
    assert code == 0
    assert f"One of {', '.join(formats.TARGETS)}." in " ".join(stdout.replace("│", "").split())
