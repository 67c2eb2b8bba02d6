"""What a regression becomes in other tools: values on the scale of its labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers
from support.command import invoke
from support.models import experiment
from support.rows import write_values

from unipelt_cli import load_run
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.runs.loaded_runs import LoadedRun
from unipelt_cli.training import execution
from unipelt_cli.training.events import Finished

TEXTS = ["the film 7 was good", "the film 8 was awful", "the film 9 was good great awful"]
BOUNDS = {"prices": (105_534, 968_881), "years": (1987, 2023)}


@pytest.fixture(scope="module", params=BOUNDS)
def trained(
    request: pytest.FixtureRequest, calm_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, LoadedRun]:
    """Return a LoRA and a union, trained on large labels that are far from 0."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = write_values(folder / "rows.csv", *BOUNDS[request.param])
    own = {
        "task": None,
        "folds": 0,
        "train_file": str(rows),
        "text": "text",
        "label": "label",
        "k": 32,
    }
    own["kind"] = "regression"
    loaded = {}
    for method in ("lora", "unipelt-apl"):
        planned = experiment(
            calm_bert,
            method,
            data=own,
            model={"pooling": "native", "normalise": False},
            train={"epochs": 8, "batch_size": 8, "learning_rate": 5e-3},
        )
        *_, ended = execution.execute(planned, folder / method)
        assert isinstance(ended, Finished)
        loaded[method] = load_run(folder / method)
    return loaded


def exported(loaded: LoadedRun, out: Path, *options: str) -> dict[str, Any]:
    code, stdout, stderr = invoke(
        "export", loaded.run.directory, "--to", *options, "--out", out, "--json"
    )
    assert code == 0, stderr
    return dict(json.loads(stdout))


def values_of(model: Any, loaded: LoadedRun) -> np.ndarray:
    """Return what a library's model says of the texts, each in a batch of its own."""
    encoded = encode_rows(loaded.tuned, [TEXTS], 128)
    with torch.no_grad():
        each = [model(**encoded.batch([row], torch.device("cpu"))).logits for row in range(3)]
    return torch.cat(each)[:, 0].numpy()


def check(values: np.ndarray, loaded: LoadedRun, within: float = 1e-4) -> None:
    (scale,) = loaded.run.scales
    assert scale.deviation > 5
    assert values == pytest.approx(loaded.logits(TEXTS)[:, 0], abs=within * scale.unit)


def test_hf_gives_labels(trained: dict[str, LoadedRun], tmp_path: Path) -> None:
    loaded, out = trained["lora"], tmp_path / "out"
    report = exported(loaded, out, "hf")
    assert report["tolerance"] == pytest.approx(1e-4 * loaded.run.scales[0].unit)
    classify = transformers.pipeline("text-classification", str(out))
    check(np.array([answer["score"] for answer in classify(TEXTS)]), loaded)


def test_peft_gives_labels(trained: dict[str, LoadedRun], tmp_path: Path, calm_bert: Path) -> None:
    loaded, out = trained["lora"], tmp_path / "out"
    exported(loaded, out, "peft")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(calm_bert, num_labels=1)
    check(values_of(peft.PeftModel.from_pretrained(base, str(out)).eval(), loaded), loaded)


def test_adapters_gives_labels(trained: dict[str, LoadedRun], tmp_path: Path) -> None:
    report = exported(trained["unipelt-apl"], tmp_path / "out", "adapters")
    assert report["parity"]["max_abs_logit_diff"] <= report["tolerance"]
    assert report["tolerance"] == pytest.approx(1e-4 * trained["unipelt-apl"].run.scales[0].unit)


@pytest.mark.parametrize(("options", "within"), [([], 1e-4), (["--fp16"], 0.05)])
def test_onnx_gives_labels(
    trained: dict[str, LoadedRun], tmp_path: Path, options: list[str], within: float
) -> None:
    loaded, out = trained["unipelt-apl"], tmp_path / "out"
    exported(loaded, out, "onnx", *options)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    names = [own.name for own in session.get_inputs()]
    batch = encode_rows(loaded.tuned, [TEXTS], 128).batch(range(3), torch.device("cpu"))
    said = session.run(None, {name: batch[name].numpy() for name in names})[0]
    check(np.asarray(said)[:, 0], loaded, within)
