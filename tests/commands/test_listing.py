"""The command `list`."""

import json
from pathlib import Path

import pytest
from support.command import invoke

from unipelt_cli.config.presets import read_preset


@pytest.mark.parametrize("what", ["tasks", "methods", "presets", "backbones"])
def test_lists(what: str) -> None:
    code, table, stderr = invoke("list", what)
    assert (code, stderr) == (0, "")
    code, stdout, _ = invoke("list", what, "--json")
    entries = json.loads(stdout)[what]
    assert len(entries) >= 6
    assert all(str(next(iter(entry.values()))) in table for entry in entries)
    assert max(map(len, table.splitlines())) <= 80
    assert not any(line.endswith(" ") for line in table.splitlines())


def test_methods_are_listed_with_the_papers_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stdout, _ = invoke("list", "methods", "--json")
    rates = {
        entry["name"]: [entry[key] for key in ("learning_rate", "paper_rate", "paper_optimizer")]
        for entry in json.loads(stdout)["methods"]
    }
    assert rates["mam"] == [1e-3, 1e-4, "AdamW"]
    assert rates["prompt"] == [1e-2, None, "Adafactor"]
    assert rates["union"] == [5e-4, None, None]
    narrow = invoke("list", "methods")[1].splitlines()
    assert max(map(len, narrow)) <= 80
    assert not any("1e-3" in line or "…" in line for line in narrow)
    monkeypatch.setenv("COLUMNS", "120")
    _, stdout, _ = invoke("list", "methods")
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert any(line.startswith("mam ") and " 1e-3 (1e-4) " in line for line in lines)
    assert any(line.startswith("prompt ") and " 1e-2 (Adafactor) " in line for line in lines)


def test_the_papers_own_numbers_are_listed_as_presets() -> None:
    _, stdout, _ = invoke("list", "presets", "--json")
    said = {entry["name"]: entry["what"] for entry in json.loads(stdout)["presets"]}
    assert said["few-labels/lora"] == "lora by the recipe for few labels"
    assert "few-labels/probe" not in said
    assert said["published/loreft"] == (
        "loreft as Wu et al. 2024 trained it: learning_rate 0.0006, batch_size 32, warmup 0.09, "
        "first_tokens 1"
    )
    assert "published/prompt" not in said


def test_a_run_takes_a_papers_numbers_by_name(tmp_path: Path) -> None:
    code, stdout, stderr = invoke(
        "train", "--preset", "published/houlsby", "--task", "demo", "--k", "20", "--dev-size", "20",
        "--set", "train.epochs=1", "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    assert json.loads(stdout)["method"] == "houlsby"
    train = read_preset(str(tmp_path / "run" / "experiment.toml"))["train"]
    assert (train["learning_rate"], train["weight_decay"], train["epochs"]) == (3e-4, 0.01, 1)
    code, _, stderr = invoke("train", "--preset", "published/ia3", "--task", "demo")
    assert code == 2
    assert stderr.splitlines()[-2:] == [
        "error: preset 'published/ia3': Liu et al. 2022 trains with Adafactor, and every run here "
        "with AdamW",
        "hint: give --preset ia3: our own setting",
    ]
