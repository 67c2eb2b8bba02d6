"""Where heads start and end: over pairs read apart at the cosine, else drawn or at class means.

Nearest class means: Snell et al. 2017 (arXiv 1703.05175).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unipelt_cli.models.classifier import STEEPNESS, Head
from unipelt_cli.models.evaluation import fill
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.training.events import Course

RIDGE = 1e-3  # on the mean loss of a row, by squared weight on the standardised cosine
STEPS = 100  # of L-BFGS, which stops by itself before
ABSENT = -3 * STEEPNESS
"""Logit of a class without a train row: below what any other can have."""


def start_heads(
    tuned: Tuned, courses: Sequence[Course], start: str, features: Sequence[Tensor] = ()
) -> None:
    """Set each head to where it starts; `random` is what it was drawn as.

    Over pairs read apart a head is fitted to its train rows' cosines, its last input, whatever
    `start` says: that is what a sentence encoder was trained for. From 0 a head of 2H+1 inputs,
    each far below 1, takes longer to find that than few rows last, and the backbone is moved
    meanwhile. With `means` a head over classes starts at their train rows' mean features.
    `features`, (rows, width) of each course's train rows, are those of a frozen backbone: its rows
    go through it once.
    """
    for place, course in enumerate(courses):
        head = tuned.classifier.heads[place]
        if tuned.classifier.apart[place]:
            _start_at_cosine(head, course, _read(tuned, course, place, features))
        elif start == "means" and not course.task.is_regression:
            set_to_means(head, course, _read(tuned, course, place, features))


def end_heads(tuned: Tuned, courses: Sequence[Course], features: Sequence[Tensor] = ()) -> None:
    """Set each head over classes to its train rows' means as training left them.

    A trained head has learned few rows by heart, and its rare classes least well: where a class has
    a handful of rows, the means of what they have become tell others apart far better. Heads over
    pairs read apart, and of regressions, stay as trained.
    """
    for task_index, course in enumerate(courses):
        head = tuned.classifier.heads[task_index]
        if not (course.task.is_regression or tuned.classifier.apart[task_index]):
            set_to_means(head, course, _read(tuned, course, task_index, features))


def _read(tuned: Tuned, course: Course, place: int, features: Sequence[Tensor]) -> Tensor:
    """Return what a head's linear unit reads of the train rows, (rows, inputs), on the CPU."""
    rows, _ = course.train
    head = tuned.classifier.heads[place]
    if features:
        with torch.no_grad():
            known: Tensor = head.eval().inputs(features[place].to(tuned.device))
        return known.cpu()
    read = np.zeros((len(rows), head.out.in_features), np.float32)

    def compute(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [head.inputs(tuned.classifier.features(**inputs))]

    tuned.classifier.eval().select(place)
    fill([read], compute, tuned, rows, np.arange(len(rows)))
    return torch.from_numpy(read)


def set_to_means(head: Head, course: Course, read: Tensor) -> None:
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


def _start_at_cosine(head: Head, course: Course, read: Tensor) -> None:
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
    inputs = (cosines - mean) / deviation
    fitted = torch.zeros(2, outputs, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([fitted], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits = inputs[:, None] * fitted[0] + fitted[1]
        is_values = targets.is_floating_point()
        error = (
            functional.mse_loss(logits[:, 0], targets)
            if is_values
            else functional.cross_entropy(logits, targets)
        )
        total = error + RIDGE * fitted[0].square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    search.step(loss)  # type: ignore[no-untyped-call]
    slopes = fitted.detach()[0] / deviation
    return slopes, fitted.detach()[1] - slopes * mean
