"""The head, and the classifier: a backbone, a pooling, and a head for each task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from unipelt_cli.backbones.dropout import DropoutSource
from unipelt_cli.methods.base import Method
from unipelt_cli.methods.building_blocks import new_linear
from unipelt_cli.models.pairs import features_of_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel
STEEPNESS = 10.0
"""How long a head's weights get that tells features of length 1 apart."""
ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True)
class HeadShape:
    """What a head reads of a row, and how: the layers before its linear unit.

    Over two texts apart there is no dense layer, which no library has there, and the features,
    made of vectors of length 1, keep their own lengths: the cosine is one of them.
    """

    width: int
    activation: str | None
    """Of the dense layer that the library's own classifier has; None for no such layer."""
    normalise: bool
    """Whether the linear unit reads features of length 1."""

    def size(self, outputs: int) -> int:
        """Count the parameters of a head before there is one."""
        dense = (self.width + 1) * self.width if self.activation else 0
        return (self.width + 1) * outputs + dense


class Head(nn.Module):
    """Dropout and a linear unit; `native` adds the dense layer the library's classifier has.

    Dropout stands before the dense layer as well, on every backbone; DistilBERT's and DeBERTa's
    own classifiers have none there, and DistilBERT's own share is 0.2.
    """

    def __init__(
        self, shape: HeadShape, outputs: int, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        width, activation = shape.width, shape.activation
        self.normalise = shape.normalise
        self.dropout = nn.Dropout(dropout)
        self.dense = new_linear(width, width, generator) if activation else None
        self.activation = ACTIVATIONS[activation]() if activation else None
        self.out = new_linear(width, outputs, generator)

    @property
    def rate(self) -> float:
        """What its learning rate is multiplied by: on short features its weights are long."""
        return STEEPNESS if self.normalise else 1.0

    @property
    def width(self) -> int:
        """How many features of a row it reads."""
        return (self.dense or self.out).in_features

    def inputs(self, features: Tensor) -> Tensor:  # (batch, width) -> (batch, inputs of out)
        """Return what the linear unit reads, before its own dropout."""
        if self.dense is not None and self.activation is not None:
            features = self.activation(self.dense(self.dropout(features)))
        return functional.normalize(features, dim=-1) if self.normalise else features

    def forward(self, features: Tensor) -> Tensor:  # (batch, width) -> (batch, outputs)
        logits: Tensor = self.out(self.dropout(self.inputs(features)))
        return logits


class Classifier(nn.Module):
    """A backbone, one way to read a text's features from it, and a head for each task.

    Of tasks that are `apart` a row is two texts, each of which goes through the backbone.
    """

    def __init__(
        self,
        backbone: "PreTrainedModel",
        heads: Sequence[Head],
        method: Method,
        pooling: str,
        reads_pooler: bool,
        draws: DropoutSource,
        apart: Sequence[bool] = (),
    ) -> None:
        super().__init__()
        self.draws = draws
        self.apart = tuple(apart) or (False,) * len(heads)
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
        """Return the logits of the task's head for features (batch, head's inputs)."""
        logits: Tensor = self.heads[self.task](features)
        return logits

    def features(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return what the task's head reads of each row, float32 (batch, head's inputs)."""
        return self.combine(self.pooled(attention_mask, **inputs))

    def combine(self, pooled: Tensor) -> Tensor:
        """Return what the task's head reads of each row, from what was pooled of its texts."""
        return features_of_pairs(pooled) if self.apart[self.task] else pooled

    def pooled(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return the vector of each text, float32 (texts, hidden)."""
        with torch.autocast(
            attention_mask.device.type, self.autocast, enabled=self.autocast is not None
        ):
            output = self.backbone(attention_mask=attention_mask, **inputs)
            return self._pool(output, attention_mask).float()

    def features_of_states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return what the task's head reads, from last hidden states (texts, length, hidden)."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        pooler: Any = getattr(self.backbone, "pooler", None) if self.reads_pooler else None
        if isinstance(pooler, nn.Linear):  # as albert has it
            activation: Any = self.backbone.pooler_activation
            pooled = activation(pooler(hidden[:, 0]))
        else:
            pooled = None if pooler is None else pooler(hidden)
        output = BaseModelOutputWithPooling(hidden, pooled)  # type: ignore[arg-type]
        return self.combine(self._pool(output, mask).float())

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
