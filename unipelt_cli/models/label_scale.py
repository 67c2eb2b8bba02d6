"""The scale on which a regression is learned: labels less their mean, over their deviation.

A head starts near 0 and moves by about its rate a step, so that it never reaches labels of 16 to
84, and a rank correlation hides it. What is stored has the scale in it: it gives labels.

Labels that it reaches stay as they are, such as STS-B's, 0 to 5: `unipelt-apl` learned those far
worse standardised (minilm, k = 100, dev 300, data seeds 111 and 222: test Spearman 0.42 and 0.40 in
place of 0.66 and 0.67; `lora` 0.58 and 0.49 in place of 0.57 and 0.58).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from unipelt_cli.metrics import Values

REACHED, NARROWEST = 5.0, 0.5  # the largest label and the least deviation that stay raw
FINEST = 0.005  # of the mean: 1e-4 of it is some four of float32's steps there


@dataclass(frozen=True)
class LabelScale:
    """The mean and the standard deviation of train labels; raw ones are taken as they are."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, labels: Values) -> "LabelScale":
        """Return the scale of train labels (rows,); of equal ones the deviation is 0."""
        if labels.min() == labels.max():  # their computed mean may miss them by a digit
            return cls(float(labels[0]), 0.0)
        return cls(float(labels.mean()), float(labels.std()))

    @classmethod
    def chosen(cls, labels: Values) -> "LabelScale":
        """Return the scale of train labels, raw where a head reaches them as they are."""
        is_reached = np.abs(labels).max() <= REACHED and labels.std() >= NARROWEST
        return cls() if is_reached else cls.of(labels)

    def standardise(self, labels: Values) -> NDArray[np.float32]:
        """Return labels as the head learns them."""
        return ((labels - self.mean) / (self.deviation or 1.0)).astype(np.float32)

    def restore(self, values: Values) -> NDArray[np.float64]:
        """Return what a head says as values on the labels' scale."""
        return np.asarray(values * self.deviation + self.mean, dtype=np.float64)

    def fold_into(self, unit: nn.Linear) -> None:
        """Let a linear unit that gives standardised values give labels."""
        with torch.no_grad():
            unit.weight.copy_(unit.weight.double() * self.deviation)
            unit.bias.copy_(unit.bias.double() * self.deviation + self.mean)

    @property
    def unit(self) -> float:
        """What a difference between two answers is measured in: 1 for raw labels."""
        return max(self.deviation, FINEST * abs(self.mean)) or 1.0


RAW = LabelScale()
