"""What each submodule is worth: the score that is lost where it is closed.

An open gate says that a submodule takes part, not that the answer needs it.
"""

from collections.abc import Collection, Iterator, Sequence
from statistics import fmean

import numpy as np
from datasets import Dataset

from unipelt_cli.errors import ConfigError
from unipelt_cli.gates.results import AblationReport, Layer, Loss
from unipelt_cli.methods.unipelt.inspection import closed, places
from unipelt_cli.metrics import Values, lost
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import (
    Gates,
    compute_with_gates,
    encode_rows,
    predictions,
    references,
)
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.run import Run

LAST = ("adapter", "parallel")
OPEN = 0.5  # a gate whose mean is at least this much says that its submodule takes part


class Ablation:
    """One task's rows, passed through a run's model whole and with submodules closed."""

    def __init__(self, run: Run, tuned: TunedModel, rows: Dataset, task_index: int = 0) -> None:
        self.tuned, self.task, self.task_index = tuned, run.tasks[task_index], task_index
        columns = [rows[column] for column in self.task.text]
        self.encoded: Encoded = encode_rows(tuned, columns, run.experiment.model.max_length)
        self.references = references(rows)
        self.submodules = places(tuned.classifier.backbone)
        parts = dict.fromkeys(part for _, part in self.submodules)
        self.parts = sorted(parts, key=LAST.__contains__)  # in the order in which they act
        self.whole, self.gates = self._pass()
        self.score = self._score(self.whole)

    @property
    def passes(self) -> int:
        """How many passes over the rows `losses` takes."""
        return len(self.parts) + len(self.submodules)

    def losses(self) -> Iterator[Loss]:
        """Close each submodule in all layers, then in one layer at a time."""
        for part in self.parts:
            everywhere = [(layer, name) for layer, name in self.submodules if name == part]
            yield self._loss(None, part, everywhere)
        for layer, part in sorted(
            self.submodules, key=lambda module: (module[0], module[1] in LAST)
        ):
            yield self._loss(layer, part, [(layer, part)])

    def _loss(self, layer: int | None, part: str, resting: Collection[tuple[int, str]]) -> Loss:
        with closed(self.tuned.classifier.backbone, resting):
            predicted, _ = self._pass()
        score = self._score(predicted)
        worse = lost(self.task.metric, self.score, score)
        changed = int(np.sum(predicted != self.whole))
        flips = None if self.task.is_regression else changed
        return Loss(layer, part, self._gate(layer, part), round(score, 6), round(worse, 6), flips)

    def _pass(self) -> tuple[Values, Gates]:
        logits, gates = compute_with_gates(self.tuned, self.encoded, self.task_index)
        return predictions(self.task, logits), gates

    def _score(self, predicted: Values) -> float:
        return self.task.score(predicted, self.references)[self.task.metric]

    def _gate(self, layer: int | None, part: str) -> float | None:
        """Return the mean of a part's gates: LoRA may have two; one module may serve all layers."""
        modules = 1 + max(number for number, _ in self.submodules)
        if layer is None or (modules == 1 and len(self.gates) > 1):
            chosen = self.gates
        elif len(self.gates) == modules:
            chosen = [self.gates[layer]]
        else:  # several modules are called several times each: whose gate is whose is not recorded
            return None
        means = [
            float(values.mean())
            for gates in chosen
            for name, values in gates.items()
            if name == part or name.startswith(f"{part}_")
        ]
        return round(fmean(means), 6) if means else None


def refuse(run: Run) -> None:
    """Raise ConfigError for a run whose method is no union of submodules."""
    if not run.experiment.method.submodules:
        raise ConfigError(
            f"--ablate: method {run.experiment.method_name!r} is no union of submodules",
            "drop it, or train a union, such as unipelt-apl",
        )


def summarise(ablation: Ablation, losses: Sequence[Loss]) -> AblationReport:
    """Return what was lost, by layer and in all of them, and what that says."""
    layers: dict[int, dict[str, Loss]] = {}
    for loss in losses:
        if loss.layer is not None:
            layers.setdefault(loss.layer, {})[loss.part] = loss
    return AblationReport(
        metric=ablation.task.metric,
        score=round(ablation.score, 6),
        everywhere={loss.part: loss for loss in losses if loss.layer is None},
        layers=tuple(Layer(layer, by_part) for layer, by_part in layers.items()),
        verdict=verdict(losses),
    )


def verdict(losses: Sequence[Loss]) -> str:
    """Say in one line which submodule the score needs most, and which are open for nothing."""
    single = [loss for loss in losses if loss.layer is not None]
    most = max(single, key=lambda loss: loss.lost)
    needed = f"needed most: {_name(most)}" if most.lost > 0 else "no submodule is needed alone"
    gated = any(loss.gate is not None for loss in single)
    idle = [loss for loss in single if loss.lost <= 0 and (not gated or (loss.gate or 0.0) >= OPEN)]
    if not idle:
        return f"{needed}; {'every open one is needed' if gated else 'every one is needed'}"
    first = max(idle, key=lambda loss: (loss.gate or 0.0, -loss.lost))
    what = "open but not needed" if gated else "not needed"
    return f"{needed}; {what}: {len(idle)} of {len(single)}, such as {_name(first)}"


def _name(loss: Loss) -> str:
    costs = f"costs {round(loss.lost, 3) + 0.0:.3f}"
    gate = "" if loss.gate is None else f"gate {loss.gate:.2f}, "
    return f"layer {loss.layer} {loss.part} ({gate}{costs})"
