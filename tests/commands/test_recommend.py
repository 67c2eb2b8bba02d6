"""The command `recommend`."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.backbones import Backbones
from support.models import experiment
from typer.testing import CliRunner

from unipelt_cli.cli import app
from unipelt_cli.commands.recommend import floor_verdict
from unipelt_cli.config.presets import read_preset
from unipelt_cli.runs.run import read_run
from unipelt_cli.sweeps.successive_halving import Candidate, Trial
from unipelt_cli.training.planning import Shared


@pytest.fixture
def flags(backbone_dir: Backbones, rows_file: Path, tmp_path: Path) -> list[str]:
    return [
        *("recommend", "--train-file", str(rows_file), "--text", "text", "--label", "label"),
        *("--model", str(backbone_dir("bert")), "--methods", "head,lora", "--rates", "1e-3,5e-3"),
        *("--set", "train.epochs=6", "--device", "cpu", "--out", str(tmp_path / "chosen")),
    ]


def test_the_command_leaves_preset_evidence_and_a_run_that_saw_test_once(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    encode = Shared.encode

    def watched(self: Any, tuned: Any, own: Any, split: str, given: Any) -> Any:
        seen.append(split)
        return encode(self, tuned, own, split, given)

    monkeypatch.setattr(Shared, "encode", watched)
    done = CliRunner().invoke(app, [*flags, "--json"])
    assert done.exit_code == 0, done.stderr
    assert seen.count("test") == 1
    assert seen[-1] == "test"
    answer = json.loads(done.stdout)
    assert len(answer["candidates"]) == 5
    assert answer["floor"] in answer["candidates"]
    assert (answer["floor"]["method"], answer["floor"]["learning_rate"]) == ("probe", None)
    assert answer["floor"]["rungs"] == 3, "it stays to the end"
    chosen = answer["candidates"][0]
    assert chosen == answer["chosen"]
    found = read_run(tmp_path / "chosen" / "run")
    assert found.result == answer["result"]
    assert found.experiment.method_name == chosen["method"]
    preset = read_preset(answer["preset"])
    assert preset.get("train", {}).get("learning_rate") == chosen["learning_rate"]
    assert json.loads((tmp_path / "chosen" / "evidence.json").read_text())["chosen"] == chosen
    again = CliRunner().invoke(app, flags)
    assert again.exit_code == 2
    assert f"{tmp_path / 'chosen'}: exists already" in again.stderr


@pytest.mark.parametrize(
    ("scores", "line"),
    [
        ({"probe": 0.5, "lora": 0.6, "head": 0.5}, "1 of 2 beat probe"),
        ({"probe": 0.5, "lora": 0.5}, "nothing beat probe"),
        ({"lora": 0.5}, None),
    ],
)
def test_it_says_what_beat_the_floor(scores: dict[str, float], line: str | None) -> None:
    found = []
    for name, score in scores.items():
        made = experiment(Path("minilm"), name)
        found.append(Candidate(made, [Trial(made, score=score)], metric="accuracy"))
    more = " (dev 0.5000)" if line == "nothing beat probe" else ""
    whole = line and f"{line}, which trains nothing in the backbone{more}"
    assert floor_verdict(found) == whole


def test_a_budget_that_ends_early_says_what_was_not_tried(flags: list[str]) -> None:
    done = CliRunner().invoke(app, [*flags, "--budget", "0.001s"])
    assert done.exit_code == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning: the budget")]
    assert line == (
        "warning: the budget ended in round 1 of 3; not tried: lora at 0.001, head at 0.005, "
        "lora at 0.005"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--budget", "soon"], "--budget 'soon': not a time"),
        (["--rates", "fast"], "--rates 'fast': not numbers"),
        (["--rates", "100"], "train.learning_rate = 100.0 is not allowed"),
        (["--methods", "lorra"], "method 'lorra': no such method"),
    ],
)
def test_wrong_options_are_refused(flags: list[str], changed: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, [*flags, *changed])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[0] == f"error: {message}"
