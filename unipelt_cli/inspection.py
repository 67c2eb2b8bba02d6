"""Which submodules a run really used: its gates by layer, class and example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from unipelt_cli.batches import Encoded, by_length
from unipelt_cli.errors import RunError
from unipelt_cli.evaluation import encode_rows
from unipelt_cli.methods.submodules import record_gates
from unipelt_cli.modeling import Tuned
from unipelt_cli.runs import Run

Gates = Sequence[Mapping[str, NDArray[np.float32]]]  # by layer: gate -> one value a row


@dataclass(frozen=True)
class GateReport:
    """The gates of one split: values by layer, gate and row."""

    gates: Gates
    rows: Dataset
    labels: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The names of a layer's gates."""
        return list(self.gates[0])

    def by_layer(self) -> list[dict[str, Any]]:
        """Return mean, spread and quantiles of every gate in every layer."""
        return [
            {"layer": layer, **{name: _summary(values) for name, values in gates.items()}}
            for layer, gates in enumerate(self.gates)
        ]

    def by_class(self) -> list[dict[str, Any]]:
        """Return every gate's mean for the rows of each label (regression: thirds by value)."""
        return [
            {
                "class": name,
                "rows": int(chosen.sum()),
                "layers": [
                    {"layer": layer, **{n: _summary(v[chosen]) for n, v in gates.items()}}
                    for layer, gates in enumerate(self.gates)
                ],
            }
            for name, chosen in self._classes()
            if chosen.any()
        ]

    def by_example(self) -> list[dict[str, Any]]:
        """Return every row's gates, without its text: row number, label, gates by layer."""
        labels = self.rows["label"]
        return [
            {
                "row": row,
                "label": self.labels[labels[place]] if self.labels else float(labels[place]),
                "layers": [
                    {name: round(float(values[place]), 6) for name, values in gates.items()}
                    for gates in self.gates
                ],
            }
            for place, row in enumerate(self.rows["row"])
        ]

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


def inspect(run: Run, tuned: Tuned, rows: Dataset, place: int = 0) -> GateReport:
    """Pass rows of one of a run's tasks through its model and collect its gates.

    Raises RunError for a method that has none.
    """
    task = run.tasks[place]
    encoded = encode_rows(
        tuned, [rows[column] for column in task.text], run.experiment.model.max_length
    )
    return GateReport(collect(run, tuned, encoded, place), rows, task.labels)


def collect(run: Run, tuned: Tuned, rows: Encoded, place: int = 0) -> Gates:
    """Return how far every gate of every layer opens for each row.

    Raises RunError for a method that has none.
    """
    tuned.classifier.select(place)
    collected: list[dict[str, NDArray[np.float32]]] = []
    with torch.inference_mode(), record_gates(tuned.classifier.backbone) as recorded:
        for batch in by_length(rows.lengths, rows.pad_to):
            tuned.classifier(**rows.batch(batch, tuned.device))
            if not recorded or not recorded[0]:
                raise RunError(
                    f"{run.directory}: method {run.experiment.method_name!r} has no gates",
                    "train a gated method, such as unipelt-apl",
                )
            if not collected:
                collected = [
                    {name: np.zeros(len(rows), dtype=np.float32) for name in gates}
                    for gates in recorded
                ]
            for layer, gates in zip(collected, recorded, strict=True):
                for name, values in gates.items():
                    layer[name][batch] = values.numpy()
    return collected


def _summary(values: NDArray[np.float32]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    numbers = {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        "p05": low,
        "median": middle,
        "p95": high,
        "max": values.max(),
    }
    return {name: round(float(number), 6) for name, number in numbers.items()}
