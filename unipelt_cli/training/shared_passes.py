"""Runs that differ in seeds alone, trained in shared passes over one backbone."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional

from unipelt_cli.errors import CheckError
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system.memory import is_exhausted, release
from unipelt_cli.system.row_threads import shared_out, shares_out
from unipelt_cli.training.events import Batch, BatchHalved, Step, StepResult, TrainingEvent
from unipelt_cli.training.loop import Training


def train_together(
    loops: Mapping[int, Training],
) -> Iterator[tuple[int, TrainingEvent | CheckError | None]]:
    """Train the loops, whose models share a backbone; yield each event with its loop's name.

    None says that a loop is over, an error that it failed; the others go on. Between two events
    every loop can be saved.
    """
    if len(loops) == 1:
        yield from _alone(*next(iter(loops.items())))
        return
    turns = {name: loop.turns() for name, loop in loops.items()}
    fits = True
    while turns:
        batches: dict[int, Batch] = {}
        for name in list(turns):
            for turn in turns[name]:
                if isinstance(turn, Batch):
                    batches[name] = turn
                    break
                yield name, turn
            else:
                del turns[name]
                yield name, None
        if not batches:
            continue
        happened: list[tuple[int, TrainingEvent | CheckError]] = []
        stepping = [loops[name] for name in batches]
        taken = _try(stepping, list(batches.values())) if fits else None
        if taken is None:
            fits, taken = False, []
            for name, loop in zip(batches, stepping, strict=True):
                answer, halved = _take_alone(loop, batches[name])
                taken.append(answer)
                happened += [(name, event) for event in halved]
        # Every loop knows of its step before anyone can stop them.
        for name, answer in zip(batches, taken, strict=True):
            if isinstance(answer, CheckError):
                del turns[name]
                happened.append((name, answer))
            else:
                step = turns[name].send(answer)
                assert isinstance(step, Step)
                happened.append((name, step))
        yield from happened


def _alone(name: int, loop: Training) -> Iterator[tuple[int, TrainingEvent | CheckError | None]]:
    try:
        for event in loop.events():
            yield name, event
    except CheckError as error:
        yield name, error
    else:
        yield name, None


def _try(
    loops: Sequence[Training], batches: Sequence[Batch]
) -> list[StepResult | CheckError] | None:
    """Take one step of every loop in one pass; None where that does not fit into memory."""
    try:
        return _take(loops, batches)
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
    for loop in loops:
        loop.stepper.optimizer.zero_grad(set_to_none=True)
    release()
    return None


def _take_alone(loop: Training, batch: Batch) -> tuple[StepResult | CheckError, list[BatchHalved]]:
    """Take one step of one loop, in smaller parts if memory asks for it."""
    halved, taking = [], loop.stepper.take(batch)
    while True:
        try:
            halved.append(next(taking))
        except StopIteration as stop:
            return stop.value, halved
        except CheckError as error:
            return error, halved


def _take(loops: Sequence[Training], batches: Sequence[Batch]) -> list[StepResult | CheckError]:
    """Take one step of every loop."""
    start = time.perf_counter()
    tuned = [loop.tuned for loop in loops]
    generators = [Generator().manual_seed(loop.stepper.step_seed) for loop in loops]
    features: list[Tensor] = []
    steps = [
        loop.stepper.open(batch, partial(_taken, features, turn))
        for turn, (loop, batch) in enumerate(zip(loops, batches, strict=True))
    ]
    with shared_out(tuned[0].classifier.shares_rows):
        features += _features(tuned, [step.inputs for step in steps], generators, loops)
        losses = []
        for loop, step, generator, rows in zip(loops, steps, generators, features, strict=True):
            with loop.tuned.classifier.draws.of([generator], [len(rows)]):
                losses.append(loop.method.loss(step))
        torch.autograd.backward(losses)
    taken: list[StepResult | CheckError] = []
    for loop, step, loss in zip(loops, steps, losses, strict=True):
        loop.method.after_backward(step.backbone, step.moment)
        try:
            value = loop.stepper.close(loss, step.moment)
            taken.append(StepResult(value, (time.perf_counter() - start) / len(loops)))
        except CheckError as error:
            taken.append(error)
    return taken


def _taken(features: Sequence[Tensor], turn: int, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the features of one run, from the pass that is taken for all runs at once."""
    return features[turn]


def _features(
    tuned: Sequence[TunedModel],
    inputs: Sequence[Mapping[str, Tensor]],
    generators: Sequence[Generator],
    loops: Sequence[Training],
) -> list[Tensor]:
    """Send the rows of all runs through the backbone once; return each run's features."""
    counts = [len(run_inputs["attention_mask"]) for run_inputs in inputs]
    rows = counts if shares_out(tuned[0].device) else [max(counts)] * len(counts)
    length = max(run_inputs["attention_mask"].shape[1] for run_inputs in inputs)
    pad_id = loops[0].courses[0].train[0].pad_id
    joined = {
        name: torch.cat(
            [
                _padded(run_inputs[name], count, length, pad_id if name == "input_ids" else 0)
                for run_inputs, count in zip(inputs, rows, strict=True)
            ]
        )
        for name in inputs[0]
    }
    joined["attention_mask"][:, 0] = 1  # of rows that stand for none as well
    joints = [model.method.joint(model.classifier.backbone) for model in tuned]
    assert joints[0] is not None
    classifier = tuned[0].classifier
    with classifier.draws.of(generators, rows), joints[0].together(joints, rows):
        pooled = classifier.pooled(**joined)
    split = zip(tuned, torch.split(pooled, rows), counts, strict=True)
    # A run's texts are one block, so that each run's pairs are found in its own.
    return [model.classifier.combine(texts[:count]) for model, texts, count in split]


def _padded(x: Tensor, rows: int, length: int, value: int) -> Tensor:
    return functional.pad(x, (0, length - x.shape[1], 0, rows - len(x)), value=value)
