"""Runs on tiny backbones, and how exports of them are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.config.experiment import resolve
from unipelt_cli.methods import get
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.models.build import build
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.names import ENVIRONMENT, EXPERIMENT, METRICS, MODEL, PROBE
from unipelt_cli.runs.probe import probe_rows
from unipelt_cli.runs.run import Run

LABELS = ("low", "middle", "high")
TINY = {"prefix_length": 4, "prefix_width": 16, "rank": 4, "reduction": 8}


def make_run(
    directory: Path,
    method: str,
    settings: dict[str, Any] | None = None,
    labels: tuple[str, ...] = LABELS,
    folded: bool = True,
    **model: Any,
) -> tuple[Run, TunedModel]:
    """Return a run and its model with noise on all that trains; its test rows are nowhere.

    Its head reads features as they are, which libraries can, unless `model` says otherwise.
    """
    settings = dict(settings or {})
    if isinstance(get(method).method, Submodules):
        settings = TINY | settings
    train = {"device": "cpu", "precision": settings.pop("precision", "fp32")}
    read = {"backbone": str(directory), "max_length": 32, "normalise": False}
    experiment = resolve(
        [
            ("", {"data": {"task": "demo"}, "train": train}),
            ("", {"model": read | model}),
            ("", {"method": {"name": method} | settings}),
        ]
    )
    apart = experiment.model.pairs == "apart"
    tuned = build(experiment, len(labels) or 1, folded=folded, pairs=[apart])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.classifier.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    task = {
        "name": "my task.",
        "text": ["a", "b"][: 1 + apart],
        "labels": labels,
        "metric": "accuracy",
        "also": [],
    }
    counts = dict.fromkeys(labels, 2) | dict.fromkeys(labels[-1:], 0)
    split = {"rows": 4, "digest": "0" * 64, "row_ids": [0, 1, 2, 3], "labels": counts}
    data = {"source": {"kind": "files", "train": "/secret/rows.csv"}}
    own = {"name": tuned.pretrained.name, "fingerprint": tuned.pretrained.fingerprint}
    splits = {"splits": {"train": split, "dev": split}}
    environment = {"unipelt": "1", "backbone": own, "data": data | splits}
    result = {
        **{"k": 4, "data_seed": 111, "seed": 42, "metric": "accuracy", "collapsed": False},
        **{"dev": {"accuracy": 0.5}, "test": {"accuracy": 0.25}, "pooling": tuned.pooling},
        **{"files": dict.fromkeys((EXPERIMENT, ENVIRONMENT, PROBE, METRICS, MODEL), "")},
        **{"epochs": 3, "best_epoch": 2, "seconds": 1.0, "device": "cpu", "sha256": ""},
        **{"trainable_parameters": 9, "stored_parameters": 9, "head_parameters": 9},
        **{"artifact_bytes": 9, "peak_memory_bytes": 9},
    }
    return Run(Path("the-run"), experiment, environment, {"task": task}, result), tuned


def rows_of(tuned: TunedModel) -> list[dict[str, Tensor]]:
    rows = probe_rows(tuned, 8)
    return [rows.batch([row], torch.device("cpu")) for row in range(4)]


def difference(ours: Any, theirs: Any, rows: list[dict[str, Tensor]]) -> float:
    with torch.inference_mode():
        return max(float((ours(**row) - theirs(**row)).abs().max()) for row in rows)


def hidden(model: Any) -> Callable[..., Tensor]:
    return lambda **row: model(**row).last_hidden_state


def logits(model: Any) -> Callable[..., Tensor]:
    return lambda **row: model(**row).logits


NATIVE = sorted(name for name, row in BACKBONES.items() if row.native)
