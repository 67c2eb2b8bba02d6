"""A gated run without gates: each a constant, and without the submodules that dev does not miss.

A gate that is a number is a factor on weights, so the result costs less and merges further.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from datasets import Dataset
from torch import Tensor

from unipelt_cli.errors import CheckError, RunError
from unipelt_cli.gates.report import inspect_gates
from unipelt_cli.gates.results import Change, Layer, StaticReport, SubmoduleCost
from unipelt_cli.methods.base import Method
from unipelt_cli.methods.unipelt.constant_gates import with_constant_gates, without
from unipelt_cli.methods.unipelt.inspection import closed, places
from unipelt_cli.methods.unipelt.method import Submodules
from unipelt_cli.metrics import Values, lost
from unipelt_cli.models import build
from unipelt_cli.models.batches import Encoded
from unipelt_cli.models.evaluation import compute_logits, encode_rows, predictions, references
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.runs.run import Run, copied

COST = 0.01
ROUNDS = 5  # of timing
Module = tuple[int, str]
"""A layer, and the name of a submodule in it."""


@dataclass(frozen=True)
class Static:
    """The ungated run and its model, in float32 on the CPU, and what the change cost."""

    run: Run
    tuned: TunedModel
    report: StaticReport


@dataclass(frozen=True)
class _Split:
    """Encoded rows of one split, scored by the run's own metric."""

    run: Run
    rows: Encoded
    labels: Values

    def score(self, tuned: TunedModel) -> float:
        task = self.run.task
        predicted = predictions(task, compute_logits(tuned, self.rows))
        return task.score(predicted, self.labels)[task.metric]

    def lost(self, before: float, tuned: TunedModel) -> float:
        """Return how much worse than `before` a model scores."""
        return lost(self.run.task.metric, before, self.score(tuned))


def make_static(
    run: Run,
    tuned: TunedModel,
    rows: Callable[[str], Dataset],
    *,
    cost: float = COST,
    only: Collection[str] | None = None,
) -> Static:
    """Replace every gate by its mean over train, and drop what dev does not miss.

    `rows` gives a split; `cost` is the dev score that all of it may take; `only` names the parts
    that may stay at all. Submodules go in the order of what each alone costs, as many as stay
    within `cost` together, but never all. Raises RunError for a run without gates, CheckError
    where the cost is higher.
    """
    method = _gated(run, tuned)
    gated = _rebuilt(run, tuned, method, method.fold(tuned.classifier.backbone))
    gates = _means(run, gated, rows("train"))
    folded = method.fold(gated.classifier.backbone)
    ungated, stored = with_constant_gates(method, folded, gates)
    constant = _rebuilt(run, tuned, ungated, stored)
    dev, test = (_split(run, gated, rows(name)) for name in ("dev", "test"))
    before = dev.score(gated)
    modules = places(constant.classifier.backbone)
    forced = [module for module in modules if only is not None and module[1] not in only]
    if len(forced) == len(modules):
        raise RunError(
            f"{run.directory}: the format holds nothing of its {' and '.join(ungated.parts)}",
            "choose one that does, such as --to adapters or --to onnx",
        )
    free = [] if only is not None else modules  # such a format gains nothing by a layer's less
    costs, dropped = _droppable(dev, before, constant, forced, free, cost)
    final, kept = without(ungated, stored, dropped, len(gates))
    pruned = _rebuilt(run, tuned, final, kept)
    changed = _with_method(run, final)
    sizes = [model.parameter_counts()["stored_parameters"] for model in (gated, pruned)]
    # As other tools compute them.
    plain = [copied(run, gated, accelerate=False), copied(changed, pruned, accelerate=False)]
    report = StaticReport(
        cost=cost,
        gates=[Layer(layer, means) for layer, means in enumerate(gates)],
        costs=[SubmoduleCost(layer, part, lost) for (layer, part), lost in costs.items()],
        dropped=[f"{part}.{n}" for part, n in sorted((part, n) for n, part in dropped)],
        metric=run.task.metric,
        dev=Change(before, dev.score(pruned)),
        test=Change(test.score(gated), test.score(pruned)),
        stored_parameters=Change(*sizes),
        rows_per_second=Change(*_speeds(dev.rows, plain)),
    )
    return Static(changed, pruned, report)


def _gated(run: Run, tuned: TunedModel) -> Submodules:
    if len(run.tasks) > 1:
        raise RunError(
            f"{run.directory}: trained on several tasks, whose gates differ",
            "train one task alone, with --task",
        )
    if not isinstance(tuned.method, Submodules) or not tuned.method.gated:
        raise RunError(
            f"{run.directory}: method {run.experiment.method_name!r} has no gates",
            "leave --static-gates out",
        )
    return tuned.method


def _means(run: Run, tuned: TunedModel, rows: Dataset) -> list[dict[str, float]]:
    layers = inspect_gates(run, tuned, rows).gates
    sites: Any = tuned.classifier.backbone.get_submodule("submodules.layers")
    if len(layers) != len(sites):
        raise RunError(
            f"{run.directory}: layers of its backbone share their weights, but not their gates",
            "train on a backbone whose layers have weights of their own, such as a bert",
        )
    return [{name: float(values.mean()) for name, values in gates.items()} for gates in layers]


def _split(run: Run, tuned: TunedModel, rows: Dataset) -> _Split:
    columns = [rows[column] for column in run.task.text]
    encoded = encode_rows(tuned, columns, run.experiment.model.max_length)
    return _Split(run, encoded, references(rows))


def _droppable(
    dev: _Split,
    before: float,
    tuned: TunedModel,
    forced: Sequence[Module],
    free: Sequence[Module],
    most: float,
) -> tuple[dict[Module, float], list[Module]]:
    """Return what each submodule alone costs, and which go; those that are forced to go first."""

    def without_these(modules: Collection[Module]) -> float:
        with closed(tuned.classifier.backbone, modules):
            return dev.lost(before, tuned)

    if (constant := without_these([])) > most:
        raise _too_dear(dev, "constant gates alone cost", constant, most)
    if forced and (taken := without_these(forced)) > most:
        parts = " and ".join(sorted({part for _, part in forced}))
        raise _too_dear(dev, f"going without {parts} costs", taken, most)
    costs = {module: without_these([module]) for module in free}
    order = sorted(free, key=lambda module: costs[module])
    fits, beyond = 0, len(order)  # all of them are never dropped
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if without_these([*forced, *order[:middle]]) <= most:
            fits = middle
        else:
            beyond = middle
    return costs, [*forced, *order[:fits]]


def _too_dear(dev: _Split, what: str, lost: float, most: float) -> CheckError:
    return CheckError(
        f"{dev.run.directory}: {what} {lost:.4f} of dev {dev.run.task.metric}, more than {most:g}",
        "nothing was written: allow more with --cost, or export it with its gates",
    )


def _with_method(run: Run, method: Method) -> Run:
    """Return the run as if it had been trained with this method, in float32 on the CPU."""
    experiment = run.experiment.with_("method", **dataclasses.asdict(method))
    experiment = experiment.with_("train", device="cpu", precision="fp32")
    return dataclasses.replace(run, experiment=experiment)


def _rebuilt(
    run: Run, tuned: TunedModel, method: Method, stored: Mapping[str, Tensor]
) -> TunedModel:
    """Build a model of the run's head and backbone with another method's tensors."""
    experiment = _with_method(run, method).experiment
    pairs = [run.task.is_pair]
    rebuilt = build.build(experiment, run.task.outputs, tuned.pretrained, folded=True, pairs=pairs)
    replaced = {f"backbone.{name}" for name in tuned.method.fold(tuned.classifier.backbone)}
    others = {name: tensor for name, tensor in tuned.stored().items() if name not in replaced}
    rebuilt.load(others | {f"backbone.{name}": tensor for name, tensor in stored.items()})
    return rebuilt


def _speeds(rows: Encoded, models: Sequence[TunedModel]) -> list[float]:
    """Return the rows a second of each model, measured in turns."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for times, tuned in zip(seconds, models, strict=True):
            start = time.perf_counter()
            compute_logits(tuned, rows)
            times.append(time.perf_counter() - start)
    return [len(rows) / median(times) for times in seconds]
