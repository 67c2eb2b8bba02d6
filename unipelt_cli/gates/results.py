"""What is read off a run's gates, as its tables, pages and pictures show it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from unipelt_cli.files.as_json import INLINE, LEFT_OUT, OPTIONAL, keyed

_Value = TypeVar("_Value", covariant=True)


@dataclass(frozen=True)
class Layer(Generic[_Value]):
    """What is known of each gate, or of each submodule, of one layer; not every layer has each."""

    layer: int
    gates: Mapping[str, _Value] = field(metadata=INLINE)


@dataclass(frozen=True)
class MeanGate:
    """A gate's mean over rows."""

    mean: float


@dataclass(frozen=True)
class GateStatistics(MeanGate):
    """A gate's values over rows: in [0, 1], entropies in bits.

    `entropy` is that of their histogram, 0 for a constant; `undecided` the mean binary entropy, 1
    where it is half open for every row.
    """

    std: float
    min: float
    p05: float
    median: float
    p95: float
    max: float
    entropy: float
    undecided: float


GateLayers = Sequence[Layer[GateStatistics]]


@dataclass(frozen=True)
class LayerGate:
    """One gate of one layer, and its mean over rows."""

    layer: int
    gate: str
    mean: float


@dataclass(frozen=True)
class ClassGates:
    """The gates over the rows of one label, or of one third of the values."""

    name: str = field(metadata=keyed("class"))
    rows: int
    layers: GateLayers


@dataclass(frozen=True)
class ClassMean:
    """A gate's mean over the rows of one class."""

    name: str = field(metadata=keyed("class"))
    mean: float


@dataclass(frozen=True)
class ClassDifference:
    """Which class opens a gate most and which least; `effect` counts in spreads within classes."""

    layer: int
    gate: str
    most: ClassMean
    least: ClassMean
    difference: float
    spread: float
    effect: float | None


@dataclass(frozen=True)
class RowGates:
    """One row's gates, without its text."""

    row: int
    label: str | float
    layers: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class RowGate:
    """One row, and how far a gate opens for it."""

    row: int
    label: str | float
    value: float


@dataclass(frozen=True)
class ExtremeRows:
    """The rows that open a gate most and least, as a mean over layers."""

    gate: str
    most: Sequence[RowGate]
    least: Sequence[RowGate]


@dataclass(frozen=True)
class EpochGates:
    """The gates' means over dev after one epoch, and its dev scores."""

    epoch: int
    is_best: bool
    dev: Mapping[str, float]
    layers: Sequence[Layer[float]]


@dataclass(frozen=True)
class Loss:
    """What closing one submodule costs, in one layer or (`layer` None) in all of them.

    `gate` is its mean over rows, None where nothing is gated; `lost` is below 0 where the score
    rose; `flips` counts the rows whose label changed, None in regression.
    """

    layer: int | None = field(metadata=LEFT_OUT)
    part: str = field(metadata=LEFT_OUT)
    gate: float | None
    score: float
    lost: float
    flips: int | None


@dataclass(frozen=True)
class AblationReport:
    """What is lost where submodules are closed, in all layers and in each, and what that says."""

    metric: str
    score: float
    everywhere: Mapping[str, Loss] = field(metadata=keyed("all"))
    layers: Sequence[Layer[Loss]]
    verdict: str = field(metadata=keyed("says"))

    def rows(self) -> list[tuple[str, Mapping[str, Loss]]]:
        """Return what a table shows: the losses in all layers, then those in each."""
        each = [(str(layer.layer), layer.gates) for layer in self.layers]
        return [("all", self.everywhere), *each]


@dataclass(frozen=True)
class Change:
    """A number before and after."""

    before: float
    after: float


@dataclass(frozen=True)
class SubmoduleCost:
    """The dev score that one submodule of one layer is worth."""

    layer: int
    part: str
    cost: float


@dataclass(frozen=True)
class StaticReport:
    """What constant gates and dropped submodules cost, and what they gain; `cost` was allowed."""

    cost: float
    gates: Sequence[Layer[float]]
    costs: Sequence[SubmoduleCost]
    dropped: Sequence[str]
    metric: str
    dev: Change
    test: Change
    stored_parameters: Change
    rows_per_second: Change


@dataclass(frozen=True)
class Inspection:
    """What `inspect-gates` shows of one split's rows; what was not asked for is None."""

    rows: int
    split: str
    layers: GateLayers
    nearly_closed: Sequence[LayerGate]
    ablation: AblationReport | None = field(default=None, metadata=OPTIONAL)
    classes: Sequence[ClassGates] | None = field(default=None, metadata=OPTIONAL)
    differences: Sequence[ClassDifference] | None = field(default=None, metadata=OPTIONAL)
    top: Sequence[ExtremeRows] | None = field(default=None, metadata=OPTIONAL)
    examples: Sequence[RowGates] | None = field(default=None, metadata=OPTIONAL)
    epochs: Sequence[EpochGates] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class EpochsInspection:
    """What `inspect-gates` shows of training; `layers` are those of the best epoch."""

    rows: int
    split: str
    layers: Sequence[Layer[MeanGate]]
    best_epoch: int
    epochs: Sequence[EpochGates]


def gate_names(layers: Iterable[Mapping[str, object]]) -> list[str]:
    """Return the names of the gates of all layers, each once; not every layer has each."""
    return list(dict.fromkeys(name for gates in layers for name in gates))


def names_in(layers: Iterable[Layer[object]]) -> list[str]:
    """Return the names of the gates that any layer has, each once."""
    return gate_names(layer.gates for layer in layers)


def over_layers(layers: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return each gate's mean over the layers that have it."""
    means = list(layers)
    return {
        name: float(np.mean([gates[name] for gates in means if name in gates]))
        for name in gate_names(means)
    }
