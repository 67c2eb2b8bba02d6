"""From an Experiment to a Tuned model: frozen backbone, attached method, pooling and head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unipelt_cli import methods
from unipelt_cli.config import Experiment
from unipelt_cli.errors import BackboneError, ConfigError
from unipelt_cli.methods.base import Method, initialise, new_linear
from unipelt_cli.pretrained import Pretrained, find

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}


class Dropout(nn.Module):
    """Dropout whose mask costs a quarter of the random numbers: 16 bits decide for one element.

    On a CPU the library's own draws one by one and takes a quarter of a training step.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.threshold = p, round(p * 2**16)

    def forward(self, x: Tensor) -> Tensor:  # any shape
        if not self.training or self.threshold == 0:
            return x
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= self.threshold - 2**15).to(x.dtype)
        return x * kept.mul_(2**16 / (2**16 - self.threshold))


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

    def forward(self, features: Tensor) -> Tensor:  # (batch, hidden) -> (batch, outputs)
        if self.dense is not None and self.activation is not None:
            features = self.activation(self.dense(self.dropout(features)))
        logits: Tensor = self.out(self.dropout(features))
        return logits


class Classifier(nn.Module):
    """A backbone, one way to read a row's features from it, and the head."""

    def __init__(
        self, backbone: PreTrainedModel, head: Head, pooling: str, reads_pooler: bool
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.pooling, self.reads_pooler = pooling, reads_pooler
        self.autocast: torch.dtype | None = None

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return float32 logits (batch, outputs) for token ids (batch, length) and their mask."""
        with torch.autocast(
            attention_mask.device.type, self.autocast, enabled=self.autocast is not None
        ):
            output = self.backbone(attention_mask=attention_mask, **inputs)
            features = self._pool(output, attention_mask)
        logits: Tensor = self.head(features.float())
        return logits

    def _pool(self, output: Any, mask: Tensor) -> Tensor:
        if self.reads_pooler:
            pooled: Tensor = output.pooler_output
            return pooled
        hidden: Tensor = output.last_hidden_state
        if self.pooling == "mean":
            weights = mask.to(hidden.dtype)[:, :, None]
            return (hidden * weights).sum(1) / weights.sum(1)
        if self.pooling == "eos":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
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

    def stored(self) -> dict[str, Tensor]:
        """Return what a run stores, by name: the folded method and the head, in float32."""
        folded = self.method.fold(self.classifier.backbone)
        return {
            **{f"backbone.{name}": tensor for name, tensor in folded.items()},
            **{f"head.{name}": tensor.detach() for name, tensor in self._head().items()},
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy stored tensors into a model that was built folded; names were checked before."""
        own = dict(self.classifier.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def parameter_counts(self) -> dict[str, int]:
        """Count what trains, what is stored (both without the head), and the head."""
        backbone = self.classifier.backbone
        trained = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        folded = self.method.fold(backbone)
        lent = sum(trained[name].numel() for name in self.untrained)
        return {
            "trainable_parameters": sum(p.numel() for p in trained.values()) - lent,
            "stored_parameters": sum(t.numel() for t in folded.values()) - lent,
            "head_parameters": sum(p.numel() for p in self._head().values()) + lent,
        }

    def _head(self) -> dict[str, nn.Parameter]:
        return dict(self.classifier.head.named_parameters())


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
        return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
    return "fp32"


def choose_pooling(wanted: str, pretrained: Pretrained, missing: frozenset[str]) -> str:
    """Return the pooling; `auto` follows the backbone's own files, never an untrained pooler."""
    if wanted != "auto":
        return wanted
    said = pretrained.sentence_pooling
    if said is not None:
        return said
    return "cls" if missing else "native"


def build(
    experiment: Experiment,
    outputs: int,
    pretrained: Pretrained | None = None,
    *,
    folded: bool = False,
) -> Tuned:
    """Build the model that an experiment describes, with `outputs` logits a row.

    With `folded` it has the stored form, ready to load. Draws from `train.seed` alone.
    Raises BackboneError or ConfigError for a backbone, device or length that cannot be.
    """
    settings = experiment.model
    pretrained = pretrained or find(settings.backbone)
    device = choose_device(experiment.train.device)
    precision = choose_precision(experiment.train.precision, device)
    attention = pretrained.attention(settings.attention, device.type)
    native = pretrained.layout.native
    wants_pooler = native.pooler and settings.pooling in ("auto", "native")
    backbone, missing = pretrained.load_backbone(attention, pooler=wants_pooler)
    pooling = choose_pooling(settings.pooling, pretrained, missing)
    reads_pooler = native.pooler and pooling == "native"
    if wants_pooler and not reads_pooler:
        missing = frozenset()
        backbone.register_module("pooler", None)
    _check_length(settings.max_length, pretrained, backbone)
    backbone.requires_grad_(False)
    original = list(backbone.parameters())
    generator = torch.Generator().manual_seed(experiment.train.seed)
    experiment.method.attach(backbone, pretrained.layout, generator, folded=folded)
    if missing:
        initialise(cast(nn.Linear, backbone.get_submodule("pooler.dense")), generator)
        backbone.get_submodule("pooler").requires_grad_(True)
    activation = native.activation if pooling == "native" and native.dense else None
    hidden = backbone.config.hidden_size
    head = Head(hidden, outputs, settings.head_dropout, activation, generator)
    classifier = Classifier(backbone, head, pooling, reads_pooler)
    if precision == "bf16":
        _to_bf16(classifier, original)
    if device.type == "cpu":
        _replace_dropout(classifier)
    classifier.to(device)
    tokenizer = pretrained.load_tokenizer()
    return Tuned(
        classifier.eval(),
        tokenizer,
        pretrained,
        experiment.method,
        pooling,
        precision,
        device,
        missing,
    )


def _to_bf16(classifier: Classifier, original: list[nn.Parameter]) -> None:
    """Store a frozen backbone in bf16; one whose own tensors train stays float32 under autocast."""
    if any(parameter.requires_grad for parameter in original):
        classifier.autocast = torch.bfloat16
        return
    for parameter in original:
        parameter.data = parameter.data.to(torch.bfloat16)


def _replace_dropout(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, Dropout(child.p))
        else:
            _replace_dropout(child)


def _check_length(max_length: int, pretrained: Pretrained, backbone: PreTrainedModel) -> None:
    positions = backbone.config.max_position_embeddings - pretrained.layout.position_offset
    if max_length > positions:
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
