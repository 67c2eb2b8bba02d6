"""Where heads start and end: over pairs read apart at the cosine, else drawn or at class means.

Nearest class means: Snell et al. 2017 (arXiv 1703.05175).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unipelt_cli.methods.linear_fits import ABSENT, fit_classes, fit_values
from unipelt_cli.models.classifier import STEEPNESS, Head
from unipelt_cli.models.evaluation import fill
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.training.events import TaskRows

RIDGE = 1e-3  # on the mean loss of a row, by squared weight on the standardised cosine
STRENGTH = 1.0
"""scikit-learn's C of a head's last fit over pairs: rows that were tuned lie far apart by then."""


def start_heads(
    tuned: TunedModel, courses: Sequence[TaskRows], start: str, features: Sequence[Tensor] = ()
) -> None:
    """Set each head to where it starts; `random` is what it was drawn as.

    Over pairs read apart a head is fitted to its train rows' cosines, its last input, whatever
    `start` says: that is what a sentence encoder was trained for. From 0 a head of 2H+1 inputs,
    each far below 1, takes longer to find that than few rows last, and the backbone is moved
    meanwhile. With `means` a head over classes starts at their train rows' mean features.
    `features`, (rows, width) of each course's train rows, are those of a frozen backbone: its rows
    go through it once.
    """
    for task_index, course in enumerate(courses):
        head = tuned.classifier.heads[task_index]
        if tuned.classifier.apart[task_index]:
            _start_at_cosine(head, course, _read(tuned, course, task_index, features))
        elif start == "means" and not course.task.is_regression:
            set_to_means(head, course, _read(tuned, course, task_index, features))


def end_heads(
    tuned: TunedModel, courses: Sequence[TaskRows], features: Sequence[Tensor] = ()
) -> None:
    """Set each head over classes to its train rows' means as training left them.

    A trained head has learned few rows by heart, and its rare classes least well: where a class has
    a handful of rows, the means of what they have become tell others apart far better. Over pairs
    read apart, whose features are no means of classes, it is fitted to them by logistic regression.
    Heads of regressions stay as trained.
    """
    for task_index, course in enumerate(courses):
        if course.task.is_regression:
            continue
        head, read = tuned.classifier.heads[task_index], _read(tuned, course, task_index, features)
        if tuned.classifier.apart[task_index]:
            _fit_to_classes(head, course, read)
        else:
            set_to_means(head, course, read)


def _read(
    tuned: TunedModel, course: TaskRows, task_index: int, features: Sequence[Tensor]
) -> Tensor:
    """Return what a head's linear unit reads of the train rows, (rows, inputs), on the CPU."""
    rows, _ = course.train
    head = tuned.classifier.heads[task_index]
    if features:
        with torch.no_grad():
            known: Tensor = head.eval().inputs(features[task_index].to(tuned.device))
        return known.cpu()
    read = np.zeros((len(rows), head.out.in_features), np.float32)

    def compute(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [head.inputs(tuned.classifier.features(**inputs))]

    tuned.classifier.eval().select(task_index)
    fill([read], compute, tuned, rows, np.arange(len(rows)))
    return torch.from_numpy(read)


def set_to_means(head: Head, course: TaskRows, read: Tensor) -> None:
    """Point each class's weights from the middle of all classes to its own rows' mean.

    The logit of a class is how far `read`, (rows, inputs), lies from the middle in its direction:
    classes of many rows count no more than those of few. One without a row is never answered.
    """
    labels = torch.from_numpy(course.train[1])
    present = torch.unique(labels)
    means = torch.stack([read[labels == label].mean(0) for label in present])
    middle = means.mean(0)
    length = read.norm(dim=1).mean().clamp(min=1e-6)  # 1 where features are normalised
    directions = STEEPNESS / length * functional.normalize(means - middle, dim=1)
    weight = torch.zeros(head.out.out_features, read.shape[1])
    bias = torch.full((head.out.out_features,), ABSENT)
    weight[present] = directions
    bias[present] = -(directions @ middle)
    with torch.no_grad():
        head.out.weight.copy_(weight)
        head.out.bias.copy_(bias)


def _fit_to_classes(head: Head, course: TaskRows, read: Tensor) -> None:
    outputs = head.out.out_features
    fitted = fit_classes(read.double().numpy(), course.train[1], STRENGTH, outputs)
    with torch.no_grad():
        head.out.weight.copy_(torch.from_numpy(fitted.weight))
        head.out.bias.copy_(torch.from_numpy(fitted.bias))


def _start_at_cosine(head: Head, course: TaskRows, read: Tensor) -> None:
    cosines, labels = read[:, -1].double(), course.train[1]
    if course.task.is_regression:
        targets = torch.from_numpy(course.scale.standardise(labels)).double()
    else:
        targets = torch.from_numpy(labels)
    slopes, offsets = fit(cosines, targets, head.out.out_features)
    with torch.no_grad():
        head.out.weight.zero_()
        head.out.weight[:, -1] = slopes.to(head.out.weight)
        head.out.bias.copy_(offsets.to(head.out.bias))


def fit(cosines: Tensor, targets: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Return slopes and offsets (outputs,) of the least mean loss over rows, from (rows,) float64.

    Floating-point targets are values, learned by squared error; others are places of labels.
    """
    mean, deviation = cosines.mean(), cosines.std(correction=0).clamp(min=1e-6)
    inputs = ((cosines - mean) / deviation)[:, None].numpy()
    strength = 1 / (RIDGE * len(inputs))
    if targets.is_floating_point():
        line = fit_values(inputs, targets.numpy(), strength)
    else:  # of two classes one weight stands for both, so half of it is penalised
        several = 2 if len(np.unique(targets.numpy())) > 2 else 1
        line = fit_classes(inputs, targets.numpy(), strength / several, outputs)
    slopes = torch.from_numpy(line.weight[:, 0]) / deviation
    return slopes, torch.from_numpy(line.bias) - slopes * mean
