"""Which submodules a run really used: its gates by layer, class, example and epoch."""

from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat

from unipelt_cli.gates.results import (
    ClassDifference,
    ClassGates,
    ClassMean,
    EpochGates,
    ExtremeRows,
    GateStatistics,
    Layer,
    LayerGate,
    RowGate,
    RowGates,
    gate_names,
)
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import Gates, compute_with_gates, encode_rows
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs import schema
from unipelt_cli.runs.checks import check_file
from unipelt_cli.runs.names import METRICS
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import Run, without_gates

NEARLY_CLOSED = 0.1  # a gate whose mean is below adds next to nothing of its submodule
BINS = 50  # of [0, 1], for the entropy of a gate's values
Values = NDArray[np.float32]


@dataclass(frozen=True)
class GateReport:
    """The gates of one split: values by layer, gate and row."""

    gates: Gates
    rows: Dataset
    labels: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The names of all gates, in the order in which they act."""
        return gate_names(self.gates)

    def by_layer(self) -> tuple[Layer[GateStatistics], ...]:
        """Return mean, spread, quantiles and entropies of every gate in every layer."""
        return self._layers(np.ones(len(self.rows), dtype=np.bool_))

    def nearly_closed(self) -> tuple[LayerGate, ...]:
        """Return where a gate's mean is below NEARLY_CLOSED."""
        return tuple(
            LayerGate(layer, name, mean)
            for layer, gates in enumerate(self.gates)
            for name, values in gates.items()
            if (mean := _rounded(values.mean())) < NEARLY_CLOSED
        )

    def by_class(self) -> tuple[ClassGates, ...]:
        """Return what `by_layer` does for the rows of each label (regression: thirds by value)."""
        return tuple(
            ClassGates(name, int(chosen.sum()), self._layers(chosen))
            for name, chosen in self._classes()
            if chosen.any()
        )

    def differences(self) -> tuple[ClassDifference, ...]:
        """Return for every gate which class opens it most and which least, by what counts most.

        `effect` is the difference over the spread within classes (None where that is nothing): a
        gate that moves little from row to row tells classes apart by little. Classes of one row
        are left out.
        """
        classes = {name: chosen for name, chosen in self._classes() if chosen.sum() > 1}
        if len(classes) < 2:
            return ()
        differences = [
            _difference(layer, gate, {name: values[chosen] for name, chosen in classes.items()})
            for layer, gates in enumerate(self.gates)
            for gate, values in gates.items()
        ]
        return tuple(sorted(differences, key=lambda gate: gate.effect or 0.0, reverse=True))

    def by_example(self) -> tuple[RowGates, ...]:
        """Return every row's gates, without its text: row number, label, gates by layer."""
        return tuple(
            RowGates(
                *self._row(index),
                tuple(
                    {name: _rounded(values[index]) for name, values in gates.items()}
                    for gates in self.gates
                ),
            )
            for index in range(len(self.rows))
        )

    def top(self, count: int) -> tuple[ExtremeRows, ...]:
        """Return the rows that open each gate most and least, and all gates: means over layers."""
        means = {
            name: np.mean([layer[name] for layer in self.gates if name in layer], axis=0)
            for name in self.names
        }
        means["all"] = np.mean(
            [values for layer in self.gates for values in layer.values()], axis=0
        )
        return tuple(
            ExtremeRows(
                name, self._first(-values, values, count), self._first(values, values, count)
            )
            for name, values in means.items()
        )

    def _first(self, order: Values, values: Values, count: int) -> tuple[RowGate, ...]:
        """Return the rows that come first in an order, with their values."""
        first = np.argsort(order, kind="stable")[:count].tolist()
        return tuple(RowGate(*self._row(index), _rounded(values[index])) for index in first)

    def _layers(self, chosen: NDArray[np.bool_]) -> tuple[Layer[GateStatistics], ...]:
        return tuple(
            Layer(layer, {name: _statistics(values[chosen]) for name, values in gates.items()})
            for layer, gates in enumerate(self.gates)
        )

    def _row(self, index: int) -> tuple[int, str | float]:
        label = self.rows["label"][index]
        return self.rows["row"][index], self.labels[label] if self.labels else float(label)

    def _classes(self) -> list[tuple[str, NDArray[np.bool_]]]:
        labels = np.asarray(self.rows["label"])
        if self.labels:
            return [(name, labels == index) for index, name in enumerate(self.labels)]
        low, high = np.quantile(labels, [1 / 3, 2 / 3])
        return [
            (f"below {low:.2f}", labels < low),
            (f"{low:.2f} to {high:.2f}", (labels >= low) & (labels <= high)),
            (f"above {high:.2f}", labels > high),
        ]


def inspect_gates(run: Run, tuned: TunedModel, rows: Dataset, task_index: int = 0) -> GateReport:
    """Pass rows of one of a run's tasks through its model and collect its gates.

    Raises RunError for a method that has none.
    """
    task = run.tasks[task_index]
    columns = [rows[column] for column in task.text]
    encoded = encode_rows(tuned, columns, run.experiment.model.max_length)
    return GateReport(collect(run, tuned, encoded, task_index), rows, task.labels)


def collect(run: Run, tuned: TunedModel, rows: Encoded, task_index: int = 0) -> Gates:
    """Return how far every gate of every layer opens for each row.

    Raises RunError for a method that has none.
    """
    _, gates = compute_with_gates(tuned, rows, task_index)
    if not gates:
        raise without_gates(run)
    return gates


def gates_of(tuned: TunedModel, rows: Encoded) -> Gates:
    """Pass rows through a model and return its gates; nothing for a method that has none."""
    return compute_with_gates(tuned, rows)[1]


def sample(rows: Dataset, count: int | None) -> Dataset:
    """Return so many rows in their order, the same ones at every call; all of them for None."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(sorted(np.random.default_rng(0).permutation(len(rows))[:count].tolist()))


class _Epoch(BaseModel):
    epoch: int
    is_best: bool
    dev: dict[str, FiniteFloat]
    gates: list[dict[str, FiniteFloat]] = []  # of an earlier version, or unselected: none


def by_epoch(run: Run) -> tuple[EpochGates, ...]:
    """Return the gates' means over dev after each epoch, by layer, as training recorded them.

    No epochs where it recorded none. Raises RunError for a file that was changed.
    """
    path = run.directory / METRICS
    check_file(path, run.result["files"][METRICS])
    events = [event for event in read_metrics(run.directory) if event.get("kind") == "epoch"]
    epochs = [_Epoch.model_validate(schema.shaped(path, event, _Epoch)) for event in events]
    if not any(epoch.gates for epoch in epochs):
        return ()
    return tuple(
        EpochGates(
            epoch=epoch.epoch,
            is_best=epoch.epoch == run.outcome.best_epoch,
            dev=epoch.dev,
            layers=tuple(Layer(layer, gates) for layer, gates in enumerate(epoch.gates)),
        )
        for epoch in epochs
    )


def _difference(layer: int, gate: str, by_class: dict[str, Values]) -> ClassDifference:
    """Compare a gate's values (rows,) of each class, of two rows or more each."""
    means = {name: _rounded(values.mean()) for name, values in by_class.items()}
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    difference = _rounded(means[most] - means[least])
    squares = sum(float(values.var()) * len(values) for values in by_class.values())
    spread = float(np.sqrt(squares / sum(map(len, by_class.values()))))
    return ClassDifference(
        layer=layer,
        gate=gate,
        most=ClassMean(most, means[most]),
        least=ClassMean(least, means[least]),
        difference=difference,
        spread=_rounded(spread),
        effect=_rounded(difference / spread) if spread > 1e-6 else None,
    )


def _statistics(values: Values) -> GateStatistics:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return GateStatistics(
        mean=_rounded(values.mean()),
        std=_rounded(values.std()),
        min=_rounded(values.min()),
        p05=_rounded(low),
        median=_rounded(middle),
        p95=_rounded(high),
        max=_rounded(values.max()),
        entropy=_rounded(_entropy(values)),
        undecided=_rounded(_undecided(values)),
    )


def _entropy(values: Values) -> float:
    """Return in bits how much a gate tells of its row: of its histogram, 0 for a constant."""
    counts, _ = np.histogram(values, bins=BINS, range=(0.0, 1.0))
    shares = counts[counts > 0] / len(values)
    return abs(float(-(shares * np.log2(shares)).sum()))


def _undecided(values: Values) -> float:
    """Return the mean binary entropy in bits: 1 is half open for every row, 0 open or closed."""
    opened = np.clip(values.astype(np.float64), 1e-12, 1 - 1e-12)
    closed = 1 - opened
    return float(-(opened * np.log2(opened) + closed * np.log2(closed)).mean())


def _rounded(number: SupportsFloat) -> float:
    return round(float(number), 6)
