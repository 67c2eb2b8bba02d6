"""From rows to logits, and from logits to predictions and scores."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipelt_cli.methods.unipelt.inspection import record_gates
from unipelt_cli.metrics import Values
from unipelt_cli.models.batches import Encoded, by_length, encode
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system.memory import is_exhausted, release, too_large
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.system.row_threads import shared_out
from unipelt_cli.tasks import Task

Logits = NDArray[np.float32]
Features = NDArray[np.float32]
Gates = list[dict[str, NDArray[np.float32]]]
"""By layer: {gate: one value a row}; no layers where nothing is gated."""


def encode_rows(tuned: TunedModel, columns: Sequence[Sequence[str]], max_length: int) -> Encoded:
    """Tokenize text columns for a model, padded as its method and apart as its head needs them."""
    return encode(
        columns,
        tuned.tokenizer,
        tuned.classifier.backbone.config,
        max_length=max_length,
        pad_to_max=tuned.method.pads_to_max_length,
        apart=tuned.pairs == "apart",
    )


def compute_logits(
    tuned: TunedModel,
    rows: Encoded,
    task: int = 0,
    processes: Processes = ALONE,
    seen: Callable[[list[int]], None] | None = None,
) -> Logits:
    """Return a task's logits (rows, outputs) in the rows' own order; no dropout, no gradient.

    Several processes take an equal share of the rows each, and all of them get all logits.
    After each pass `seen` is told which rows it was of.
    """
    outputs = tuned.classifier.heads[task].out.out_features
    return _compute(tuned.classifier, outputs, tuned, rows, task, processes, seen)


def compute_features(
    tuned: TunedModel, rows: Encoded, task: int = 0, processes: Processes = ALONE
) -> Features:
    """Return what a task's head reads of rows (rows, size), as `compute_logits` its answers."""
    width, compute = tuned.classifier.heads[task].width, tuned.classifier.features
    return _compute(compute, width, tuned, rows, task, processes)


def _compute(
    forward: Callable[..., Tensor],
    width: int,
    tuned: TunedModel,
    rows: Encoded,
    task: int,
    processes: Processes,
    seen: Callable[[list[int]], None] | None = None,
) -> NDArray[np.float32]:
    """Return what a pass gives for each row, (rows, width); each process takes its share."""
    tuned.classifier.eval()
    tuned.classifier.select(task)
    answers = np.zeros((len(rows), width), dtype=np.float32)
    share = np.argsort(-rows.lengths, kind="stable")[processes.rank :: processes.count]

    def compute(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [forward(**inputs)]

    processes.on_each(lambda: fill([answers], compute, tuned, rows, share, seen))
    processes.sum(torch.from_numpy(answers))
    return answers


def compute_with_gates(
    tuned: TunedModel, rows: Encoded, task: int = 0, processes: Processes = ALONE
) -> tuple[Logits, Gates]:
    """Return what `compute_logits` does, and how far each gate opened for each row."""
    names: list[tuple[int, str]] = []  # (layer, gate)
    values: list[NDArray[np.float32]] = []  # of each, (rows,)

    def keep(batch: list[int]) -> None:
        if not names:
            names.extend((layer, name) for layer, gates in enumerate(recorded) for name in gates)
            values.extend(np.zeros((len(names), len(rows)), dtype=np.float32))
        if names:  # one copy from the device; a row's gate is the mean over its texts
            opened = torch.stack([value for gates in recorded for value in gates.values()]).cpu()
            opened = opened.view(len(names), rows.texts, len(batch)).mean(1)
            for row_values, value in zip(values, opened.numpy(), strict=True):
                row_values[batch] = value

    with record_gates(tuned.classifier.backbone) as recorded:
        logits = compute_logits(tuned, rows, task, processes, keep)
    # A process that had no row to compute does not know which gates there are.
    shares = [share for share in processes.gather((names, values, len(recorded))) if share[0]]
    if not shares:
        return logits, []
    gates: Gates = [{} for _ in range(shares[0][2])]
    for index, (layer, name) in enumerate(shares[0][0]):
        gates[layer][name] = np.sum([share[1][index] for share in shares], axis=0, dtype=np.float32)
    return logits, gates


def gate_means(each: Sequence[Gates]) -> tuple[dict[str, float], ...]:
    """Return by layer {gate: mean over all rows}, to six digits, of what passes recorded."""
    return tuple(
        {
            name: round(float(np.concatenate([gates[name] for gates in of_layer]).mean()), 6)
            for name in of_layer[0]
        }
        for of_layer in zip(*each, strict=True)
    )


def fill(
    logits: Sequence[Logits],
    compute: Callable[[Mapping[str, Tensor]], Sequence[Tensor]],
    tuned: TunedModel,
    rows: Encoded,
    chosen: NDArray[np.int64],
    seen: Callable[[list[int]], None] | None = None,
) -> None:
    """Compute the chosen rows' logits, of one model or of several alike, in batches that fit.

    `seen` is called after each batch with its rows.
    """
    with torch.inference_mode(), shared_out(tuned.classifier.shares_rows):
        batches = by_length(rows.widths[chosen], rows.width_to)
        waiting = [chosen[batch].tolist() for batch in batches][::-1]
        while waiting:
            batch = waiting.pop()
            try:
                answers = compute(rows.batch(batch, tuned.device))
                for table, answer in zip(logits, answers, strict=True):
                    table[batch] = answer.float().cpu().numpy()
                if seen is not None:
                    seen(batch)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_exhausted(error):
                    raise
            if len(batch) == 1:
                raise too_large()
            release()
            half = len(batch) // 2
            waiting += [batch[half:], batch[:half]]


def answers(
    tuned: TunedModel, task: Task, parts: Iterable[Any], max_length: int, task_index: int = 0
) -> tuple[Values, Values]:
    """Return predictions and references (rows,) of labelled rows that come part by part."""
    predicted: list[Any] = []
    true: list[Any] = []
    for rows in parts:
        encoded = encode_rows(tuned, [rows[column] for column in task.text], max_length)
        predicted.append(predictions(task, compute_logits(tuned, encoded, task_index)))
        true.append(references(rows))
    return np.concatenate(predicted), np.concatenate(true)


def predictions(task: Task, logits: Logits) -> Values:
    """Return label indices, or values in regression."""
    if task.is_regression:
        return np.asarray(logits[:, 0], dtype=np.float64)
    return np.asarray(logits.argmax(axis=1), dtype=np.int64)


def probabilities(logits: Logits) -> NDArray[np.float64]:
    """Return the softmax over labels, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    normed: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return normed


def references(rows: Any) -> Values:
    """Return the labels of a split as an array."""
    return np.asarray(rows["label"])


def has_collapsed(predicted: Values, unit: float = 1.0) -> bool:
    """Say whether a model predicts the same for every row (values: to six digits of a unit)."""
    return len(predicted) > 1 and bool(np.ptp(predicted) <= 1e-6 * max(unit, abs(predicted[0])))
