"""What a method is: hyperparameters, attach, and optional operations with defaults."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Generator, Tensor, nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.forms import LinearFit, LowRankUpdates, Rescalings

CHECKS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Category = Literal["full", "partial", "additive", "reparameterised", "hybrid", "unified"]


def _reads_nothing(names: Iterable[str]) -> dict[str, Tensor]:
    """Stand in for a checkpoint where there is none."""
    return {}


@dataclass(frozen=True)
class AttachContext:
    """Where a method is attached.

    With `folded` the backbone gets the form that is stored. Randomness comes from `generator`
    alone. What requires a gradient before `attach` belongs to the head. With several `tasks` all
    of them train one backbone: `Method.select` says whose rows come next.
    """

    layout: Layout
    generator: Generator
    folded: bool = False
    head_parameters: int = 0
    mask_id: int | None = None
    """The tokenizer's [MASK], where it has one."""
    special_ids: frozenset[int] = frozenset()
    """Its other tokens that stand for no text."""
    fingerprint: str = ""
    """The backbone's, as a run's file has it."""
    tasks: int = 1
    read: Callable[[Iterable[str]], Mapping[str, Tensor]] = _reads_nothing
    """Read tensors by the names they have in the checkpoint, in float32: those that it holds."""


@dataclass(frozen=True)
class Stage:
    """One phase of training: its share of the epochs, and whether dev selects its best epoch.

    One that `continues` trains the same tensors as the stage before it, which does not select, and
    goes on with its optimiser and its schedule of the rate, which then spans both.
    """

    share: float = 1.0
    selects: bool = True
    continues: bool = False


@dataclass(frozen=True)
class StagePosition:
    """Where a stage stands: steps taken before this one, and steps if nothing stops it early."""

    stage: int
    step: int
    steps: int


@dataclass(frozen=True)
class TrainingBatch:
    """One batch in training, as a method's loss sees it; `forward` may be called twice."""

    backbone: nn.Module
    inputs: Mapping[str, Tensor]
    moment: StagePosition
    is_regression: bool
    forward: Callable[[], Tensor]  # logits (batch, outputs)
    criterion: Callable[[Tensor], Tensor]  # logits -> mean loss against the true labels


class Losses(Protocol):
    """A pass over the train rows: the mean loss of each batch, ready for `backward`."""

    def __call__(
        self, batch_size: int, rows: int | None = None, *, training: bool = False
    ) -> Iterator[Tensor]: ...


class SharedPasses(Protocol):
    """The passes of a backbone, which those of other runs on the same one can join."""

    def lend(self, other: Any) -> None:
        """Let the passes of another run, of the same kind, read the frozen tensors of this one."""

    def together(self, runs: Sequence[Any], counts: Sequence[int]) -> AbstractContextManager[None]:
        """Inside, a batch holds so many rows of each run, one run after another.

        On other devices than a CPU, as many of each.
        """


Gates = Sequence[Mapping[str, float]]
"""By layer: gate -> one value for all rows."""


@checked_dataclass(frozen=True, config=CHECKS)
class Method:
    """Base of all methods: the hyperparameters are the fields of the subclass."""

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (what is wrong, what to do) for fields that contradict each other."""
        yield from ()

    @property
    def earlier(self) -> Mapping[str, Any]:
        """What runs had been trained with before there were settings that said so, by setting."""
        return {}

    def unwritten(self, written: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what runs meant by leaving a setting out that was unset and has a default now.

        `written` are the settings that the run did write.
        """
        return {}

    @property
    def submodules(self) -> tuple[str, ...]:
        """What the method is a union of, for comparing it with each part alone; () for no union."""
        return ()

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        """Yield (why, what to do) where this backbone cannot carry the method.

        Asked with the backbone's architecture and the library's config object (`hidden_size`,
        `num_hidden_layers`), before weights are read.
        """
        yield from ()

    @property
    def pads_to_max_length(self) -> bool:
        """Whether a row's result depends on padding, so that all rows must be padded alike."""
        return False

    @property
    def needs_autocast(self) -> bool:
        """Whether its float32 tensors meet the bf16 backbone's without a cast of their own."""
        return False

    @property
    def alters_weights(self) -> bool:
        """Whether the backbone's own tensors change though frozen, and so must stay float32."""
        return False

    @property
    def idle(self) -> Mapping[str, str]:
        """Patterns of tensors that claim to train yet may not move, each with its reason."""
        return {}

    @property
    def reads_frozen_features(self) -> bool:
        """Whether a row's features never change: nothing but heads trains, nothing is attached.

        Then each row goes through the backbone once, in evaluation mode.
        """
        return False

    @property
    def has_closed_form(self) -> bool:
        """Whether `fit_head` gives the heads at once, from features that never change."""
        return False

    def fit_head(
        self, features: Tensor, labels: NDArray[Any], outputs: int, *, is_regression: bool
    ) -> LinearFit:
        """Fit the linear unit of one task's head to what it reads of the train rows.

        `features` are float32 (rows, size), `labels` (rows,) class numbers or values.
        """
        raise TypeError(f"{type(self).__name__} trains by steps")

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        """Change a backbone whose parameters are all frozen, and mark what trains."""
        raise TypeError(f"{type(self).__name__} does not say how it attaches")

    def accelerate(self, backbone: nn.Module, site: AttachContext) -> bool:
        """Make passes faster, exactly, once the tensors' kinds and device are settled.

        Says whether they now share a batch's rows out: see `row_threads.shared_out`.
        """
        return False

    def joint(self, backbone: nn.Module) -> SharedPasses | None:
        """Return how runs of this method share passes, or None where each needs its own."""
        return None

    def select(self, backbone: nn.Module, task: int) -> None:
        """Make the next forward passes those of one task; a method that shares all ignores it."""

    def prepare(self, backbone: nn.Module, losses: Losses) -> None:
        """Look at the train rows once before training; must give the same when repeated."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The phases of training; the last one selects, since its best epoch is the result."""
        return (Stage(),)

    def enter_stage(self, backbone: nn.Module, stage: int) -> None:
        """Begin a later stage: change what trains. State that is kept lies in buffers."""

    def loss(self, step: TrainingBatch) -> Tensor:
        """Return the scalar that one step minimises."""
        return step.criterion(step.forward())

    def after_backward(self, backbone: nn.Module, moment: StagePosition) -> None:
        """Change gradients, before they are clipped; the global generator is the step's own."""

    def after_step(self, backbone: nn.Module, moment: StagePosition) -> None:
        """Change what the optimiser made of the tensors."""

    def rate(self, name: str) -> float:
        """Return the factor on the run's learning rate for one tensor of the backbone."""
        return 1.0

    def decays(self, name: str) -> bool:
        """Say whether weight decay may pull a matrix of the backbone towards zero."""
        return True

    def trainable(self, backbone: nn.Module) -> int:
        """Count the numbers that train."""
        return sum(p.numel() for p in backbone.parameters() if p.requires_grad)

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return what is stored: the trained tensors under their names in the folded form.

        Of a freshly folded backbone it gives the shapes and kinds that a file must have:
        float32, uint8 for packed bits, int32 for places.
        """
        return {
            name: parameter.detach()
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad
        }

    def unfold(self, backbone: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """Put what `fold` returned into a backbone that was attached folded."""
        parameters = dict(backbone.named_parameters())
        with torch.no_grad():
            for name, tensor in stored.items():
                parameters[name].copy_(tensor)

    @property
    def unmergeable(self) -> str | None:
        """Why no plain backbone computes the same function, or None where `merge` makes one."""
        return "it adds modules that no plain backbone has"

    def merge(self, backbone: nn.Module) -> None:
        """Fold everything into the backbone's own tensors, exactly.

        Raises CannotMerge with the reason where no plain backbone computes the same function.
        """
        if self.unmergeable is not None:
            raise CannotMerge(self.unmergeable)

    def as_low_rank_or_rescaling(
        self, backbone: nn.Module, part: str | None = None, gates: Gates = ()
    ) -> "LowRankUpdates | Rescalings":
        """Return the stored method as a form that other libraries have too, exactly.

        With `part` that part of a union alone, which is another model; gates are then held at
        these values. Raises NoKnownForm with the reason where there is none.
        """
        if part is not None:
            raise NoKnownForm(f"it has no part {part!r}")
        raise NoKnownForm("it is neither LoRA nor (IA)3")

    def report(self, backbone: nn.Module) -> dict[str, float]:
        """Return what was measured in the forward passes since the last call, for the result."""
        return {}


def refuse_unusual_layers(layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield the refusal of a method that is written for BERT's kind of layer."""
    if not layout.is_plain:
        yield (
            f"it is written for BERT's kind of layer, and a {layout.model_type}'s is another",
            "choose another backbone: `unipelt list backbones` shows which carry what",
        )


def count_stored(stored: Mapping[str, Tensor]) -> int:
    """Count stored numbers in float32 equivalents: 32 packed bits are one, places are none."""
    return sum(
        -(-tensor.numel() // 4) if tensor.dtype == torch.uint8 else tensor.numel()
        for tensor in stored.values()
        if tensor.dtype != torch.int32
    )


class NoKnownForm(Exception):
    """No other library computes what this method computes; the message says why."""


class CannotMerge(Exception):
    """No plain backbone computes what this method computes; the message says why."""


@dataclass(frozen=True)
class Published:
    """What a method's paper, or its authors' code, trains with on an encoder, where it is known.

    The backbone, its length and the rows stay the user's.
    """

    learning_rate: float
    train: Mapping[str, float] = field(default_factory=dict)
    """Other settings of the section `train`: epochs, batch_size, warmup, weight_decay."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method in which the paper's is another than our default."""
    optimizer: str = "AdamW"
    """Another than AdamW has rates of its own, which mean nothing here."""


@dataclass(frozen=True)
class Recipe:
    """One entry of the table of methods."""

    method: Method
    learning_rate: float
    category: Category
    summary: str
    source: str
    is_suggested: bool = False
    """Whether `recommend` tries it if nobody says what to try."""
    published: Published | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Defaults of the sections `model` and `train` in which this method's are others."""

    @property
    def paper_rate(self) -> float | None:
        """The paper's learning rate; None where it has none for AdamW on an encoder."""
        published = self.published
        is_known = published is not None and published.optimizer == "AdamW"
        return published.learning_rate if published is not None and is_known else None
