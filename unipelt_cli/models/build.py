"""From an Experiment to a tuned model: frozen backbone, attached method, pooling and head."""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from unipelt_cli.backbones.dropout import DropoutSource, replace_dropout
from unipelt_cli.backbones.pretrained import Pretrained, find
from unipelt_cli.backbones.sentence_encoder import Reading
from unipelt_cli.backbones.tokenizer_files import case_note
from unipelt_cli.config.experiment import Experiment
from unipelt_cli.config.sections import ModelSettings
from unipelt_cli.errors import BackboneError
from unipelt_cli.methods.base import AttachContext, Method, count_stored
from unipelt_cli.methods.building_blocks import initialise
from unipelt_cli.models.classifier import Classifier, Head, HeadShape
from unipelt_cli.models.pairs import choose_pairs, notes_of_pairs, width_of_pairs
from unipelt_cli.models.tuned import TunedModel
from unipelt_cli.system import memory
from unipelt_cli.system.devices import choose_device, choose_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMISED = 3  # a gradient and two moments for each number that trains


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
    if (named := pretrained.sentence_reading.pooling) is not None:
        return named
    if layout.native is None:
        return "mean"
    return "cls" if missing else "native"


def build(
    experiment: Experiment,
    outputs: int | Sequence[int],
    pretrained: Pretrained | None = None,
    *,
    folded: bool = False,
    accelerate: bool = True,
    pairs: Sequence[bool] = (),
) -> TunedModel:
    """Build the model that an experiment describes, with `outputs` logits a row (of each task).

    `pairs` says of which tasks a row has two texts: of none unless given.
    With `folded` it has the stored form, ready to load. Draws from `train.seed` alone. Without
    `accelerate` every pass goes through the library's layers, where a tracer can follow it.
    Raises BackboneError or ConfigError for a backbone, device or length that cannot be.
    """
    outputs = (outputs,) if isinstance(outputs, int) else outputs
    pretrained = pretrained or find(experiment.model.backbone)
    device = choose_device(experiment.train.device)
    precision = choose_precision(experiment.train.precision, device)
    method = experiment.method
    refuse(method, experiment.method_name, pretrained)
    read = _read_backbone(experiment.model, pretrained, device)
    backbone, draws = read.module, DropoutSource()
    replace_dropout(backbone, draws)  # before the method puts hooks on it
    backbone.requires_grad_(False)
    original = list(backbone.parameters())
    plain_buffers = frozenset(f"backbone.{name}" for name, _ in backbone.named_buffers())
    generator = torch.Generator().manual_seed(experiment.train.seed)
    if read.untrained:
        _initialise_pooler(backbone, pretrained, generator)
    tokenizer = pretrained.load_tokenizer()
    kind = choose_pairs(experiment.model.pairs, pretrained, read.pooling, has_pairs=any(pairs))
    apart = [kind == "apart" and is_pair for is_pair in pairs or (False,) * len(outputs)]
    hidden, activation = backbone.config.hidden_size, _head_activation(pretrained, read.pooling)
    alone = HeadShape(hidden, activation, experiment.model.normalise)
    over_pairs = HeadShape(width_of_pairs(hidden), None, normalise=False)
    shapes = [over_pairs if is_apart else alone for is_apart in apart]
    size = sum(shape.size(count) for shape, count in zip(shapes, outputs, strict=True))
    site = _site(pretrained, tokenizer, generator, size, folded=folded, tasks=len(outputs))
    _attach(method, backbone, site, device)
    pooled = _pooled_token(pretrained, read.pooling)
    dropout = experiment.model.head_dropout
    heads = [
        Head(shape, count, dropout, generator) for shape, count in zip(shapes, outputs, strict=True)
    ]
    classifier = Classifier(backbone, heads, method, pooled, read.reads_pooler, draws, apart)
    if precision == "bf16":
        _to_bf16(classifier, original, method)
    replace_dropout(classifier, draws)
    classifier.to(device)
    classifier.shares_rows = accelerate and method.accelerate(backbone, site)
    return TunedModel(
        classifier.eval(),
        tokenizer,
        pretrained,
        method,
        read.pooling,
        precision,
        device,
        read.untrained,
        plain_buffers,
        kind,
        experiment.model.normalise,
        (*_notes(read.named or Reading(), tokenizer, pretrained), *notes_of_pairs(kind, apart)),
    )


def _notes(reading: Reading, tokenizer: Any, pretrained: Pretrained) -> Iterator[str]:
    """Yield what a user must know of a backbone before training."""
    case = case_note(tokenizer, pretrained.directory, wants_small=reading.lower_cases)
    yield from filter(None, (reading.note, case))


@dataclass(frozen=True)
class _ReadBackbone:
    """A backbone that was read from its files, and how rows are read from it."""

    module: "PreTrainedModel"
    pooling: str
    reads_pooler: bool
    untrained: frozenset[str]
    """Tensors of the pooler it reads that the checkpoint did not hold."""
    named: Reading | None
    """What its own files say of how rows are read, where that is followed."""


def _read_backbone(
    settings: ModelSettings, pretrained: Pretrained, device: torch.device
) -> _ReadBackbone:
    """Read a backbone that fits into memory, with its pooler if that is what will be read."""
    attention = pretrained.attention(settings.attention, device.type)
    named = pretrained.sentence_reading if settings.pooling == "auto" else None
    has_pooler = pretrained.layout.has_pooler
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
    return _ReadBackbone(backbone, pooling, reads_pooler, missing, named)


def _initialise_pooler(
    backbone: "PreTrainedModel", pretrained: Pretrained, generator: torch.Generator
) -> None:
    """Give a pooler that the checkpoint lacks weights of its own, and let it train."""
    pooler = backbone.get_submodule(pretrained.layout.pooler)
    initialise(cast(nn.Linear, pooler), generator)
    backbone.get_submodule("pooler").requires_grad_(True)


def _head_activation(pretrained: Pretrained, pooling: str) -> str | None:
    """Return the activation of the dense layer that the library's own classifier has, if any."""
    native = pretrained.layout.native
    return native.activation if native and pooling == "native" and native.dense else None


def _pooled_token(pretrained: Pretrained, pooling: str) -> str:
    """Return how the classifier pools: the library's own of some reads the last token."""
    native = pretrained.layout.native
    reads_last = native is not None and native.reads_last and pooling == "native"
    return "eos" if reads_last else pooling


def _site(
    pretrained: Pretrained,
    tokenizer: Any,
    generator: torch.Generator,
    head_parameters: int,
    *,
    folded: bool,
    tasks: int,
) -> AttachContext:
    """Return where a method is attached, and what it may draw from and look at there."""
    return AttachContext(
        pretrained.layout,
        generator,
        folded,
        head_parameters,
        tokenizer.mask_token_id,
        frozenset(tokenizer.all_special_ids),
        pretrained.fingerprint,
        tasks=tasks,
        read=pretrained.read_tensors,
    )


def _attach(
    method: Method, backbone: "PreTrainedModel", site: AttachContext, device: torch.device
) -> None:
    """Attach a method, and make sure that what it trains fits into memory."""
    method.attach(backbone, site)
    if not site.folded:
        numbers = sum(
            parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad
        )
        memory.require(numbers, OPTIMISED, f"training {numbers:,} numbers", device)


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
        site = AttachContext(pretrained.layout, generator, folded, head_parameters, tasks=tasks)
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


def _check_length(max_length: int, pretrained: Pretrained, backbone: "PreTrainedModel") -> None:
    positions = pretrained.layout.positions(backbone.config)
    if positions is not None and max_length > positions:
        raise BackboneError(
            f"model.max_length = {max_length}: the backbone has {positions} positions",
            f"set model.max_length={positions} or less",
        )
