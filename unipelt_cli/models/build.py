"""From an Experiment to a Tuned model: frozen backbone, attached method, pooling and head."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from unipelt_cli import methods
from unipelt_cli.backbones.dropout import Draws, Dropout
from unipelt_cli.backbones.pretrained import Pretrained, find
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.methods.base import Method, Site, count_stored, initialise, new_linear
from unipelt_cli.system import memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMISED = 3  # a gradient and two moments for each number that trains
ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}


class Head(nn.Module):
    """Dropout and a linear unit; `native` adds the dense layer the library's classifier has."""

    def __init__(
        self,
        hidden: int,
        outputs: int,
        dropout: float,
        activation: str | None,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = new_linear(hidden, hidden, generator) if activation else None
        self.activation = ACTIVATIONS[activation]() if activation else None
        self.out = new_linear(hidden, outputs, generator)

    @staticmethod
    def size(hidden: int, outputs: int, *, has_dense: bool) -> int:
        """Count the parameters of a head before there is one."""
        return (hidden + 1) * outputs + (hidden + 1) * hidden * has_dense

    def forward(self, features: Tensor) -> Tensor:  # (batch, hidden) -> (batch, outputs)
        if self.dense is not None and self.activation is not None:
            features = self.activation(self.dense(self.dropout(features)))
        logits: Tensor = self.out(self.dropout(features))
        return logits


class Classifier(nn.Module):
    """A backbone, one way to read a row's features from it, and a head for each task."""

    def __init__(
        self,
        backbone: "PreTrainedModel",
        heads: Sequence[Head],
        method: Method,
        pooling: str,
        reads_pooler: bool,
        draws: Draws,
    ) -> None:
        super().__init__()
        self.draws = draws
        self.backbone, self.head = backbone, heads[0]
        self.other_heads = nn.ModuleList(heads[1:])
        self.method = method
        self.pooling, self.reads_pooler = pooling, reads_pooler
        self.autocast: torch.dtype | None = None
        self.shares_rows = False
        self.select(0)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The head of each task."""
        return (self.head, *cast(Sequence[Head], self.other_heads))

    def select(self, task: int) -> None:
        """Make the next forward passes those of one task, by its place among the run's."""
        self.task = task
        self.method.select(self.backbone, task)

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return float32 logits (batch, outputs) for token ids (batch, length) and their mask."""
        return self.read(self.features(attention_mask, **inputs))

    def read(self, features: Tensor) -> Tensor:
        """Return the logits of the task's head for features (batch, hidden)."""
        logits: Tensor = self.heads[self.task](features)
        return logits

    def features(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return what a head reads of each row, float32 (batch, hidden)."""
        with torch.autocast(
            attention_mask.device.type, self.autocast, enabled=self.autocast is not None
        ):
            output = self.backbone(attention_mask=attention_mask, **inputs)
            return self._pool(output, attention_mask).float()

    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        if self.reads_pooler:
            pooled: Tensor = output.pooler_output
            return pooled
        hidden: Tensor = output.last_hidden_state
        if self.pooling == "mean":
            weights = mask.to(hidden.dtype)[:, :, None]
            return (hidden * weights).sum(1) / weights.sum(1)
        if self.pooling == "eos":
            rows = torch.arange(
                hidden.shape[0], device=hidden.device
            )  # a tracer bakes in what len gives
            return hidden[rows, mask.sum(1) - 1]
        return hidden[:, 0]


@dataclass(frozen=True)
class Tuned:
    """A built model with everything a run needs to know about it."""

    classifier: Classifier
    tokenizer: Any
    pretrained: Pretrained
    method: Method
    pooling: str
    precision: str
    device: torch.device
    untrained: frozenset[str]
    """Backbone tensors that the checkpoint did not hold: they count as head, and are stored."""
    plain_buffers: frozenset[str]
    """Buffers that the backbone has by itself; all others are the method's state."""

    def stored(self) -> dict[str, Tensor]:
        """Return what a run stores, by name: the folded method and the head.

        Numbers are float32; a method may pack bits (uint8) and name places (int32).
        """
        return {
            **{f"backbone.{name}": tensor for name, tensor in self._folded().items()},
            **{name: parameter.detach() for name, parameter in self._head().items()},
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up stored tensors in a model that was built folded; names were checked before."""
        head = self._head()
        with torch.no_grad():
            for name in head:
                head[name].copy_(tensors[name])
        self.method.unfold(
            self.classifier.backbone,
            {
                name.removeprefix("backbone."): tensor
                for name, tensor in tensors.items()
                if name not in head
            },
        )

    def buffers(self) -> dict[str, Tensor]:
        """Return the method's state beside its parameters, by name."""
        return {
            name: buffer
            for name, buffer in self.classifier.named_buffers()
            if name not in self.plain_buffers
        }

    def parameter_counts(self) -> dict[str, int]:
        """Count what trains, what is stored (both without the head), and the head."""
        own = dict(self.classifier.backbone.named_parameters())
        lent = sum(own[name].numel() for name in self.untrained)
        return {
            "trainable_parameters": self.method.trainable(self.classifier.backbone) - lent,
            "stored_parameters": count_stored(self._folded()),
            "head_parameters": sum(p.numel() for p in self._head().values()),
        }

    def _folded(self) -> dict[str, Tensor]:
        folded = self.method.fold(self.classifier.backbone)
        return {name: tensor for name, tensor in folded.items() if name not in self.untrained}

    def _head(self) -> dict[str, nn.Parameter]:
        """Return the heads' parameters, and the pooler's where the checkpoint held none."""
        lent = {f"backbone.{name}" for name in self.untrained}
        return {
            name: parameter
            for name, parameter in self.classifier.named_parameters()
            if not name.startswith("backbone.") or name in lent
        }


def choose_device(wanted: str) -> torch.device:
    """Return the device; raise ConfigError for one that this machine does not have."""
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, there in has.items() if there))
    if not has[wanted]:
        there = ", ".join(name for name, is_there in has.items() if is_there)
        raise ConfigError(
            f"train.device = {wanted!r}: this machine has none", f"choose one of auto, {there}"
        )
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return fp32 or bf16; `auto` takes bf16 where the hardware multiplies it fast."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cpu":
        is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16" if is_fast else "fp32"
    return "fp32"


def choose_pooling(wanted: str, pretrained: Pretrained, missing: frozenset[str]) -> str:
    """Return the pooling; `auto` follows the backbone's own files, never an untrained pooler.

    Raises BackboneError for `native` where the library has no classifier to follow.
    """
    layout = pretrained.layout
    if wanted == "native" and layout.native is None:
        raise BackboneError(
            f"model.pooling = 'native': {layout.no_native}",
            "choose one of mean, cls, eos",
        )
    if wanted != "auto":
        return wanted
    said = pretrained.sentence_pooling
    if said is not None:
        return said
    if layout.native is None:
        return "mean"
    return "cls" if missing else "native"


def build(
    experiment: Experiment,
    outputs: int | Sequence[int],
    pretrained: Pretrained | None = None,
    *,
    folded: bool = False,
    hasten: bool = True,
) -> Tuned:
    """Build the model that an experiment describes, with `outputs` logits a row (of each task).

    With `folded` it has the stored form, ready to load. Draws from `train.seed` alone. Without
    `hasten` every pass goes through the library's layers, where a tracer can follow it.
    Raises BackboneError or ConfigError for a backbone, device or length that cannot be.
    """
    settings = experiment.model
    outputs = (outputs,) if isinstance(outputs, int) else outputs
    pretrained = pretrained or find(settings.backbone)
    device = choose_device(experiment.train.device)
    precision = choose_precision(experiment.train.precision, device)
    method = experiment.method
    refuse(method, experiment.method_name, pretrained)
    attention = pretrained.attention(settings.attention, device.type)
    native, has_pooler = pretrained.layout.native, pretrained.layout.has_pooler
    wants_pooler = has_pooler and settings.pooling in ("auto", "native")
    numbers = sum(map(math.prod, pretrained.shapes.values()))
    memory.require(numbers, 1, f"backbone {pretrained.name}", torch.device("cpu"))
    backbone, missing = pretrained.load_backbone(attention, pooler=wants_pooler)
    pooling = choose_pooling(settings.pooling, pretrained, missing)
    reads_pooler = has_pooler and pooling == "native"
    if wants_pooler and not reads_pooler:
        missing = frozenset()
        backbone.register_module("pooler", None)
    _check_length(settings.max_length, pretrained, backbone)
    draws = Draws()
    _replace_dropout(backbone, draws)  # before the method puts hooks on it
    backbone.requires_grad_(False)
    original = list(backbone.parameters())
    plain_buffers = frozenset(f"backbone.{name}" for name, _ in backbone.named_buffers())
    generator = torch.Generator().manual_seed(experiment.train.seed)
    if missing:
        pooler = backbone.get_submodule(pretrained.layout.pooler)
        initialise(cast(nn.Linear, pooler), generator)
        backbone.get_submodule("pooler").requires_grad_(True)
    activation = native.activation if native and pooling == "native" and native.dense else None
    hidden = backbone.config.hidden_size
    size = sum(Head.size(hidden, own, has_dense=activation is not None) for own in outputs)
    tokenizer = pretrained.load_tokenizer()
    site = Site(
        pretrained.layout,
        generator,
        folded,
        size,
        tokenizer.mask_token_id,
        frozenset(tokenizer.all_special_ids),
        pretrained.fingerprint,
        tasks=len(outputs),
    )
    method.attach(backbone, site)
    if not folded:
        numbers = sum(own.numel() for own in backbone.parameters() if own.requires_grad)
        what = f"training {numbers:,} numbers"
        memory.require(numbers, OPTIMISED, what, device)
    heads = [Head(hidden, own, settings.head_dropout, activation, generator) for own in outputs]
    reads_last = native is not None and native.reads_last and pooling == "native"
    read = "eos" if reads_last else pooling
    classifier = Classifier(backbone, heads, method, read, reads_pooler, draws)
    if precision == "bf16":
        _to_bf16(classifier, original, method)
    _replace_dropout(classifier, draws)
    classifier.to(device)
    classifier.shares_rows = hasten and method.hasten(backbone, site)
    return Tuned(
        classifier.eval(),
        tokenizer,
        pretrained,
        method,
        pooling,
        precision,
        device,
        missing,
        plain_buffers,
    )


def refuse(method: Method, name: str, pretrained: Pretrained) -> None:
    """Raise BackboneError where a method cannot run on a backbone, before weights are read."""
    for reason, remedy in method.refusals(pretrained.layout, pretrained.library_config()):
        raise BackboneError(f"method {name!r} on {pretrained.name}: {reason}", remedy)


def skeleton(pretrained: Pretrained) -> Any:
    """Make a backbone's modules without weights or memory, to count what a method adds."""
    with torch.device("meta"):
        return pretrained.library_class(pretrained.library_config())


def count(
    method: Method,
    pretrained: Pretrained,
    head_parameters: int,
    tasks: int = 1,
    bare: nn.Module | None = None,
) -> tuple[int, int]:
    """Return how many numbers train and how many are stored, both without the heads.

    Whoever counts several methods on one backbone makes its skeleton once, and gives it as `bare`.
    """
    bare = bare or skeleton(pretrained)
    counted = []
    for folded in (False, True):
        backbone = deepcopy(bare).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        site = Site(pretrained.layout, generator, folded, head_parameters, tasks=tasks)
        method.attach(backbone, site)
        counted.append(backbone)
    return method.trainable(counted[0]), count_stored(method.fold(counted[1]))


def _to_bf16(classifier: Classifier, original: list[nn.Parameter], method: Method) -> None:
    """Store a frozen backbone in bf16; one whose own tensors train stays float32 under autocast."""
    own_train = method.alters_weights or any(p.requires_grad for p in original)
    if own_train or method.needs_autocast:
        classifier.autocast = torch.bfloat16
    if own_train:
        return
    for parameter in original:
        parameter.data = parameter.data.to(torch.bfloat16)


def _replace_dropout(module: nn.Module, draws: Draws) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, Dropout(child.p, draws))
        else:
            _replace_dropout(child, draws)


def _check_length(max_length: int, pretrained: Pretrained, backbone: "PreTrainedModel") -> None:
    positions = pretrained.layout.positions(backbone.config)
    if positions is not None and max_length > positions:
        raise BackboneError(
            f"model.max_length = {max_length}: the backbone has {positions} positions",
            f"set model.max_length={positions} or less",
        )


def merge(tuned: Tuned) -> None:
    """Fold the method into the backbone; raises methods.CannotMerge with the reason."""
    if tuned.pooling != "native":
        raise methods.CannotMerge(
            f"the library's own classifier does not read {tuned.pooling} pooling"
        )
    tuned.method.merge(tuned.classifier.backbone)
