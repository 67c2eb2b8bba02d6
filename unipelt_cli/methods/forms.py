"""What a method amounts to in plain terms: a linear unit, low-rank updates, rescalings."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearFit:
    """The linear unit of a head, fitted at once."""

    weight: Tensor
    """(outputs, features)"""
    bias: Tensor
    """(outputs,)"""


@dataclass(frozen=True)
class LowRankUpdates:
    """Linear units that compute W x + b + scale B A x, all of one rank."""

    rank: int
    scale: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """The path of a unit in the backbone -> A (R, inputs), B (outputs, R)."""


@dataclass(frozen=True)
class Rescalings:
    """Linear units whose outputs, or whose inputs, are multiplied by vectors."""

    outputs: Mapping[str, Tensor]
    """The path of a unit in the backbone -> (outputs,)."""
    inputs: Mapping[str, Tensor]
    """The path of a unit in the backbone -> (inputs,)."""
