"""Training on twelve rows, and what it leaves of the backbone's own tensors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.models import experiment
from torch import Tensor

from unipelt_cli.config.experiment import resolve
from unipelt_cli.models.build import build
from unipelt_cli.models.evaluation import encode_rows
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.tasks import get_task
from unipelt_cli.training.events import Epoch, Step
from unipelt_cli.training.loop import Training

TWELVE_LABELS = np.array([0, 1] * 6)
TWELVE = [f"the film was {('good', 'awful')[i % 2]} {'and red ' * (i % 4)}" for i in range(12)]
NATIVE = {"pooling": "native"}


def made(
    directory: Path, method: str, model: dict[str, Any] = NATIVE, **options: Any
) -> TunedModel:
    return build(experiment(directory, method, model=model, options=options), 2)


def training(tuned: TunedModel, **train: Any) -> Training:
    settings = {"epochs": 2, "batch_size": 5, "learning_rate": 1e-2, "warmup": 0.0, **train}
    resolved = resolve([("", {"data": {"task": "sst2"}, "train": settings})]).train
    rows = encode_rows(tuned, [TWELVE], 128)
    return Training(tuned, get_task("sst2"), (rows, TWELVE_LABELS), (rows, TWELVE_LABELS), resolved)


def prepared(tuned: TunedModel) -> TunedModel:
    loop = training(tuned)
    next(loop.events())
    return tuned


def pristine(directory: Path) -> dict[str, Tensor]:
    return dict(made(directory, "head").classifier.backbone.named_parameters())


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def goes_on(directory: Path, method: str, stop_after: int) -> None:
    """Stop a run after some events; going on must give what an unbroken run gives."""
    whole = training(made(directory, method), epochs=4)
    expected = [e.loss for e in whole.events() if isinstance(e, Step)]
    stopped = training(made(directory, method), epochs=4)
    events = stopped.events()
    seen = [next(events) for _ in range(stop_after)]
    tensors, counters = stopped.state()
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = training(made(directory, method), epochs=4)
    resumed.restore(saved, counters)
    rest = [e.loss for e in resumed.events() if isinstance(e, Step)]
    assert [e.loss for e in seen if isinstance(e, Step)] + rest == expected
    ours, theirs = resumed.tuned.stored(), whole.tuned.stored()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(isinstance(e, Epoch) for e in seen) == stop_after // 4


def largest(scores: Tensor, count: int) -> list[int]:
    order = np.lexsort((np.arange(len(scores)), -scores.numpy()))
    return sorted(order[:count].tolist())
