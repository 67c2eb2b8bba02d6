"""One step of the optimiser: its rates, its seeds, its loss, its parts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.config.sections import TrainSettings
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.tasks import Task

PREPARING = 2**32  # seeds from here on belong to passes before training


def loss_of(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss over rows: squared error in regression, else cross-entropy."""
    if task.is_regression:
        return functional.mse_loss(logits[:, 0], labels.float())
    return functional.cross_entropy(logits, labels)


def make_adamw(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, tuned: Tuned
) -> torch.optim.AdamW:
    """Make AdamW with the method's rates; it decays only matrices that the method lets decay.

    A bias or a gate must not be pulled to nothing.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_head = not name.startswith("backbone.")
        own = name.removeprefix("backbone.")
        factor = settings.head_rate if is_head else tuned.method.rate(own)
        is_matrix = parameter.ndim > 1 and parameter.shape[0] > 1
        decays = is_matrix and (is_head or tuned.method.decays(own))
        decay = settings.weight_decay if decays else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": decay, "factor": factor}
            for (factor, decay), members in groups.items()
        ],
        fused=tuned.device.type in ("cpu", "cuda"),
    )


def derive_seed(seed: int, step: int) -> int:
    """Mix a run's seed with a place in it: a seed of its own, of 63 bits."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Give one step random numbers of its own and leave the process's generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield
