"""A built model with everything a run needs to know about it: stored, loaded, merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipelt_cli import methods
from unipelt_cli.backbones.pretrained import Pretrained
from unipelt_cli.methods.base import Method, count_stored
from unipelt_cli.models.classifier import Classifier


@dataclass(frozen=True)
class TunedModel:
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
    pairs: str = "joint"
    """Whether two texts of a row are read as one (joint) or each by itself (apart)."""
    normalise: bool = False
    """Whether a head over texts read as one reads features of length 1, were there such a head."""
    notes: tuple[str, ...] = ()
    """What its user must know of the backbone before training."""

    @property
    def has_library_head(self) -> bool:
        """Whether the transformers library's own classifier has this model's head."""
        return self.misfit() is None

    def misfit(self, *poolings: str) -> "Misfit | None":
        """Return why no library's head reads what this one does, if one reads these `poolings`.

        The transformers library's own classifier reads native pooling alone, the default.
        """
        poolings = poolings or ("native",)
        reads, remedies = list[str](), list[str]()
        if self.pooling not in poolings:
            reads.append(f"{self.pooling} pooling")
            remedies.append(f"model.pooling={poolings[0]}")
        if self.classifier.head.normalise:
            reads.append("features of length 1")
        if any(self.classifier.apart):
            reads.append("the texts of a pair apart")
        if reads and self.normalise:  # a head over pairs would begin to, read as one
            remedies.append("model.normalise=false")
        if any(self.classifier.apart):
            remedies.append("model.pairs=joint")
        if not reads:
            return None
        return Misfit(" and ".join(reads), " ".join(f"--set {remedy}" for remedy in remedies))

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
        parameters = dict(self.classifier.backbone.named_parameters())
        lent = sum(parameters[name].numel() for name in self.untrained)
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


@dataclass(frozen=True)
class Misfit:
    """Why a library has no head for a model: what it does not read, and flags of `train`."""

    reads: str
    flags: str


def merge(tuned: TunedModel) -> None:
    """Fold the method into the backbone; raises methods.CannotMerge with the reason."""
    if misfit := tuned.misfit():
        raise methods.CannotMerge(f"the library's own classifier does not read {misfit.reads}")
    tuned.method.merge(tuned.classifier.backbone)
