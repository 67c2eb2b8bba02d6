"""Gates as constants, and submodules left out: the same function, or what it costs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.backbones import WORDS, Backbones
from support.command import FAST, error_of, invoke, rows_options
from support.models import disturbed, experiment, logits_of
from torch import nn

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.exports import formats
from unipelt_cli.gates import static_gates
from unipelt_cli.gates.results import Change
from unipelt_cli.gates.static_gates import make_static
from unipelt_cli.methods.unipelt.inspection import closed
from unipelt_cli.models.build import build
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.run import Run
from unipelt_cli.tasks import Task

TINY: dict[str, Any] = {
    **{"prefix_length": 4, "rank": 4, "reduction": 8, "lora_scale": 1.0},
    "parts": "adapter,prefix,lora,bias",
}
SENTENCES = [" ".join(WORDS[i : i + 2 + i % 9]) for i in range(30)]


def model_of(
    directory: Path, method: str = "unipelt-apl", **options: Any
) -> tuple[Run, TunedModel]:
    """Return a run that no training made, with noise on all its tensors, and rows of its own."""
    described = experiment(directory, method, options=options, model={"max_length": 32})
    tuned = balanced(disturbed(build(described, 2, folded=True), 0.3))
    task = {"name": "t", "text": ["text"], "labels": ["no", "yes"], "metric": "accuracy"}
    header = {"task": task | {"also": []}}
    return Run(Path("the-run"), described, {}, header, {}), tuned


def balanced(tuned: TunedModel) -> TunedModel:
    """Move the head's bias so that half of the sentences fall to each class."""
    logits = logits_of(tuned, SENTENCES)
    margins = (logits[:, 1] - logits[:, 0]).sort().values
    with torch.no_grad():
        tuned.classifier.head.out.bias[1] -= margins[14:16].mean()
    return tuned


def own_labels(tuned: TunedModel) -> Callable[[str], Dataset]:
    """Label sentences by what the model says itself: whatever changes its mind costs something."""
    labels = logits_of(tuned, SENTENCES).argmax(1).tolist()
    assert 10 <= sum(labels) <= 20
    return lambda split: Dataset.from_dict(
        {"text": SENTENCES, "label": labels, "row": list(range(len(labels)))}
    )


def set_gates(tuned: TunedModel) -> None:
    """Let every gate be another constant."""
    generator = torch.Generator().manual_seed(5)
    for layer in tuned.classifier.backbone.get_submodule("submodules.layers"):
        for gate in layer.gates.values():
            assert isinstance(gate, nn.Linear)
            nn.init.zeros_(gate.weight)
            nn.init.normal_(gate.bias, 0.0, 1.0, generator)


@pytest.mark.parametrize("lora_gates", ["shared", "separate"])
@pytest.mark.parametrize("model_type", sorted(BACKBONES.keys() - {"albert"}))
def test_constant_gates_fold_exactly(
    backbone_dir: Backbones, model_type: str, lora_gates: str
) -> None:
    parts = ",".join(
        part for part in TINY["parts"].split(",") if part in BACKBONES[model_type].parts
    )
    options = TINY | {"parts": parts, "lora_gates": lora_gates, "lora_scale": 0.7}
    run, tuned = model_of(backbone_dir(model_type), **options)
    set_gates(tuned)
    rows = own_labels(balanced(tuned))
    made = make_static(run, tuned, rows, cost=0.0)
    report, method = made.report, made.tuned.method
    assert not method.gated
    assert report.dev == Change(1.0, 1.0)
    places = {(int(n), part) for part, n in (place.split(".") for place in report.dropped)}
    with closed(tuned.classifier.backbone, places):
        expected = logits_of(tuned, SENTENCES)
    assert (expected - logits_of(made.tuned, SENTENCES)).abs().max() < 1e-5
    assert made.run.experiment.method == method
    assert report.stored_parameters.after < report.stored_parameters.before


def test_a_gate_becomes_its_mean_over_train(backbone_dir: Backbones) -> None:
    run, tuned = model_of(backbone_dir("bert"), **TINY)
    asked = []
    rows = own_labels(tuned)

    def listen(split: str) -> Dataset:
        asked.append(split)
        return rows(split).select(range(8)) if split == "train" else rows(split)

    made = make_static(run, tuned, listen, cost=1.0)
    assert asked[0] == "train"
    from unipelt_cli.gates.report import inspect_gates

    gates = inspect_gates(run, tuned, rows("train").select(range(8))).gates
    for layer, said in zip(gates, made.report.gates, strict=True):
        for name, values in layer.items():
            assert said.gates[name] == pytest.approx(float(np.mean(values)), abs=1e-6)


def test_what_goes_stays_within_the_cost_and_never_is_all(backbone_dir: Backbones) -> None:
    run, tuned = model_of(backbone_dir("bert"), **TINY)
    rows = own_labels(tuned)
    dear, cheap = (make_static(run, tuned, rows, cost=cost).report for cost in (1.0, 0.1))
    assert len(dear.dropped) == 2 * 4 - 1
    assert 1 <= len(cheap.dropped) < len(dear.dropped)
    assert 1.0 - cheap.dev.after <= 0.1
    costs = {f"{each.part}.{each.layer}": each.cost for each in cheap.costs}
    assert len(costs) == 8
    stay = costs.keys() - set(cheap.dropped)
    assert max(costs[place] for place in cheap.dropped) <= min(costs[place] for place in stay)
    assert cheap.stored_parameters.after > dear.stored_parameters.after


def test_a_cost_that_is_too_high_is_refused(backbone_dir: Backbones) -> None:
    run, tuned = model_of(backbone_dir("bert"), **TINY)
    set_gates(tuned)
    rows = own_labels(balanced(tuned))
    with pytest.raises(CheckError, match=r"the-run: going without adapter and prefix costs 0\.\d+"):
        make_static(run, tuned, rows, cost=0.01, only=formats.get("hf").holds)
    made = make_static(run, tuned, rows, cost=1.0, only=formats.get("hf").holds)
    assert set(made.tuned.method.parts) == {"lora", "bias"}
    assert not made.tuned.method.leave_out

    for layer in tuned.classifier.backbone.get_submodule("submodules.layers"):
        for gate in layer.gates.values():
            nn.init.normal_(gate.weight, 0.0, 30.0, torch.Generator().manual_seed(1))
    with pytest.raises(CheckError, match="constant gates alone cost"):
        make_static(run, tuned, own_labels(balanced(tuned)), cost=0.0)


@pytest.mark.parametrize(
    ("model_type", "method", "message"),
    [
        ("bert", "lora", "the-run: method 'lora' has no gates"),
        ("bert", "full", "the-run: method 'full' has no gates"),
        ("albert", "unipelt-apl", "layers of its backbone share their weights"),
    ],
)
def test_what_has_no_gates_to_fix_is_refused(
    backbone_dir: Backbones, model_type: str, method: str, message: str
) -> None:
    run, tuned = model_of(backbone_dir(model_type), method)
    labels = Dataset.from_dict({"text": SENTENCES, "label": [0, 1] * 15, "row": [*range(30)]})
    with pytest.raises(RunError, match=message):
        make_static(run, tuned, lambda split: labels)


def test_nothing_that_merges_is_refused(backbone_dir: Backbones) -> None:
    run, tuned = model_of(backbone_dir("bert"), "unipelt-ap")
    with pytest.raises(RunError, match="the format holds nothing of its adapter and prefix"):
        make_static(run, tuned, own_labels(tuned), only=formats.get("hf").holds)


def test_a_regression_counts_a_higher_error_as_a_cost(backbone_dir: Backbones) -> None:
    run, tuned = model_of(backbone_dir("bert"), **TINY)
    run.__dict__["tasks"] = (Task("t", ("text",), (), "mse", ()),)
    values = logits_of(tuned, SENTENCES)[:, 0].tolist()
    rows = Dataset.from_dict({"text": SENTENCES, "label": values, "row": [*range(30)]})
    described = run.experiment
    one = build(described, 1, folded=True)
    one.load({n: t[:1] if n.startswith("head.out") else t for n, t in tuned.stored().items()})
    report = make_static(run, one, lambda split: rows, cost=0.5).report
    assert report.dev.before < 1e-6
    assert 0 < report.dev.after <= 0.5


@pytest.fixture(scope="module")
def native(backbone_dir: Backbones, rows_file: Path, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("static") / "run"
    model = ("--model", backbone_dir("bert"), "--set", "model.pooling=native")
    model += ("--set", "model.normalise=false")
    code, _, said = invoke(
        "train", *rows_options(rows_file), "--k", "24", *model, *FAST, "--out", out
    )
    assert code == 0, said
    return out


def test_the_command_reports_and_writes(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    code, answer, said = invoke(
        *("export", native, "--to", "hf", "--static-gates", "--cost", "1", "--out", out, "--json")
    )
    assert code == 0, said
    report = json.loads(answer)
    assert report["parity"]["max_abs_logit_diff"] <= 1e-4
    assert report["static"]["cost"] == 1.0
    assert report["static"]["dropped"] == ["adapter.0", "adapter.1", "prefix.0", "prefix.1"]
    for line in (
        "constant gates",
        "dev accuracy",
        "numbers stored",
        "rows/s",
        "dropped: adapter.0",
    ):
        assert line in said
    assert (out / "model.safetensors").is_file()


def test_the_command_refuses_in_two_lines(native: Path, tmp_path: Path) -> None:
    assert error_of("export", native, "--to", "hf", "--cost", "0.1") == (
        "--cost 0.1: only --static-gates costs anything",
        "give that too",
    )
    out = tmp_path / "out"
    costs = ("--to", "adapters", "--static-gates", "--cost", "-1")
    assert error_of("export", native, *costs, "--out", out) == (
        "Invalid value for '--cost': Input should be greater than or equal to 0",
        "see `unipelt export --help`",
    )
    assert not out.exists()


def test_a_pooling_that_the_format_cannot_hold_is_refused_at_once(
    native: Path, backbone_dir: Backbones, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    model = ("--model", backbone_dir("bert"), "--set", "model.pooling=mean")
    code, _, said = invoke(
        "train", *rows_options(rows_file), "--k", "24", *model, *FAST, "--out", out
    )
    assert code == 0, said
    assert error_of("export", out, "--to", "hf", "--static-gates") == (
        "--to hf: holds no head that reads mean pooling and features of length 1, "
        "with or without gates",
        "train with --set model.pooling=native --set model.normalise=false, "
        "or use --to adapters or --to onnx",
    )


def test_a_refusal_writes_nothing(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_gates, "_gated", lambda run, tuned: _refuse(run))
    out = tmp_path / "out"
    code, answer, said = invoke(
        "export", native, "--to", "adapters", "--static-gates", "--out", out, "--json"
    )
    assert (code, answer) == (1, "")
    assert said.splitlines()[-2].startswith("error: ")
    assert not out.exists()


def _refuse(run: Run) -> None:
    raise CheckError(f"{run.directory}: costs too much", "allow more with --cost")


def test_a_part_that_is_left_out_is_trained_stored_and_read_back(
    backbone_dir: Backbones, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = ("--model", backbone_dir("bert"), "--set", "method.leave_out=adapter.0,prefix.1")
    code, answer, said = invoke(
        *("train", *rows_options(rows_file), "--k", "24", *settings, *FAST, "--out", out, "--json")
    )
    assert code == 0, said
    result = json.loads(answer)
    code, answer, said = invoke("eval", out, "--json")
    assert json.loads(answer)["scores"] == result["test"]
    code, _, said = invoke("inspect-gates", out)
    assert code == 0, said
    code, answer, said = invoke(
        "export", out, "--to", "adapters", "--out", tmp_path / "a", "--json"
    )
    assert code == 0, said
    assert json.loads(answer)["parity"]["max_abs_logit_diff"] <= 1e-4


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        (
            "adapter.x",
            "method.leave_out = ['adapter.x']: 'adapter.x' is no part of a layer",
            "name one as adapter.0: a part of this method, and a layer from 0 on",
        ),
        (
            "bias.1",
            "method.leave_out = ['bias.1']: 'bias.1' is no part of a layer",
            "name one as adapter.0: a part of this method, and a layer from 0 on",
        ),
        (
            "lora.2",
            "method.leave_out names layer 2: there is no such layer",
            "the backbone's are 0 to 1",
        ),
    ],
)
def test_places_that_are_not_there_are_refused(
    backbone_dir: Backbones, rows_file: Path, tmp_path: Path, value: str, message: str, hint: str
) -> None:
    settings = ("--model", backbone_dir("bert"), "--set", f"method.leave_out={value}")
    command = ("train", *rows_options(rows_file), "--k", "24", *settings, "--out", tmp_path / "run")
    assert error_of(*command) == (message, hint)
