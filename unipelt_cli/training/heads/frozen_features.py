"""What a frozen backbone gives for a run's rows: each goes through it once, without dropout."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipelt_cli.models.evaluation import Features, Logits, compute_features
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system.processes import Processes
from unipelt_cli.training.events import TaskRows
from unipelt_cli.training.heads.loss import loss_of

Source = Callable[[TunedModel, int, str], Features]
"""Features (rows, size) of a task's split, by its place among the run's tasks."""


def are_frozen(tuned: TunedModel) -> bool:
    """Say whether the features of a model's rows never change while it trains."""
    method = tuned.method
    return method.reads_frozen_features and (method.has_closed_form or not tuned.untrained)


class FrozenFeatures:
    """The features of a run's train and dev rows; heads train on them, or are fitted at once."""

    def __init__(
        self,
        tuned: TunedModel,
        courses: Sequence[TaskRows],
        processes: Processes,
        source: Source | None = None,
    ) -> None:
        self.tuned, self.courses, self.processes = tuned, courses, processes
        self._source = source or self._compute
        self.train: list[Tensor] = []
        self.dev: list[Tensor] = []
        self.seconds = 0.0

    def _compute(self, tuned: TunedModel, task_index: int, split: str) -> Features:
        rows, _ = getattr(self.courses[task_index], split)
        return compute_features(tuned, rows, task_index, self.processes)

    def prepare(self) -> None:
        """Send every train and dev row through the backbone."""
        start = time.perf_counter()
        for task_index, course in enumerate(self.courses):
            self.train.append(torch.from_numpy(self._source(self.tuned, task_index, "train")))
            has_dev = course.dev is not None
            dev = self._source(self.tuned, task_index, "dev") if has_dev else np.zeros((0, 0), "f4")
            self.dev.append(torch.from_numpy(dev))
        self.seconds = time.perf_counter() - start

    def train_rows(self, task_index: int, rows: NDArray[np.int64]) -> Tensor:
        """Return the features (rows, width) of some train rows of a task, for a step."""
        return self.train[task_index][rows].to(self.tuned.device)

    def dev_logits(self, task_index: int) -> Logits:
        """Return the logits (rows, outputs) of a task's dev rows; no dropout, no gradient."""
        return read_features(self.tuned, self.dev[task_index].numpy(), task_index)

    def fit(self) -> None:
        """Fit every task's head to all of its train rows at once, on its labels' scale."""
        for task_index, course in enumerate(self.courses):
            task, labels = course.task, course.train[1]
            head = self.tuned.classifier.heads[task_index].eval()
            targets = course.scale.standardise(labels) if task.is_regression else labels
            with torch.no_grad():
                read = head.inputs(self.train[task_index].to(self.tuned.device))
                fitted = self.tuned.method.fit_head(
                    read, targets, task.outputs, is_regression=task.is_regression
                )
                head.out.weight.copy_(fitted.weight)
                head.out.bias.copy_(fitted.bias)

    def loss_sum(self) -> float:
        """Return the loss of all train rows together, as the heads are now."""
        losses = 0.0
        for task_index, course in enumerate(self.courses):
            features = self.train[task_index].numpy()
            logits = torch.from_numpy(read_features(self.tuned, features, task_index))
            labels = course.train[1]
            losses += loss_of(course, logits, labels).item() * len(labels)
        return losses


def read_features(tuned: TunedModel, features: Features, task_index: int) -> Logits:
    """Return what a task's head says of features (rows, size): logits (rows, outputs)."""
    classifier = tuned.classifier.eval()
    classifier.select(task_index)
    with torch.inference_mode():
        logits: Logits = classifier.read(torch.from_numpy(features).to(tuned.device)).cpu().numpy()
    return logits
