"""Methods that train tensors which the backbone already has."""

from collections.abc import Iterator
from dataclasses import field
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import (
    CHECKS,
    AttachContext,
    Method,
    Published,
    Recipe,
    refuse_unusual_layers,
)
from unipelt_cli.methods.building_blocks import train_norms


@dataclass(frozen=True, config=CHECKS)
class Selective(Method):
    """Base of the methods that add nothing: what they train is the backbone's own."""

    @property
    def unmergeable(self) -> None:
        return None


@dataclass(frozen=True, config=CHECKS)
class Full(Selective):
    """Train every tensor of the backbone."""

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        backbone.requires_grad_(True)


@dataclass(frozen=True, config=CHECKS)
class Head(Selective):
    """Train nothing but the head, on features that are computed once, in evaluation mode.

    A frozen backbone whose rows are seen once has no dropout to draw: the head keeps its own.
    """

    @property
    def reads_frozen_features(self) -> bool:
        return True

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        pass


@dataclass(frozen=True, config=CHECKS)
class TopLayers(Selective):
    """Train the last layers and the pooler (Lee, Tang and Lin 2019, arXiv 1911.03090)."""

    layers: Annotated[
        int | None, Field(ge=1, description="how many layers train (a fourth of them if unset)")
    ] = field(default=None)

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)
        layer_count = config.num_hidden_layers
        if self.layers is not None and self.layers > layer_count:
            yield (
                f"method.layers = {self.layers}: it has {layer_count}",
                f"set {layer_count} or less",
            )

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        layers = site.layout.layer_list(backbone)
        count = self.layers or max(1, len(layers) // 4)
        layers[-count:].requires_grad_(True)
        if getattr(backbone, "pooler", None) is not None:
            backbone.get_submodule("pooler").requires_grad_(True)


@dataclass(frozen=True, config=CHECKS)
class LayerNorms(Selective):
    """Train weight and bias of every LayerNorm: two a layer, and the embeddings' one."""

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from refuse_unusual_layers(layout)

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        train_norms(backbone, site.layout)


@dataclass(frozen=True, config=CHECKS)
class BitFit(Selective):
    """Train the biases: all layers', the embedding norm's and the pooler's, by a list of places.

    A search for names with "bias" would also catch what other methods add.
    """

    places: Annotated[
        Literal["all", "query-intermediate"],
        Field(description="every bias, or the queries' and the first feed-forward units' alone"),
    ] = "all"

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        if "bias" in layout.lacks:
            yield layout.lacks["bias"], "choose another method or another backbone"

    def attach(self, backbone: nn.Module, site: AttachContext) -> None:
        for module in self._biased(backbone, site.layout):
            assert isinstance(module.bias, nn.Parameter)
            module.bias.requires_grad_(True)

    def _biased(self, backbone: nn.Module, layout: Layout) -> Iterator[nn.Module]:
        if self.places == "query-intermediate":
            for layer in layout.layer_list(backbone):
                yield layer.get_submodule(layout.query)
                yield layer.get_submodule(layout.intermediate)
            return
        yield from layout.all_biased(backbone)
        if getattr(backbone, "pooler", None) is not None:
            yield backbone.get_submodule(layout.pooler)


_MAO = Published(2e-5, {"epochs": 50, "patience": 10, "batch_size": 16, "warmup": 0.0})
_ZAKEN = Published(1e-3, {"epochs": 16, "batch_size": 8, "warmup": 0.0})
METHODS = MappingProxyType(
    {
        "full": Recipe(
            Full(),
            2e-5,
            "full",
            "every tensor of the backbone",
            "Mao et al. 2022",
            True,
            published=_MAO,
        ),
        "head": Recipe(
            Head(),
            2e-3,
            "partial",
            "nothing but the head",
            "Ben Zaken et al. 2022",
            True,
            published=_ZAKEN,
            settings={
                "model": {"normalise": True, "head_dropout": 0.0},
                "train": {
                    "head_start": "means",
                    "balanced": True,
                    "epochs": 200,
                    "patience": 200,
                    "weight_decay": 0.05,
                },
            },
        ),
        "bitfit": Recipe(
            BitFit(),
            1e-3,
            "partial",
            "the backbone's biases",
            "Ben Zaken et al. 2022",
            True,
            published=_ZAKEN,
        ),
        "top-layers": Recipe(
            TopLayers(),
            3e-4,
            "partial",
            "the last layers and the pooler",
            "Lee et al. 2019",
            published=Published(2e-5),
        ),
        "layernorm": Recipe(
            LayerNorms(),
            1e-3,
            "partial",
            "the backbone's LayerNorms",
            "Liu et al. 2022",
            published=Published(3e-4, optimizer="Adafactor"),
        ),
    }
)
