"""Where a head over pairs read apart starts: at what the cosine of the two texts says by itself."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from unipelt_cli.models.evaluation import fill
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.training.events import Course

RIDGE = 1e-3  # on the mean loss of a row, by squared weight on the standardised cosine
STEPS = 100  # of L-BFGS, which stops by itself before


def start_heads(tuned: Tuned, courses: Sequence[Course]) -> None:
    """Fit each head over pairs read apart to its train rows' cosines, its last input.

    A sentence encoder's cosine is what it was trained for. From 0 a head of 2H+1 inputs, each far
    below 1, takes longer to find that than few rows last, and the backbone is moved meanwhile.
    """
    for place, course in enumerate(courses):
        if tuned.classifier.apart[place]:
            tuned.classifier.eval().select(place)
            _start(tuned, course, place)


def _start(tuned: Tuned, course: Course, place: int) -> None:
    rows, labels = course.train
    head = tuned.classifier.heads[place]
    read = np.zeros((len(rows), head.out.in_features), np.float32)

    def compute(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return [tuned.classifier.features(**inputs)]

    fill([read], compute, tuned, rows, np.arange(len(rows)))
    cosines = torch.from_numpy(read[:, -1]).double()
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
