"""Methods that the `adapters` library (1.3.0) computes as their papers do: Compacter, and MAD-X.

Only this module of `methods` imports it, and only inside functions: the import takes seconds.
The library attaches and computes; it draws from the global generator, so that every number is
drawn again from the site's, and it leaves new tensors in float32, so that these methods run under
autocast beside a bf16 backbone. Saving, which it does not do strictly, is ours.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Generator, nn

from unipelt_cli.backbones.layout import Layout
from unipelt_cli.methods.base import CHECKS, AttachContext, Method, Published, Recipe
from unipelt_cli.methods.building_blocks import initialise

KNOWN = frozenset({"bert", "roberta", "xlm-roberta", "electra", "distilbert"})
"""Architectures that the library has and that were tested here."""
GAIN = 2**0.5  # of Glorot's bounds, in the authors' code


@dataclass(frozen=True, config=CHECKS)
class OfLibrary(Method):
    """Base of the methods that the library attaches."""

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        if layout.model_type not in KNOWN:
            yield (
                f"the adapters library does not carry it to a {layout.model_type}",
                f"choose one of {', '.join(sorted(KNOWN))}",
            )

    @property
    def needs_autocast(self) -> bool:
        return True


def add(backbone: Any, configs: Mapping[str, Any], generator: Generator) -> None:
    """Attach the library's modules under their names, every linear unit drawn N(0, 0.02)."""
    import adapters

    backbone_ids = {id(parameter) for parameter in backbone.parameters()}
    # On a skeleton's device, counting costs no numbers: the library copies every linear unit.
    with torch.random.fork_rng(devices=[]), next(backbone.parameters()).device:
        adapters.init(backbone)
        for name, config in configs.items():
            backbone.add_adapter(name, config=config)
    for module in backbone.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in backbone_ids:
            initialise(module, generator)


def activate(backbone: Any, *names: str) -> None:
    """Send the states through these modules, the first one first, in training and out of it."""
    from adapters.composition import Stack

    # `set_active_adapters` would log that none is active yet, on its way to do this
    backbone.adapters_config.active_setup = Stack(*names)


def tensors(backbone: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters that were attached under a name."""
    return {key: p for key, p in backbone.named_parameters() if f".{name}." in f".{key}"}


def bottleneck(reduction: int, **options: Any) -> Any:
    """Return the config of a Pfeiffer adapter, as UniPELT has it."""
    import adapters

    return adapters.SeqBnConfig(reduction_factor=reduction, **options)


@dataclass(frozen=True, config=CHECKS)
class Compacter(OfLibrary):
    """Bottlenecks whose matrices are sums of n Kronecker products A_i (n, n) x s_i t_i^T.

    Mahabadi et al. 2021 (arXiv 2106.04647). The A_i are one set for the whole backbone. The norms
    stay frozen, unlike the paper's. s and t start Glorot-uniform (paper) with gain sqrt 2 (release;
    the library draws normals with gain 1), A_i N(0, 1e-4) as in the release's configs.
    """

    after_attention: Annotated[
        bool, Field(description="also after attention, or after the feed-forward block alone (++)")
    ] = True
    products: Annotated[int, Field(ge=1, le=64, description="Kronecker products in a sum")] = 4
    rank: Annotated[int, Field(ge=1, le=64, description="rank of each product's second factor")] = 1
    reduction: Annotated[
        int, Field(ge=1, description="hidden size over bottleneck, which is rounded up")
    ] = 32
    rule_std: Annotated[float, Field(gt=0, description="std of the A_i at the start")] = 1e-4

    def refusals(self, layout: Layout, config: Any) -> Iterator[tuple[str, str]]:
        yield from super().refusals(layout, config)
        if config.hidden_size % self.products:
            yield (
                f"its hidden size {config.hidden_size} is no multiple of {self.products}",
                "set method.products to a divisor of it",
            )

    def width(self, hidden: int) -> int:
        """Return the bottleneck: a multiple of `products`, so that the products fill it."""
        return -(-max(1, hidden // self.reduction) // self.products) * self.products

    def attach(self, backbone: Any, site: AttachContext) -> None:
        import adapters

        hidden = backbone.config.hidden_size
        config = adapters.CompacterConfig(
            mh_adapter=self.after_attention,
            phm_dim=self.products,
            phm_rank=self.rank,
            # the library takes the floor of the quotient, which a half keeps off the edge
            reduction_factor=hidden / (self.width(hidden) + 0.5),
        )
        add(backbone, {"compacter": config}, site.generator)
        activate(backbone, "compacter")
        for name, parameter in tensors(backbone, "compacter").items():
            if name.endswith(("W_left", "W_right")):
                for factor in parameter.data:
                    nn.init.xavier_uniform_(factor, GAIN, site.generator)
            elif name.endswith("phm_rule"):
                nn.init.normal_(parameter, 0.0, self.rule_std, generator=site.generator)

    def decays(self, name: str) -> bool:
        return not name.endswith("phm_rule")


_SOURCE = "Mahabadi et al. 2021"
METHODS = MappingProxyType(
    {
        "compacter": Recipe(
            Compacter(),
            3e-3,
            "additive",
            "bottlenecks made of Kronecker products, two a layer",
            _SOURCE,
            published=Published(3e-3, {"epochs": 20, "batch_size": 100}),
        ),
        "compacter-plus-plus": Recipe(
            Compacter(after_attention=False),
            3e-3,
            "additive",
            "bottlenecks made of Kronecker products, one a layer",
            _SOURCE,
            published=Published(3e-3, {"epochs": 20, "batch_size": 100}),
        ),
    }
)
