"""The training loop, as a generator of events: it prints nothing and writes nothing.

Every step draws from its own seed, and every epoch's order from its own: a run stopped after any
step goes on exactly, from its tensors and a few counters.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.batches import Encoded, shuffled
from unipelt_cli.config import TrainSettings
from unipelt_cli.errors import CheckError
from unipelt_cli.evaluation import compute_logits, predictions
from unipelt_cli.modeling import Tuned
from unipelt_cli.tasks import Task, is_better


@dataclass(frozen=True)
class Step:
    """One optimiser step was taken."""

    epoch: int
    step: int
    steps: int  # of this epoch
    loss: float


@dataclass(frozen=True)
class Epoch:
    """One epoch was trained and scored on dev."""

    epoch: int
    train_loss: float
    dev: Mapping[str, float]
    train_seconds: float
    evaluation_seconds: float
    tokens: int  # real tokens trained on
    is_best: bool


@dataclass
class Progress:
    """The counters of a loop: with its tensors, all that going on needs."""

    epoch: int = 1
    step: int = 0  # within the epoch
    taken: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    train_seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = 0.0
    best_dev: dict[str, float] = field(default_factory=dict)
    total_tokens: int = 0
    total_train_seconds: float = 0.0


class Training:
    """A loop over one model: iterate over `events`, read `progress`, save `state` at any event."""

    def __init__(
        self,
        tuned: Tuned,
        task: Task,
        train: tuple[Encoded, NDArray[Any]],
        dev: tuple[Encoded, NDArray[Any]],
        settings: TrainSettings,
    ) -> None:
        assert settings.learning_rate is not None
        self.tuned, self.task, self.settings = tuned, task, settings
        self.train, self.dev = train, dev
        self.parameters = {
            name: parameter
            for name, parameter in tuned.classifier.named_parameters()
            if parameter.requires_grad
        }
        self.steps = -(-len(train[0]) // settings.batch_size)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.optimizer = _adamw(self.parameters, settings, tuned.device)

    def events(self) -> Iterator[Step | Epoch]:
        """Train until patience or epochs end, then put the best epoch's tensors back.

        Raises CheckError when the loss is no longer a number.
        """
        while not self.is_done:
            yield from self._train_epoch()
            yield self._score_epoch()
        self._copy(self.best)

    @property
    def is_done(self) -> bool:
        """Whether the next epoch would be one too many."""
        progress = self.progress
        if progress.epoch > self.settings.epochs:
            return True
        return progress.epoch - 1 - progress.best_epoch >= self.settings.patience

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and counters from which `restore` goes on exactly."""
        tensors = {f"now.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.detach()
        return tensors, asdict(self.progress)

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take up a saved state; a KeyError or RuntimeError means that it is another run's."""
        self.progress = Progress(**counters)
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            groups.setdefault(kind, {})[name] = tensor.to(self.parameters[name].device)
        self._copy(groups.pop("now"))
        self.best = groups.pop("best", {})
        for kind, values in groups.items():
            for name, tensor in values.items():
                self.optimizer.state[self.parameters[name]][kind] = tensor

    def _train_epoch(self) -> Iterator[Step]:
        rows, labels = self.train
        settings, progress = self.settings, self.progress
        order = shuffled(rows.lengths, settings.batch_size, settings.seed, progress.epoch)
        while progress.step < self.steps:
            start = time.perf_counter()
            chosen = order[progress.step]
            loss = self._step(rows, labels, chosen)
            progress.step += 1
            progress.taken += 1
            progress.loss_sum += loss * len(chosen)
            progress.tokens += int(rows.lengths[chosen].sum())
            progress.train_seconds += time.perf_counter() - start
            yield Step(progress.epoch, progress.step, self.steps, loss)

    def _step(self, rows: Encoded, labels: NDArray[Any], chosen: NDArray[np.int64]) -> float:
        classifier, device = self.tuned.classifier, self.tuned.device
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        classifier.train()
        with _seeded(self.settings.seed, self.progress.taken, device):
            logits = classifier(**rows.batch(chosen.tolist(), device))
            loss = self._loss(logits, torch.as_tensor(labels[chosen], device=device))
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        value = loss.item()
        if not np.isfinite(value):
            raise CheckError(
                f"the loss is {value} at step {self.progress.taken + 1}",
                f"lower train.learning_rate (now {self.settings.learning_rate})",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.task.is_regression:
            return functional.mse_loss(logits[:, 0], labels.float())
        return functional.cross_entropy(logits, labels)

    def _rate(self) -> float:
        """Return this step's rate: linear warm-up, then linear decay to 0 over all epochs."""
        peak = self.settings.learning_rate
        assert peak is not None
        total = self.settings.epochs * self.steps
        warm = round(self.settings.warmup * total)
        step = self.progress.taken
        if step < warm:
            return peak * (step + 1) / warm
        return peak * (total - step) / max(1, total - warm)

    def _score_epoch(self) -> Epoch:
        start = time.perf_counter()
        rows, labels = self.dev
        logits = compute_logits(self.tuned, rows)
        scores = self.task.score(predictions(self.task, logits), labels)
        progress, metric = self.progress, self.task.metric
        first = not progress.best_dev
        is_best = first or is_better(metric, scores[metric], progress.best_score)
        if is_best:
            progress.best_epoch, progress.best_score = progress.epoch, scores[metric]
            progress.best_dev = dict(scores)
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        event = Epoch(
            progress.epoch,
            progress.loss_sum / len(self.train[0]),
            scores,
            progress.train_seconds,
            time.perf_counter() - start,
            progress.tokens,
            is_best,
        )
        progress.total_tokens += progress.tokens
        progress.total_train_seconds += progress.train_seconds
        progress.epoch += 1
        progress.step = progress.tokens = 0
        progress.loss_sum = progress.train_seconds = 0.0
        return event

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)


def _adamw(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings, device: torch.device
) -> torch.optim.AdamW:
    """Make AdamW that decays matrices only: a bias or a gate must not be pulled to nothing."""
    matrices = [p for p in parameters.values() if p.ndim > 1 and p.shape[0] > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1 or p.shape[0] == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], fused=device.type in ("cpu", "cuda")
    )


@contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Give one step random numbers of its own and leave the process's generators as they were."""
    own = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(own) >> 1)
        yield
