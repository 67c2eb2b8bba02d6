"""One step of the optimiser: its rates, its seeds, its loss, its parts."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from unipelt_cli.config.sections import TrainSettings
from unipelt_cli.errors import CheckError
from unipelt_cli.methods import StagePosition, TrainingBatch
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system.memory import is_exhausted, release, too_large
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.system.row_threads import shared_out
from unipelt_cli.training.events import Batch, BatchHalved, Progress, StepResult, TaskRows
from unipelt_cli.training.gradients import Gradients
from unipelt_cli.training.heads.frozen_features import FrozenFeatures
from unipelt_cli.training.heads.loss import contrast, loss_of
from unipelt_cli.training.optimizer import make_adamw, schedule, scheduled_rate

PREPARING = 2**32  # seeds from here on belong to passes before training


class Stepper:
    """What takes a loop's steps: its rates, its parts of a batch, the optimiser, a running mean."""

    def __init__(
        self,
        tuned: TunedModel,
        courses: Sequence[TaskRows],
        settings: TrainSettings,
        stage_steps: Sequence[int],
        processes: Processes = ALONE,
        frozen: FrozenFeatures | None = None,
    ) -> None:
        self.tuned, self.courses, self.settings = tuned, courses, settings
        self.frozen = frozen
        self.stage_steps, self.processes = stage_steps, processes
        self.method = tuned.method
        self.progress = Progress()
        if processes.are_several:  # whoever goes on computes the same parts
            self.progress.micro_batch_size = -(-settings.batch_size // processes.count)
        self.take_up_parameters()

    def take_up_parameters(self) -> None:
        """Begin to optimise what trains now."""
        self.parameters = {
            name: parameter
            for name, parameter in self.tuned.classifier.named_parameters()
            if parameter.requires_grad
        }
        self.averaged: dict[str, Tensor] = {}
        self.optimizer = make_adamw(self.parameters, self.settings, self.tuned)
        self.gradients = Gradients(list(self.parameters.values()), self.processes)

    def take(self, batch: Batch) -> Generator[BatchHalved, None, StepResult]:
        """Take one step on some rows of one task, in smaller parts if memory asks for it."""
        start = time.perf_counter()
        while True:
            size, loss = self.part_size(len(batch.rows)), None
            try:
                with shared_out(self.tuned.classifier.shares_rows):
                    loss = self._step(batch, size)
            except (RuntimeError, MemoryError) as error:
                if self.processes.are_several or not is_exhausted(error):
                    raise
            if loss is not None:
                return StepResult(loss, time.perf_counter() - start)
            if size == 1:
                raise too_large()
            self.optimizer.zero_grad(set_to_none=True)
            release()
            self.progress.micro_batch_size = size // 2
            yield BatchHalved(size // 2, self._contrasts(batch.task_index))

    def part_size(self, rows: int) -> int:
        """Return how many rows are computed at a time: at most a process's share of a batch."""
        share = -(-self.settings.batch_size // self.processes.count)
        return min(rows, share, self.progress.micro_batch_size or share)

    def _step(self, batch: Batch, size: int) -> float | None:
        """Move the tensors by the gradients of a batch's parts, most often one.

        None where a part does not fit into the memory of one of several processes.
        """
        moment, backbone = self._moment(), self.tuned.classifier.backbone
        self._set_rate()
        loss: Tensor | None = None
        try:
            loss = self._backward(batch, size)
        except (RuntimeError, MemoryError) as error:
            if not (self.processes.are_several and is_exhausted(error)):
                raise
        loss = self.gradients.sum(loss)
        if loss is None:
            return None
        with seeded(self._part_seed(len(batch.rows)), self.tuned.device):  # alike in all processes
            self.method.after_backward(backbone, moment)
        return self.close(loss, moment)

    def _backward(self, batch: Batch, size: int) -> Tensor:
        """Add up the gradients of this process's parts; return what they add to the loss."""
        rows, processes = batch.rows, self.processes
        total = torch.zeros((), device=self.tuned.device)
        for first in range(processes.rank * size, len(rows), processes.count * size):
            part = rows[first : first + size]
            step = self.open(
                Batch(batch.task_index, part),
                lambda inputs: self.tuned.classifier.features(**inputs),
            )
            with seeded(self._part_seed(first), self.tuned.device):
                loss = self.method.loss(step) * (len(part) / len(rows))
                torch.autograd.backward(loss)
            total = total + loss.detach()
        return total

    @property
    def step_seed(self) -> int:
        """What the next step draws from."""
        return derive_seed(self.settings.seed, self.progress.taken)

    def _part_seed(self, first: int) -> int:
        """Return what a part of a step that begins at this row draws from."""
        return derive_seed(self.step_seed, first) if first else self.step_seed

    def open(
        self, batch: Batch, features: Callable[[Mapping[str, Tensor]], Tensor]
    ) -> TrainingBatch:
        """Begin a step: the rate is set, the rows are tensors, which `features` sends through."""
        self._set_rate()
        course = self.courses[batch.task_index]
        rows, labels = course.train
        classifier, device = self.tuned.classifier, self.tuned.device
        if not classifier.training:  # it goes through all modules
            classifier.train()
        classifier.select(batch.task_index)
        inputs, frozen, latest = dict[str, Tensor](), self.frozen, list[Tensor]()
        if frozen is None:
            inputs = rows.batch(batch.rows.tolist(), device)

        def forward() -> Tensor:
            read = frozen.train_rows(batch.task_index, batch.rows) if frozen else features(inputs)
            latest[:] = [read]
            return classifier.read(read)

        def criterion(logits: Tensor) -> Tensor:
            loss = loss_of(course, logits, labels[batch.rows])
            if not self._contrasts(batch.task_index):
                return loss
            told_apart = torch.as_tensor(labels[batch.rows], device=device)
            return loss + self.settings.contrast * contrast(latest[0], told_apart)

        return TrainingBatch(
            classifier.backbone,
            inputs,
            self._moment(),
            course.task.is_regression,
            forward,
            criterion,
        )

    def _contrasts(self, task_index: int) -> bool:
        """Say whether a task's loss has the term: features of one text each, and classes."""
        is_apart = self.tuned.classifier.apart[task_index]
        is_regression = self.courses[task_index].task.is_regression
        return self.settings.contrast > 0 and not is_apart and not is_regression

    def _set_rate(self) -> None:
        rate = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]

    def close(self, loss: Tensor, moment: StagePosition) -> float:
        """End a step whose gradients are there: clip them, check the loss, move the tensors."""
        nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        value = loss.item()
        if not np.isfinite(value):
            raise CheckError(
                f"the loss is {value} at step {self.progress.taken + 1}",
                f"lower train.learning_rate (now {self.settings.learning_rate})",
            )
        self.optimizer.step()
        self.method.after_step(self.tuned.classifier.backbone, moment)
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        return value

    def _average(self) -> None:
        """Move the running mean of the tensors towards what they are now."""
        decay = self.settings.averaging
        if not decay:
            return
        now = {name: parameter.detach() for name, parameter in self.parameters.items()}
        if not self.averaged:
            self.averaged = {name: tensor.clone() for name, tensor in now.items()}
        # A mean that is young follows faster: it would be the start's for long.
        weight = max(1 - decay, 1 / (self.progress.stage_taken + 1))
        torch._foreach_lerp_(list(self.averaged.values()), list(now.values()), weight)

    def _moment(self) -> StagePosition:
        progress = self.progress
        return StagePosition(progress.stage, progress.stage_taken, self.stage_steps[progress.stage])

    def rate(self) -> float:
        """Return this step's learning rate."""
        spanned = schedule(self.method.stages, self.stage_steps, self._moment())
        return scheduled_rate(self.settings, spanned)


def derive_seed(seed: int, step: int) -> int:
    """Mix a run's seed with a place in it: a seed of its own, of 63 bits."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Give one step random numbers of its own and leave the process's generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def train_losses(
    tuned: TunedModel,
    courses: Sequence[TaskRows],
    seed: int,
    batch_size: int,
    rows: int | None = None,
    *,
    training: bool = False,
) -> Iterator[Tensor]:
    """Pass over the train rows in their order, before any step: see `methods.base.Losses`.

    Several tasks come one after the other, each with an equal share of `rows`.
    """
    classifier, device, before = tuned.classifier, tuned.device, 0
    share = None if rows is None else -(-rows // len(courses))
    classifier.train(training)
    for task_index, course in enumerate(courses):
        encoded, labels = course.train
        count = min(share or len(encoded), len(encoded))
        for start in range(0, count, batch_size):
            chosen = np.arange(start, min(start + batch_size, count))
            classifier.select(task_index)
            with seeded(derive_seed(seed, PREPARING + before + start), device):
                logits = classifier(**encoded.batch(chosen.tolist(), device))
                yield loss_of(course, logits, labels[chosen])
        before += count
