"""Several runs in one pass over one frozen backbone: each as it would be alone.

Every run keeps its own tensors, optimiser, order of rows, random numbers, schedule and patience;
what they share is the product of their rows with the frozen weights. A run that is over leaves.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional

from unipelt_cli.errors import CheckError
from unipelt_cli.methods.base import Joint
from unipelt_cli.models.build import Tuned
from unipelt_cli.system.memory import is_exhausted, release
from unipelt_cli.system.row_threads import shared_out, shares_out
from unipelt_cli.training.loop import Batch, Halved, Happening, Step, Taken, Training


def can_share(tuned: Tuned) -> bool:
    """Say whether runs of this kind can share passes: nothing of the backbone itself trains."""
    return tuned.method.joint(tuned.classifier.backbone) is not None and not tuned.untrained


def share(first: Tuned, other: Tuned) -> None:
    """Let another run's model read the frozen tensors of the first, and free its own."""
    frozen = {
        name: parameter.data
        for name, parameter in first.classifier.backbone.named_parameters()
        if not parameter.requires_grad
    }
    for name, parameter in other.classifier.backbone.named_parameters():
        if not parameter.requires_grad:
            parameter.data = frozen[name]
    joints = [one.method.joint(one.classifier.backbone) for one in (first, other)]
    assert joints[0] is not None
    joints[0].lend(joints[1])


def can_join(first: Tuned, other: Tuned) -> bool:
    """Say whether two models that `can_share` give their answers in the same pass."""
    return (
        can_share(first)
        and can_share(other)
        and (first.method, first.pooling, first.precision, first.device)
        == (other.method, other.pooling, other.precision, other.device)
    )


def hold_once(earlier: Sequence[Tuned], new: Tuned) -> None:
    """Let a model and earlier ones, none of which trains, hold once what is equal in them."""
    for other in sorted(earlier, key=lambda one: _joint(one) is None):
        # Fused layers read the tensors that they were made of: they lend, and do not borrow.
        borrows = _joint(other) is None and _joint(new) is not None
        _lend(*((new, other) if borrows else (other, new)))


def _lend(first: Tuned, other: Tuned) -> None:
    there = dict(first.classifier.backbone.named_parameters())
    for name, parameter in other.classifier.backbone.named_parameters():
        if name in there and _is_same(there[name].data, parameter.data):
            parameter.data = there[name].data
    joints = _joint(first), _joint(other)
    alike = (first.precision, first.device) == (other.precision, other.device)
    if joints[0] is not None and joints[1] is not None and alike:
        joints[0].lend(joints[1])


def _joint(tuned: Tuned) -> Joint | None:
    return tuned.method.joint(tuned.classifier.backbone)


def _is_same(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
    return alike and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def answer(tuned: Sequence[Tuned], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what each of several models that `can_join` says of the same rows, in one pass."""
    joints = list(map(_joint, tuned))
    assert joints[0] is not None
    rows = [len(inputs["attention_mask"])] * len(tuned)
    joined = {name: own.repeat(len(tuned), 1) for name, own in inputs.items()}
    with joints[0].together(joints, rows):
        features = tuned[0].classifier.features(**joined)
    split = torch.split(features, rows)
    return [one.classifier.read(own) for one, own in zip(tuned, split, strict=True)]


def events(
    loops: Mapping[int, Training],
) -> Iterator[tuple[int, Happening | CheckError | None]]:
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
        happened: list[tuple[int, Happening | CheckError]] = []
        own = [loops[name] for name in batches]
        taken = _try(own, list(batches.values())) if fits else None
        if taken is None:
            fits, taken = False, []
            for name, loop in zip(batches, own, strict=True):
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


def _alone(name: int, loop: Training) -> Iterator[tuple[int, Happening | CheckError | None]]:
    try:
        for event in loop.events():
            yield name, event
    except CheckError as error:
        yield name, error
    else:
        yield name, None


def _try(loops: Sequence[Training], batches: Sequence[Batch]) -> list[Taken | CheckError] | None:
    """Take one step of every loop in one pass; None where that does not fit into memory."""
    try:
        return _take(loops, batches)
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
    for loop in loops:
        loop.optimizer.zero_grad(set_to_none=True)
    release()
    return None


def _take_alone(loop: Training, batch: Batch) -> tuple[Taken | CheckError, list[Halved]]:
    """Take one step of one loop, in smaller parts if memory asks for it."""
    halved, taking = [], loop.take(batch)
    while True:
        try:
            halved.append(next(taking))
        except StopIteration as stop:
            return stop.value, halved
        except CheckError as error:
            return error, halved


def _take(loops: Sequence[Training], batches: Sequence[Batch]) -> list[Taken | CheckError]:
    """Take one step of every loop."""
    start = time.perf_counter()
    tuned = [loop.tuned for loop in loops]
    generators = [Generator().manual_seed(loop.step_seed) for loop in loops]
    steps = [
        loop.open(batch, partial(_never, loop)) for loop, batch in zip(loops, batches, strict=True)
    ]
    with shared_out(tuned[0].classifier.shares_rows):
        features = _features(tuned, [step.inputs for step in steps], generators, loops)
        losses = []
        for loop, step, generator, own in zip(loops, steps, generators, features, strict=True):
            classifier = loop.tuned.classifier
            with classifier.draws.of([generator], [len(own)]):
                losses.append(
                    loop.method.loss(replace(step, forward=partial(classifier.read, own)))
                )
        torch.autograd.backward(losses)
    taken: list[Taken | CheckError] = []
    for loop, step, loss in zip(loops, steps, losses, strict=True):
        loop.method.after_backward(step.backbone, step.moment)
        try:
            value = loop.close(loss, step.moment)
            taken.append(Taken(value, (time.perf_counter() - start) / len(loops)))
        except CheckError as error:
            taken.append(error)
    return taken


def _never(loop: Training, inputs: Mapping[str, Tensor]) -> Tensor:
    raise AssertionError("the pass is taken for all runs at once")


def _features(
    tuned: Sequence[Tuned],
    inputs: Sequence[Mapping[str, Tensor]],
    generators: Sequence[Generator],
    loops: Sequence[Training],
) -> list[Tensor]:
    """Send the rows of all runs through the backbone once; return each run's features."""
    counts = [len(own["attention_mask"]) for own in inputs]
    rows = counts if shares_out(tuned[0].device) else [max(counts)] * len(counts)
    length = max(own["attention_mask"].shape[1] for own in inputs)
    pad_id = loops[0].courses[0].train[0].pad_id
    joined = {
        name: torch.cat(
            [
                _padded(own[name], count, length, pad_id if name == "input_ids" else 0)
                for own, count in zip(inputs, rows, strict=True)
            ]
        )
        for name in inputs[0]
    }
    joined["attention_mask"][:, 0] = 1  # of rows that stand for none as well
    joints = [one.method.joint(one.classifier.backbone) for one in tuned]
    assert joints[0] is not None
    classifier = tuned[0].classifier
    with classifier.draws.of(generators, rows), joints[0].together(joints, rows):
        features = classifier.features(**joined)
    split = torch.split(features, rows)
    return [own[:count] for own, count in zip(split, counts, strict=True)]


def _padded(x: Tensor, rows: int, length: int, value: int) -> Tensor:
    return functional.pad(x, (0, length - x.shape[1], 0, rows - len(x)), value=value)
