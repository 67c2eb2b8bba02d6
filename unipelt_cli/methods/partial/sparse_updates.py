"""Methods that change few of the backbone's entries, or each only at some steps."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from unipelt_cli.backbones.architectures import BACKBONES
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Losses,
    Method,
    Published,
    Recipe,
    StagePosition,
)
from unipelt_cli.methods.partial.overlay import Deltas, Entries, frozen, squared_gradients, top
from unipelt_cli.methods.partial.selective import Selective

BITS = tuple(1 << bit for bit in range(8))


@dataclass(frozen=True, config=CHECKS)
class Sparse(Method):
    """Base of the methods that store places and deltas: `backbone.sparse`."""

    share: Annotated[
        float, Field(gt=0, le=1, description="share of the backbone's entries that change")
    ] = 0.005

    @property
    def alters_weights(self) -> bool:
        return True

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return sorted int32 places and float32 deltas: an entry is pretrained + delta."""
        return {f"sparse.{name}": t for name, t in sparse(backbone).stored().items()}

    def unfold(self, backbone: nn.Module, stored: Mapping[str, Tensor]) -> None:
        sparse(backbone).load(stored["sparse.entries.places"], stored["sparse.deltas"])

    @property
    def unmergeable(self) -> None:
        return None

    def merge(self, backbone: nn.Module) -> None:
        """Add every delta to its entry, as each forward pass does."""
        sparse(backbone).merge()
        del backbone.sparse


@dataclass(frozen=True, config=CHECKS)
class FishMask(Sparse):
    """Train the entries with the largest Fisher information, fixed before the first step.

    The empirical Fisher of Sung, Nair and Raffel 2021 (arXiv 2111.09839): the square of one
    example's gradient under its true label, in one ranking over all tensors without the head.
    The head counts towards the share, since it trains anyway.
    """

    samples: Annotated[int, Field(ge=1, description="examples that the Fisher is taken over")] = (
        1024
    )

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        parameters = frozen(backbone)
        head = site.head_parameters
        total = sum(p.numel() for p in parameters.values())
        backbone.sparse = Deltas(parameters, max(1, int(self.share * (total + head)) - head))
        sparse(backbone).lay_over(backbone)

    def prepare(self, backbone: nn.Module, losses: Losses) -> None:
        """Choose the entries; a batch of one, since a mean's square is not the mean of squares."""
        parameters, entries = sparse(backbone).own, sparse(backbone).entries
        entries.choose(
            top(squared_gradients(parameters, losses(1, self.samples)), len(entries.places))
        )


@dataclass(frozen=True, config=CHECKS)
class ChildTuningF(Selective):
    """Fine-tune with a new random part of the gradient at each step, g <- g * M / kept.

    Xu et al. 2021 (arXiv 2109.05687). The optimiser's running mean also moves entries that were
    not drawn. The paper masks the head too; here it trains plainly, since it is not the backbone's.
    The authors' code clips the gradient before it masks it, a constant factor that Adam cancels.
    """

    kept: Annotated[
        float, Field(gt=0, le=1, description="chance of an entry's gradient to be kept")
    ] = 0.3

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.requires_grad_(True)

    def after_backward(self, backbone: nn.Module, moment: StagePosition) -> None:
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                kept = torch.empty_like(parameter.grad).bernoulli_(self.kept)
                parameter.grad.mul_(kept.div_(self.kept))


@dataclass(frozen=True, config=CHECKS)
class ChildTuningD(Selective):
    """Fine-tune a fixed part of the layers' entries: those with the largest squared gradient.

    Xu et al. 2021 (arXiv 2109.05687): the mean over batches, with dropout, each tensor's gradient
    clipped to length 1. Embeddings and pooler train in full. Unlike in the authors' code the layers
    do not decay, so that what is masked stays as it was, and masking comes before clipping.
    """

    share: Annotated[
        float, Field(gt=0, le=1, description="share of the layers' entries that train")
    ] = 0.3
    batch_size: Annotated[int, Field(ge=1, description="rows a squared gradient is taken of")] = 16

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        layers = _layers(backbone)
        total = sum(parameter.numel() for parameter in layers.values())
        child = Entries(list(layers.values()), max(1, int(self.share * total)))
        for name, parameter in backbone.named_parameters():
            if name not in layers:
                parameter.requires_grad_(True)
        backbone.child = child

    def prepare(self, backbone: nn.Module, losses: Losses) -> None:
        layers, child = list(_layers(backbone).values()), _child(backbone)
        scores = squared_gradients(layers, losses(self.batch_size, training=True), clip=1.0)
        child.choose(top(scores, len(child.places)))
        for parameter, places in zip(layers, child.split(), strict=True):
            parameter.requires_grad_(len(places) > 0)

    def after_backward(self, backbone: nn.Module, moment: StagePosition) -> None:
        layers = _layers(backbone).values()
        for parameter, places in zip(layers, _child(backbone).split(), strict=True):
            if parameter.grad is not None:
                kept = parameter.grad.flatten()[places]
                parameter.grad.zero_().view(-1)[places] = kept

    def decays(self, name: str) -> bool:
        return not _is_in_layers(name)

    def trainable(self, backbone: nn.Module) -> int:
        layers = _layers(backbone).keys()
        others = (p.numel() for n, p in backbone.named_parameters() if n not in layers)
        return len(_child(backbone).places) + sum(others)

    def fold(self, backbone: nn.Module) -> dict[str, Tensor]:
        """Return embeddings and pooler whole, and of the layers one bit an entry and the values.

        Above one entry in 32 bits are smaller than places.
        """
        layers, child = _layers(backbone), _child(backbone)
        flat = torch.cat([parameter.detach().flatten() for parameter in layers.values()])
        return {
            **{n: p.detach() for n, p in backbone.named_parameters() if n not in layers},
            "child.bits": pack(child.places, child.total),
            "child.values": flat[child.places.long()],
        }

    def unfold(self, backbone: nn.Module, stored: Mapping[str, Tensor]) -> None:
        layers, child = _layers(backbone), _child(backbone)
        child.choose(unpack(stored["child.bits"]))
        split = child.split()
        values = torch.split(stored["child.values"], [len(places) for places in split])
        with torch.no_grad():
            for parameter, places, part in zip(layers.values(), split, values, strict=True):
                parameter.view(-1)[places] = part.to(parameter.device)
        others = {n: t for n, t in stored.items() if n not in ("child.bits", "child.values")}
        super().unfold(backbone, others)

    def merge(self, backbone: nn.Module) -> None:
        del backbone.child


def pack(places: Tensor, total: int) -> Tensor:
    """Return `total` bits, eight a byte, that are set at these places."""
    bits = torch.zeros(-(-total // 8) * 8, dtype=torch.uint8, device=places.device)
    bits[places.long()] = 1
    return (bits.view(-1, 8) * bits.new_tensor(BITS)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Return the places of the bits that are set, int32."""
    bits = packed[:, None] & packed.new_tensor(BITS)
    return bits.flatten().nonzero()[:, 0].int()


def sparse(backbone: nn.Module) -> Deltas:
    """Return what a sparse method added to the backbone."""
    assert isinstance(backbone.sparse, Deltas)
    return backbone.sparse


def _child(backbone: nn.Module) -> Entries:
    assert isinstance(backbone.child, Entries)
    return backbone.child


def _layers(backbone: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in backbone.named_parameters() if _is_in_layers(name)}


def _is_in_layers(name: str) -> bool:
    return any(fnmatchcase(name, f"{layout.layers}.*") for layout in BACKBONES.values())


_CHILD = Published(4e-5, {"epochs": 3, "batch_size": 16, "warmup": 0.1, "weight_decay": 0.01})
METHODS = MappingProxyType(
    {
        "fish-mask": Recipe(
            FishMask(),
            1e-3,
            "partial",
            "the entries with the largest Fisher information",
            "Sung et al. 2021",
            published=Published(5e-5, {"epochs": 7}),
        ),
        "child-tuning-f": Recipe(
            ChildTuningF(),
            1e-4,
            "partial",
            "every tensor, a random part of the gradient at a time",
            "Xu et al. 2021",
            published=_CHILD,
        ),
        "child-tuning-d": Recipe(
            ChildTuningD(),
            1e-4,
            "partial",
            "embeddings and the layers' entries that matter most",
            "Xu et al. 2021",
            published=_CHILD,
        ),
    }
)
