"""Methods that train tensors which the backbone already has."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from pydantic.dataclasses import dataclass
from torch import nn

from unipelt_cli.backbones import Layout
from unipelt_cli.methods.base import CHECKS, Method, Recipe, Site


@dataclass(frozen=True, config=CHECKS)
class Selective(Method):
    """Base of the methods that add nothing: what they train is the backbone's own."""

    @property
    def unmergeable(self) -> None:
        return None


@dataclass(frozen=True, config=CHECKS)
class Full(Selective):
    """Train every tensor of the backbone."""

    def attach(self, backbone: nn.Module, site: Site) -> None:
        backbone.requires_grad_(True)


@dataclass(frozen=True, config=CHECKS)
class Head(Selective):
    """Train nothing but the head: the floor that every method has to beat."""

    def attach(self, backbone: nn.Module, site: Site) -> None:
        pass


@dataclass(frozen=True, config=CHECKS)
class BitFit(Selective):
    """Train the biases: all layers', the embedding norm's and the pooler's, by a list of places.

    A search for names with "bias" would also catch what other methods add.
    """

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        if "bias" in layout.lacks:
            yield layout.lacks["bias"], "choose another method or another backbone"

    def attach(self, backbone: nn.Module, site: Site) -> None:
        for module in self._biased(backbone, site.layout):
            assert isinstance(module.bias, nn.Parameter)
            module.bias.requires_grad_(True)

    @staticmethod
    def _biased(backbone: nn.Module, layout: Layout) -> Iterator[nn.Module]:
        yield from layout.all_biased(backbone)
        if getattr(backbone, "pooler", None) is not None:
            yield backbone.get_submodule(layout.pooler)


METHODS = MappingProxyType(
    {
        "full": Recipe(Full(), 2e-5, "full", "every tensor of the backbone", "Mao et al. 2022"),
        "head": Recipe(Head(), 1e-3, "partial", "nothing but the head", "Ben Zaken et al. 2022"),
        "bitfit": Recipe(
            BitFit(), 1e-4, "partial", "the backbone's biases", "Ben Zaken et al. 2022"
        ),
    }
)
