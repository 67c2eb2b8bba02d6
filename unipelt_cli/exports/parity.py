"""Whether an exported model computes what the run does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unipelt_cli.models.batches import Encoded

TOLERANCE = 1e-4
SIZES = (1, 3, 32, 8)  # of the batches for a tool where padding must not matter
CPU = torch.device("cpu")

Model = Callable[..., Tensor]
"""From a batch's tensors by name to its logits (batch, outputs), or hidden states."""


@dataclass(frozen=True)
class Parity:
    """How far two models' logits are apart over rows (hidden states where one has no head)."""

    rows: int
    max_abs_logit_diff: float
    mean_abs_logit_diff: float
    label_flips: int


def unpadded(rows: Encoded) -> Iterator[list[int]]:
    """Yield batches of rows of one length, for a tool where padding would change the answer.

    Of pairs that are read apart all first texts have one length, and all second ones.
    """
    lengths = rows.text_lengths.T
    for length in np.unique(lengths, axis=0):
        alike = (lengths == length).all(axis=1).nonzero()[0].tolist()
        yield from (alike[start : start + max(SIZES)] for start in range(0, len(alike), max(SIZES)))


def padded(rows: Encoded) -> Iterator[list[int]]:
    """Yield batches of several sizes, of rows of any length."""
    start, turn = 0, 0
    while start < len(rows):
        size = SIZES[turn % len(SIZES)]
        yield list(range(start, min(start + size, len(rows))))
        start, turn = start + size, turn + 1


def compare(
    rows: Encoded,
    batches: Iterator[list[int]],
    ours: Model,
    theirs: Model,
    to_logits: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Parity:
    """Summarise how far two models are apart on all rows.

    Where they give hidden states, `to_logits` reads logits from them and the mask.
    """
    count, flips, differences = 0, 0, []
    for batch in batches:
        inputs = rows.batch(batch, CPU)
        with torch.inference_mode():
            our, their = ours(**inputs), theirs(**inputs)
            apart = (our - their).abs()
            if to_logits is not None:
                mask = inputs["attention_mask"]
                apart = apart[mask.bool()]
                our, their = to_logits(our, mask), to_logits(their, mask)
        differences.append(apart.flatten())
        flips += int((our.argmax(1) != their.argmax(1)).sum())
        count += len(batch)
    apart = torch.cat(differences)
    return Parity(count, float(apart.max()), float(apart.mean()), flips)
