"""The training loop, as a generator of events: it prints nothing and writes nothing.

Every step draws from its own seed, and every epoch's order from its own: a run stopped after any
step goes on exactly, from its tensors and a few counters.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unipelt_cli.config.sections import TrainSettings
from unipelt_cli.errors import CheckError
from unipelt_cli.methods import Moment, Pass
from unipelt_cli.models.batches import interleaved
from unipelt_cli.models.evaluation import Gates, compute_with_gates, gate_means, predictions
from unipelt_cli.models.tuned import Tuned
from unipelt_cli.system.memory import is_exhausted, release, too_large
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.system.row_threads import shared_out
from unipelt_cli.tasks import Task, is_better, joint_metric, joint_scores
from unipelt_cli.training.events import (
    Batch,
    Course,
    Epoch,
    Halved,
    Happening,
    Labelled,
    Progress,
    Step,
    Taken,
    Turns,
)
from unipelt_cli.training.gradients import Gradients
from unipelt_cli.training.step import PREPARING, derive_seed, loss_of, make_adamw, seeded


class Training:
    """A loop over one model: iterate over `events`, read `progress`, save `state` at any event.

    The tasks of `more` train the same model: every batch is of one task and reaches its head only.
    Several processes share every batch out, and then take the same step each.
    """

    def __init__(
        self,
        tuned: Tuned,
        task: Task,
        train: Labelled,
        dev: Labelled,
        settings: TrainSettings,
        more: Sequence[Course] = (),
        processes: Processes = ALONE,
    ) -> None:
        assert settings.learning_rate is not None
        self.tuned, self.task, self.settings = tuned, task, settings
        self.processes = processes
        self.train, self.dev = train, dev
        self.courses = (Course(task, train, dev), *more)
        self.tasks = [course.task for course in self.courses]
        self.method = tuned.method
        sizes = [len(course.train[0]) for course in self.courses]
        self.rows = sum(sizes)
        self.steps = sum(-(-size // settings.batch_size) for size in sizes)
        self.lengths = [max(1, round(s.share * settings.epochs)) for s in self.method.stages]
        self.progress = Progress()
        if processes.are_several:  # whoever goes on computes the same parts
            self.progress.micro_batch_size = -(-settings.batch_size // processes.count)
        self.best: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = {}
        self.is_prepared = False
        self._take_up_parameters()

    def _take_up_parameters(self) -> None:
        """Begin to optimise what trains now; what trained in an earlier stage is still carried."""
        self.parameters = {
            name: parameter
            for name, parameter in self.tuned.classifier.named_parameters()
            if parameter.requires_grad
        }
        self.carried |= self.parameters
        self.averaged: dict[str, Tensor] = {}
        self.optimizer = make_adamw(self.parameters, self.settings, self.tuned)
        self.gradients = Gradients(list(self.parameters.values()), self.processes)

    @property
    def epochs(self) -> int:
        """How many epochs all stages take, if none ends early."""
        return sum(self.lengths)

    def events(self) -> Iterator[Happening]:
        """Train every stage until patience or epochs end, then put its best epoch back.

        Raises CheckError when the loss is no longer a number.
        """
        yield from self.drive(self.turns())

    def drive(self, turns: "Turns") -> Iterator[Happening]:
        """Take the steps that turns ask for, and pass their events on."""
        taken: Taken | None = None
        while True:
            try:
                turn = turns.send(taken)
            except StopIteration:
                return
            taken = None
            if isinstance(turn, Batch):
                taken = yield from self.take(turn)
            else:
                yield turn

    def turns(self) -> "Turns":
        """Do what `events` does, but ask for each step to be taken: several loops can share one."""
        self._prepare()
        while True:
            while not self.is_done:
                yield from self.train_epoch()
                yield self.score_epoch()
            self._copy(self.best)
            if self.progress.stage + 1 == len(self.lengths):
                return
            self._enter(self.progress.stage + 1)
            progress = self.progress
            progress.stage_epochs, progress.stage_taken = progress.epoch - 1, 0
            progress.best_epoch, progress.best_score, progress.best_dev = 0, 0.0, {}

    @property
    def is_done(self) -> bool:
        """Whether the stage's next epoch would be one too many."""
        progress, stage = self.progress, self.progress.stage
        over = progress.epoch - 1
        if over - progress.stage_epochs >= self.lengths[stage]:
            return True
        since = over - max(progress.best_epoch, progress.stage_epochs)
        is_patient = since < self.settings.patience
        is_patient |= since * self.steps < self.settings.patience_steps
        return self.method.stages[stage].selects and not is_patient

    def _prepare(self) -> None:
        """Let the method look at the train rows, once."""
        if not self.is_prepared:
            self.method.prepare(self.tuned.classifier.backbone, self._losses)
            self.tuned.classifier.zero_grad(set_to_none=True)
            self._take_up_parameters()
            self.processes.share(self._tensors())
            self.is_prepared = True

    def _enter(self, stage: int) -> None:
        self.method.enter(self.tuned.classifier.backbone, stage)
        self.progress.stage, self.best = stage, {}
        self._take_up_parameters()
        self.processes.share(self._tensors())

    def _tensors(self) -> list[Tensor]:
        """Return what a step may change; the last bits of sums on a GPU may differ by process."""
        return [*self.carried.values(), *self.tuned.buffers().values()]

    def _losses(
        self, batch_size: int, rows: int | None = None, *, training: bool = False
    ) -> Iterator[Tensor]:
        """Pass over the train rows in their order: see `methods.base.Losses`.

        Several tasks come one after the other, each with an equal share of `rows`.
        """
        classifier, device, before = self.tuned.classifier, self.tuned.device, 0
        share = None if rows is None else -(-rows // len(self.courses))
        classifier.train(training)
        for place, course in enumerate(self.courses):
            encoded, labels = course.train
            count = min(share or len(encoded), len(encoded))
            for start in range(0, count, batch_size):
                chosen = np.arange(start, min(start + batch_size, count))
                target = torch.as_tensor(labels[chosen], device=device)
                classifier.select(place)
                with seeded(derive_seed(self.settings.seed, PREPARING + before + start), device):
                    logits = classifier(**encoded.batch(chosen.tolist(), device))
                    yield loss_of(course.task, logits, target)
            before += count

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and counters from which `restore` goes on exactly."""
        now = {name: tensor.detach() for name, tensor in self.carried.items()}
        tensors = {f"now.{name}": t for name, t in (now | self.tuned.buffers()).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"averaged.{name}": tensor for name, tensor in self.averaged.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.detach()
        return tensors, asdict(self.progress)

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Take up a saved state.

        A KeyError, RuntimeError, TypeError or ValueError means that it is another run's.
        """
        saved = Progress(**counters)
        if saved.stage >= len(self.lengths):
            raise ValueError("no such stage")
        self._prepare()
        for stage in range(1, saved.stage + 1):
            self._enter(stage)
        self.progress = saved
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            groups.setdefault(kind, {})[name] = tensor.to(self.tuned.device)
        if self.processes.are_several:  # there may have been fewer, and larger parts
            self.progress.micro_batch_size = self._part_size(self.settings.batch_size)
        self._copy(groups.pop("now"))
        self.best = groups.pop("best", {})
        self.averaged = groups.pop("averaged", {})
        for kind, values in groups.items():
            for name, tensor in values.items():
                self.optimizer.state[self.parameters[name]][kind] = tensor

    def train_epoch(self) -> "Turns":
        """Ask for the steps of the epoch that are not taken yet."""
        settings, progress = self.settings, self.progress
        lengths = [course.train[0].lengths for course in self.courses]
        order = interleaved(lengths, settings.batch_size, settings.seed, progress.epoch)
        while progress.step < self.steps:
            place, chosen = order[progress.step]
            taken = yield Batch(place, chosen)
            assert taken is not None
            progress.step += 1
            progress.taken += 1
            progress.stage_taken += 1
            progress.loss_sum += taken.loss * len(chosen)
            progress.tokens += int(lengths[place][chosen].sum())
            progress.train_seconds += taken.seconds
            rate = progress.tokens / max(progress.train_seconds, 1e-9)
            yield Step(progress.epoch, progress.step, self.steps, taken.loss, rate)

    def take(self, batch: Batch) -> Generator[Halved, None, Taken]:
        """Take one step on some rows of one task, in smaller parts if memory asks for it."""
        start = time.perf_counter()
        while True:
            size, loss = self._part_size(len(batch.rows)), None
            try:
                with shared_out(self.tuned.classifier.shares_rows):
                    loss = self._step(batch, size)
            except (RuntimeError, MemoryError) as error:
                if self.processes.are_several or not is_exhausted(error):
                    raise
            if loss is not None:
                return Taken(loss, time.perf_counter() - start)
            if size == 1:
                raise too_large()
            self.optimizer.zero_grad(set_to_none=True)
            release()
            self.progress.micro_batch_size = size // 2
            yield Halved(size // 2)

    def _part_size(self, rows: int) -> int:
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
                Batch(batch.place, part), lambda inputs: self.tuned.classifier(**inputs)
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

    def open(self, batch: Batch, forward: Callable[[Mapping[str, Tensor]], Tensor]) -> Pass:
        """Begin a step: the rate is set, the rows are tensors, `forward` turns them into logits."""
        self._set_rate()
        task, (rows, labels) = self.tasks[batch.place], self.courses[batch.place].train
        classifier, device = self.tuned.classifier, self.tuned.device
        if not classifier.training:  # it goes through all modules
            classifier.train()
        classifier.select(batch.place)
        inputs = rows.batch(batch.rows.tolist(), device)
        target = torch.as_tensor(labels[batch.rows], device=device)
        return Pass(
            classifier.backbone,
            inputs,
            self._moment(),
            task.is_regression,
            lambda: forward(inputs),
            lambda logits: loss_of(task, logits, target),
        )

    def _set_rate(self) -> None:
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]

    def close(self, loss: Tensor, moment: Moment) -> float:
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

    def _moment(self) -> Moment:
        progress = self.progress
        steps = self.lengths[progress.stage] * self.steps
        return Moment(progress.stage, progress.stage_taken, steps)

    def _rate(self) -> float:
        """Return this step's rate: linear warm-up, then linear decay to 0 over the stage."""
        peak = self.settings.learning_rate
        assert peak is not None
        moment = self._moment()
        step, total = moment.step, moment.steps
        warm = round(self.settings.warmup * total)
        if step < warm:
            return peak * (step + 1) / warm
        return peak * (total - step) / max(1, total - warm)

    def score_epoch(self) -> Epoch:
        """Score the epoch on dev and begin the next one."""
        start = time.perf_counter()
        progress = self.progress
        scores: dict[str, float] = {}
        gates: list[Gates] = []
        is_best = False
        if self.method.stages[progress.stage].selects:
            with self._means():
                found = [self._score(place) for place in range(len(self.tasks))]
                scores = joint_scores(self.tasks, [own for own, _ in found])
                gates = [own for _, own in found]
                is_best = self._select(scores)
        event = Epoch(
            progress.epoch,
            progress.loss_sum / self.rows,
            scores,
            progress.train_seconds,
            time.perf_counter() - start,
            progress.tokens,
            is_best,
            gate_means(gates),
        )
        progress.total_tokens += progress.tokens
        progress.total_train_seconds += progress.train_seconds
        progress.epoch += 1
        progress.step = progress.tokens = 0
        progress.loss_sum = progress.train_seconds = 0.0
        return event

    @contextmanager
    def _means(self) -> Iterator[None]:
        """Inside, the model has the running mean of its tensors, where one is kept."""
        if not self.averaged:
            yield
            return
        own = {name: self.parameters[name].detach().clone() for name in self.averaged}
        self._copy(self.averaged)
        try:
            yield
        finally:
            self._copy(own)

    def _score(self, place: int) -> tuple[dict[str, float], Gates]:
        task, (rows, labels) = self.tasks[place], self.courses[place].dev
        logits, gates = compute_with_gates(self.tuned, rows, place, self.processes)
        return task.score(predictions(task, logits), labels), gates

    def _select(self, scores: dict[str, float]) -> bool:
        """Keep this epoch's tensors if it is the stage's best so far."""
        progress, metric = self.progress, joint_metric(self.tasks)
        first = not progress.best_dev
        if not first and not is_better(metric, scores[metric], progress.best_score):
            return False
        progress.best_epoch, progress.best_score = progress.epoch, scores[metric]
        progress.best_dev = dict(scores)
        current = {**self.parameters, **self.tuned.buffers()}
        self.best = {name: tensor.detach().clone() for name, tensor in current.items()}
        return True

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        own = {**self.carried, **self.tuned.buffers()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
