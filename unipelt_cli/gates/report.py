"""Which submodules a run really used: its gates by layer, class, example and epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat

from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import Gates, compute_with_gates, encode_rows
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.runs import schema
from unipelt_cli.runs.checks import check_file
from unipelt_cli.runs.names import METRICS
from unipelt_cli.runs.progress import read_metrics
from unipelt_cli.runs.run import Run, without_gates

NEARLY_CLOSED = 0.1  # a gate whose mean is below adds next to nothing of its submodule
BINS = 50  # of [0, 1], for the entropy of a gate's values
Values = NDArray[np.float32]
Layers = Sequence[Mapping[str, Any]]


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

    def by_layer(self) -> list[dict[str, Any]]:
        """Return mean, spread, quantiles and entropies of every gate in every layer."""
        return self._layers(np.ones(len(self.rows), dtype=np.bool_))

    def nearly_closed(self) -> list[dict[str, Any]]:
        """Return where a gate's mean is below NEARLY_CLOSED: layer, gate and mean."""
        return [
            {"layer": layer, "gate": name, "mean": mean}
            for layer, gates in enumerate(self.gates)
            for name, values in gates.items()
            if (mean := _rounded(values.mean())) < NEARLY_CLOSED
        ]

    def by_class(self) -> list[dict[str, Any]]:
        """Return what `by_layer` does for the rows of each label (regression: thirds by value)."""
        return [
            {"class": name, "rows": int(chosen.sum()), "layers": self._layers(chosen)}
            for name, chosen in self._classes()
            if chosen.any()
        ]

    def differences(self) -> list[dict[str, Any]]:
        """Return for every gate which class opens it most and which least, by what counts most.

        `effect` is the difference over the spread within classes (None where that is nothing): a
        gate that moves little from row to row tells classes apart by little. Classes of one row
        are left out.
        """
        classes = [(name, chosen) for name, chosen in self._classes() if chosen.sum() > 1]
        if len(classes) < 2:
            return []
        found = []
        for layer, gates in enumerate(self.gates):
            for gate, values in gates.items():
                means = {name: _rounded(values[chosen].mean()) for name, chosen in classes}
                most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
                difference = _rounded(means[most] - means[least])
                squares = sum(values[own].var() * own.sum() for _, own in classes)
                spread = float(np.sqrt(squares / sum(own.sum() for _, own in classes)))
                found.append(
                    {
                        "layer": layer,
                        "gate": gate,
                        "most": {"class": most, "mean": means[most]},
                        "least": {"class": least, "mean": means[least]},
                        "difference": difference,
                        "spread": _rounded(spread),
                        "effect": _rounded(difference / spread) if spread > 1e-6 else None,
                    }
                )
        return sorted(found, key=lambda own: own["effect"] or 0.0, reverse=True)

    def by_example(self) -> list[dict[str, Any]]:
        """Return every row's gates, without its text: row number, label, gates by layer."""
        return [
            {
                **self._row(place),
                "layers": [
                    {name: _rounded(values[place]) for name, values in gates.items()}
                    for gates in self.gates
                ],
            }
            for place in range(len(self.rows))
        ]

    def top(self, count: int) -> list[dict[str, Any]]:
        """Return the rows that open each gate most and least, and all gates: means over layers."""
        each = {
            name: np.mean([own[name] for own in self.gates if name in own], axis=0)
            for name in self.names
        }
        each["all"] = np.mean([values for own in self.gates for values in own.values()], axis=0)
        return [
            {
                "gate": name,
                **{
                    end: [
                        {**self._row(place), "value": _rounded(values[place])}
                        for place in np.argsort(sign * values, kind="stable")[:count].tolist()
                    ]
                    for end, sign in (("most", -1), ("least", 1))
                },
            }
            for name, values in each.items()
        ]

    def _layers(self, chosen: NDArray[np.bool_]) -> list[dict[str, Any]]:
        return [
            {"layer": layer, **{name: _summary(values[chosen]) for name, values in gates.items()}}
            for layer, gates in enumerate(self.gates)
        ]

    def _row(self, place: int) -> dict[str, Any]:
        label = self.rows["label"][place]
        return {
            "row": self.rows["row"][place],
            "label": self.labels[label] if self.labels else float(label),
        }

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


def inspect_gates(run: Run, tuned: Tuned, rows: Dataset, place: int = 0) -> GateReport:
    """Pass rows of one of a run's tasks through its model and collect its gates.

    Raises RunError for a method that has none.
    """
    task = run.tasks[place]
    columns = [rows[column] for column in task.text]
    encoded = encode_rows(tuned, columns, run.experiment.model.max_length)
    return GateReport(collect(run, tuned, encoded, place), rows, task.labels)


def collect(run: Run, tuned: Tuned, rows: Encoded, place: int = 0) -> Gates:
    """Return how far every gate of every layer opens for each row.

    Raises RunError for a method that has none.
    """
    _, gates = compute_with_gates(tuned, rows, place)
    if not gates:
        raise without_gates(run)
    return gates


def gates_of(tuned: Tuned, rows: Encoded) -> Gates:
    """Pass rows through a model and return its gates; nothing for a method that has none."""
    return compute_with_gates(tuned, rows)[1]


def sample(rows: Dataset, count: int | None) -> Dataset:
    """Return so many rows in their order, the same ones at every call; all of them for None."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(sorted(np.random.default_rng(0).permutation(len(rows))[:count].tolist()))


def gate_names(layers: Layers) -> list[str]:
    """Return the names of the gates of all layers, each once; not every layer has each."""
    return list(dict.fromkeys(name for own in layers for name in own if name != "layer"))


class _Epoch(BaseModel):
    epoch: int
    is_best: bool
    dev: dict[str, FiniteFloat]
    gates: list[dict[str, FiniteFloat]] = []  # of an earlier version, or unselected: none


def by_epoch(run: Run) -> list[dict[str, Any]]:
    """Return the gates' means over dev after each epoch, by layer, as training recorded them.

    No epochs where it recorded none. Raises RunError for a file that was changed.
    """
    path = run.directory / METRICS
    check_file(path, run.result["files"][METRICS])
    events = [own for own in read_metrics(run.directory) if own.get("kind") == "epoch"]
    epochs = [_Epoch.model_validate(schema.shaped(path, own, _Epoch)) for own in events]
    if not any(own.gates for own in epochs):
        return []
    return [
        {
            "epoch": own.epoch,
            "is_best": own.epoch == run.result["best_epoch"],
            "dev": own.dev,
            "layers": [{"layer": layer, **gates} for layer, gates in enumerate(own.gates)],
        }
        for own in epochs
    ]


def over_layers(layers: Layers) -> dict[str, float]:
    """Return each gate's mean over the layers that have it."""
    return {
        name: float(np.mean([own[name] for own in layers if name in own]))
        for name in gate_names(layers)
    }


def _summary(values: Values) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    numbers = {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "p05": low,
        "median": middle,
        "p95": high,
        "max": values.max(),
        "entropy": _entropy(values),
        "undecided": _undecided(values),
    }
    return {name: _rounded(number) for name, number in numbers.items()}


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


def _rounded(number: Any) -> float:
    return round(float(number), 6)
