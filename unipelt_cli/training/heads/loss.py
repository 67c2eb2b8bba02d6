"""The loss of a batch: how far its answers are off, and how its features lie to each other."""

import torch
from torch import Tensor
from torch.nn import functional

from unipelt_cli.metrics import Values
from unipelt_cli.training.events import TaskRows


def loss_of(course: TaskRows, logits: Tensor, labels: Values) -> Tensor:
    """Return the mean loss over rows: squared error on the course's scale, else cross-entropy."""
    if course.task.is_regression:
        target = torch.as_tensor(course.scale.standardise(labels), device=logits.device)
        return functional.mse_loss(logits[:, 0], target)
    return functional.cross_entropy(logits, torch.as_tensor(labels, device=logits.device))


def contrast(features: Tensor, labels: Tensor) -> Tensor:
    """Return how far the cosines of a batch's pairs are from 1 within a label, and from 0 between.

    Mean squared errors of both kinds of pairs, added: neither outweighs the other where labels are
    many or few. Of a batch in parts, for want of memory or over several processes, only the rows
    of one part are compared. `features` are (batch, width), `labels` (batch,) class numbers. What
    SetFit trains with (Tunstall et al. 2022, arXiv 2209.11055), on all pairs instead of sampled.
    """
    units = functional.normalize(features, dim=-1)
    first, second = torch.triu_indices(len(units), len(units), offset=1, device=units.device)
    cosines = (units @ units.T)[first, second]
    alike = labels[first] == labels[second]
    total = features.new_zeros(())
    for pairs, target in ((alike, 1.0), (~alike, 0.0)):
        errors = (cosines - target).square() * pairs
        total = total + errors.sum() / pairs.sum().clamp(min=1)
    return total
