"""The training loop, as a generator of events: it prints nothing and writes nothing.

Every step draws from its own seed, and every epoch's order from its own: a run stopped after any
step goes on exactly, from its tensors and a few counters.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unipelt_cli.config.sections import HeadEnd, TrainSettings
from unipelt_cli.metrics import is_better
from unipelt_cli.models.batches import interleaved
from unipelt_cli.models.evaluation import Gates, compute_with_gates, gate_means, predictions
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system.processes import ALONE, Processes
from unipelt_cli.tasks import Task, joint_metric, joint_scores
from unipelt_cli.training.events import (
    Batch,
    Epoch,
    Labelled,
    Progress,
    Step,
    StepResult,
    TaskRows,
    TrainingEvent,
    Turns,
)
from unipelt_cli.training.heads.frozen_features import FrozenFeatures, Source, are_frozen
from unipelt_cli.training.heads.start_and_end import end_heads, start_heads
from unipelt_cli.training.step import Stepper, train_losses


class Training:
    """A loop over one model: iterate over `events`, read `progress`, save `state` at any event.

    The tasks of `more` train the same model: every batch is of one task and reaches its head only.
    Several processes share every batch out, and then take the same step each. Features that never
    change are computed once, or come from `source`.
    """

    def __init__(
        self,
        tuned: TunedModel,
        task: Task,
        train: Labelled,
        dev: Labelled | None,
        settings: TrainSettings,
        more: Sequence[TaskRows] = (),
        processes: Processes = ALONE,
        source: Source | None = None,
    ) -> None:
        assert settings.learning_rate is not None
        self.tuned, self.task, self.settings = tuned, task, settings
        self.train, self.dev, self.processes = train, dev, processes
        courses = (TaskRows(task, train, dev), *more)
        self.courses = tuple(course.scaled(settings) for course in courses)
        self.tasks = [course.task for course in self.courses]
        self.method = tuned.method
        sizes = [len(course.train[0]) for course in self.courses]
        self.rows = sum(sizes)
        self.steps = sum(-(-size // settings.batch_size) for size in sizes)
        epochs = 1 if self.method.has_closed_form else settings.epochs
        self.lengths = [max(1, round(s.share * epochs)) for s in self.method.stages]
        stage_steps = [length * self.steps for length in self.lengths]
        self.frozen: FrozenFeatures | None = None
        if are_frozen(tuned):
            self.frozen = FrozenFeatures(tuned, self.courses, processes, source)
        self.stepper = Stepper(tuned, self.courses, settings, stage_steps, processes, self.frozen)
        self.best: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = dict(self.parameters)
        self.is_prepared = False
        self.head_end: HeadEnd = "trained"  # which end the heads were given

    @property
    def progress(self) -> Progress:
        """How far the loop has come."""
        return self.stepper.progress

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains in this stage, by name."""
        return self.stepper.parameters

    def _take_up_parameters(self) -> None:
        """Begin to optimise what trains now; what trained in an earlier stage is still carried."""
        self.stepper.take_up_parameters()
        self.carried |= self.parameters

    @property
    def epochs(self) -> int:
        """How many epochs all stages take, if none ends early."""
        return sum(self.lengths)

    def events(self) -> Iterator[TrainingEvent]:
        """Train every stage until patience or epochs end, then put its best epoch back.

        At the end a regression's values are on the scale of its labels. Raises CheckError when the
        loss is no longer a number.
        """
        yield from self.drive(self.turns())

    def drive(self, turns: "Turns") -> Iterator[TrainingEvent]:
        """Take the steps that turns ask for, and pass their events on."""
        taken: StepResult | None = None
        while True:
            try:
                turn = turns.send(taken)
            except StopIteration:
                return
            taken = None
            if isinstance(turn, Batch):
                taken = yield from self.stepper.take(turn)
            else:
                yield turn

    def turns(self) -> "Turns":
        """Do what `events` does, but ask for each step to be taken: several loops can share one."""
        self._prepare()
        while True:
            while not self.is_done:
                yield from self.train_epoch()
                yield self.score_epoch()
            self._keep()
            if self.progress.stage + 1 == len(self.lengths):
                self._end_heads()
                self._fold_scales()
                return
            self._enter(self.progress.stage + 1)
            progress = self.progress
            progress.stage_epochs, progress.stage_taken = progress.epoch - 1, 0
            progress.best_epoch, progress.best_score, progress.best_dev = 0, 0.0, {}

    def _keep(self) -> None:
        """Put the stage's best epoch back; without dev rows the last one stays, or the mean."""
        if self.dev is None and self.method.stages[self.progress.stage].selects:
            self._copy(self.stepper.averaged)
        self._copy(self.best)

    @property
    def selects(self) -> bool:
        """Whether dev rows choose the best epoch of this stage."""
        return self.dev is not None and self.method.stages[self.progress.stage].selects

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
        return self.selects and not is_patient

    def _prepare(self) -> None:
        """Let the method look at the train rows, once."""
        if not self.is_prepared:
            losses = partial(train_losses, self.tuned, self.courses, self.settings.seed)
            self.method.prepare(self.tuned.classifier.backbone, losses)
            self.tuned.classifier.zero_grad(set_to_none=True)
            if self.frozen is not None:
                self.frozen.prepare()
                self.progress.train_seconds += self.frozen.seconds
            start_heads(self.tuned, self.courses, self.settings.head_start, self._frozen_rows)
            self._take_up_parameters()
            self.processes.broadcast(self._tensors())
            self.is_prepared = True

    @property
    def _frozen_rows(self) -> Sequence[Tensor]:
        """Features (rows, width) of each task's train rows, where they never change."""
        return self.frozen.train if self.frozen else ()

    def _enter(self, stage: int) -> None:
        self.method.enter_stage(self.tuned.classifier.backbone, stage)
        self.progress.stage, self.best = stage, {}
        if self.method.stages[stage].continues:
            self.stepper.averaged = {}  # of tensors that the stage before was still changing
        else:
            self._take_up_parameters()
        self.processes.broadcast(self._tensors())

    def _tensors(self) -> list[Tensor]:
        """Return what a step may change; the last bits of sums on a GPU may differ by process."""
        return [*self.carried.values(), *self.tuned.buffers().values()]

    def state(self) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Return tensors and counters from which `restore` goes on exactly."""
        now = {**self.carried, **self.tuned.buffers()}
        tensors = {f"now.{name}": tensor.detach() for name, tensor in now.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"averaged.{name}": tensor for name, tensor in self.stepper.averaged.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.stepper.optimizer.state.get(parameter, {}).items():
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
        self.stepper.progress = saved
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            groups.setdefault(kind, {})[name] = tensor.to(self.tuned.device)
        if self.processes.are_several:  # there may have been fewer, and larger parts
            self.progress.micro_batch_size = self.stepper.part_size(self.settings.batch_size)
        self._copy(groups.pop("now"))
        self.best = groups.pop("best", {})
        self.stepper.averaged = groups.pop("averaged", {})
        for kind, values in groups.items():
            for name, tensor in values.items():
                self.stepper.optimizer.state[self.parameters[name]][kind] = tensor

    def train_epoch(self) -> "Turns":
        """Ask for the steps of the epoch that are not taken yet."""
        settings, progress = self.settings, self.progress
        lengths = [course.train[0].lengths for course in self.courses]
        if self.frozen is not None and self.method.has_closed_form:
            self._fit(self.frozen, sum(int(row_lengths.sum()) for row_lengths in lengths))
            return
        classes = [course.classes for course in self.courses] if settings.balanced else ()
        draws = settings.batch_size, settings.seed, progress.epoch
        order = interleaved(lengths, *draws, classes, settings.rows_per_class)
        while progress.step < self.steps:
            task_index, chosen = order[progress.step]
            taken = yield Batch(task_index, chosen)
            assert taken is not None
            progress.step += 1
            progress.taken += 1
            progress.stage_taken += 1
            progress.loss_sum += taken.loss * len(chosen)
            progress.tokens += int(lengths[task_index][chosen].sum())
            progress.train_seconds += taken.seconds
            rate = progress.tokens / max(progress.train_seconds, 1e-9)
            yield Step(progress.epoch, progress.step, self.steps, taken.loss, rate)

    def _fit(self, frozen: FrozenFeatures, tokens: int) -> None:
        """Fit all heads at once, in place of an epoch's steps; the loss is the fitted heads'."""
        start, progress = time.perf_counter(), self.progress
        frozen.fit()
        self.processes.broadcast(self._tensors())
        progress.loss_sum, progress.tokens = frozen.loss_sum(), tokens
        progress.train_seconds += time.perf_counter() - start

    def score_epoch(self) -> Epoch:
        """Score the epoch on dev, where there is one, and begin the next one."""
        start = time.perf_counter()
        progress = self.progress
        scores: dict[str, float] = {}
        gates: list[Gates] = []
        is_best = False
        if self.dev is None:
            progress.best_epoch = progress.epoch
        if self.selects:
            with self._means():
                scores, gates = self._dev_scores()
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
        averaged = self.stepper.averaged
        latest = {name: self.parameters[name].detach().clone() for name in averaged}
        self._copy(averaged)
        try:
            yield
        finally:
            self._copy(latest)

    def _dev_scores(self) -> tuple[dict[str, float], list[Gates]]:
        """Return the scores of all tasks on their dev rows, and each one's gates."""
        scored = [self._score(task_index) for task_index in range(len(self.tasks))]
        return joint_scores(self.tasks, [scores for scores, _ in scored]), [g for _, g in scored]

    def _score(self, task_index: int) -> tuple[dict[str, float], Gates]:
        task, dev = self.tasks[task_index], self.courses[task_index].dev
        assert dev is not None
        rows, labels = dev
        if self.frozen is None:
            logits, gates = compute_with_gates(self.tuned, rows, task_index, self.processes)
        else:
            logits, gates = self.frozen.dev_logits(task_index), []
        predicted = predictions(task, logits)
        if task.is_regression:
            predicted = self.courses[task_index].scale.restore(predicted)
        return task.score(predicted, labels), gates

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

    def _end_heads(self) -> None:
        """Set heads to their classes' means if settings say so; dev rows, if any, may refuse."""
        has_classes = not all(task.is_regression for task in self.tasks)
        if self.settings.head_end == "trained" or self.method.has_closed_form or not has_classes:
            return
        end_heads(self.tuned, self.courses, self._frozen_rows)
        self.processes.broadcast(self._tensors())
        self.head_end = self.settings.head_end
        if not self.selects:
            return
        scores, _ = self._dev_scores()
        progress, metric = self.progress, joint_metric(self.tasks)
        if is_better(metric, scores[metric], progress.best_score):
            progress.best_score, progress.best_dev = scores[metric], dict(scores)
        else:
            self.head_end = "trained"
            self._copy(self.best)

    def _fold_scales(self) -> None:
        """Let every head give labels: what is stored and exported knows of no other scale."""
        for course, head in zip(self.courses, self.tuned.classifier.heads, strict=True):
            course.scale.fold_into(head.out)

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        destinations = {**self.carried, **self.tuned.buffers()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                destinations[name].copy_(tensor)
